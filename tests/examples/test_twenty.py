"""The molecules of ``twenty.py``, and its queue of runs and tables."""

import json
import sys
from unittest.mock import ANY

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.systems.files import load_molecule
from tests.support.examples import EXAMPLES, load_example

load_example("benchmarks/cases.py")
twenty = load_example("benchmarks/twenty.py")
make_molecules = load_example("benchmarks/molecules/make_molecules.py")

OBC2 = ["amber14-all.xml", "implicit/obc2.xml"]


def energy_and_forces(molecule):
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(molecule.positions)
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True)
    return state.getPotentialEnergy()._value, forces._value


def load(name, force_field=OBC2):
    folder = EXAMPLES / "benchmarks/molecules"
    if name in twenty.WITH_SYSTEM:
        return load_molecule(folder / f"{name}.pdb", folder / f"{name}.xml")
    return load_molecule(folder / f"{name}.pdb", None, force_field)


def check(name):
    """Load a molecule, look at its conformation and at the round trip of its coordinates."""
    molecule = load(name)
    if name not in twenty.WITH_SYSTEM:
        make_molecules.check_conformation(name, molecule.topology, molecule.positions)
    _, forces = energy_and_forces(molecule)
    assert np.abs(forces).max() < 3000, "near a minimum: 3 decimals in the file"
    coordinates = InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    x = torch.tensor(molecule.positions)[None]
    u, log_det = coordinates.inverse_and_log_det(x)
    back, log_det_back = coordinates.forward_and_log_det(u)
    assert float((coordinates.place(u, like=x) - x).abs().max()) < 1e-10
    assert u.shape == (1, 3 * molecule.n_atoms - 6)
    assert back.shape == x.shape
    assert float((log_det + log_det_back).abs()) < 1e-8


@pytest.mark.parametrize("name", ["ace_pro_nme", "ace_thr_nme", "toluene"])
def test_molecule(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", twenty.NAMES)
def test_every_molecule(name):
    check(name)


def test_which_molecules_there_are():
    assert len(set(twenty.CAPPED)) == 20
    assert set(twenty.NAMES) >= {*twenty.CAPPED, *twenty.REFERENCES}
    files = {path.stem for path in (EXAMPLES / "benchmarks/molecules").glob("*.pdb")}
    assert files == set(twenty.NAMES)


@pytest.mark.parametrize(
    ("residue", "change"), [("ALA", ("HA", "CB")), ("THR", ("OG1", "CG2")), ("ILE", ("CG1", "CG2"))]
)
def test_inverted_centres_are_seen(residue, change):
    molecule = load(f"ace_{residue.lower()}_nme")
    index = {a.name: a.index for a in molecule.topology.atoms() if a.residue.index == 1}
    x = np.array(molecule.positions)
    first, second = (index[name] for name in change)
    x[[first, second]] = x[[second, first]]
    with pytest.raises(ValueError, match="is inverted"):
        make_molecules.check_conformation("test", molecule.topology, x)


def test_same_model_as_a_faster_force():
    for name in ("ace_asp_nme", "ace_met_nme"):
        expected, forces = energy_and_forces(load(name))
        energy, other = energy_and_forces(load(name, list(twenty.FORCE_FIELD)))
        assert energy == pytest.approx(expected, rel=1e-4)
        np.testing.assert_allclose(other, forces, atol=0.1)


def test_the_faster_force_has_no_cutoff():
    pdb = app.PDBFile(str(EXAMPLES / "benchmarks/molecules/ace_ala_nme.pdb"))
    force_field = app.ForceField(*twenty.FORCE_FIELD)
    with pytest.raises(ValueError, match="expected NoCutoff, got CutoffNonPeriodic"):
        force_field.createSystem(
            pdb.topology, nonbondedMethod=app.CutoffNonPeriodic, nonbondedCutoff=2 * unit.nanometer
        )
    with pytest.raises(ValueError, match="expected no option of the solvent"):
        force_field.createSystem(pdb.topology, soluteDielectric=2.0)


def test_queue_goes_on_where_it_was(tmp_path):
    """A command that fails is tried again, one that succeeded is not; times are added up."""
    queue = twenty.Queue(tmp_path)
    script = (
        "import pathlib, sys; p = pathlib.Path({!r}); s = not p.exists(); p.touch(); sys.exit(s)"
    )
    command = [sys.executable, "-c", script.format(str(tmp_path / "mark"))]
    assert queue.call("toluene", command) == 1
    first = json.loads((tmp_path / "state.json").read_text())["toluene"]
    again = twenty.Queue(tmp_path)
    assert again.call("toluene", command) == 0
    entry = json.loads((tmp_path / "state.json").read_text())["toluene"]
    assert entry["status"] == 0
    assert entry["wall_seconds"] > first["wall_seconds"] > 0
    again.run("toluene", None)  # it has finished: nothing of the arguments is looked at
    assert (tmp_path / "toluene.log").read_text().count("$ ") == 2


def test_rows_of_another_folder_are_kept(tmp_path):
    """But not those of molecules that this folder has begun."""
    committed = json.loads((EXAMPLES / "results/twenty.json").read_text())["rows"][:3]
    output = tmp_path / "twenty.json"
    output.write_text(json.dumps({"rows": committed, "failed": {}}))
    queue = twenty.Queue(tmp_path)
    queue.call(committed[1]["molecule"], [sys.executable, "-c", "import sys; sys.exit(3)"])
    twenty.collect(queue, output, 10)
    written = json.loads(output.read_text())
    assert written["rows"] == [committed[0], committed[2]]
    assert written["failed"] == {committed[1]["molecule"]: {"status": 3, "log": ANY}}
    assert (tmp_path / "twenty.md").exists()


def test_tables_have_failures_and_what_is_not_known():
    row = {
        "molecule": "toluene", "n_atoms": 15, "cpu_minutes": 5.0,
        "minutes": {"md": 1.0, "training": 2.0, "sampling": 0.5, "compilation": 0.3},
        "energy_evaluations": {"md": 3000000, "training": None, "sampling": 10},
        "independence": {"300.00": 0.5, "600.00": None}, "swap_steered": [0.25],
        "reverse_ess": {"300.00": 0.125},
        "basins": {"torsions": [], "in_training_frames": 0, "visited_at": {"300.00": 0}},
        "statuses": {"converged": 4, "wrong": 0}, "verdict": {"sentence": "converged"},
        "notes": ["the peptide bond is trans"],
        "reference": {
            "iterations": 500, "n_called_converged": 3, "n_numbers": 6, "largest_z_of_these": 1.26,
            "largest_z_of_others": None, "wrong_and_called_converged": [],
        },
    }  # fmt: skip
    text = twenty.tables([row], {"ace_gly_nme": {"status": 2, "log": "error: no"}})
    assert "| toluene | 15 | 3.5 (5.0) | 3e+06 | 0.50 - | 0.25 | 0.12 |" in text
    assert "exit status 2: error: no |\n\ntoluene: the peptide bond is trans\n\n|" in text
    assert "| toluene | 500 | 3 of 6 | 1.3 |  | none |" in text
