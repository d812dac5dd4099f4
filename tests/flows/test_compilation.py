"""Flows whose maps are compiled: same maps, blocks of one size, and what happens without compiler.

By default torch's compiler traces the maps and runs them as they are: C++ takes a while.
"""

import logging

import numpy as np
import pytest
import torch

from openmm_tsf.analysis.load import load_run
from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.flows.compilation import compile_for_sampling
from openmm_tsf.potentials import DoubleWell
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels import FlowIndependence, FlowWalk, PlainSwap, SteeredSwap
from tests.support.simulated_cuda import simulated_cuda

ROWS = 16
LADDER = (0.7, 1.0, 1.6)


@pytest.fixture
def traced(monkeypatch):
    """Let programs be traced, and run without being compiled."""

    def trace(function, *, fullgraph, dynamic, options):
        return torch._dynamo.optimize("eager", nopython=fullgraph, dynamic=dynamic)(function)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", trace)


def trained(cls=TemperatureSteerableFlow, conditioner_dtype=None, n=2):
    """Return a flow on R^n whose networks are not zero."""
    flow = cls(n, 0 if cls is RealNVPFlow else n, 2, (8,), seed=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    flow.conditioner_dtype = conditioner_dtype
    return flow


def draws(flow, n):
    with torch.no_grad():
        return flow.sample_prior(n, 1.0, torch.Generator(flow.device).manual_seed(3))


@pytest.mark.parametrize(
    ("cls", "dtype"), [(TemperatureSteerableFlow, torch.float32), (RealNVPFlow, None)]
)
@torch.no_grad()
def test_both_maps_are_those_of_the_flow_and_rows_do_not_know_of_each_other(traced, cls, dtype):
    flow = trained(cls, dtype)
    compiled = compile_for_sampling(flow, ROWS)
    assert compiled is not flow
    assert flow.programs is None
    assert compiled.programs.describe() == {"rows": ROWS, "cuda_graphs": False}
    v = draws(flow, 40)
    (x, p), log_det = compiled.forward_and_log_det(v)
    (x_eager, p_eager), log_det_eager = flow.forward_and_log_det(v)
    tolerance = {"rtol": 0.0, "atol": 1e-12 if dtype is None else 1e-5}
    for part, expected in ((x, x_eager), (p, p_eager), (log_det, log_det_eager)):
        torch.testing.assert_close(part, expected, **tolerance)
    back, inverse_log_det = compiled.inverse_and_log_det(x, p)
    torch.testing.assert_close(back, v, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0.0, atol=1e-12)
    for n in (0, 1, 15, 16, 17):
        (few, _), few_log_det = compiled.forward_and_log_det(v[:n])
        assert torch.equal(few, x[:n])
        assert torch.equal(few_log_det, log_det[:n])
        assert torch.equal(compiled.inverse_and_log_det(x[:n], p[:n])[0], back[:n])


def test_a_compiled_flow_has_no_derivatives_and_does_not_change(traced):
    flow = trained()
    compiled = compile_for_sampling(flow, ROWS)
    v = draws(flow, 3)
    with pytest.raises(RuntimeError, match="has no derivatives: use the flow itself"):
        compiled.forward_and_log_det(v.requires_grad_())
    assert all(p.requires_grad for p in flow.parameters())
    with pytest.raises(RuntimeError, match="must not change: compile it again"):
        compiled.conditioner_dtype = torch.float32
    content = {name: value + 1 for name, value in flow.state_dict().items() if "weight" in name}
    compiled.load_state_dict(content, strict=False)
    with pytest.raises(RuntimeError, match="must not change: compile it again"):
        compiled.forward_and_log_det(draws(flow, 3))
    with pytest.raises(ValueError, match="got a compiled one"):
        compile_for_sampling(compiled, ROWS)
    with pytest.raises(ValueError, match="rows: expected"):
        compile_for_sampling(flow, 0)
    with pytest.raises(ValueError, match="cuda_graphs: expected None or False on a CPU"):
        compile_for_sampling(flow, ROWS, cuda_graphs=True)
    with pytest.raises(ValueError, match="expected one in float64"):
        compile_for_sampling(trained().float(), ROWS)


def test_a_compiled_flow_is_not_converted_or_moved(traced):
    compiled = compile_for_sampling(trained(), ROWS)
    with simulated_cuda():
        moved = compiled.to("cuda")
        with pytest.raises(RuntimeError, match="must not change: compile it again"):
            moved.forward_and_log_det(draws(moved, 3))
    compiled = compile_for_sampling(trained(), ROWS).float()
    with pytest.raises(RuntimeError, match="must not change: compile it again"):
        compiled.forward_and_log_det(draws(compiled, 3))


def test_one_process_compiles_as_many_flows_as_it_likes(traced):
    """Torch compiles eight versions of one function, here one, and no more."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (1, 2, 3):
            flow = trained(n=n)
            assert compile_for_sampling(flow, ROWS) is not flow


def test_programs_that_are_not_each_others_inverse_are_refused(monkeypatch):
    def wrong(function, **options):
        if "inverse" not in function.__name__:
            return function
        return lambda *given: tuple(part + 1e-4 for part in function(*given))

    monkeypatch.setattr(torch, "compile", wrong)
    with pytest.raises(RuntimeError, match=r"it is not its own inverse by .*, expected 1e-06"):
        compile_for_sampling(trained(), ROWS)
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *given: f(2 * given[0]))
    with pytest.raises(RuntimeError, match="it differs from the flow by"):
        compile_for_sampling(trained(), ROWS)


def test_without_a_compiler_the_flow_is_evaluated_eagerly_and_that_is_told(monkeypatch, caplog):
    def missing(function, **options):
        def call(*given):
            raise RuntimeError("Failed to find C compiler. Please specify via CC")

        return call

    monkeypatch.setattr(torch, "compile", missing)
    flow = trained()
    assert compile_for_sampling(flow, ROWS) is flow
    assert "the flow is not compiled, and evaluated eagerly: Failed to find C" in caplog.text


def test_without_cuda_graphs_kernels_are_launched_and_that_is_told(monkeypatch, caplog):
    """On the simulated device, where nothing is compiled."""
    recorded = []

    def plain(function, *, options, **others):
        recorded.append(options)
        if options["triton.cudagraphs"] and broken:
            raise RuntimeError("capture failed\nand more")
        return function

    monkeypatch.setattr(torch, "compile", plain)
    for broken in (True, False):
        with simulated_cuda():
            flow = trained().to("cuda")
            compiled = compile_for_sampling(flow, ROWS)
            assert compiled.programs.describe() == {"rows": ROWS, "cuda_graphs": not broken}
            v = draws(flow, 20)
            with torch.no_grad():
                (x, _), _ = compiled.forward_and_log_det(v)
                (expected, _), _ = flow.forward_and_log_det(v)
            assert x.device == v.device
            torch.testing.assert_close(x.cpu(), expected.cpu(), rtol=0.0, atol=1e-12)
    message = "no CUDA graphs, launching kernels one by one: RuntimeError: capture failed"
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [message]
    assert [options["triton.cudagraphs"] for options in recorded] == [
        True,
        False,
        False,
        True,
        True,
    ]


def sampler_of(flow, potential, n_walkers=12):
    parts = flow, potential, LADDER
    kernels = [
        FlowIndependence(*parts, n_steps=2, round_trip_interval=1),
        FlowWalk(*parts, sigma=0.6, round_trip_interval=1),
        SteeredSwap(*parts, round_trip_interval=1),
        PlainSwap(LADDER, potential.boltzmann_constant),
    ]
    return ParallelTempering(None, flow, LADDER, n_walkers, kernels, potential, seed=3)


def double_well():
    return DoubleWell(*(torch.tensor([c, c]).double() for c in (0.2, -1.0, 0.4)))


def test_a_run_records_its_programs_and_is_resumed_with_the_same_bits(traced, tmp_path):
    flow = trained(conditioner_dtype=torch.float32)
    compiled = compile_for_sampling(flow, ROWS)
    start = torch.zeros(12, 3, 2)
    ends = []
    for name, parts in (("whole", (8,)), ("part", (5, 3))):
        for i, n in enumerate(parts):
            sampler = sampler_of(compiled, double_well())
            if i:
                sampler.resume(tmp_path / name)
            else:
                sampler.set_positions(start)
            sampler.run(n, tmp_path / name, progress=False)
        ends.append(sampler.state.x)
    assert torch.equal(*ends)
    choices = load_run(tmp_path / "whole").config["choices"]
    assert choices["flow_programs"] == {"rows": ROWS, "cuda_graphs": False}
    with pytest.warns(UserWarning, match=r"flow_programs .*resumed with None; the"):
        sampler_of(flow, double_well()).resume(tmp_path / "whole")


def check_populations(device):
    potential = double_well()
    flow = trained(conditioner_dtype=None if device == "cuda" else torch.float32).to(device)
    compiled = compile_for_sampling(flow, 256)
    assert compiled is not flow
    assert compiled.programs.cuda_graphs == (device == "cuda")
    sampler = sampler_of(compiled, potential, 256)
    sampler.set_positions(torch.zeros(256, 3, 2))
    sampler.tune(100)
    x = sampler.run(200, progress=False, collect=True)
    for rung, temperature in enumerate(LADDER):
        positive = (x[:, :, rung] > 0).double().mean(dim=0).cpu().numpy()  # of each walker [W, d]
        error = positive.std(axis=0, ddof=1) / np.sqrt(len(positive))
        expected = potential.probability_positive(temperature).numpy()
        assert np.abs((positive.mean(axis=0) - expected) / error).max() < 4


@pytest.mark.slow
def test_populations_of_an_exact_target_with_a_compiled_flow():
    check_populations("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_populations_of_an_exact_target_with_cuda_graphs():
    check_populations("cuda")
