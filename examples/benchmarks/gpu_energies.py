"""Sections of gpu.py on the device itself and on energies: products, launches, conformations."""

import gc
import json
from functools import partial
from typing import Any

import numpy as np
import openmm
import torch
from gpu_steps import Bench, Entries
from timing import openmm_loop, seconds

from openmm_tsf.potentials.platforms import available_platforms

DTYPES = {"float64": torch.float64, "float32": torch.float32}
BATCHES = (10**6, 192, 3072, 49152)
SMOKE_BATCHES = (256, 192)
#: Conformations whose energies are compared with the Reference platform's.
_COMPARED = 192
_LOOP, _LOOPS = "loop over OpenMM's ", "loops.json"


def conformations(bench: Bench, n: int) -> torch.Tensor:
    """[n, N, 3] on the device in float64: the reference positions with noise of 0.003 nm."""
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    start = torch.tensor(bench.molecule.positions, dtype=torch.float64, device=bench.device)
    shape = (n, *start.shape)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=bench.device)
    return start + 0.003 * noise


def measure_energies(bench: Bench) -> Entries:
    """Microseconds per conformation by batch and precision, and of a loop over OpenMM's."""
    x, reference = compared(bench)
    loops = {}
    for name, label, properties in loop_platforms(bench):
        result = measure_loop(bench, name, properties, x, reference)
        loops[label] = result["us"]
        yield f"{_LOOP}{label}", result
    (bench.directory / _LOOPS).write_text(json.dumps(loops))  # for compiled energies, too
    yield from measure_batches(bench, False)


def measure_compiled_energies(bench: Bench) -> Entries:
    """The same compiled, as the section before it compiled them."""
    # In a rehearsal without a GPU nothing is compiled: C++ would take a minute for each.
    yield from measure_batches(bench, bench.is_cuda or not bench.smoke)


def compared(bench: Bench) -> tuple[torch.Tensor, np.ndarray]:
    """Return conformations, and the energies of the first on the Reference platform."""
    x = conformations(bench, max(SMOKE_BATCHES if bench.smoke else BATCHES))
    context = make_context(bench, "Reference", {})
    return x, energies_of(context, x[:_COMPARED].cpu().numpy())


def measure_batches(bench: Bench, compile: bool) -> Entries:
    x, reference = compared(bench)
    file = bench.directory / _LOOPS
    loops = json.loads(file.read_text()) if file.is_file() else {}
    for name, dtype in DTYPES.items():
        y = x.to(dtype)
        for batch in SMOKE_BATCHES if bench.smoke else BATCHES:
            mode = "compiled" if compile else "eager"
            result = measure_batch(bench, y[:batch], compile, reference)
            ratios = {f"times faster than {k}": round(us / result["us"]) for k, us in loops.items()}
            yield f"{batch} conformations, {name}, {mode}", result | ratios


def measure_batch(
    bench: Bench, x: torch.Tensor, compile: bool, reference: np.ndarray
) -> dict[str, Any]:
    """Time energies of a batch, and compare the first with the Reference platform."""
    bench.reset_memory()
    with bench.potential(len(x), x.dtype, compile) as potential:
        work = partial(potential.energy, x)
        first = bench.seconds(work)
        median, calls = bench.median_seconds(work)
        error = np.abs(potential.energy(x[:_COMPARED]).double().cpu().numpy() - reference)
        if compile and not potential.is_compiled:
            raise RuntimeError("no compiler for this device")
        result = {
            "us": round(1e6 * median / len(x), 5),
            "calls": calls,
            "first_call_seconds": round(first, 2),
            "largest_error_kJ_mol": float(error.max()),
            "peak_MiB": bench.peak_mib(),
        }
    del potential, work
    gc.collect()
    return result


def loop_platforms(bench: Bench) -> list[tuple[str, str, dict[str, str]]]:
    """Return the platforms of the loop, with a label and their properties."""
    if not bench.is_cuda:
        return [("Reference", "Reference platform", {})]
    if "CUDA" not in available_platforms():
        failures = openmm.Platform.getPluginLoadFailures()
        raise RuntimeError(f"OpenMM has no CUDA platform here: {failures}")
    precisions = ("double", "mixed", "single")
    return [("CUDA", f"CUDA platform ({p})", {"Precision": p}) for p in precisions]


def measure_loop(
    bench: Bench, name: str, properties: dict[str, str], x: torch.Tensor, reference: np.ndarray
) -> dict[str, Any]:
    """Time a loop over one Context, of fewer conformations than a batch of torch has."""
    context = make_context(bench, name, properties)
    rows = x[: 20 if bench.smoke else 2000].cpu().numpy()
    openmm_loop(context, rows[:10], False)
    passes = [seconds(partial(openmm_loop, context, rows, False)) for _ in range(3)]
    energies = energies_of(context, x[:_COMPARED].cpu().numpy())
    return {
        "us": round(1e6 * float(np.median(passes)) / len(rows), 2),
        "conformations": len(rows),
        "largest_error_kJ_mol": float(np.abs(energies - reference).max()),
    }


def make_context(bench: Bench, name: str, properties: dict[str, str]) -> openmm.Context:
    integrator = openmm.VerletIntegrator(0.0005)
    platform = openmm.Platform.getPlatform(name)
    return openmm.Context(bench.molecule.system, integrator, platform, properties)


def energies_of(context: openmm.Context, x: np.ndarray) -> np.ndarray:
    energies = []
    for row in x:
        context.setPositions(row)
        energies.append(context.getState(energy=True).getPotentialEnergy()._value)
    return np.array(energies)


def measure_device(bench: Bench) -> Entries:
    """Speed of matrix products, copies and launches."""
    size = 128 if bench.smoke else 8192
    names = ("float64", "float32", "bfloat16") if bench.is_cuda else ("float64", "float32")
    generator = torch.Generator(bench.device).manual_seed(bench.seed)
    for name in names:
        shape, dtype = (size, size), getattr(torch, name)
        a = torch.randn(shape, generator=generator, device=bench.device).to(dtype)
        median, calls = bench.median_seconds(partial(torch.mm, a, a), 1.0)
        yield f"product, {size}, {name}", {"TFLOP/s": 2 * size**3 / median / 1e12, "calls": calls}
    # As the couplings' networks have it: 128 features, B columns.
    batch = 192 if bench.smoke else 49152
    weight = torch.randn((128, 128), generator=generator, device=bench.device)
    columns = torch.randn((128, batch), generator=generator, device=bench.device)
    median, _ = bench.median_seconds(partial(torch.mm, weight, columns), 0.5)
    yield f"product, 128 x 128 x {batch}, float32", {"TFLOP/s": 2 * 128**2 * batch / median / 1e12}
    n_bytes = 2**20 if bench.smoke else 2**32
    source = torch.ones(n_bytes // 8, dtype=torch.float64, device=bench.device)
    target = torch.empty_like(source)
    median, _ = bench.median_seconds(partial(target.copy_, source), 1.0)
    yield "copy", {"GB/s": 2 * n_bytes / median / 1e9}
    small = torch.ones(192, dtype=torch.float64, device=bench.device)

    def launch() -> None:
        for _ in range(1000):
            small.add_(1.0)

    median, _ = bench.median_seconds(launch, 0.5)
    yield "launch of a small operation", {"us": 1e3 * median}
    median, _ = bench.median_seconds(lambda: [small.sum().item() for _ in range(100)], 0.5)
    yield "sum of a small tensor, read by the host", {"us": 1e4 * median}
