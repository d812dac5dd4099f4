"""The tutorials run, in a short form, and stay short."""

import re

import mdtraj
import pytest
import torch

from tests.support.examples import EXAMPLES, run_source, shortened

TUTORIALS = {path.name for path in EXAMPLES.glob("*.py")}


def run_short(name, changes):
    """Run a tutorial with some of its lines replaced, in the present directory."""
    return run_source(shortened((EXAMPLES / name).read_text(), changes))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The directory and the variables of ``first_run.py``."""
    changes = {
        "N_STEPS = 1000": "N_STEPS = 4",
        "N_WALKERS = 32": "N_WALKERS = 4",
        "N_TUNING = 100": "N_TUNING = 3",
        "N_ITERATIONS = 500": "N_ITERATIONS = 12",
        "STRIDE = 2": "STRIDE = 40",
        "(dataset, seed=1)": "(dataset, seed=1, n_blocks=2, hidden=(16,))",
    }
    directory = tmp_path_factory.mktemp("first_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        return directory, run_short("first_run.py", changes)


def test_only_short_tutorials_and_the_troubleshooting_are_at_the_top():
    names = (
        "any_temperature",
        "first_run",
        "openmm_sampler",
        "openmmtools_sampler",
        "own_kernel",
        "own_molecule",
        "torch_potential",
    )
    assert {f"{name}.py" for name in names} == TUTORIALS
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert files - TUTORIALS == {"troubleshooting.md"}
    for name in TUTORIALS:
        source = (EXAMPLES / name).read_text()
        assert source.count("\n") < 60, name
        assert source.startswith("# %% [markdown]\n# # "), name
        assert "# %%\n" in source, name


def test_first_run(first_run):
    directory, variables = first_run
    assert (directory / "ramachandran.png").stat().st_size > 10_000
    assert variables["run"].n_iterations == 12
    assert variables["phi"].shape == (4 * 12,)
    assert set(variables["summary"]["phi_positive"]) == {"300.00", "424.00", "600.00"}


def test_any_temperature(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    variables = run_short("any_temperature.py", {"N_FRAMES = 10_000": "N_FRAMES = 20"})
    assert variables["frames"].n_frames == 12 * 4 * 3
    assert variables["populations"].sum() == pytest.approx(1.0)
    assert variables["curve"].value.shape == (7,)
    assert mdtraj.load_dcd("350K.dcd", top="run/topology.pdb").n_frames == 20
    printed = capsys.readouterr().out
    assert "frames of all rungs are worth" in printed
    assert "350 K: 20 frames, <U> = " in printed


def test_openmmtools_sampler(first_run, monkeypatch, capsys):
    monkeypatch.chdir(first_run[0])
    variables = run_short("openmmtools_sampler.py", {"N_MD = 500, 250": "N_MD = 3, 4"})
    variables["reporter"].close()
    assert variables["sampler"].iteration == 3
    assert len(variables["phi"]) == 4
    printed = capsys.readouterr().out
    assert "600 K: accepted draws and steps: ['0." in printed
    assert "300 K: P(phi > 0) = " in printed


def test_own_molecule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {
        "N_EQUILIBRATION = 20_000": "N_EQUILIBRATION = 3000",
        "N_MD = 500_000": "N_MD = 6000",  # less has another temperature by chance
        '"md.dcd", 100': '"md.dcd", 60',
        "N_STEPS = 2000": "N_STEPS = 4",
        "N_ITERATIONS = 500": "N_ITERATIONS = 2",
        "ladder, 32": "ladder, 3",
        "tune(100)": "tune(2)",
        "(dataset, seed=1)": "(dataset, seed=1, n_blocks=2, hidden=(16,))",
    }
    variables = run_short("own_molecule.py", changes)
    assert len(variables["dataset"]) == 100
    assert list(variables["run"].dihedral_atoms) == ["phi", "psi"]


def test_openmm_sampler(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {
        "N_EQUILIBRATION = 20_000": "N_EQUILIBRATION = 3000",
        "N_MD = 500_000": "N_MD = 6000",
        '(100, "md.npz")': '(60, "md.npz")',
        "N_STEPS = 2000": "N_STEPS = 4",
        "N_ITERATIONS = 2000": "N_ITERATIONS = 20",
        "(dataset, seed=1)": "(dataset, seed=1, n_blocks=2, hidden=(16,))",
    }
    variables = run_short("openmm_sampler.py", changes)
    assert len(variables["dataset"]) == 100
    assert variables["sampler"].currentIteration == 20
    assert variables["frames"].n_frames == 2
    assert variables["counts"]["proposed"].tolist() == [[0, 10, 0], [0, 0, 10], [0, 0, 0]]
    printed = capsys.readouterr().out
    assert "P(phi > 0) at 300 K" in printed
    assert "flow_crank_nicolson accepted: " in printed


def test_torch_potential(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        changes = {"BATCH = 4096": "BATCH = 64", "COMPILE = True": "COMPILE = False"}
        run_short("torch_potential.py", changes)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert float(re.search(r"difference: (\S+) kJ/mol", printed)[1]) < 1e-4
    assert float(re.search(r"takes (\S+) times", printed)[1]) > 0
    assert "force = -gradient: True" in printed


def test_own_kernel_and_a_wrong_one(tmp_path, monkeypatch):
    """The kernel passes its test; accepting at another temperature does not."""
    monkeypatch.chdir(tmp_path)
    run_short("own_kernel.py", {})
    with pytest.raises(AssertionError):
        run_short("own_kernel.py", {"(-u / self.kt)": "(-0.8 * u / self.kt)"})
