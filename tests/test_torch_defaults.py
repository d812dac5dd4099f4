"""Default dtype and device of torch, which other packages set, change nothing."""

import ast
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import kernels
from openmm_tsf.potentials import GaussianWell, MixedDoubleWell
from tests.support.exact_cases import the_tree
from tests.support.exact_tree import POSITIONS

PACKAGE = Path(tsf.__file__).parent
#: Functions of torch that make a tensor from none; nn.Linear makes its parameters with them.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "normal",
    "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip
MODULES = {"Bilinear", "Conv1d", "Embedding", "GRU", "LSTM", "LayerNorm", "Linear", "RMSNorm"}


def unnamed(source: str) -> list[str]:
    """Calls of torch's factories that do not name dtype and device."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        home, _, name = ast.unparse(node.func).rpartition(".")
        expected = set()
        if home == "torch" and name == "Generator":
            expected = {"device"}
        elif name in {"torch": FACTORIES, "nn": MODULES, "torch.nn": MODULES}.get(home, ()):
            expected = {"dtype", "device"}
        if missing := expected - {keyword.arg for keyword in node.keywords}:
            calls.append(f"{node.lineno}: {ast.unparse(node)} without {sorted(missing)}")
    return calls


def test_factories_name_dtype_and_device():
    found = {str(path): unnamed(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "call",
    ["torch.zeros(3, dtype=torch.float64)", "torch.rand(3, device=x.device)", "nn.Linear(2, 2)",
     "torch.Generator()", "torch.as_tensor(x)", "f(torch.arange(3).long())"],
)  # fmt: skip
def test_a_planted_factory_is_reported(call):
    assert len(unnamed(f"y = {call}")) == 1
    assert unnamed("torch.zeros(3, dtype=x.dtype, device=x.device) + torch.zeros_like(x)") == []


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = pytest.mark.parametrize(
    "defaults",
    [
        partial(default_dtype, torch.float64),
        partial(default_dtype, torch.bfloat16),
        partial(default_device, "meta"),
        partial(torch.device, "meta"),
        torch.no_grad,
    ],
    ids=["float64", "bfloat16", "meta", "meta-context", "no-grad"],
)


def seeded(seed):
    return torch.Generator(device="cpu").manual_seed(seed)


def of_toys(folder):
    """Tensors of a training, kernels and a run on a model potential; files in `folder`."""
    mixed = MixedDoubleWell.random(3, seed=4)
    points = torch.linspace(-1, 1, 5, dtype=torch.float64, device="cpu")
    yield from mixed.marginal(0, points, 1.0)
    well = GaussianWell(torch.eye(2, dtype=torch.float64, device="cpu"))
    dataset = tsf.MDDataset(well.sample(300, 1.0, seeded(1)), 1.0)
    ladder = (1.0, 2.0)
    sizes = {"n_steps": 3, "batch_size": 8, "kl_batch_size": 4, "n_validation_draws": 10}
    path = {"estimator": "path", "n_chains": 8, "optimizer": "muon", "temperatures": ladder}
    for number, extra in enumerate(({}, path)):
        flow = tsf.TemperatureSteerableFlow.from_dataset(
            dataset, n_blocks=1, hidden=(4,), seed=2, conditioner_dtype=torch.float32
        )
        yield from flow.state_dict().values()
        settings = tsf.FitSettings(**sizes, ramp=(0.0, 0.1), **extra)
        checkpoint = folder / f"{number}.pt"
        for resume in (False, True):
            tsf.fit(flow, dataset, well, settings=settings, seed=3, progress=False,
                    checkpoint_path=checkpoint, resume=resume)  # fmt: skip
        yield from flow.state_dict().values()
    flow.save(folder / "flow.pt")
    flow = tsf.load_flow(folder / "flow.pt")
    yield from flow.sample(5, 2.0, seeded(0))
    parts = flow, well, ladder
    sequence = [
        kernels.FlowWalk(*parts),
        kernels.FlowIndependence(*parts),
        kernels.FlowCrankNicolson(*parts, share=0.5),
        kernels.FlowMultipleTry(*parts, n_tries=2),
        kernels.LatentMALA(*parts),
        kernels.OneOf([kernels.LatentHMC(*parts), kernels.CartesianMALA(well, ladder, 1.0)]),
        kernels.CartesianHMC(well, ladder, 1.0, n_steps=2),
        kernels.OnRungs(kernels.TorchLangevin(well, [2.0], 1.0, integrator="baoab"), ladder),
        kernels.InternalWalk.from_dataset(dataset, well, ladder),
        kernels.PlainSwap(ladder, 1.0, scheme="random_pairs"),
        kernels.SteeredSwap(*parts),
        kernels.SteeredSwap(*parts, scheme=[(0, 1)], name="pairs"),
    ]

    def make():
        return tsf.ParallelTempering(None, flow, ladder, 4, sequence, well, seed=5)

    zeros = torch.zeros(4, 2, 2, dtype=torch.float64, device="cpu")
    sampler = make()
    sampler.set_positions(zeros, zeros)
    sampler.tune(12)
    sampler.run(3, folder / "run", progress=False)
    sampler = make().resume(folder / "run")
    yield sampler.run(2, folder / "run", progress=False, collect=True)
    yield sampler.state.velocities
    yield torch.from_numpy(tsf.load_run(folder / "run").thermodynamics().energy)


def of_a_molecule(folder):
    """Tensors of coordinates, energies, a flow and a run of a molecule of seven atoms."""
    tree = the_tree()
    molecule = tsf.MolecularSystem(tree.system(), tree.topology, POSITIONS)
    potential = molecule.potential()
    noise = torch.randn(400, 7, 3, dtype=torch.float64, device="cpu", generator=seeded(1))
    dataset = tsf.MDDataset(torch.from_numpy(POSITIONS.copy()) + 1e-3 * noise, 300.0, molecule)
    yield from potential.energy_and_forces(dataset.positions[:4])
    with tsf.OpenMMPotential(molecule.system, "Reference", n_contexts=1) as in_openmm:
        yield from in_openmm.energy_and_forces(dataset.positions[:4])
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(4,), seed=2)
    flow.save(folder / "flow.pt")
    flow = tsf.load_flow(folder / "flow.pt", molecule)
    yield from flow.state_dict().values()
    yield from flow.sample(5, 300.0, seeded(0))
    ladder = (300.0, 310.0)
    sampler = tsf.ParallelTempering(molecule, flow, ladder, 2, potential=potential, seed=5)
    yield sampler.run(3, progress=False, collect=True)
    yield sampler.state.velocities


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    return {of: list(of(folder)) for of in (of_toys, of_a_molecule)}


@DEFAULTS
@pytest.mark.parametrize("of", [of_toys, of_a_molecule])
def test_results_are_the_same_bit_by_bit(of, defaults, expected, tmp_path):
    with defaults():
        got = list(of(tmp_path))
    assert len(got) == len(expected[of]) > 10
    for number, (one, other) in enumerate(zip(got, expected[of], strict=True)):
        assert (one.dtype, one.device) == (other.dtype, other.device), number
        assert torch.equal(one, other), number


def test_shapes_of_a_file_are_compared_without_memory(tmp_path, monkeypatch):
    """Sizes in a damaged file may stand for more memory than there is."""
    devices = set()

    def check(tensors, expected):
        devices.update(value.device.type for value in expected.values())

    monkeypatch.setattr("openmm_tsf.flows.base.check_shapes", check)
    tsf.TemperatureSteerableFlow(2, 2, 1, (4,)).save(tmp_path / "flow.pt")
    tsf.load_flow(tmp_path / "flow.pt")
    assert devices == {"meta"}
