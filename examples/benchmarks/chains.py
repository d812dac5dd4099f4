"""Time and memory as a molecule grows: capped chains of 1 to 20 alanines, with fitted exponents.

    python examples/benchmarks/chains.py                        # chains.json, on a free core
    python examples/benchmarks/chains.py --smoke --output x.json  # two sizes, tiny: does it run?

Per energy with forces (torch, in a batch, not compiled), per step of training (the default
preset's, path gradients), and per iteration of replica exchange (a period of the default preset
with its dynamics): CPU time, and the most memory of the process so far. Each size runs in a process
of its own with one thread. The flow is that of the default preset, not trained, which takes as
long; its fixed layers are fitted to frames of short dynamics at 600 K. Steps of training are the
difference of a longer and a shorter training, which validate alike. The exponents are slopes of
ln(time) against ln(atoms) by least squares, over all sizes and over the larger half, where the
costs that do not depend on the molecule count less.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import openmm.unit as unit
import torch
from scaling_steps import ladder, median, peak_mib, time_run, used

from openmm_tsf.systems import MDDataset, MolecularSystem, capped_peptide
from openmm_tsf.systems.frame_numbers import least_frames
from openmm_tsf.training import fit
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import make_sampler
from openmm_tsf.workflow.train import build_flow

RESULTS = Path(__file__).parents[1] / "results"
SIZES = (1, 2, 3, 5, 8, 12, 16, 20)
KELVIN, STEPS_PER_FRAME, SEED = 600.0, 10, 1
N_WALKERS, N_RUNGS, BATCH = 16, 3, 64
#: Quantities whose growth is fitted.
TIMES = ("energy_us", "training_step_ms", "iteration_ms")
COLUMNS = (*TIMES, "energy_MiB", "training_MiB", "iteration_MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, help="measure one size here, and print JSON")
    parser.add_argument("--sizes", type=int, nargs="+", help="alanines between the caps")
    parser.add_argument("--smoke", action="store_true", help="tiny networks and numbers")
    parser.add_argument("--output", type=Path, default=RESULTS / "chains.json")
    args = parser.parse_args()
    if args.size is not None:
        torch.set_num_threads(1)
        print(json.dumps(measure(args.size, args.smoke)))
        return
    rows = []
    for n in args.sizes or ((1, 2) if args.smoke else SIZES):
        command = [sys.executable, __file__, "--size", str(n), *["--smoke"] * args.smoke]
        threads = {"OMP_NUM_THREADS": "1", "OPENMM_CPU_THREADS": "1"}
        done = subprocess.run(
            command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    report = {
        "command": " ".join(["chains.py", *sys.argv[1:]]),
        "load_of_the_machine": [round(load, 1) for load in os.getloadavg()],
        "sizes": rows,
        "exponents": {name: exponents(rows, name) for name in TIMES},
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


def exponents(rows: list[dict[str, float]], name: str) -> dict[str, float]:
    """Return the slope of ln(name) against ln(atoms), over all sizes and the larger half."""
    half = rows[len(rows) // 2 :] if len(rows) >= 4 else rows
    return {"all": slope(rows, name), "larger_half": slope(half, name)}


def slope(rows: list[dict[str, float]], name: str) -> float:
    x, y = (np.log([row[key] for row in rows]) for key in ("n_atoms", name))
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def measure(n_alanines: int, smoke: bool) -> dict[str, Any]:
    """Return the costs of one size."""
    molecule, settings = capped_peptide("A" * n_alanines), preset("default")
    frames = short_dynamics(molecule)
    potential = molecule.potential("torch")
    result: dict[str, Any] = {"n_alanines": n_alanines, "n_atoms": molecule.n_atoms}
    x = frames.positions[:BATCH]
    repeats = 2 if smoke else 7
    each = [cpu_seconds(lambda: potential.energy_and_forces(x)) for _ in range(repeats)]
    result |= {"energy_us": 1e6 * median(each) / len(x), "energy_MiB": peak_mib()}
    flow_settings = replace(settings.flow, n_blocks=1, hidden=(8,)) if smoke else settings.flow
    flow = build_flow(frames, flow_settings, SEED)
    fewer, more = (1, 13) if smoke else (2, 10)
    batches = {"batch_size": 16, "kl_batch_size": 8, "n_chains": 16} if smoke else {}
    batches |= {"n_validation_draws": 20}
    times = []
    for n_steps in (fewer, fewer, more):  # the first to warm up
        fitting = replace(
            settings.fit, n_steps=n_steps, validate_interval=more, ramp=(0.0, 0.0), **batches
        )
        began = used()
        fit(flow, frames, potential, settings=fitting, seed=SEED, progress=False)
        times.append(used() - began)
    result["training_step_ms"] = 1e3 * (times[2] - times[1]) / (more - fewer)
    result["training_MiB"] = peak_mib()
    sampling = replace(settings.sampling, n_walkers=N_WALKERS, temperatures=ladder(N_RUNGS))
    start = frames.positions[torch.arange(N_WALKERS * N_RUNGS) % len(frames)]
    period = sampling.local_interval
    with make_sampler(
        molecule, flow, sampling, potential, (SEED, None), start.unflatten(0, (N_WALKERS, N_RUNGS))
    ) as sampler:
        time_run(sampler, period)
        cycles = [time_run(sampler, period)[0] for _ in range(1 if smoke else 5)]
    result |= {"iteration_ms": 1e3 * median(cycles) / period, "iteration_MiB": peak_mib()}
    return {key: round(value, 2) for key, value in result.items()}


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    began = used()
    work()
    return used() - began


def short_dynamics(molecule: MolecularSystem) -> MDDataset:
    """Return as few frames of 600 K as a flow can be built on."""
    integrator = openmm.LangevinMiddleIntegrator(
        KELVIN, 5 / unit.picosecond, 0.001 * unit.picosecond
    )
    integrator.setRandomNumberSeed(SEED)
    platform = openmm.Platform.getPlatformByName("CPU")
    context = openmm.Context(molecule.system, integrator, platform, {"Threads": "1"})
    context.setPositions(molecule.positions)
    context.setVelocitiesToTemperature(KELVIN, SEED)
    integrator.step(500)
    frames = []
    for _ in range(max(BATCH, least_frames(molecule))):
        integrator.step(STEPS_PER_FRAME)
        state = context.getState(positions=True)
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
    return MDDataset(torch.from_numpy(np.array(frames)), KELVIN, molecule=molecule)


def print_table(report: dict[str, Any]) -> None:
    """Print the table in Markdown."""
    names = [name.replace("_", " ") for name in COLUMNS]
    print(f"| alanines | atoms | {' | '.join(names)} |")
    print("|---" * (2 + len(names)) + "|")
    for row in report["sizes"]:
        cells = " | ".join(f"{row[name]:g}" for name in COLUMNS)
        print(f"| {row['n_alanines']} | {row['n_atoms']} | {cells} |")
    for name, fitted in report["exponents"].items():
        print(
            f"{name}: atoms^{fitted['all']} over all, ^{fitted['larger_half']} over the larger half"
        )


if __name__ == "__main__":
    main()
