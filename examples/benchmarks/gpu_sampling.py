"""Sections of gpu.py on sampling: time, waits and memory, round trips, same bits, decisions."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from gpu_steps import Bench, Entries, sampling_sizes

from openmm_tsf.analysis.load import load_run
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.compilation import compile_for_sampling
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.potentials import TorchPotential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.workflow.potential_choice import GPU_BLOCK
from openmm_tsf.workflow.sample import flow_block


def measure_iterations(bench: Bench) -> Entries:
    """Milliseconds, waits, busy share and memory of an iteration by number of walkers."""
    flow, which = bench.flow()
    for n_walkers in (4, 16) if bench.smoke else (64, 256, 1024, 4096, 16384):
        yield f"{n_walkers} walkers, eager, {which} flow", time_sampler(bench, flow, n_walkers)


def measure_compiled_flow(bench: Bench) -> Entries:
    """The same with the flow's two maps compiled, without and with CUDA graphs."""
    for n_walkers in (4,) if bench.smoke else (64, 4096):
        for name, graphs in {"compiled flow": False, "CUDA graphs": True}.items():
            flow, which = bench.flow()
            if graphs and not bench.is_cuda:
                continue
            result = time_compiled(bench, flow, n_walkers, graphs)
            torch.compiler.reset()
            yield f"{n_walkers} walkers, {name}, {which} flow", result


def time_compiled(
    bench: Bench, flow: AugmentedFlow, n_walkers: int, graphs: bool
) -> dict[str, Any]:
    """Compile a flow, compare it with the eager one, and time iterations with it."""
    n_rungs, _ = sampling_sizes(bench.settings.sampling)
    v = draw_latents(bench, flow, n_walkers * n_rungs)
    with compiler_of(bench), torch.no_grad():
        start = time.perf_counter()
        compiled = compile_flow(bench, flow, n_walkers, graphs)
        seconds = time.perf_counter() - start
        (x, _), log_det = compiled.forward_and_log_det(v)
        (x_eager, _), log_det_eager = flow.forward_and_log_det(v)
        inside = log_det_eager.isfinite()
        result: dict[str, Any] = {
            "programs": "none" if compiled.programs is None else compiled.programs.describe(),
            "compile_seconds": round(seconds, 1),
            "largest_difference_nm": float((x - x_eager)[inside].abs().max()),
            "largest_difference_log_det": float((log_det - log_det_eager)[inside].abs().max()),
        }
        return result | time_sampler(bench, compiled, n_walkers)


def compile_flow(
    bench: Bench, flow: AugmentedFlow, n_walkers: int, graphs: bool | None = None
) -> AugmentedFlow:
    """Return the flow compiled as production compiles it."""
    n_rungs, _ = sampling_sizes(bench.settings.sampling)
    return compile_for_sampling(flow, flow_block(n_walkers, n_rungs, bench.device), graphs)


@contextmanager
def compiler_of(bench: Bench) -> Iterator[None]:
    """In a rehearsal without a GPU only trace programs, and run them eagerly: C++ takes minutes."""

    def trace(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiler = torch._dynamo.optimize("eager", nopython=True, dynamic=options["dynamic"])
        traced: Callable[..., Any] = compiler(function)
        return traced

    if bench.is_cuda or not bench.smoke:
        yield
        return
    import torch._dynamo

    with mock.patch.object(torch, "compile", trace):
        yield


@torch.no_grad()
def draw_latents(bench: Bench, flow: AugmentedFlow, n: int) -> torch.Tensor:
    generator = torch.Generator(flow.device).manual_seed(bench.seed)
    return flow.sample_prior(n, flow.reference_temperature, generator)


def time_sampler(bench: Bench, flow: AugmentedFlow, n_walkers: int) -> dict[str, Any]:
    """Time iterations of a sampler, and count what they make the host wait for."""
    n_rungs, period = sampling_sizes(bench.settings.sampling)
    bench.reset_memory()
    with (
        bench.potential(n_walkers * n_rungs) as potential,
        bench.sampler(flow, potential, n_walkers) as sampler,
    ):
        run = partial(sampler.run, period, progress=False)
        first = bench.seconds(run)
        median, calls = bench.median_seconds(run, 0.5 if bench.smoke else 4.0)
        waits = bench.count_waits(run)
        profile = bench.profile(run)
        result = {
            "ms": round(1e3 * median / period, 3),
            "us_per_walker_and_rung": round(1e6 * median / period / (n_walkers * n_rungs), 3),
            "iterations": calls * period,
            "first_iterations_seconds": round(first, 2),
            "waits_per_iteration": None if waits is None else waits / period,
            "peak_MiB": bench.peak_mib(),
        }
        if profile is not None:
            result["busy_share"] = round(profile["busy_seconds"] / median, 3)
            result["kernels_per_iteration"] = profile["kernels"] / period
    return result


@torch.no_grad()
def measure_round_trips(bench: Bench) -> Entries:
    """Deviations of D(D^-1(x)) from x, in batches of the same size and of others."""
    flow, which = bench.flow()
    batches = (24, 96) if bench.smoke else (192, 3072, 49152)
    precisions: list[tuple[str, torch.dtype | None, bool]] = [
        ("float64", None, False),
        ("float32", torch.float32, False),
    ]
    if bench.is_cuda:
        precisions.append(("float32 (TF32)", torch.float32, True))
    for name, dtype, tf32 in precisions:
        set_conditioner_dtype(flow.network, dtype)
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        try:
            for batch in batches:
                result = round_trip_errors(bench, flow, batch)
                yield f"{batch} configurations, {name} networks, {which} flow", result
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def round_trip_errors(bench: Bench, flow: AugmentedFlow, batch: int) -> dict[str, float]:
    """Map configurations to latents, and back in batches of several sizes; errors in nm."""
    generator = torch.Generator(flow.device).manual_seed(bench.seed)
    kelvin = flow.reference_temperature
    draws = flow.sample(batch, kelvin, generator)
    inside = draws.log_prob.isfinite()
    x, momenta = draws.x[inside], draws.momenta[inside]
    copies = flow.draw_copies(x, kelvin, generator)[0] if flow.overlap else None
    v, _ = flow.inverse_and_log_det(x, momenta, copies)
    n = len(v)
    errors = {}
    for label, size in {"same size": n, "halves": -(-n // 2), "of 12": 12}.items():
        parts = v.split(size)[: 64 if size == 12 else None]
        back = torch.cat([flow.forward_and_log_det(part)[0][0] for part in parts])
        errors[label] = float((flow.match_pose(back, x[: len(back)]) - x[: len(back)]).abs().max())
    return errors


def measure_bits(bench: Bench) -> Entries:
    """Whether a chain has the same bits a second time, and after it was resumed."""
    flow, which = bench.flow()
    n_walkers, n = (4, 8) if bench.smoke else (64, 50)
    n_rungs, _ = sampling_sizes(bench.settings.sampling)
    # Energies compiled or not, then the flow as well.
    modes = [(False, False), (True, False), (True, True)] if bench.is_cuda else [(False, False)]
    for i, (energies, maps) in enumerate(modes if bench.is_cuda else [*modes, (False, True)]):
        # The main job's block: what it compiled is in the cache.
        batch = GPU_BLOCK if energies else n_walkers * n_rungs
        with compiler_of(bench), bench.potential(batch, compile=energies) as potential:
            used = compile_flow(bench, flow, n_walkers) if maps else flow
            first, second = (final(bench, used, potential, n_walkers, 2 * n) for _ in range(2))
            directory = bench.directory / f"resumed_{i}"
            with bench.sampler(used, potential, n_walkers) as sampler:
                sampler.run(n, directory, progress=False)
            with bench.sampler(used, potential, n_walkers) as sampler:
                sampler.resume(directory).run(n, directory, progress=False)
                third = sampler.state.x
            mode = f"{'compiled' if energies else 'eager'} energies{', compiled' * maps}"
            yield (
                f"{2 * n} iterations, {n_walkers} walkers, {mode}, {which} flow",
                {
                    "same_bits_twice": torch.equal(first, second),
                    "same_bits_resumed": torch.equal(first, third),
                },
            )


def final(
    bench: Bench, flow: AugmentedFlow, potential: TorchPotential, n_walkers: int, n: int
) -> torch.Tensor:
    with bench.sampler(flow, potential, n_walkers) as sampler:
        sampler.run(n, progress=False)
        return sampler.state.x


def measure_writing(bench: Bench) -> Entries:
    """The share of a run's time that is not its iterations: collecting, writing, checkpoints."""
    flow, which = bench.flow()
    n_rungs, period = sampling_sizes(bench.settings.sampling)
    for n_walkers in (4,) if bench.smoke else (64, 4096):
        with (
            bench.potential(n_walkers * n_rungs) as potential,
            bench.sampler(flow, potential, n_walkers) as sampler,
        ):
            sampler.run(period, progress=False)
            n = period * (2 if bench.smoke else 5)
            directory = bench.directory / f"written_{n_walkers}"
            alone = time_run(bench, sampler, n)
            total = time_run(bench, sampler, n, directory)
            inside = load_run(directory).segments.wall_seconds
            yield (
                f"{n_walkers} walkers, {n} iterations, {which} flow",
                {
                    "seconds_not_written": round(alone, 3),
                    "seconds_written": round(total, 3),
                    "of_iterations": round(inside, 3),
                    "writing_share": round(1 - inside / total, 4),
                    "frames_per_second": round(n * n_walkers * n_rungs / total),
                },
            )


def time_run(bench: Bench, sampler: ParallelTempering, n: int, directory: Any = None) -> float:
    start = time.perf_counter()
    sampler.run(n, directory, progress=False)
    bench.synchronize()
    return time.perf_counter() - start
