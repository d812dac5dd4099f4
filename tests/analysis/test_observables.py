"""Observables of a run: their values, what is refused, and where they appear."""

import mdtraj
import numpy as np
import pytest

import openmm_tsf as tsf
from openmm_tsf.analysis import analyze as analysis
from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.observables import check_functions, define_observables, split_definitions
from openmm_tsf.analysis.report import describe
from openmm_tsf.analysis.targets import Target
from openmm_tsf.io.files import read_json
from openmm_tsf.units import KB
from tests.support.analysis_runs import GAP, TEMPERATURES, small_run, two_state_run
from tests.support.fabricate import chain_positions, write_run

MARKER = "import pathlib\npathlib.Path(__file__).with_suffix('.imported').touch()\n"
FUNCTIONS = f"""{MARKER}
import mdtraj
from dataclasses import dataclass

@dataclass
class Unused:
    number: "int"

def end_to_end(frames):
    return mdtraj.compute_distances(frames, [[0, 3]], periodic=False)

def shifted(frames):
    return frames.xyz[1:, 0, 0]

def positions(frames):
    return frames.xyz

def infinite(frames):
    return frames.xyz[:, 0, 0] / 0

def failing(frames):
    raise KeyError("no such thing")

number = 3
"""


@pytest.fixture(scope="module")
def molecule():
    return tsf.systems.alanine_dipeptide()


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


def define(molecule, **definitions):
    return define_observables(definitions, molecule.mdtraj_topology, molecule.dihedrals)


def was_imported(path):
    return path.with_suffix(".imported").exists()


def test_values_are_those_of_mdtraj(molecule):
    x = tsf.MDDataset.shipped(molecule, stride=400).positions.numpy()
    frames = mdtraj.Trajectory(x.astype(np.float32), molecule.mdtraj_topology)
    known = define(
        molecule,
        psi="psi",
        turn="dihedral:ALA2:N, ALA2:CA,ALA2-C ,NME3:N",
        bend="angle:ACE1:C,8,18",
        d="distance:1,NME3:C",
        unique="distance:CB,CA",
        own=lambda t: t.xyz[:, 0, 2] > 0,
    )
    psi = mdtraj.compute_psi(frames, periodic=False)[1][:, 0]
    expected = {
        "psi": psi,
        "turn": psi,
        "bend": mdtraj.compute_angles(frames, [[4, 8, 18]], periodic=False)[:, 0],
        "d": mdtraj.compute_distances(frames, [[1, 18]], periodic=False)[:, 0],
        "unique": mdtraj.compute_distances(frames, [[10, 8]], periodic=False)[:, 0],
        "own": (x[:, 0, 2] > 0).astype(float),
    }
    units = [each.unit for each in known.values()]
    assert units == ["rad", "rad", "rad", "nm", "nm", ""]
    for name, values in expected.items():
        found = known[name].evaluate(frames)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, values)
    assert known["d"].definition == "distance:1,18"
    assert known["turn"].definition == "dihedral:6,8,14,16"


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ({"d": "distance:1,22"}, "d: expected an atom by its number, 0 to 21, .* got '22'"),
        ({"d": "distance:1,-1"}, "d: expected an atom by its number"),
        ({"d": "distance:1,ALA2:CX"}, r"d: expected .* got 'ALA2:CX' \(like it: .*ALA2:CA"),
        ({"d": "distance:1,C"}, "d: expected one atom, got 'C', which 3 have: .* 4, 14, 18"),
        ({"d": "distance:1"}, "d: expected 2 atoms of a distance, separated by commas"),
        ({"d": "distance:1,2,3"}, "d: expected 2 atoms"),
        ({"d": "dihedral:1,4,6,"}, "d: expected 4 atoms"),
        ({"d": "distance:4,ACE1:C"}, "d: expected different atoms"),
        ({"d": "chi1"}, r"d: expected a torsion .* got 'chi1' \(torsions: phi, psi\)"),
        ({"phi": "psi"}, "expected another name than 'phi', which is a torsion"),
        ({"phi": "distance:1,4"}, "expected another name than 'phi'"),
        ({"U": "phi"}, "expected a name of letters, .* got 'U'"),
        ({"a b": "phi"}, "expected a name of letters, .* got 'a b'"),
        ({"": "phi"}, "expected a name of letters"),
        ({"d": "no_such_module:f"}, "d: no_such_module cannot be imported: ModuleNotFound"),
        ({"d": "os.path:nothing"}, "d: expected a function nothing in os.path, got no such name"),
        ({"d": "os:sep"}, "d: expected a function sep in os, got str"),
        ({"d": "missing.py:f"}, "d: expected a Python file, there is no missing.py"),
        ({"d": "a b:f"}, "d: expected a torsion of the molecule by name"),
    ],
)
def test_definitions_that_are_none(molecule, definitions, message):
    with pytest.raises(ValueError, match=f"observe: {message}"):
        define(molecule, **definitions)


def test_types_and_texts_that_are_none(molecule):
    with pytest.raises(TypeError, match=r"observe: d: expected .* or a function, got 3"):
        define(molecule, d=3)
    with pytest.raises(TypeError, match="expected names with their definitions, got list"):
        define_observables(["phi"], molecule.mdtraj_topology, molecule.dihedrals)
    with pytest.raises(ValueError, match="observe: expected different names, got 'd' twice"):
        split_definitions(["d=phi", "d=psi"])
    assert split_definitions(["a = x=y:f", "phi"]) == {"a": "x=y:f", "phi": "phi"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shifted", r"expected 2 numbers, one for each frame, .* got float32 of shape \(1,\)"),
        ("positions", r"expected 2 numbers, .* got float32 of shape \(2, 22, 3\)"),
        ("infinite", "expected finite numbers .* got -?inf"),
        ("failing", r"functions.py:failing raised KeyError\('no such thing'\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_functions_are_tried_before_the_work(molecule, functions, name, message):
    known = define(molecule, f=f"{functions}:{name}", d="distance:1,2")
    structure = mdtraj.Trajectory(molecule.positions[None] + 1, molecule.mdtraj_topology)
    with pytest.raises(ValueError, match=f"observe: f: .*{message}"):
        check_functions(known, structure)


def test_values_of_a_run(shared, functions):
    path, *_ = shared
    run = load_run(path)
    shape = (run.n_used, run.n_walkers, run.n_rungs)
    values = run.observable("distance:0,3")
    assert values.shape == shape
    for rung, kelvin in enumerate(run.temperatures):
        frames = run.trajectory(kelvin)
        expected = mdtraj.compute_distances(frames, [[0, 3]], periodic=False).reshape(shape[:2])
        np.testing.assert_array_equal(values[..., rung], expected)
        np.testing.assert_array_equal(run.observable("distance:0,3", kelvin), expected)
    np.testing.assert_array_equal(run.observable(f"{functions}:end_to_end"), values)
    by_frames = run.observable("dihedral:3,2,1,0")  # the same angle as phi, which is recorded
    np.testing.assert_allclose(by_frames, run.observable("phi"), atol=1e-5)
    np.testing.assert_array_equal(run.observable("phi"), run.dihedral_at_all_rungs("phi"))
    run.observe({"d": "distance:0,3", "f": lambda frames: frames.xyz[:, 3, 1]})
    np.testing.assert_array_equal(run.observable("d"), values)
    curve = run.curve("d", [350.0])
    assert curve.value[0] == run.curve(values, [350.0]).value[0]
    run.observe({"d": "distance:0,2"})  # another one of the same name
    assert run.observables["d"].atoms == (0, 2)
    assert not np.array_equal(run.observable("d"), values)
    with pytest.raises(
        ValueError, match=r"observable: expected one of d, f, phi, psi or .* got 'x'"
    ):
        run.observable("x")
    with pytest.raises(ValueError, match="observe: observable: expected an atom"):
        run.observable("distance:0,4")


def test_the_mean_of_a_distance_is_that_of_its_two_states(tmp_path):
    """Exact chains with -ln[P(1)/P(0)] = GAP/kT: the distance is a function of the state."""
    rng = np.random.default_rng(11)
    energy, states = two_state_run(rng, n=600, n_walkers=16, rho=0.4)
    phi = np.where(states, 1.0, -2.0)
    path = write_run(
        tmp_path / "run", TEMPERATURES, energy, {"phi": phi}, positions=chain_positions(phi)
    )
    run = load_run(path)
    run.observe({"d": "distance:0,3"})
    quantities = run.summary()["quantities"]
    lengths = [np.linalg.norm(np.diff(chain_positions(a)[[0, 3]], axis=0)) for a in (1.0, -2.0)]
    for kelvin in TEMPERATURES:
        p = 1 / (1 + np.exp(GAP / (KB * kelvin)))
        exact = p * lengths[0] + (1 - p) * lengths[1]
        entry = quantities["mean d"][f"{kelvin:.2f}"]
        assert entry["status"] == "converged"
        assert abs(entry["value"] - exact) < 4 * entry["stderr"]
        assert entry["stderr"] < 0.05 * abs(lengths[1] - lengths[0])


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("observed")
    functions = folder / "functions.py"
    functions.write_text(FUNCTIONS)
    recorded = {"d": "distance:0,3", "w": "dihedral:3,2,1,0", "away": f"{functions}:end_to_end"}
    path = folder / "run"
    small_run(path, n=80, n_walkers=6, choices={"observables": recorded})
    with pytest.MonkeyPatch.context() as patch:  # other figures take seconds
        patch.setattr(analysis, "plot_diagnostics", lambda run, path: None)
        patch.setattr(analysis, "write_thermodynamics", lambda run, folder, reference: {})
        patch.setattr(tsf.Run, "plot", lambda self, path, reference=None: None)
        summary = analyze(path, folder / "out", observe={"bend": "angle:0,1,3"})
    return path, folder / "out", summary, functions


def test_what_is_recorded_is_reported_and_no_file_is_imported_for_it(analysed):
    _, output, summary, functions = analysed
    assert not was_imported(functions)
    assert summary == read_json(output / "summary.json")
    assert summary["observables"] == {
        "d": {"definition": "distance:0,3", "kind": "distance", "unit": "nm"},
        "w": {"definition": "dihedral:3,2,1,0", "kind": "dihedral", "unit": "rad"},
        "bend": {"definition": "angle:0,1,3", "kind": "angle", "unit": "rad"},
    }
    assert {"mean d", "mean bend", "w_positive"} <= summary["quantities"].keys()
    assert any(key.startswith("basin w ") for key in summary["quantities"])
    for rung, entry in summary["quantities"]["w_positive"].items():
        assert entry["value"] == summary["phi_positive"][rung]["p"]
    notes = [note for note in summary["monitor"]["notes"] if "away" in note]
    assert len(notes) == 1
    assert "recorded by name only: give it again" in notes[0]


def test_pages_show_it(analysed):
    _, output, *_ = analysed
    page = (output / "report.html").read_text(encoding="utf-8")
    for text in ("⟨d⟩ (nm)", "⟨bend⟩ (rad)", "distance:0,3", "P(w &gt; 0)", "observables.png"):
        assert text in page
    assert (output / "observables.png").stat().st_size > 20_000
    assert not (output / "torsions.png").exists()  # phi and psi of one residue are all there is


def test_what_is_given_replaces_what_is_recorded(analysed):
    path, _, summary, functions = analysed
    run = load_run(path)
    run.observe({"d": "distance:0,2", "away": f"{functions}:end_to_end"})
    again = run.summary()
    assert again["observables"]["d"]["definition"] == "distance:0,2"
    assert again["observables"]["away"]["definition"] == f"{functions}:end_to_end"
    assert again["quantities"]["mean away"]["300.00"]["value"] == pytest.approx(
        summary["quantities"]["mean d"]["300.00"]["value"], rel=1e-12
    )
    assert not any("away" in note for note in again["monitor"]["notes"])
    words = describe(again)
    assert "<d> (nm)" in words
    assert "<away>  " in words
    assert was_imported(functions)


def test_what_does_not_converge_is_in_the_verdict(tmp_path):
    small_run(tmp_path / "run", n=60)
    run = load_run(tmp_path / "run", start=0)
    run.observe({"drift": lambda frames: np.repeat(np.linspace(0, 1, 60), 4)})
    summary = run.summary()
    assert summary["quantities"]["mean drift"]["300.00"]["status"] == "not yet"
    assert any("<drift>" in reason for reason in summary["verdict"]["missing"])


def test_frames_that_are_gone(tmp_path):
    recorded = {"d": "distance:0,3", "phi": "phi"}
    small_run(tmp_path / "run", n=20, choices={"observables": recorded})
    (tmp_path / "run" / "T300.00K.dcd").unlink()
    run = load_run(tmp_path / "run")
    summary = run.summary()
    assert list(summary["observables"]) == ["phi"]  # recorded with the numbers
    assert any("d is left out: the traj" in note for note in summary["monitor"]["notes"])
    run.observe({"e": "distance:0,2"})
    with pytest.raises(FileNotFoundError, match=r"T300\.00K\.dcd is missing"):
        run.summary()


@pytest.mark.parametrize("content", [3, {"d": 4}, {"d": "distance:0,9"}, {"d": "x"}, {"U": "phi"}])
def test_damaged_records_are_refused(tmp_path, content):
    small_run(tmp_path / "run", n=4, choices={"observables": content})
    with pytest.raises(ValueError, match=r"config\.json: damaged"):
        load_run(tmp_path / "run").summary()


def test_runs_without_a_molecule_have_no_atoms(tmp_path):
    energy = np.random.default_rng(3).normal(size=(20, 2, 2))
    run = load_run(write_run(tmp_path / "run", [1.0, 2.0], energy))
    with pytest.raises(ValueError, match="observe: expected a run of a molecule"):
        run.observe({"d": "distance:0,1"})


def test_targets_of_observables(shared):
    path, *_ = shared
    run = load_run(path)
    run.observe({"d": "distance:0,3", "bend": "angle:0,1,3", "n": lambda t: t.xyz[:, 3, 1] * 1000})
    values = {name: run.observable(name, 300) for name in run.observables}
    for text, mean in {
        "d < 1 nm": values["d"].mean(),
        "d < 1": values["d"].mean(),
        "bend < 5 % at 300 K": values["bend"].mean(),
        "cos(bend) < 1": np.cos(values["bend"]).mean(),
        "P(d > 0.2) < 1": (values["d"] > 0.2).mean(),
        "P(n > 200, phi < 90) < 1": (values["n"] > 200).mean(),
        "P(bend > 85.5) < 1": (np.degrees(values["bend"]) > 85.5).mean(),
    }.items():
        target = Target.parse(text)
        assert Target.parse(str(target)) == target
        target.check_for(["phi", "psi"], TEMPERATURES.tolist(), observables=run.observables)
        assert target.assess(run).assessment.value == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e < 0.1", r"expected slow torsions .*\(phi; observables: d, w, n\), got 'e'"),
        ("d < 0.1 rad", "expected the unit nm of d, got rad"),
        ("n < 0.1 nm", "expected the unit none of n, got nm"),
        ("w < 0.1", r"expected cos\(w\), sin\(w\) or P\(w > 0\) of a dihedral"),
        ("phi < 0.1", r"expected cos\(phi\)"),
        ("cos(d) < 0.1", r"expected an angle, got 'cos\(d\)'"),
        ("P(w > 200) < 0.1", r"expected degrees in \[-180, 180\] of w, got 200"),
        ("P(phi > 200) < 10 %", r"expected degrees in \[-180, 180\] of phi, got 200"),
        ("P(d < -1) < 0.1", "expected a positive distance d, got -1"),
    ],
)
def test_targets_that_do_not_fit(shared, text, message):
    run = load_run(shared[0])
    run.observe({"d": "distance:0,3", "w": "dihedral:3,2,1,0", "n": lambda t: t.xyz[:, 0, 0]})
    with pytest.raises(ValueError, match=f"until: {message}"):
        Target.parse(text).check_for(["phi"], [300.0], observables=run.observables)


def test_certificates_judge_them_too(molecule, tmp_path):
    frames = tsf.MDDataset.shipped(molecule, stride=100).positions
    certificate = tsf.certify({600: frames}, molecule, observe={"d": "distance:1,18"})
    expected = mdtraj.compute_distances(
        mdtraj.Trajectory(frames.numpy().astype(np.float32), molecule.mdtraj_topology), [[1, 18]]
    )
    value = certificate["quantities"]["mean d"]["600.00"]["value"]
    assert value == pytest.approx(float(expected.astype(np.float64).mean()), rel=1e-6)
    assert any("<d> = " in check["words"] for check in certificate["checks"])
    with pytest.raises(ValueError, match="observe: d: expected an atom"):
        tsf.certify({600: frames}, molecule, observe={"d": "distance:1,180"})
