import matplotlib.image
import numpy as np
import pytest
from matplotlib.text import Text

from openmm_tsf.analysis import load_run, plot_diagnostics, plot_ramachandran
from openmm_tsf.analysis.plots import diagnostics
from openmm_tsf.analysis.plots import ramachandran as plots
from tests.support.analysis_runs import angles_of_two_basins, make_reference
from tests.support.fabricate import write_run

RUNGS = [300.0, 600.0]


def make_run(path, temperatures=RUNGS, n=40, n_walkers=6, p=0.1, **options):
    rng = np.random.default_rng(1)
    shape = (n, n_walkers, len(temperatures))
    phi, psi = angles_of_two_basins(rng, shape, p)
    replica = np.argsort(rng.random(shape), axis=2)
    energy, angles = rng.normal(size=shape), {"phi": phi, "psi": psi}
    return load_run(write_run(path, temperatures, energy, angles, replica=replica, **options))


def reference_at(temperatures):
    return make_reference(np.random.default_rng(2), 500, temperatures)


def check_image(path):
    """A picture with something in it."""
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 400
    assert pixels.shape[1] > 800
    assert 0.1 < np.mean(pixels[..., :3].min(axis=2) > 0.99) < 0.99


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, [300.0, 400.0]),  # a reference that lacks a rung
        ({"p": 0.0}, None),  # never in the basin, and its configuration names no reference
        ({"temperatures": [300.0], "n": 1, "n_walkers": 1}, [300.0]),
        ({"temperatures": [300.0], "n": 30, "n_walkers": 1}, [300.0]),
    ],
)
def test_figures(tmp_path, options, at):
    run = make_run(tmp_path / "run", **options)
    run.plot(tmp_path / "a.png", None if at is None else reference_at(at))
    plot_diagnostics(run, tmp_path / "b.png")
    check_image(tmp_path / "a.png")
    check_image(tmp_path / "b.png")


def test_diagnostics_with_swaps_of_any_pair(tmp_path):
    kernels = {"local": 3, "swap_plain": 2, "swap_steered": (3, 3)}
    run = make_run(tmp_path / "run", [300.0, 400.0, 500.0], kernels=kernels)
    assert run.acceptance()["swap_steered"].shape == (3, 3)
    plot_diagnostics(run, tmp_path / "b.png")
    check_image(tmp_path / "b.png")


def test_several_residues(tmp_path):
    rng = np.random.default_rng(4)
    shape = (20, 3, 2)
    names = ("psi1", "phi2", "phi3", "psi3", "phi4", "psi4")
    angles_of = {name: rng.uniform(-np.pi, np.pi, shape) for name in names}
    run = load_run(write_run(tmp_path / "run", RUNGS, rng.normal(size=shape), angles_of))
    assert run.backbone() == ("phi3", "psi3")  # the first that has both
    for name, angles in zip(("phi4", "psi4"), run.ramachandran(300, residue=4), strict=True):
        np.testing.assert_allclose(angles, angles_of[name][:, :, 0].ravel(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"residue: expected one of \[3, 4\].* got 2"):
        run.ramachandran(300, residue=2)
    run.plot(tmp_path / "a.png", residue=4)
    check_image(tmp_path / "a.png")
    plot_diagnostics(run, tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"got 'phi'"):
        run.plot(tmp_path / "c.png", reference_at(RUNGS))


def test_a_single_pair_has_no_number(tmp_path):
    run = make_run(tmp_path / "run", n=2)
    assert run.backbone() == ("phi", "psi")
    with pytest.raises(ValueError, match="residue: this run has a single pair, phi and psi, got 2"):
        run.ramachandran(300, residue=2)


def test_figures_say_what_is_not_known(tmp_path, monkeypatch):
    drawn = []
    for module in (plots, diagnostics):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.append(figure))
    run = make_run(tmp_path / "run", p=0.0)
    plot_ramachandran(run, tmp_path / "a.png", reference_at(RUNGS))
    plot_diagnostics(run, tmp_path / "b.png")
    ramachandran, diagnostic = (
        [text.get_text() for text in figure.findobj(Text)] for figure in drawn
    )
    words = "\n".join(ramachandran)
    for expected in ("z not known", "p not known", "K: not known", "error not known"):
        assert expected in words
    assert not any(word in words for word in ("nan", "inf", "unknown"))
    assert {"run mean", "reference mean"} <= set(ramachandran)
    assert "never visited" in diagnostic
    assert diagnostic.count("300 K") == 1  # the energies' legend; P(phi > 0) has drawn no rung


def test_a_run_without_angles(tmp_path):
    energy = np.random.default_rng(3).normal(size=(20, 2, 2))
    run = load_run(write_run(tmp_path / "run", [1.0, 2.0], energy))
    with pytest.raises(ValueError, match=r"this one recorded \[\]"):
        plot_ramachandran(run, tmp_path / "a.png")
    plot_diagnostics(run, tmp_path / "b.png")
    check_image(tmp_path / "b.png")
