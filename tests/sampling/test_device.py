"""Sampling with everything on one GPU: on a simulated one the CPU's bits, and one wait.

Tests marked ``gpu`` run the same on a real one, whose random numbers are others.
"""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.io.files import read_json
from openmm_tsf.metropolis import InvalidWalker
from openmm_tsf.potentials import DoubleWell
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.langevin_openmm import OpenMMLangevin
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo
from openmm_tsf.sampling.tempering import ParallelTempering
from tests.support import count_waits, invariance
from tests.support.constrained_cases import ConstrainedCase
from tests.support.exact_cases import TreeCase, assert_energies_are_stored
from tests.support.examples import EXAMPLES
from tests.support.simulated_cuda import CUDA, simulated_cuda

N_WALKERS = 12
LADDER = (0.7, 1.0, 1.6)
IN_TORCH = [name for name, e in invariance.KERNELS.items() if e.kind is not OpenMMLangevin]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def moved(value):
    """Return a copy of an object of the tests whose tensors and modules are on the GPU."""
    new = copy.copy(value)
    for name, item in vars(value).items():
        if isinstance(item, torch.nn.Module):
            setattr(new, name, copy.deepcopy(item).to("cuda"))
        elif isinstance(item, torch.Tensor):
            setattr(new, name, item.to("cuda"))
    return new


def on_gpu(case):
    """Return a case with its flow, and the potential of the molecule, on the GPU."""
    case = copy.copy(case)
    case.flow = copy.deepcopy(case.flow).to("cuda")
    if isinstance(case, TreeCase):
        case.potential = copy.copy(case.potential)
        case.potential.tree = moved(case.tree)
    return case


def iterate(kernels, case, start, n, counts=None):
    """Return the state after 1 + n iterations, what the kernels counted in n, and the waits."""
    parts = (case.flow, case.ladder, len(start.x), kernels, case.potential, 5)
    with ParallelTempering(None, *parts) as sampler:
        sampler.set_positions(start.x, start.velocities)
        sampler.run(1, progress=False)  # constants are copied to the GPU once
        if counts is not None:
            counts.clear()
        sampler.run(n, progress=False)
        waits = {} if counts is None else dict(counts.waits)
        return sampler.state, sampler.totals, waits


def molecule_of(name):
    entry = invariance.KERNELS[name]
    pose_kept = entry.keeps_pose or entry.is_swap
    return invariance.tree(entry.flows[0], entry.rungs[-1], pose_kept)


def model_of(name):
    return invariance.model("double-well")


def constrained_of(name):
    return ConstrainedCase(pose_kept=False, measure="stiff")


def every_case():
    """Yield kernels with the function that makes a case; few with a molecule are not slow."""
    yield pytest.param("mala", constrained_of, id="mala, constraints", marks=pytest.mark.slow)
    quick = ("walk", "steered swap", "batched langevin", "latent mala")
    for name in IN_TORCH:
        if invariance.KERNELS[name].on_model is not None:
            yield pytest.param(name, model_of, id=name)
        marks = [] if name in quick else [pytest.mark.slow]
        yield pytest.param(name, molecule_of, id=f"{name}, molecule", marks=marks)


def kernel_on_gpu(name, case, monkeypatch):
    """Return the kernel of a case on the GPU; its whitened coordinates are moved there, too."""
    fitted = invariance.layers
    with monkeypatch.context() as patch:
        patch.setattr(
            invariance, "layers", lambda of, *mode: copy.deepcopy(fitted(case, *mode)).to("cuda")
        )
        gpu_case = on_gpu(case)
        return invariance.KERNELS[name](gpu_case), gpu_case


@pytest.mark.parametrize(("name", "case_of"), list(every_case()))
def test_every_kernel_gives_the_bits_of_the_cpu_and_waits_once_an_iteration(
    name, case_of, monkeypatch
):
    case = case_of(name)
    kernel = invariance.KERNELS[name](case)
    start = case.start(N_WALKERS, torch.Generator().manual_seed(1))
    expected, totals, _ = iterate([kernel], case, start, 2)
    with simulated_cuda() as counts:
        kernel, gpu_case = kernel_on_gpu(name, case, monkeypatch)
        state, gpu_totals, waits = iterate([kernel], gpu_case, start, 2, counts)
        assert state.x.device == state.energy.device == state.replica.device == CUDA
        state = state.to(torch.device("cpu"))
    (info,), (gpu_info,) = totals.values(), gpu_totals.values()
    assert torch.equal(gpu_info.accepted, info.accepted)
    assert torch.equal(gpu_info.proposed, info.proposed)
    for count in ("rejected_non_finite", "mirror_images", "outside_domain", "not_reversible"):
        assert getattr(gpu_info, count) == getattr(info, count), count
    # The CPU leaves out rows outside the domain, and rounds those of a smaller batch otherwise.
    assert gpu_info.n_evaluations >= info.n_evaluations
    rounding = 0.0 if info.outside_domain + info.mirror_images == 0 else 1e-10
    for field in ("x", "velocities", "energy", "replica"):
        value, other = getattr(state, field), getattr(expected, field)
        assert (value is None) == (other is None), field
        if value is not None:
            assert float((value - other).abs().max()) <= rounding, (type(case).__name__, field)
    if name != "one of":  # it waits for the number of the kernel that is drawn
        assert sum(waits.values()) == 2, waits


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", IN_TORCH)
def test_every_kernel_runs_on_a_real_gpu(name, monkeypatch):
    for case_of in (model_of, molecule_of):
        if case_of is model_of and invariance.KERNELS[name].on_model is None:
            continue
        case = case_of(name)
        start = case.start(N_WALKERS, torch.Generator().manual_seed(1))
        kernel, gpu_case = kernel_on_gpu(name, case, monkeypatch)
        state, totals, _ = iterate([kernel], gpu_case, start, 2)
        assert state.x.device.type == "cuda"
        assert_energies_are_stored(gpu_case.potential, state)
        (info,) = totals.values()
        assert int(info.proposed.sum()) > 0
        assert info.accepted.device.type == "cpu"


def sampler_of(flow, potential, n_walkers, seed=3, before=()):
    kernels = [
        *before,
        FlowIndependence(flow, potential, LADDER),
        FlowWalk(flow, potential, LADDER, sigma=0.6, n_steps=2),
        PlainSwap(LADDER, potential.boltzmann_constant),
    ]
    return ParallelTempering(None, flow, LADDER, n_walkers, kernels, potential, seed)


class Poison:
    """A kernel that gives a walker an infinite energy while `active`."""

    name, exact, temperatures, counts_shape = "poison", True, LADDER, (3,)

    def __init__(self, active):
        self.active = active

    def __call__(self, state, generator):
        energy = state.energy.clone()
        if self.active:
            energy[2, 1] = torch.inf
        return state.evolve(energy=energy), KernelInfo.zero(self.counts_shape)

    def settings(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, content):
        pass


def test_an_invalid_walker_is_an_error_that_names_the_kernel_and_changes_nothing():
    case = invariance.model("double-well")
    with simulated_cuda():
        flow, ends = copy.deepcopy(case.flow).to("cuda"), []
        for active in (True, False):
            poison = Poison(active)
            sampler = sampler_of(flow, case.potential, 4, before=[poison])
            sampler.set_positions(torch.zeros(4, 3, 3))
            if active:
                with pytest.raises(InvalidWalker, match=r"flow_independent: .* at row 7 \(1 of"):
                    sampler.run(1, progress=False)
                assert sampler.state.iteration == 0
                poison.active = False
            sampler.run(1, progress=False)
            ends.append(sampler.state.x.cpu())
        assert torch.equal(*ends)


def test_the_round_trip_is_checked_without_a_wait():
    case = invariance.model("double-well")
    start = case.start(N_WALKERS, torch.Generator().manual_seed(1))
    with simulated_cuda() as counts:
        gpu_case = on_gpu(case)
        parts = (gpu_case.flow, case.potential, LADDER, 0.5)
        walk = FlowWalk(*parts, round_trip_interval=1)
        _, _, waits = iterate([walk], gpu_case, start, 2, counts)
    assert sum(waits.values()) == 2, waits


def test_a_flow_that_is_not_its_own_inverse_is_an_error():
    case = invariance.model("double-well")
    with simulated_cuda():
        flow = copy.deepcopy(case.flow).to("cuda")
        inverse = flow.inverse_and_log_det
        flow.inverse_and_log_det = lambda x, p, *copies: tuple(
            part + 1e-4 for part in inverse(x, p, *copies)
        )
        sampler = sampler_of(flow, case.potential, 4)
        sampler.set_positions(torch.zeros(4, 3, 3))
        with pytest.raises(RuntimeError, match="misses the positions by"):
            sampler.run(1, progress=False)


def test_networks_of_a_flow_that_samples_on_a_gpu_have_its_precision():
    flow = copy.deepcopy(invariance.model("double-well").flow)
    flow.conditioner_dtype = torch.float32
    assert place_for_sampling(flow, torch.device("cpu")).conditioner_dtype == torch.float32
    with simulated_cuda():
        placed = place_for_sampling(flow, torch.device("cuda", 0))
        assert placed.device.type == "cuda"
        assert placed.conditioner_dtype is None


@pytest.mark.parametrize(
    "device", [nullcontext, pytest.param(None, marks=[pytest.mark.gpu, needs_gpu])]
)
def test_flow_and_checkpoint_there_and_back(device, tmp_path):
    device = simulated_cuda() if device is nullcontext else nullcontext()
    case = invariance.model("double-well")
    with device:
        flow = copy.deepcopy(case.flow).to("cuda")
        flow.save(tmp_path / "flow.pt")
        loaded = load_flow(tmp_path / "flow.pt")
        assert loaded.device.type == "cpu"
        v = torch.ones(5, 5, dtype=torch.float64)
        (x, _), _ = loaded.forward_and_log_det(v)
        (there, _), _ = flow.forward_and_log_det(v.to("cuda"))
        torch.testing.assert_close(there.cpu(), x, rtol=1e-12, atol=1e-12)

        whole = sampler_of(flow, case.potential, 6)
        whole.set_positions(torch.zeros(6, 3, 3))
        whole.run(6, tmp_path / "whole", progress=False)
        part = sampler_of(flow, case.potential, 6)
        part.set_positions(torch.zeros(6, 3, 3))
        part.run(4, tmp_path / "part", progress=False)
        again = sampler_of(flow, case.potential, 6, seed=99).resume(tmp_path / "part")
        again.run(2, tmp_path / "part", progress=False)
        assert torch.equal(again.state.x.cpu(), whole.state.x.cpu())
        content = torch.load(tmp_path / "part" / "checkpoint.pt", weights_only=True)
        assert content["state"]["x"].device.type == "cpu"
        assert content["generator_device"] == "cuda"
    on_cpu = sampler_of(copy.deepcopy(case.flow), case.potential, 6)
    with pytest.raises(ValueError, match="device: this run draws its random numbers on 'cuda'"):
        on_cpu.resume(tmp_path / "part")


@pytest.mark.slow
def test_the_default_preset_waits_once_an_iteration_and_a_step_of_training(tmp_path):
    """As the committed file says."""
    assert count_waits.main(["--output", str(tmp_path / "waits.json")]) == 0
    now, committed = (read_json(path / "waits.json") for path in (tmp_path, EXAMPLES / "results"))
    for what in ("iterations", "training_steps"):
        assert now[what]["waits"] == committed[what]["waits"]
        assert set(now[what]["waits"]) == {1}


@pytest.mark.parametrize("intervals", [{}, {"save_interval": 3, "numbers_interval": 1}])
def test_writing_waits_for_the_device_in_the_thread_of_the_writer_only(intervals, tmp_path):
    """One packet an iteration, which the iteration does not wait for: the CPU's files."""
    case, waited = invariance.model("double-well"), []
    start = case.start(N_WALKERS, torch.Generator().manual_seed(1))
    options = {"checkpoint_interval": 2, "progress": False, **intervals}
    on_cpu = sampler_of(case.flow, case.potential, N_WALKERS)
    on_cpu.set_positions(start.x)
    on_cpu.run(6, tmp_path / "cpu", **options)
    with simulated_cuda() as counts:
        for output in (None, tmp_path / "cuda"):
            sampler = sampler_of(copy.deepcopy(case.flow).to("cuda"), case.potential, N_WALKERS)
            sampler.set_positions(start.x)
            sampler.run(1, output, **options)
            counts.clear()
            sampler.run(5, output, **options)
            of_flow = sum(n for (_, place), n in counts.waits.items() if "provenance" in place)
            in_thread = {kind: n for (kind, _), n in counts.waits.items() if "in writer" in kind}
            waited.append(counts.n_waits - sum(in_thread.values()) - of_flow)
    assert waited == [5, 5], counts  # the flow is compared once a call, with what was recorded
    assert in_thread["event in writer_0"] == 5
    numbers = [load_run(tmp_path / name, start=0) for name in ("cpu", "cuda")]
    for name in ("energy", "replica", "iteration"):
        np.testing.assert_array_equal(*(getattr(run, name) for run in numbers))
    frames = [
        np.concatenate([np.load(f)["positions"] for f in sorted((run.path / "segments").iterdir())])
        for run in numbers
    ]
    np.testing.assert_array_equal(*frames)


@needs_gpu
@pytest.mark.gpu
def test_populations_of_an_exact_target_on_a_real_gpu():
    potential = DoubleWell(*(torch.tensor([c, c]).double() for c in (0.2, -1.0, 0.4)))
    flow = invariance.model("double-well").flow.__class__(2, 2, 2, (8,), 1.0, seed=2).to("cuda")
    sampler = sampler_of(flow, potential, 512)
    sampler.set_positions(torch.zeros(512, 3, 2))
    sampler.tune(200)
    sampler.run(200, progress=False)
    x = sampler.run(500, progress=False, collect=True)
    for rung, temperature in enumerate(LADDER):
        positive = (x[:, :, rung] > 0).double().mean(dim=0).cpu().numpy()  # of each walker [W, d]
        error = positive.std(axis=0, ddof=1) / np.sqrt(len(positive))
        expected = potential.probability_positive(temperature).numpy()
        assert np.abs((positive.mean(axis=0) - expected) / error).max() < 4
