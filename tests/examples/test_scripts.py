"""The scripts of the benchmarks and figures: arguments, measurements of a flow, repeated runs."""

import runpy
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import SamplingSettings
from tests.support.analysis_runs import sample_basins
from tests.support.examples import EXAMPLES, load_example
from tests.support.fabricate import write_run

#: Scripts and the modules beside them, in an order in which they can be loaded.
MODULES = [
    "benchmarks/cases", "benchmarks/common", "benchmarks/timing", "benchmarks/bridge",
    "benchmarks/openmm_samplers", "benchmarks/lean_sampling", "benchmarks/cost_report",
    "benchmarks/gpu_steps", "benchmarks/gpu_machine", "benchmarks/gpu_energies",
    "benchmarks/gpu_sampling", "benchmarks/gpu_decisions", "benchmarks/gpu_jobs",
    "benchmarks/scaling_steps", "benchmarks/scaling_model", "lecture/tasks",
    "lecture/phi4_training",
    "paper/molecule_drawing", "paper/figure3_panels", "paper/figure3_tables",
    "paper/double_well_experiment", "paper/double_wells_figure", "lecture/silver_isomers",
]  # fmt: skip
SCRIPTS = [
    "benchmarks/between_rungs", "benchmarks/cases", "benchmarks/constrained_step",
    "benchmarks/constraints", "benchmarks/cost", "benchmarks/flow_coverage",
    "benchmarks/energy", "benchmarks/flow_alone", "benchmarks/gpu", "benchmarks/gpu_compile",
    "benchmarks/hard_to_reach", "benchmarks/hosts", "benchmarks/memory",
    "benchmarks/moves", "benchmarks/openmm_samplers", "benchmarks/other_force_fields",
    "benchmarks/chains", "benchmarks/predictions", "benchmarks/scaling",
    "benchmarks/published", "benchmarks/seeds", "benchmarks/timestep_error",
    "benchmarks/training_trials", "benchmarks/twenty", "benchmarks/writing",
    "lecture/explore_exploit", "lecture/free_energies", "lecture/importance_sampling",
    "lecture/phi4_chain", "lecture/silver", "lecture/two_gaussians", "paper/double_wells",
    "paper/double_well_sampling", "paper/figure3",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def modules():
    """Load what the scripts import from beside them."""
    for name in MODULES:
        load_example(f"{name}.py")


@pytest.fixture(scope="module")
def flow(molecule):
    """A small untrained flow whose copies overlap, as those of the presets do."""
    dataset = MDDataset.shipped(molecule, stride=40)
    options = {"n_blocks": 1, "hidden": (8,), "overlap": True, "seed": 1}
    return TemperatureSteerableFlow.from_dataset(dataset, **options)


@pytest.fixture(scope="module")
def potential(molecule):
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        yield potential


def generator():
    return torch.Generator().manual_seed(1)


def test_every_script_is_known():
    scripts = {str(path.relative_to(EXAMPLES).with_suffix("")) for path in EXAMPLES.glob("*/*.py")}
    assert scripts == {*MODULES, *SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments(name, monkeypatch, capsys):
    script = load_example(f"{name}.py")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_time_that_sampling_waits_for_writing(flow, tmp_path, monkeypatch):
    """A writer that takes 0.5 s: the last segment is waited for, the one before is hidden."""
    writing = load_example("benchmarks/writing.py")
    write = RunWriter.write

    def slowly(self, *given):
        time.sleep(0.5)
        write(self, *given)

    monkeypatch.setattr(RunWriter, "write", slowly)
    flow.save(tmp_path / "flow.pt")
    sizes = {"n_walkers": 2, "n_iterations": 2, "n_tuning": 1, "n_walk": 0}
    settings = SamplingSettings((300.0, 600.0), local_interval=0, **sizes)
    options = RunOptions(platform="Reference", progress=False)
    result = writing.sample_for_real(tmp_path / "flow.pt", tmp_path / "run", settings, options)
    assert 0.5 <= result["waited_at_the_end_seconds"] < 2
    assert result["waited_while_sampling_seconds"] < 0.4
    seconds = result["seconds_of_production"]
    waited = result["waited_at_the_end_seconds"] + result["waited_while_sampling_seconds"]
    assert result["share_in_all"] == pytest.approx(waited / seconds, rel=0.05)
    assert not (tmp_path / "run").exists()


def test_reference_frames_and_masses(molecule):
    common = load_example("benchmarks/common.py")
    frames = common.reference_frames(300.0)
    assert (frames.shape[1:], frames.dtype) == ((22, 3), torch.float64)
    masses = molecule.heavy_hydrogen_masses
    assert (masses.min(), (masses == 4.0).sum()) == (4.0, 12)
    assert common.reference_population(300.0).value == pytest.approx(0.0213, abs=1e-4)


def test_quality_of_a_flow_as_a_proposal(molecule, flow, potential, monkeypatch):
    trials = load_example("benchmarks/training_trials.py")
    frames = trials.reference_frames
    monkeypatch.setattr(trials, "reference_frames", lambda kelvin: frames(kelvin)[:40])
    quality = trials.quality(flow, potential, molecule, 100, generator())
    assert 0 <= quality["swap"] <= 1
    for kelvin in ("300", "600"):
        assert 0 < quality[kelvin]["reverse_ess_joint"] <= 1
        assert 0 <= quality[kelvin]["independence"] <= 1
    measure = load_example("benchmarks/published.py").flow_alone
    report = measure(flow, potential, molecule, 100, 2, generator())
    assert 0 < report["300"]["reverse_ess_joint"] <= 1


def test_weights_at_given_frames(molecule, flow, potential):
    """Both scripts return one weight for each draw of the momenta."""
    frames = load_example("benchmarks/common.py").reference_frames(600.0)[:20]
    weigh = load_example("benchmarks/hard_to_reach.py").log_weights
    weights = weigh(flow, potential, frames, 600.0, 3, generator())
    assert weights.shape == (60,)
    assert bool(torch.isfinite(weights).any())
    forward = load_example("benchmarks/flow_alone.py").forward_weights
    assert forward(flow, potential, frames, 600.0, generator()).shape == (20,)


def test_seeds_refuses_runs_made_otherwise(tmp_path):
    seeds = load_example("benchmarks/seeds.py")
    sizes = {"n_walkers": 4, "n_iterations": 30, "n_tuning": 7}
    settings = SamplingSettings(temperatures=(300.0, 600.0), **sizes)
    phi, psi, energy = sample_basins(np.random.default_rng(5), (30, 4, 2), (-60.0, 20.0))
    write_run(
        tmp_path / "seed_9", settings.temperatures, energy, {"phi": phi, "psi": psi}, seed=9,
        choices={"settings": to_plain_data(settings), "flow": {"sha256": "abc"}, "seed": 9},
    )  # fmt: skip
    (tmp_path / "seed_9" / "checkpoint.pt").touch()

    def again(seed=9, digest="abc", **changes):
        made = replace(settings, **changes)
        return seeds.one_run("no/flow", tmp_path / "seed_9", made, seed, digest, False)

    assert again()["n_iterations"] == 30
    for changes, words in (
        ({"n_tuning": 8}, "n_tuning: expected 8, got 7"),
        ({"n_iterations": 20}, "n_iterations: expected 20, got 30"),
        ({"n_iterations": 40}, "n_iterations: expected 40, got 30"),
        ({"n_walkers": 5}, "n_walkers: expected 5, got 4"),
        ({"temperatures": (300.0, 500.0)}, "temperatures: "),
        ({"seed": 8}, "seed: expected 8, got 9"),
        ({"digest": "abd"}, r"flow \(sha256\): expected 'abd', got 'abc'"),
    ):
        with pytest.raises(ValueError, match=words):
            again(**changes)


def test_correlation_times_of_moves():
    """Sums of exponentials, within the measured part and beyond it, and of a series."""
    moves = load_example("benchmarks/moves.py")
    t = np.arange(1, 200)
    value, extrapolated = moves.integrate(0.5**t)
    assert (value, extrapolated) == (pytest.approx(3.0, rel=0.05), False)
    slow = 0.99**t
    value, extrapolated = moves.integrate(slow)
    assert (value, extrapolated) == (pytest.approx(1 + 2 * 0.99 / 0.01, rel=0.02), True)
    assert moves.integrate(np.ones(40)) == (None, True)
    noise = np.random.default_rng(3).normal(size=(4000, 8))
    for step in range(1, len(noise)):
        noise[step] = 0.6 * noise[step - 1] + 0.8 * noise[step]
    assert moves.correlation_of(noise)[:2] == pytest.approx([0.6, 0.36], abs=0.03)
    angles = np.deg2rad([[60.0, 150.0], [60.0, 20.0], [-60.0, 150.0]])
    assert moves.in_basins(angles).tolist() == [[True, True, False], [True, False, False]]


def test_sequences_of_moves(molecule, flow, potential):
    """Every sequence is one of kernels with distinct names, and the first runs."""
    moves = load_example("benchmarks/moves.py")
    ladder = (300.0, 600.0)
    masses = torch.tensor(molecule.heavy_hydrogen_masses, dtype=torch.float64)
    start = MDDataset.shipped(molecule, stride=4000).positions[:6, None].expand(-1, 2, -1, -1)
    sigma = moves.tuned_walk(molecule, flow, potential, ladder, start[:2], 1)
    assert (sigma > 0).all()
    assert len(set(sigma.tolist())) == 2
    made = moves.sequences(flow, potential, ladder, masses, sigma)
    for kernels in made.values():
        ParallelTempering(molecule, flow, ladder, 2, kernels, potential)
    args = SimpleNamespace(seed=1, iterations=6, repeats=1)
    names = "independence", "multiple try 2"
    rows = {
        name: moves.measure(
            molecule, flow, potential, ladder, made[name], start, [0.02, 0.002], args
        )
        for name in names
    }
    assert rows["multiple try 2"]["evaluations"] == pytest.approx(2.0, abs=1.0)
    chosen = {name: made[name] for name in names}
    seconds = moves.time_iterations(molecule, flow, potential, ladder, chosen, start, args)
    for name, row in rows.items():
        row["seconds"] = seconds[name]
    report = {"timed_walkers": 6, "sequences": rows}
    moves.add_rates(report)
    assert len(moves.table(report)) == 3


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        (["600", "300"], "expected ascending temperatures without duplicates"),
        (["300", "300"], "expected ascending temperatures without duplicates"),
        (["-300", "300"], "expected a positive"),
        (["300"], "expected at least two"),
    ],
)
def test_a_reference_needs_a_ladder(ladder, words, tmp_path, monkeypatch):
    main = runpy.run_path(str(EXAMPLES.parent / "data" / "make_reference.py"))["main"]
    directory = tmp_path / "run"
    arguments = ["run", "--directory", str(directory), "--iterations", "1"]
    monkeypatch.setattr(sys, "argv", ["make_reference", *arguments, "--temperatures", *ladder])
    with pytest.raises(ValueError, match=f"--temperatures: {words}"):
        main()
    assert not list(tmp_path.iterdir())
