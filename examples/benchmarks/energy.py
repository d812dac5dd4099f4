"""Time per energy: TorchPotential and OpenMMPotential, compared with a loop over one Context.

    python examples/benchmarks/energy.py                   # batches 1 to 65536, up to 10 minutes
    python examples/benchmarks/energy.py --max-batch 256   # some minutes, compilation most of it
    python examples/benchmarks/energy.py --device cuda     # batches to 10^6 on a GPU

Times are microseconds per conformation of alanine dipeptide, medians over repeats. All methods are
measured alternately in one process, so that the ratios, medians over repeats of loop time / time in
the same repeat, do not depend on the machine's other work; where it is busy, read those of CPU
time. The loop runs on OpenMM's fastest platform for the System, measured first, on one core.
Compilation is timed in separate processes, without and with torch's disk cache. All numbers are
written to a JSON file.
"""

import argparse
import json
import os
import platform as host
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from bridge import ONE_CORE, measure_cores, measure_interpreter, measure_steps
from timing import Method, openmm_loop, time_alternately, time_clocks

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from openmm_tsf.potentials.platforms import available_cores, available_platforms
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem

#: Speed of a batch, relative to the loop on the fastest platform, that is aimed at.
TARGETS = {
    "amber99sbildn-obc2": {"energy": 4.0, "forces": 2.0},
    "ff96-obc1": {"energy": 40.0, "forces": 20.0},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LOOP_SECONDS = 0.1  # of one measurement of the loop
LOOP = "OpenMM loop"


def conformations(molecule: MolecularSystem, n: int) -> torch.Tensor:
    """[n, N, 3]: the reference positions with noise of 0.003 nm."""
    noise = np.random.default_rng(0).normal(0.0, 0.003, size=(n, molecule.n_atoms, 3))
    return torch.from_numpy(molecule.positions + noise)


def fastest_platform(molecule: MolecularSystem, names: list[str]) -> dict[str, Any]:
    """Return microseconds of the loop by platform, and the names of the fastest."""
    rows = conformations(molecule, 64).numpy()
    measured: dict[str, Any] = {"energy": {}, "forces": {}}
    for name in names:
        properties = ONE_CORE.get(name, {})
        context = openmm.Context(
            molecule.system,
            openmm.VerletIntegrator(0.0005),
            openmm.Platform.getPlatform(name),
            properties,
        )
        for key in ("energy", "forces"):
            method = Method(partial(openmm_loop, context, rows, key == "forces"), len(rows))
            method.work()
            measured[key][name] = round(min(time_clocks(method, 1)[0] for _ in range(5)), 2)
    measured["fastest"] = {key: min(measured[key], key=measured[key].get) for key in measured}
    return measured


class Methods:
    """The methods that are compared on one System."""

    def __init__(self, molecule: MolecularSystem, dtype: torch.dtype, device: str) -> None:
        self.molecule, self.dtype, self.device = molecule, dtype, device
        names = available_platforms()
        self.platforms = fastest_platform(molecule, names)
        make = TorchPotential.from_system
        self.eager = make(molecule.system, dtype, device, positions=molecule.positions)
        self.compiled = make(
            molecule.system, dtype, device, compile=True, positions=molecule.positions
        )
        self.bridges = {
            name: OpenMMPotential(molecule.system, name, ONE_CORE.get(name, {}), n_contexts=1)
            for name in set(self.platforms["fastest"].values())
        }
        self.contexts = {
            name: bridge.make_context(openmm.VerletIntegrator(0.0005))
            for name, bridge in self.bridges.items()
        }

    def close(self) -> None:
        for potential in (self.eager, self.compiled, *self.bridges.values()):
            potential.close()

    def of(self, x: torch.Tensor, key: str, n_threads: list[int]) -> dict[str, Method]:
        """Return the methods for a batch x, energies alone or with forces."""
        fastest, forces = self.platforms["fastest"][key], key == "forces"
        size = len(x)
        n_rows = max(1, int(1e6 * LOOP_SECONDS / self.platforms[key][fastest]))
        rows = x[: min(size, n_rows)]
        methods = {
            LOOP: Method(
                partial(openmm_loop, self.contexts[fastest], rows.numpy(), forces), len(rows)
            ),
            "OpenMMPotential": Method(
                partial(evaluate, self.bridges[fastest], rows, forces), len(rows)
            ),
        }
        y = x.to(self.device, self.dtype)
        for threads in n_threads:
            label = "" if threads == 1 else f", {threads} cores"
            for name, potential in (("eager", self.eager), ("compiled", self.compiled)):
                work = partial(evaluate, potential, y, forces)
                methods[f"{name}{label}"] = Method(work, size, threads)
        return methods


def evaluate(potential: OpenMMPotential | TorchPotential, x: torch.Tensor, forces: bool) -> None:
    _ = potential.energy_and_forces(x) if forces else potential.energy(x)
    if x.is_cuda:
        torch.cuda.synchronize()


def compile_times(force_field: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return seconds of compilation in new processes: the first, and one with torch's cache."""
    command = [sys.executable, __file__, "--compile-only", "--force-field", force_field]
    command += ["--dtype", arguments.dtype, "--device", arguments.device]
    measured = {}
    for name in ("first", "from_cache"):
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        measured[name] = json.loads(out.splitlines()[-1])
        print(f"{force_field}: compiled, {name}: {measured[name]}", flush=True)
    return measured


def compile_only(force_field: str, arguments: argparse.Namespace) -> None:
    molecule = alanine_dipeptide(force_field)
    potential = TorchPotential.from_system(
        molecule.system,
        DTYPES[arguments.dtype],
        arguments.device,
        compile=True,
        positions=molecule.positions,
    )
    x = conformations(molecule, 16384).to(arguments.device, DTYPES[arguments.dtype])
    rows = x[:256] if arguments.device == "cpu" else x
    potential.energy(rows)
    energy = potential.compile_seconds
    potential.energy_and_forces(rows)
    if not potential.is_compiled:
        raise SystemExit("no compiler: the warning above says why")
    total = potential.compile_seconds
    print(json.dumps({"energy": round(energy, 1), "forces": round(total - energy, 1)}))


def measure_system(
    force_field: str, batches: list[int], n_threads: list[int], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return all measurements of one System."""
    report: dict[str, Any] = {"targets": TARGETS[force_field]}
    report["compile_seconds"] = compile_times(force_field, arguments)
    molecule = alanine_dipeptide(force_field)
    x = conformations(molecule, batches[-1])
    torch.set_num_threads(1)
    methods = Methods(molecule, DTYPES[arguments.dtype], arguments.device)
    report["plain_loop_by_platform_us"] = methods.platforms
    for key in ("energy", "forces"):
        report[key] = {}
        for size in batches:
            measured = time_alternately(
                methods.of(x[:size], key, n_threads), LOOP, arguments.repeats, arguments.budget
            )
            report[key][size] = measured
        print_table(force_field, key, report, arguments.device)
    context = methods.contexts[methods.platforms["fastest"]["forces"]]
    torch.set_num_threads(1)
    report["split_of_the_loop"] = measure_interpreter(context, x, 5)
    report["integrator_step_us"] = measure_steps(context, x, 5)
    methods.close()
    return report


def print_table(force_field: str, key: str, report: dict[str, Any], device: str) -> None:
    fastest, target = report["plain_loop_by_platform_us"]["fastest"][key], report["targets"][key]
    names = list(next(iter(report[key].values())))
    print(f"\n{force_field}, {key}, {device}: us per conformation (times faster than the loop on")
    clock = "times_faster" if device != "cpu" else "times_faster_by_cpu_time"
    print(f"{fastest}: by wall time / {clock.replace('_', ' ')}); target {target:g} times")
    print(f"{'batch':>8}" + "".join(f"{name:>26}" for name in names))
    for size, row in report[key].items():
        cells = [f"{v['us']:.2f} ({v['times_faster']:.1f} / {v[clock]:.1f})" for v in row.values()]
        print(f"{size:>8}" + "".join(f"{cell:>26}" for cell in cells))
    clocks = ("times_faster", "times_faster_by_cpu_time")
    for name in names[2:]:
        best = {c: max(row[name][c] for row in report[key].values()) for c in clocks}
        report.setdefault("best", {}).setdefault(key, {})[name] = best
        reached = "reached" if best[clock] >= target else "missed"
        print(f"{name}: at best {best[clock]:.1f} times, target {target:g} {reached}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-batch", type=int, help="65536; on a GPU 1048576")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for one batch size")
    parser.add_argument("--force-field", choices=list(TARGETS), help="both by default")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpu = arguments.device != "cpu"
    # torch hints at TF32 matrix products, which no energy here can afford.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    force_fields = [arguments.force_field] if arguments.force_field else list(TARGETS)
    if arguments.compile_only:
        torch.set_num_threads(1)
        compile_only(force_fields[0], arguments)
        return
    largest = arguments.max_batch or (2**20 if gpu else 2**16)
    batches = [4**power for power in range(16) if 4**power <= largest]
    n_threads = [1] if gpu or available_cores() < 2 else [1, 2]
    name = "energy" + ("_cuda" if gpu else "") + ("" if arguments.dtype == "float64" else "_32")
    output = arguments.output or Path(__file__).with_name(f"{name}.json")

    start = time.perf_counter()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(arguments.device) if gpu else processor(),
        "dtype": arguments.dtype,
        "platforms": available_platforms(),
        "versions": {
            "python": host.python_version(),
            "openmm": openmm.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "systems": {},
    }
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for force_field in force_fields:
            report["systems"][force_field] = measure_system(
                force_field, batches, n_threads, arguments
            )
    if len(n_threads) > 1:
        molecule = alanine_dipeptide()
        shared = [size for size in batches if size in (16, 256, 4096)]
        x = conformations(molecule, batches[-1])
        report["bridge_on_all_cores"] = measure_cores(molecule, "Reference", x, shared, 5)
        print("bridge on all cores:", report["bridge_on_all_cores"])
    report["seconds"] = round(time.perf_counter() - start)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}, {report['seconds']} s")


def processor() -> str:
    """Return the CPU's name, where the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else host.processor()


if __name__ == "__main__":
    main()
