"""Sections of gpu.py on sampling: time, waits and memory, round trips, same bits, decisions."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_steps import Bench, Entries, sampling_sizes
from torch.utils._pytree import tree_map_only

from openmm_tsf.analysis.load import load_run
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.potentials import TorchPotential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.workflow.potential_choice import GPU_BLOCK

_PARTS = ("forward_and_log_det", "inverse_and_log_det")


def measure_iterations(bench: Bench) -> Entries:
    """Milliseconds, waits, busy share and memory of an iteration by number of walkers."""
    flow, which = bench.flow()
    for n_walkers in (4, 16) if bench.smoke else (64, 256, 1024, 4096, 16384):
        yield f"{n_walkers} walkers, eager, {which} flow", time_sampler(bench, flow, n_walkers)


def measure_compiled_flow(bench: Bench) -> Entries:
    """The same with the flow's two maps compiled, without and with CUDA graphs."""
    if bench.is_cuda:
        modes: dict[str, dict[str, Any]] = {
            "compiled flow": {"dynamic": False},
            "CUDA graphs": {"dynamic": False, "mode": "reduce-overhead"},
        }
    else:  # a rehearsal: C++ would take minutes
        modes = {"traced flow": {"dynamic": False, "backend": "aot_eager"}}
    for n_walkers in (4,) if bench.smoke else (64, 4096):
        for name, options in modes.items():
            flow, which = bench.flow()
            error = compile_flow(bench, flow, options, 3 * n_walkers)
            result = error | time_sampler(bench, flow, n_walkers)
            torch.compiler.reset()
            yield f"{n_walkers} walkers, {name}, {which} flow", result


@torch.no_grad()
def compile_flow(
    bench: Bench, flow: AugmentedFlow, options: dict[str, Any], n_rows: int
) -> dict[str, Any]:
    """Replace the flow's two maps by compiled ones; return seconds and the largest difference."""
    v = draw_latents(bench, flow, n_rows)
    eager = flow.forward_and_log_det(v)
    for part in _PARTS:
        compiled = torch.compile(getattr(flow, part), **options)
        setattr(flow, part, partial(call_compiled, compiled))
    seconds = bench.seconds(lambda: flow.forward_and_log_det(v))
    (x, momenta), log_det = flow.forward_and_log_det(v)
    seconds += bench.seconds(lambda: flow.inverse_and_log_det(x, momenta))
    (x_eager, _), log_det_eager = eager
    inside = log_det_eager.isfinite()
    return {
        "compile_seconds": round(seconds, 1),
        "largest_difference_nm": float((x - x_eager)[inside].abs().max()),
        "largest_difference_log_det": float((log_det - log_det_eager)[inside].abs().max()),
    }


def call_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a compiled map; the results are copied, since a CUDA graph overwrites its own."""
    torch.compiler.cudagraph_mark_step_begin()
    return tree_map_only(torch.Tensor, torch.clone, function(*arguments))


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
    for compile in (False, True) if bench.is_cuda else (False,):
        # The main job's block: what it compiled is in the cache.
        batch = GPU_BLOCK if compile else n_walkers * n_rungs
        with bench.potential(batch, compile=compile) as potential:
            first, second = (final(bench, flow, potential, n_walkers, 2 * n) for _ in range(2))
            directory = bench.directory / f"resumed_{compile}"
            with bench.sampler(flow, potential, n_walkers) as sampler:
                sampler.run(n, directory, progress=False)
            with bench.sampler(flow, potential, n_walkers) as sampler:
                sampler.resume(directory).run(n, directory, progress=False)
                third = sampler.state.x
            mode = "compiled" if compile else "eager"
            yield (
                f"{2 * n} iterations, {n_walkers} walkers, {mode} energies, {which} flow",
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
