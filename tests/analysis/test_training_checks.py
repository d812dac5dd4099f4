"""Warnings about training frames: runs with one fault of their frames each."""

import json

import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.basins import TrainingBasins
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.io.topology import write_structure
from openmm_tsf.systems.slow_torsions import slow_torsions
from tests.support.fabricate import two_state_chains, write_run
from tests.support.molecules import alanine, capped

LADDER = [300.0, 600.0]
SHAPE = (400, 8, 2)
RARE = "phi > 0, psi beta"


def angles_of(rng, shape, p=0.1, rare=True, rho=0.5):
    """φ and ψ of chains with memory; without the rare basin, ψ stays in alpha where φ > 0."""
    positive = two_state_chains(rng, shape, p, rho)
    alpha = two_state_chains(rng, shape, 0.4, rho)
    alpha |= positive & (not rare)
    phi = np.where(positive, 1.0, -1.5) + 0.2 * rng.normal(size=shape)
    psi = np.where(alpha, -0.3, 2.6) + 0.2 * rng.normal(size=shape)
    return {"phi": phi, "psi": np.remainder(psi + np.pi, 2 * np.pi) - np.pi}


def frames_of(rng, kelvin=600.0, **options):
    return TrainingBasins.measure(angles_of(rng, (5000,), **options), kelvin)


def make_run(path, angles, frames, **of_frames):
    shape = angles["phi"].shape
    energy = np.random.default_rng(9).normal(np.array(LADDER) / 10, 8.0, shape)
    choices = {"basins": None if frames is None else frames.to_config(), "frames": of_frames}
    return load_run(write_run(path, LADDER, energy, angles, choices=choices))


def test_frames_like_the_run(tmp_path):
    rng = np.random.default_rng(1)
    run = make_run(tmp_path / "run", angles_of(rng, SHAPE), frames_of(rng))
    result = monitor(run)
    assert result["warnings"] == []
    hot = result["basins"][RARE]["600.00"]
    assert hot["expected_from"] == "the training frames"
    assert abs(hot["expected_p"] - 0.06) < 4 * hot["expected_stderr"]
    cold = result["basins"][RARE]["300.00"]
    assert cold["expected_from"] in (None, "the other rungs (MBAR)")


def test_a_basin_of_the_frames_that_the_run_never_visits(tmp_path):
    """Also where the frames are of no rung's temperature."""
    rng = np.random.default_rng(2)
    for kelvin in (600.0, 500.0):
        angles = angles_of(rng, SHAPE, rare=False)
        run = make_run(tmp_path / f"run{kelvin}", angles, frames_of(rng, kelvin))
        result = monitor(run)
        words = f"all rungs: the basin {RARE} was never visited; it has 0.0"
        (warning,) = [w for w in result["warnings"] if w.startswith(words)]
        assert warning.endswith(f"of the training frames at {kelvin:.2f} K: the basin is lost")
        at_rung = [w for w in result["warnings"] if w.startswith(f"600.00 K: the basin {RARE}")]
        assert len(at_rung) == (kelvin == 600.0)
        cold = result["basins"][RARE]["300.00"]
        assert cold["p"] == 0
        assert 1e-4 < cold["high"] < 0.02


def test_a_well_that_the_frames_lack(tmp_path):
    rng = np.random.default_rng(3)
    run = make_run(tmp_path / "run", angles_of(rng, SHAPE), frames_of(rng, p=0.0))
    assert {RARE, "phi < 0, psi alpha"} <= set(run.basins.names)
    (warning,) = monitor(run)["warnings"]
    assert warning.startswith("training frames: none has phi > 0, where up to 0.1")


def test_frames_that_hardly_ever_change_basin(tmp_path):
    """One crossing from phi > 0 to phi < 0: half of the frames rest on one visit."""
    rng = np.random.default_rng(4)
    angles = angles_of(rng, (4000,), p=0.0)
    angles["phi"][:1000] = np.abs(angles["phi"][:1000])
    frames = TrainingBasins.measure(angles, 600.0)
    warnings = monitor(make_run(tmp_path / "run", angles_of(rng, SHAPE), frames))["warnings"]
    few = [w for w in warnings if w.startswith("training frames: ") and "only" in w]
    assert {w.split(" are in the basin ")[1].split(", from")[0] for w in few} == set(
        frames.populations
    )


@pytest.mark.parametrize(
    ("residue", "stuck"), [("TRP", "phi, psi, chi1"), ("PRO", "psi"), ("GLY", "phi, psi")]
)
def test_frames_that_never_leave_one_well(tmp_path, residue, stuck):
    """A proline's phi has one well only; a free rotor (chi2) has none to leave."""
    topology, positions = capped(residue)
    torsions = slow_torsions(topology)
    rng = np.random.default_rng(6)

    def draw(shape):
        angles = {name: -1.2 + 0.2 * rng.normal(size=shape) for name in torsions}
        return angles | {
            name: rng.uniform(-np.pi, np.pi, shape) for name in torsions if name == "chi2"
        }

    frames = TrainingBasins.measure(draw(2000), 600.0)
    run = make_run(tmp_path / "run", draw(SHAPE), frames)
    put_structure(run.path, topology, positions)
    run = load_run(run.path)
    assert run.basins.names == ()
    (warning,) = monitor(run)["warnings"]
    assert warning.startswith(f"training frames: {stuck} never left one well, nor did the run")


def put_structure(folder, topology, positions):
    """Make a run one of a molecule."""
    write_structure(topology, positions, folder)
    config = json.loads((folder / "config.json").read_text())
    config["dihedrals"] = slow_torsions(topology)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "mirrored", "sign", "expected"),
    [
        ("ALA", False, 1, "L-amino acids"),
        ("ALA", False, -1, None),
        ("ALA", True, -1, "D-amino acids"),
        ("ALA", True, 1, None),
        ("GLY", False, 1, None),
    ],
)
def test_an_amino_acid_on_the_wrong_side_of_phi(tmp_path, name, mirrored, sign, expected):
    """Frames and run never leave it: no other statistic sees that."""
    topology, positions = alanine() if name == "ALA" else capped(name)
    x = -positions if mirrored else positions
    rng = np.random.default_rng(5)
    phi = sign * (1.0 + 0.1 * rng.normal(size=(50, 4, 2)))
    frames = TrainingBasins.measure({"phi": np.full(500, sign * 1.0), "psi": np.zeros(500)}, 600.0)
    for known in (None, frames):
        folder = tmp_path / f"run{known is None}"
        energy = rng.normal(size=phi.shape)
        write_run(
            folder, LADDER, energy, {"phi": phi, "psi": rng.normal(size=phi.shape)},
            choices={"basins": None if known is None else known.to_config()},
        )  # fmt: skip
        put_structure(folder, topology, x)
        warnings = [w for w in monitor(load_run(folder))["warnings"] if "amino acids" in w]
        assert len(warnings) == (expected is not None)
        if expected:
            assert expected in warnings[0]
            assert warnings[0].startswith("samples" if known is None else "training frames")


def test_what_was_said_of_the_frames_at_the_start(tmp_path):
    """Wells with few visits, which the basins do not tell."""
    rng = np.random.default_rng(1)
    said = "phi > 0 was visited 2 times only, in 0.15 of 2,000 frames\x1b[2J"
    run = make_run(tmp_path / "run", angles_of(rng, SHAPE), frames_of(rng), warnings=[said])
    (warning,) = monitor(run)["warnings"]
    assert warning == f"training frames: {said[:-4]}?[2J"
    for number, wrong in enumerate(("text", [3], {"a": 1})):
        path = tmp_path / str(number)
        run = make_run(path, angles_of(rng, SHAPE), frames_of(rng), warnings=wrong)
        with pytest.raises(ValueError, match="damaged, frames: expected a list of warnings"):
            monitor(run)
