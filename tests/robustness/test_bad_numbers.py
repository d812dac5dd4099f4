"""Bad numbers, names and seeds are refused by an error that names the argument."""

import json
import math
from functools import partial

import numpy as np
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import kernels
from openmm_tsf.cli.main import main
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.potentials import GaussianWell, OpenMMPotential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings
from tests.support.refusals import from_shell, refused

NAN, INF = math.nan, math.inf
LADDER = (300.0, 600.0)


@pytest.fixture(scope="module")
def dataset(molecule):
    return MDDataset.shipped(molecule, stride=400)


@pytest.fixture(scope="module")
def flow(dataset):
    return tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(4,))


@pytest.fixture(scope="module")
def make(molecule, flow):
    """A function that makes a sampler with changed arguments."""
    with OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        usual = {"molecule": molecule, "flow": flow, "temperatures": LADDER, "n_walkers": 2,
                 "potential": potential, "seed": 1}  # fmt: skip
        samplers = []

        def make(**changes):
            samplers.append(tsf.ParallelTempering(**{**usual, **changes}))
            return samplers[-1]

        yield make
        for sampler in samplers:
            sampler.close()


@pytest.fixture
def functions(make, dataset, molecule):
    """Functions and classes that need the fixtures, and correct arguments, by name."""
    return {
        "sampler": make,
        "flow": partial(tsf.TemperatureSteerableFlow.from_dataset, dataset, hidden=(4,)),
        "dataset": partial(MDDataset, positions=torch.zeros(2, 3), temperature=1.0),
        "potential": molecule.potential,
    }


def ids(value):
    return repr(value).replace("\n", " ")[:40]


TEMPERATURES = [
    ([-300.0, 600.0], ValueError, "expected a positive temperature in kelvin, got -300.0"),
    ([0, 600], ValueError, "expected a positive temperature in kelvin, got 0"),
    ([300, NAN], ValueError, "expected a positive temperature in kelvin, got nan"),
    ([300, INF], ValueError, "expected a positive temperature in kelvin, got inf"),
    ([300, 300], ValueError, "expected ascending temperatures without duplicates"),
    ([600, 300], ValueError, "expected ascending temperatures without duplicates"),
    ([], ValueError, "expected at least one temperature, got none"),
    (["300"], TypeError, "expected a number in kelvin, got '300'"),
    ("300", TypeError, "expected a sequence of temperatures in kelvin, got '300'"),
    (300, TypeError, "expected a sequence of temperatures in kelvin, got 300"),
    (None, TypeError, "expected a sequence of temperatures in kelvin, got None"),
    ([True], TypeError, "expected a number in kelvin, got True"),
    ([[300], [600]], TypeError, r"expected a number in kelvin, got \[300\]"),
    ([300 * unit.nanometer], TypeError, "expected a quantity in kelvin, got one in nanometer"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "error", "message"), TEMPERATURES, ids=ids)
def test_ladders(make, value, error, message):
    for function in (make, SamplingSettings):
        with refused(error, f"temperatures: {message}"):
            function(temperatures=value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("run --temperatures -300 600", "temperatures: expected a positive temperature"),
        ("run --temperatures nan", "temperatures: expected a positive temperature"),
        ("run --temperatures 300 300", "temperatures: expected ascending"),
        ("sample --flow f --temperatures 600 300", "temperatures: expected ascending"),
        ("train --temperatures 600 300", "temperatures: expected ascending"),
        ("md --temperature -1", "temperature: expected a positive temperature"),
        ("md --temperature nan", "temperature: expected a positive temperature"),
        ("md --timestep 0", "timestep: expected a positive number, got 0.0"),
        ("md --timestep nan", "timestep: expected a finite number, got nan"),
        ("md --friction inf", "friction: expected a finite number, got inf"),
        ("md --friction -1", "friction: expected a positive number, got -1.0"),
        ("md --frames -5", "n_frames: expected an integer of at least 1, got -5"),
        (f"md --frames {10**30}", "n_frames: expected an integer of at most"),
        ("md --equilibration-steps -1", "n_equilibration_steps: expected an integer of at least 0"),
        ("md --seed -1", "seed: expected an integer of at least 0, got -1"),
        (f"md --seed {2**64}", "seed: expected an integer of at most"),
        ("run --seed -1", "seed: expected an integer of at least 0, got -1"),
        ("run --walkers -2", "n_walkers: expected an integer of at least 1, got -2"),
        ("run --iterations 0", "n_iterations: expected an integer of at least 1, got 0"),
        ("run --tuning -1", "n_tuning: expected an integer of at least 0, got -1"),
        ("train --steps 0", "n_steps: expected an integer of at least 1, got 0"),
        ("train --stride -3", "stride: expected an integer of at least 1, got -3"),
        ("run --threads -1", "--threads: expected at least 1, got -1"),
        ("run --platform Abacus", "platform: expected one of Reference, CPU"),
        ("md --platform CUDA9", "platform: expected one of Reference, CPU"),
    ],
    ids=ids,
)
def test_numbers_from_the_shell(given, message, tmp_path, capsys):
    line = from_shell([*given.split(), "--output", tmp_path / "out"], capsys)
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "run --temperatures 300 abc",
            "argument --temperatures: expected a number or 'auto', got 'abc'",
        ),
        ("run --seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("run --seed one", "argument --seed: invalid int value: 'one'"),
        ("md --frames 1e3", "argument --frames: invalid int value: '1e3'"),
        ("md --walkers 3", "unrecognized arguments: --walkers 3"),
        ("run --iteration-count 3", "unrecognized arguments: --iteration-count 3"),
        ("train --preset best", "argument --preset: invalid choice: 'best'"),
        ("walk", "argument COMMAND: invalid choice: 'walk'"),
    ],
    ids=ids,
)
def test_the_parser_refuses(given, message, capsys):
    with pytest.raises(SystemExit) as end:
        main([*given.split(), "--output", "out"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


BAD_COUNTS = (-1, 2.5, 2.0, NAN, INF, "3", True, None, 10**30)
BAD_SIZES = (0, -1.0, NAN, INF, "3", True, None)
COUNTED = {
    MDSettings: ("n_frames", "steps_per_frame", "n_equilibration_steps", "seed"),
    SamplingSettings: ("n_walkers", "n_iterations", "n_tuning"),
    RunSettings: ("stride", "n_rounds", "round_iterations", "round_stride"),
    FlowSettings: ("n_blocks",),
    FitSettings: ("n_steps", "batch_size", "kl_batch_size", "warmup_steps", "validate_interval",
                  "n_validation_draws", "max_skipped"),
}  # fmt: skip
COUNTS = pytest.mark.parametrize(
    ("settings", "name"), [(s, name) for s, names in COUNTED.items() for name in names]
)


@pytest.mark.parametrize("value", BAD_COUNTS, ids=ids)
@COUNTS
def test_counts(settings, name, value):
    with refused(ValueError, f"{name}: expected an integer of at (least|most)"):
        settings(**{name: value})


@COUNTS
def test_counts_of_numpy(settings, name):
    made = settings(**{name: np.int64(5)})
    assert type(getattr(made, name)) is int
    json.dumps(to_plain_data(made))


@pytest.mark.parametrize("value", BAD_SIZES, ids=ids)
@pytest.mark.parametrize("name", ["timestep", "friction", "learning_rate", "max_grad_norm"])
def test_sizes(name, value):
    if (name, value) == ("timestep", None):
        assert MDSettings(timestep=None).timestep is None  # the molecule decides
        return
    settings = MDSettings if name in ("timestep", "friction") else FitSettings
    with refused((TypeError, ValueError), f"{name}: expected (a|one) "):
        settings(**{name: value})


ARGUMENTS = {
    MDSettings: [
        ({"steps_per_frame": 0}, "steps_per_frame: expected an integer of at least 1, got 0"),
        ({"temperature": "600"}, "temperature: expected a number in kelvin, got '600'"),
        ({"timestep": 1 * unit.kelvin}, "timestep: expected a quantity in picosecond"),
    ],
    RunSettings: [
        ({"sample_share": NAN}, "sample_share: expected a finite number, got nan"),
        ({"sample_share": 1.0}, r"sample_share: expected a number in \(0, 1\)"),
    ],
    FlowSettings: [
        ({"n_momenta": -1}, "n_momenta: expected an integer of at least 0, got -1"),
        ({"hidden": 64}, "hidden: expected a sequence of integers, got 64"),
        ({"hidden": "64"}, "hidden: expected a sequence of integers, got '64'"),
        ({"hidden": (64, 0)}, "hidden: expected an integer of at least 1, got 0"),
        ({"metric": 3}, "metric: expected one of volume, polar, got 3"),
    ],
    FitSettings: [
        ({"lambda_max": NAN}, "lambda_max: expected a finite number, got nan"),
        ({"lambda_max": 1.5}, r"lambda_max: expected a number in \[0, 1\], got 1\.5"),
        ({"kl_batch_size": 0}, "kl_batch_size: expected an integer of at least 1"),
        ({"ramp": 0.5}, "ramp: expected two ascending fractions, got 0.5"),
        ({"ramp": (0.5, NAN)}, "ramp: expected a finite number, got nan"),
        ({"ramp": (0.5, 0.2)}, "ramp: expected two ascending fractions"),
        ({"basin_share": 0.6}, r"basin_share: expected a number in \[0, 0.5\]"),
        ({"ema_decay": 1.1}, r"ema_decay: expected a number in \[0, 1\], got 1\.1"),
        ({"final_learning_rate": -1}, "final_learning_rate: expected a number in"),
        ({"patience": 0}, "patience: expected an integer of at least 1, got 0"),
        ({"dtype": "float32"}, "dtype: expected one of torch.float32, torch.float64"),
        ({"temperatures": [600, 300]}, "temperatures: expected ascending"),
        ({"steps": 3}, "unexpected keyword argument 'steps'"),
    ],
    "sampler": [
        ({"walkers": 3}, "unexpected keyword argument 'walkers'"),
        ({"molecule": "ala2"}, "molecule: expected a MolecularSystem or None, got str"),
        ({"flow": None}, "flow: expected a flow, got NoneType, which has no n_coordinates"),
        ({"kernels": []}, "kernels: expected at least one, got none"),
        ({"molecule": None, "potential": None}, "potential: expected one where molecule is None"),
    ],
    "flow": [
        ({"blocks": 2}, "unexpected keyword argument 'blocks'"),
        ({"n_blocks": 0}, "n_blocks: expected an integer of at least 1, got 0"),
        ({"n_blocks": 2.0}, r"n_blocks: expected an integer of at least 1, got 2\.0"),
        ({"n_momenta": 0}, "n_momenta: a TSF expects at least 1, got 0"),
        ({"hidden": 64}, "hidden: expected a sequence of integers, got 64"),
        ({"hidden": (64, 2.5)}, r"hidden: expected an integer of at least 1, got 2\.5"),
        ({"metric": "plain"}, "metric: expected one of volume, polar, got 'plain'"),
        ({"conditioner_dtype": "float32"}, "conditioner_dtype: expected torch.float32"),
    ],
    "dataset": [
        ({"temperature": -600}, "temperature: expected a positive temperature in kelvin, got -600"),
        ({"temperature": NAN}, "temperature: expected a positive temperature in kelvin, got nan"),
        ({"temperature": "600"}, "temperature: expected a number in kelvin, got '600'"),
        ({"weight": 0}, "weight: expected a positive number, got 0"),
        ({"weight": NAN}, "weight: expected a finite number, got nan"),
        ({"weight": "1"}, "weight: expected one number, got '1'"),
        ({"n_evaluations": -1}, "n_evaluations: expected an integer of at least 0, got -1"),
        ({"n_evaluations": 1.5}, r"n_evaluations: expected an integer of at least 0, got 1\.5"),
        ({"energies": [1.0, NAN]}, "energies: expected finite numbers, .* the first is frame 1"),
        ({"energies": [1.0]}, r"energies: expected shape \[2\], got \(1,\)"),
    ],
    "potential": [
        ({"precision": "mixed"}, "options: expected some of compile, device, .* got precision"),
        ({"platform": "CPU", "dtype": 3}, "options: expected some of n_contexts, .* got dtype"),
        ({"kind": "jax"}, "kind: expected 'auto', 'torch' or 'openmm', got 'jax'"),
        ({"platform": "Abacus"}, r"platform: expected one of Reference, CPU.*got 'Abacus'"),
        ({"platform": "CPU", "platform_properties": {"Precision": "mixed"}},
         r"platform_properties: expected names among \['Threads', .* got 'Precision'"),
        ({"platform": "CPU", "platform_properties": {"Threads": "many"}},
         "platform_properties: expected a positive number of Threads, got many"),
        ({"device": "abacus"}, r"device: expected a torch device, got 'abacus' .*here: cpu"),
        ({"device": "cuda:99"}, r"device: expected a torch device, got 'cuda:99' .*here: cpu"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "changes", "message"),
    [(subject, *row) for subject, rows in ARGUMENTS.items() for row in rows],
    ids=ids,
)
def test_arguments(functions, subject, changes, message):
    with refused((TypeError, ValueError), message):
        functions.get(subject, subject)(**changes)


@pytest.mark.parametrize("value", [0, *BAD_COUNTS], ids=ids)
def test_number_of_walkers(make, value):
    with refused(ValueError, "n_walkers: expected an integer of at (least 1|most)"):
        make(n_walkers=value)


@pytest.mark.parametrize("value", BAD_COUNTS, ids=ids)
def test_number_of_iterations(make, value):
    sampler = make(n_walkers=np.int64(2))
    for start in (sampler.tune, lambda n: sampler.run(n, progress=False)):
        with refused(ValueError, "n_iterations: expected an integer of at (least 0|most)"):
            start(value)


def test_numbers_of_numpy_in_a_run(make, tmp_path):
    sampler = make(n_walkers=np.int32(2), seed=np.uint64(2**64 - 1))
    sampler.run(np.int64(1), tmp_path / "run", save_interval=np.int64(1), progress=False)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["n_walkers"], config["seed"]) == (2, 2**64 - 1)


@pytest.mark.parametrize("value", [-1, 1.5, 2.0, "1", True, NAN, 2**64, 2**70], ids=ids)
@pytest.mark.parametrize("subject", ["sampler", "flow"])
def test_seeds(functions, subject, value):
    with refused(ValueError, "seed: expected an integer of at (least 0|most)"):
        functions[subject](seed=value)


@pytest.mark.parametrize(
    ("x", "velocities", "message"),
    [
        ("start.pdb", None, "x: expected numbers, got 'start.pdb'"),
        (np.zeros((2, 22, 3)), None, r"x: expected shape \(2, 2, 22, 3\), got \(2, 22, 3\)"),
        (np.full((2, 2, 22, 3), NAN), None, "x: 4 of 4 configurations start at a non-finite"),
        (np.zeros((2, 2, 22, 3)) * unit.kelvin, None, "x: expected a quantity in nanometer"),
        (None, np.zeros((2, 22, 3)), r"velocities: expected shape \(2, 2, 22, 3\), got \(2, 22"),
        (None, np.full((2, 2, 22, 3), NAN), "velocities: expected finite numbers, got NaN"),
        (None, "slow", "velocities: expected numbers, got 'slow'"),
        (None, np.zeros((2, 2, 22, 3)) * unit.kelvin, "velocities: expected a quantity in"),
    ],
    ids=ids,
)
def test_starts(make, molecule, x, velocities, message):
    if x is None:
        x = np.tile(molecule.positions, (2, 2, 1, 1))
    with refused((TypeError, ValueError), message):
        make().set_positions(x, velocities)


def test_velocities_that_a_kernel_needs():
    """Without a molecule there are no masses to draw velocities with."""
    well = GaussianWell(torch.eye(2, dtype=torch.float64))
    d = well.event_shape[0]
    flow = tsf.TemperatureSteerableFlow(d, d, 1, (4,))
    ladder, x = (1.0, 2.0), torch.zeros(3, 2, d, dtype=torch.float64)
    langevin = kernels.TorchLangevin(well, ladder, 1.0)
    fresh = kernels.CartesianHMC(well, ladder, 1.0)
    kept = kernels.CartesianHMC(well, ladder, 1.0, persistence=0.5, name="kept")
    mixed = kernels.OneOf([langevin, kernels.CartesianMALA(well, ladder, 1.0)])
    for kernel, name in ((langevin, "local"), (kept, "kept"), (mixed, f"{mixed.name}.local")):
        sampler = tsf.ParallelTempering(None, flow, ladder, 3, [kernel], well)
        with refused(ValueError, rf"velocities: expected .* for the kernel {name}, got None"):
            sampler.set_positions(x)
        sampler.set_positions(x, torch.zeros_like(x))
    tsf.ParallelTempering(None, flow, ladder, 3, [fresh], well).set_positions(x)


def test_flows_are_made_from_a_dataset(dataset, flow):
    with refused(TypeError, "dataset: expected an MDDataset, got Tensor"):
        tsf.TemperatureSteerableFlow.from_dataset(dataset.positions)
    with refused(TypeError, "unexpected keyword argument 'n_steps'"):
        fit(flow, dataset, n_steps=3)


@pytest.mark.parametrize("name", ["stride", "skip"])
@pytest.mark.parametrize("value", BAD_COUNTS, ids=ids)
def test_strides(molecule, name, value, tmp_path):
    with refused(ValueError, f"{name}: expected an integer of at (least|most)"):
        MDDataset.load(tmp_path, molecule, 600, **{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(molecule):
    with refused(ValueError, r"device: expected a torch device, got 'cuda' .*available here: cpu"):
        molecule.potential(device="cuda")
    with refused(ValueError, r"platform: expected one of .*CPU.*, got 'CUDA'"):
        molecule.potential(platform="CUDA")
