"""A million conformations in one call, within a budget of memory.

    python examples/benchmarks/memory.py                  # 10^6 conformations, minutes a budget
    python examples/benchmarks/memory.py --rows 200000

For each budget (``memory=`` of TorchPotential) a separate process creates conformations of alanine
dipeptide, and evaluates them in one call: energies with forces, and energies whose sum is
differentiated. Peaks of resident memory are relative to the process with its input; the size of the
results, which any method must hold, is listed too. All numbers are written to a JSON file.
"""

import argparse
import json
import platform as host
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_tsf.potentials import TorchPotential
from openmm_tsf.systems.library import alanine_dipeptide

MIB = 2**20
# ru_maxrss is in KiB, on macOS in bytes.
UNIT = 1 if sys.platform == "darwin" else 1024


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT / MIB


def measure(
    what: str, budget: int, n_rows: int, n_threads: int, compiled: bool
) -> dict[str, float]:
    """Measure one call in this process, which must be new: peaks do not decrease."""
    torch.set_num_threads(n_threads)
    molecule = alanine_dipeptide()
    potential = TorchPotential.from_system(
        molecule.system, compile=compiled, positions=molecule.positions, memory=budget
    )
    x = torch.empty(n_rows, molecule.n_atoms, 3, dtype=torch.float64)
    rng, centre = np.random.default_rng(0), torch.tensor(molecule.positions)
    for rows in x.split(4096):
        rows.copy_(centre + torch.from_numpy(rng.normal(0.0, 0.003, size=tuple(rows.shape))))
    evaluate(potential, what, x[:1024].clone())  # loads libraries, starts threads, compiles
    before = peak()
    start = time.perf_counter()
    results = evaluate(potential, what, x)
    spent = time.perf_counter() - start
    above = peak() - before  # before the check of the results, which takes memory
    if not all(torch.isfinite(result).all() for result in results):
        raise SystemExit("the results are not finite")
    held = sum(result.numel() * result.element_size() for result in results) / MIB
    return {
        "input_mib": round(x.numel() * x.element_size() / MIB, 1),
        "results_mib": round(held, 1),
        "before_the_call_mib": round(before, 1),
        "peak_above_that_mib": round(above, 1),
        "peak_above_results_mib": round(above - held, 1),
        "seconds": round(spent, 1),
        "us_per_conformation": round(1e6 * spent / n_rows, 2),
    }


def evaluate(potential: TorchPotential, what: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if what == "energy_and_forces":
        return potential.energy_and_forces(x)
    x.requires_grad_()
    energy = potential.energy(x)
    energy.sum().backward()
    gradient = x.grad
    if gradient is None:
        raise SystemExit("no gradient")
    return energy.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 128, 1024], help="MiB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "MIB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shared = (arguments.rows, arguments.threads, arguments.compiled)
    if arguments.only:
        what, budget = arguments.only
        print(json.dumps(measure(what, int(budget) * MIB, *shared)))
        return
    report: dict[str, Any] = {
        "rows": arguments.rows,
        "threads": arguments.threads,
        "compiled": arguments.compiled,
        "versions": {"python": host.python_version(), "torch": torch.__version__},
        "budgets_mib": {},
    }
    for budget in arguments.budgets:
        report["budgets_mib"][budget] = {}
        for what in ("energy_and_forces", "energy_sum_backward"):
            command = [sys.executable, __file__, *sys.argv[1:], "--only", what, str(budget)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(out.splitlines()[-1])
            report["budgets_mib"][budget][what] = measured
            print(f"memory={budget} MiB, {what}: {measured}", flush=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print("written to", arguments.output)


if __name__ == "__main__":
    main()
