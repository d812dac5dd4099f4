"""Figure 3: from arrays, its caption and tables, and the one command on a small run."""

import csv
import sys
from itertools import product

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.text import Text

from openmm_tsf.analysis import Reference, load_run
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from tests.support.analysis_runs import sample_basins
from tests.support.examples import load_example
from tests.support.fabricate import write_run

TEMPERATURES, ENERGIES = [300.0, 450.0, 600.0], (-60.0, -20.0, 20.0)

molecule_drawing = load_example("paper/molecule_drawing.py")
panels = load_example("paper/figure3_panels.py")
tables = load_example("paper/figure3_tables.py")


def draws_of(rng, n, energy, n_drawn):
    return panels.FlowDraws(*sample_basins(rng, n, energy), n_drawn, 0.2, 0.05, 0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory, molecule):
    import openmm.app as app

    path = tmp_path_factory.mktemp("figure3") / "run"
    phi, psi, energy = sample_basins(np.random.default_rng(1), (40, 6, 3), ENERGIES)
    choices = {
        "flow": {"reference_temperature_K": 600.0},
        "settings": {"n_rounds": 2},
        "kernels": [{"name": "flow_walk", "repeats": 4, "interval": 1}],
        "sigma": {"flow_walk": [0.1, 0.2, 0.3]},
    }
    write_run(
        path, TEMPERATURES, energy, {"phi": phi, "psi": psi}, choices=choices,
        energy_evaluations={"md": 7}, wall_seconds={"md": None},
    )  # fmt: skip
    with open(path / "topology.pdb", "w") as file:
        app.PDBFile.writeFile(molecule.topology, 10.0 * molecule.positions, file)
    run = load_run(path)
    run.dihedral_atoms = dict(molecule.dihedrals)
    return run


@pytest.fixture(scope="module")
def reference():
    samples = sample_basins(np.random.default_rng(2), (500, 3), ENERGIES)
    return Reference(TEMPERATURES, *samples, 2.0)


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(3)
    return {300.0: draws_of(rng, 380, -60.0, 400), 600.0: draws_of(rng, 400, 20.0, 400)}


def shown(figure):
    """Texts that are drawn, and their boxes; ticks beyond an axis' limits are not."""
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for axis in (a for axes in figure.axes for a in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t not in hidden]


def overlapping(figure):
    """Pairs of texts whose boxes overlap."""
    boxes = [(words, box) for words, box in shown(figure) if box.width > 0]
    return [(a[0], b[0]) for i, a in enumerate(boxes) for b in boxes[:i] if a[1].overlaps(b[1])]


@pytest.mark.parametrize("with_reference", [True, False])
def test_the_figure(tmp_path, monkeypatch, run, draws, reference, with_reference):
    monkeypatch.setattr(panels, "DPI", 100)
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))
    )
    known = reference if with_reference else None
    panels.plot_figure3(run, draws, tmp_path / "a.png", known, tables.caption(run, draws, known))
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[1] == pytest.approx(7.2 * 100, abs=2)
    (figure,) = drawn
    assert overlapping(figure) == []
    for _, box in shown(figure):  # nothing hangs over the edge
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height
    words = [text.get_text() for text in figure.findobj(Text)]
    assert set("ABCDEFGH") <= set(words)
    assert {"φ", "ψ", panels.FLOW, panels.SAMPLER} <= set(words)
    assert (panels.REFERENCE in words) == with_reference
    images = [image for axis in figure.axes for image in axis.get_images()]
    assert len({image.norm.vmax for image in images}) == 1
    logarithmic = [axis.get_ylim() for axis in figure.axes if axis.get_yscale() == "log"]
    assert logarithmic == logarithmic[:1] * 2


def test_caption_and_tables(tmp_path, run, draws, reference):
    text = tables.caption(run, draws, reference)
    for expected in (
        "400 and 400 independent draws at 600 and 300 K", "none and 5 %", "2 rounds",
        "6 walkers on rungs of 300, 450, 600 K", "4 flow_walk", "40 saved iterations",
        "240 correlated frames", "500 frames 2 ps apart", "reference temperature 600 K",
    ):  # fmt: skip
        assert expected in text
    assert "nan" not in text
    assert max(map(len, panels.wrapped(text))) <= 146
    assert "B, F: TSF-MCMC" in tables.caption(run, draws)

    rows = tables.temperature_table(run, draws, reference)
    sources = (panels.FLOW, panels.SAMPLER, panels.REFERENCE)
    expected = list(product((300.0, 600.0), sources))
    assert [(row["temperature_K"], row["source"]) for row in rows] == expected
    first = rows[0]["outside_domain"], rows[0]["p_phi_positive"], rows[1]["n_samples"]
    assert first == pytest.approx((0.05, np.mean(draws[300.0].phi > 0), 240))
    ladder = tables.ladder_table(run)
    assert [row["sigma flow_walk"] for row in ladder] == [0.1, 0.2, 0.3]
    assert ladder[0]["accepted flow_walk"] == pytest.approx(0.3)
    assert "accepted swap_plain with the next rung" not in ladder[2]
    quantities = [(row["quantity"], row["value"]) for row in tables.run_table(run)]
    assert {("frames per rung", 240), ("energy evaluations, md", 7)} <= set(quantities)

    tables.write_csv(tmp_path / "a.csv", ladder)
    with open(tmp_path / "a.csv", newline="") as file:
        back = list(csv.DictReader(file))
    assert [float(row["sigma flow_walk"]) for row in back] == [0.1, 0.2, 0.3]
    counts = [line.count("|") for line in tables.markdown(ladder).splitlines()]
    assert counts == counts[:1] * 5


def test_histogram_and_its_error():
    """Independent draws: p (1 - p) / n of every bin."""
    values = np.random.default_rng(4).uniform(0, 4, (5000, 30))
    density, error = panels.histogram(values, np.linspace(0, 4, 5))
    exact = np.sqrt(0.25 * 0.75 / values.size)
    np.testing.assert_allclose(density, 0.25, atol=4 * exact)
    np.testing.assert_allclose(error, exact, rtol=4 / np.sqrt(2 * 29))
    assert np.isnan(panels.histogram(values[:1, :1], np.linspace(0, 4, 5))[1]).all()


def test_wrong_arguments_are_refused(run, draws, reference):
    arrays = (reference.phi, reference.psi, reference.energy)
    other = Reference([300.0], *(values[:, :, :1] for values in arrays), 1.0)
    for temperatures, known, words in (
        ({300.0: draws[300.0]}, None, "draws: expected two temperatures"),
        ({300.0: draws[300.0], 500.0: draws[600.0]}, None, "temperature: this run has rungs"),
        (draws, other, "reference: expected a rung at 600"),
    ):
        with pytest.raises(ValueError, match=words):
            panels.series_of(run, temperatures, known)
    good = np.zeros(3)
    for psi, energy, n_drawn, words in (
        (good[:2], good, 3, "psi: expected shape"),
        (good, good + np.inf, 3, "energy: expected finite"),
        (good, good, 2, "n_drawn: expected at least 3, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            panels.FlowDraws(good, psi, energy, n_drawn, 0.1, 0.1, 0.1)


def test_the_molecule_is_drawn_as_it_is(molecule):
    axis, topology, x = Figure().add_subplot(), molecule.mdtraj_topology, molecule.positions
    molecule_drawing.draw_molecule(axis, topology, x, {"φ": [4, 6, 8, 14]})
    balls = [patch for patch in axis.patches if isinstance(patch, Circle) and patch.get_linewidth()]
    assert len(balls) == molecule.n_atoms
    with pytest.raises(ValueError, match=r"positions: expected shape \(22, 3\)"):
        molecule_drawing.draw_molecule(axis, topology, x[:5], {})


def test_the_view_is_no_mirror_image(molecule):
    """Left-handed alanine stays left-handed in the drawing."""
    x = np.asarray(molecule.positions)
    view = molecule_drawing.project(x, np.full(22, 0.04), np.ones(22, dtype=bool))

    def volume(x):
        return np.linalg.det(x[[6, 14, 10]] - x[8])

    assert volume(view) == pytest.approx(volume(x))


def test_a_run_of_one_rung_is_refused(tmp_path, monkeypatch, capsys):
    phi, psi, energy = sample_basins(np.random.default_rng(6), (5, 2, 1), -60.0)
    write_run(tmp_path / "run", [300.0], energy, {"phi": phi, "psi": psi})
    monkeypatch.setattr(sys, "argv", ["figure3.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        load_example("paper/figure3.py").main()
    assert "run: expected at least two rungs, got one at 300.00 K" in capsys.readouterr().err


def test_one_command(tmp_path, monkeypatch, molecule, capsys):
    """Draws, scan, figure and tables from a run directory with an untrained flow."""
    dataset = MDDataset.shipped(molecule, stride=40)
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,), seed=1)
    with (
        molecule.potential(platform="Reference", n_contexts=1) as potential,
        ParallelTempering(molecule, flow, [300, 600], 4, potential=potential, seed=2) as sampler,
    ):
        sampler.set_positions(dataset.positions[::125][:8].reshape(4, 2, -1, 3))
        sampler.run(12, tmp_path / "run", progress=False)
    written = load_run(tmp_path / "run").config["choices"]["flow"]["sha256"]
    assert load_example("benchmarks/seeds.py").digest_of(tmp_path / "run") == written
    monkeypatch.setattr(panels, "DPI", 100)
    monkeypatch.setattr(
        sys, "argv",
        ["figure3.py", str(tmp_path / "run"), "--output", str(tmp_path / "f.png"), "--draws",
         "200", "--scan-walkers", "16", "--scan-steps", "4", "--sigmas", "0.001", "0.5"],
    )  # fmt: skip
    load_example("paper/figure3.py").main()
    names = {path.name for path in tmp_path.iterdir()} - {"run"}
    tables = ("temperatures", "ladder", "sigma", "run")
    assert names == {"f.png", "f.md", *(f"f_{table}.csv" for table in tables)}
    text = (tmp_path / "f.md").read_text()
    assert "200 and 200 independent draws" in text
    assert text.strip() == capsys.readouterr().out.strip()
    with open(tmp_path / "f_sigma.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["n_proposals"] for row in rows] == ["64"] * 4
    rates = [float(row["acceptance"]) for row in rows]
    assert rates[0] > 0.9  # a step of almost nothing
    assert rates[1] < 0.1
    assert rates[2] > 0.9
    assert torch.get_default_dtype() == torch.float32
