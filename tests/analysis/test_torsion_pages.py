"""Reports of molecules with several residues, with side chains, and without any phi."""

import mdtraj
import numpy as np
import pytest

from openmm_tsf.analysis import analyze as analysis
from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.plots.torsions import plot_torsions, torsions_by_residue
from openmm_tsf.analysis.report import describe
from openmm_tsf.io.files import read_json
from tests.support.fabricate import chain_positions, write_frames, write_run
from tests.support.peptides import ALANINE, CAPS, strand, topology_of

RUNGS = [300.0, 400.0, 600.0]
SHAPE = (40, 6, 3)


def three_wells(rng, shape=SHAPE):
    return np.radians(rng.choice([-60, 60, 180], shape)) + 0.2 * rng.normal(size=shape)


def write(path, names, rng, **options):
    energy = rng.normal(np.array(RUNGS) / 10, 8.0, SHAPE)
    return write_run(path, RUNGS, energy, {name: three_wells(rng) for name in names}, **options)


@pytest.fixture
def no_other_plots(monkeypatch):
    """Figures that do not depend on the torsions take seconds, and are tested elsewhere."""
    monkeypatch.setattr(analysis, "plot_diagnostics", lambda run, path: None)
    monkeypatch.setattr(analysis, "write_thermodynamics", lambda run, folder, reference: {})


def test_each_residue_has_a_page(tmp_path, no_other_plots, monkeypatch):
    residues = [("ACE", CAPS["ACE"]), ("ALA", ALANINE), ("ALA", ALANINE), ("NME", CAPS["NME"])]
    topology = mdtraj.Topology.from_openmm(topology_of(residues, strand(0, 3)))
    names = ("phi2", "phi3", "psi2", "psi3", "chi1_2", "C-N_4")
    rng = np.random.default_rng(1)
    path = write(tmp_path / "run", names, rng)
    write_frames(path, RUNGS, rng.normal(size=(*SHAPE, topology.n_atoms, 3)), topology)
    drawn = {}
    monkeypatch.setattr(
        analysis, "plot_torsions", lambda run, path, names: drawn.update({path.name: names})
    )
    summary = analyze(path, tmp_path / "out")
    expected = {
        "torsions_2.png": ("phi2", "psi2", "chi1_2"),
        "torsions_3.png": ("phi3", "psi3"),
        "torsions_4.png": ("C-N_4",),
    }
    assert drawn == torsions_by_residue(load_run(path)) == expected
    assert (tmp_path / "out" / "ramachandran.png").is_file()
    assert not (tmp_path / "out" / "observables.png").exists()
    words = describe(summary).splitlines()
    # Rows instead of more columns than a line has.
    assert sum(line.startswith("P(phi2 > 0)") for line in words) == 1
    assert max(len(line) for line in words if "K" in line) < 130


@pytest.mark.parametrize(
    "names",
    [("phi2", "psi2", "chi1_2"), pytest.param(("chi1", "chi2"), marks=pytest.mark.slow), ("psi",)],
)
def test_pages_are_pictures(tmp_path, names):
    run = load_run(write(tmp_path / "run", names, np.random.default_rng(2)))
    ((name, found),) = torsions_by_residue(run).items()
    assert found == names
    plot_torsions(run, tmp_path / name, names)
    assert (tmp_path / name).stat().st_size > 30_000


def test_a_page_of_one_rung_and_of_a_single_well(tmp_path):
    rng = np.random.default_rng(3)
    angles = {"C1-C2": 0.1 * rng.normal(size=(5, 2, 1)), "C2-C3": rng.normal(size=(5, 2, 1))}
    run = load_run(write_run(tmp_path / "run", [300.0], rng.normal(size=(5, 2, 1)), angles))
    plot_torsions(run, tmp_path / "a.png", tuple(angles))
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_what_has_no_phi_reports_what_it_has(tmp_path):
    rng = np.random.default_rng(4)
    angle = three_wells(rng)
    energy = rng.normal(np.array(RUNGS) / 10, 8.0, SHAPE)
    path = write_run(
        tmp_path / "run", RUNGS, energy, {"C1-C2": angle}, positions=chain_positions(angle),
        choices={"observables": {"d": "distance:0,3"}},
    )  # fmt: skip
    output = tmp_path / "out"
    summary = analyze(path, output)
    written = {file.name for file in output.iterdir()}
    assert written == {
        "summary.json", "report.html", "diagnostics.png", "observables.png", "torsions.png",
        "thermodynamics.csv", "thermodynamics.json", "thermodynamics.png",
    }  # fmt: skip
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "BUT1: C1-C2" not in page  # a name without a number does not tell the residue
    assert "<h3>C1-C2</h3>" in page
    assert {"basin C1-C2 60", "basin C1-C2 180", "basin C1-C2 -60"} <= summary["quantities"].keys()
    thermodynamics = read_json(output / "thermodynamics.json")
    assert thermodynamics["profile_of"] == "C1-C2"
    assert thermodynamics["profiles"].keys() == {f"{kelvin:.2f}" for kelvin in RUNGS}
    assert "phi" not in describe(summary)
    load_run(path).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 30_000


def test_a_phi_of_one_sign_gives_way_to_a_torsion_with_wells(tmp_path):
    rng = np.random.default_rng(5)
    energy = rng.normal(size=SHAPE)
    angles = {"phi": rng.normal(-1.2, 0.1, SHAPE), "psi": three_wells(rng)}
    run = load_run(write_run(tmp_path / "run", RUNGS, energy, angles))
    assert (run.first_phi(), run.profile_dihedral()) == ("phi", "psi")
    run.plot_thermodynamics(tmp_path / "a.png")
    angles["phi"][30, 1, 2] = 0.5
    other = load_run(write_run(tmp_path / "other", RUNGS, energy, angles))
    assert other.profile_dihedral() == "phi"
    none = load_run(write_run(tmp_path / "none", RUNGS, energy))
    assert none.profile_dihedral() is None
    none.plot(tmp_path / "b.png")  # the energies
    assert (tmp_path / "b.png").stat().st_size > 10_000
