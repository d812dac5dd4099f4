"""Sections of gpu.py on whole jobs: the tests, the main job, steps of training."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_sampling import compiler_of
from gpu_steps import Bench, Entries

from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.workflow.duration import CostMeter, step_costs
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import sample

_ROOT = Path(__file__).parents[2]


def run_tests(bench: Bench) -> Entries:
    """The tests that need a GPU."""
    files = [
        str(path.relative_to(_ROOT))
        for path in sorted((_ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text()
    ]
    if not files:
        yield "pytest -m gpu", {"status": "no such tests"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", *files]
    limit = max(1.0, bench.seconds_left)
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=_ROOT, timeout=limit, capture_output=True, text=True, check=False
        )
        output, status = done.stdout + done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, status = (error.stdout or b"").decode(), f"stopped after {limit:.0f} s"
    last = (output.strip().splitlines() or [""])[-1]
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)
    yield (
        "pytest -m gpu",
        {
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            **{what: int(n) for n, what in counts},
            "output": output[-6000:],
        },
    )


@contextmanager
def interrupted_at_deadline(bench: Bench) -> Iterator[None]:
    """Send this process a Ctrl-C at the section's deadline: a run ends, is written and analysed."""
    interrupt = threading.Timer(bench.seconds_left, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        yield
    finally:
        interrupt.cancel()


def run_main_job(bench: Bench) -> Entries:
    """The default preset, training and production with the flow compiled, and the reference."""
    with compiler_of(bench):
        yield from describe_stage(bench, "main", lambda directory, options: run(
            directory, bench.settings, options=replace(options, compile_flow=True)
        ))  # fmt: skip


def run_many_walkers(bench: Bench) -> Entries:
    """Production of as many walkers as fill the device, with the flow that was given.

    That is the preset of a GPU, but for its training.
    """
    if not bench.flow_file.is_file():
        yield "not run", {"status": "no --flow"}
        return
    settings = replace(bench.settings.sampling, n_walkers=8)
    if not bench.smoke:
        settings = replace(preset("gpu").sampling, n_tuning=40)
    yield from describe_stage(bench, "many", lambda directory, options: sample(
        bench.flow_file, directory, settings, start=bench.frames, options=options
    ))  # fmt: skip


def describe_stage(bench: Bench, name: str, stage: Callable[[Path, RunOptions], Any]) -> Entries:
    """Run a stage, at most to the section's deadline, and yield what its summary says."""
    directory = bench.directory / name
    options = RunOptions(seed=bench.seed, progress=False, **bench.device_option)
    start, complete, place = time.monotonic(), True, ""
    try:
        with interrupted_at_deadline(bench):
            stage(directory, options)
    except KeyboardInterrupt as interrupt:
        complete, place = False, where(interrupt)
    seconds = time.monotonic() - start
    if not (directory / "summary.json").is_file():
        late = {"seconds": round(seconds, 1), "samples": 0, "in": place}
        yield "ended at the deadline", late
        return
    summary = json.loads((directory / "summary.json").read_text())
    yield f"{summary['n_walkers']} walkers", describe_job(summary, seconds, complete)
    yield from compare_rungs(summary)


def where(error: BaseException) -> str:
    """Return the functions of the package that were at work, the outermost first."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/openmm_tsf/" in f.filename]
    return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)


def describe_job(summary: dict[str, Any], seconds: float, complete: bool) -> dict[str, Any]:
    """Return times, N_eff of phi > 0 at 300 K, and acceptances of a run."""
    wall = summary["wall_seconds"]
    compilation = wall.get("compilation") or 0.0
    count = summary["phi_positive"]["300.00"]["n_eff"]
    production = summary["production"]["wall_seconds"]
    independent = summary["acceptance"].get("flow_independent", {})
    return {
        "complete": complete,
        "seconds": round(seconds, 1),
        "compilation": round(compilation, 1),
        "seconds_without_compiling": round(seconds - compilation, 1),
        "training": wall["training"],
        "production": production,
        "iterations": summary["n_iterations"],
        "n_eff_phi_300K": count,
        "n_eff_phi_300K_per_second": summary["efficiency"]["n_eff_phi_per_second"],
        "acceptance_300K": independent.get("300.00"),
        "verdict": summary["verdict"]["sentence"],
    }


def compare_rungs(summary: dict[str, Any]) -> Entries:
    """<U> and P(phi > 0) of all rungs, and z against the reference where it has the rung."""
    reference = load_reference()
    for kelvin, energy in summary["energy_kJ_mol"].items():
        population = summary["phi_positive"][kelvin]
        result = {
            "U_kJ_mol": energy["mean"],
            "U_stderr": energy["stderr"],
            "p_phi_positive": population["p"],
            "p_stderr": population["stderr"],
        }
        rung = reference.rung(float(kelvin))
        if rung is not None:
            known = reference.mean_energy(rung), reference.phi_positive(rung)
            for name, value, stderr, there in (
                ("U", energy["mean"], energy["stderr"], known[0]),
                ("p", population["p"], population["stderr"], known[1]),
            ):
                result[f"{name}_reference"] = there.value
                result[f"{name}_reference_stderr"] = there.stderr
                if stderr is not None:
                    error = (stderr**2 + there.stderr**2) ** 0.5
                    result[f"z_{name}"] = (value - there.value) / error
        yield f"{kelvin} K", result


def measure_training(bench: Bench) -> Entries:
    """Milliseconds of a training step, with energies, by number of draws."""
    frames = bench.frames[:: max(1, len(bench.frames) // 500)]
    for n_draws in (30, 60) if bench.smoke else (510, 2040, 8160, 32640):
        yield f"{n_draws} draws", time_training_step(bench, frames, n_draws)


def time_training_step(bench: Bench, frames: MDDataset, n_draws: int) -> dict[str, Any]:
    """Time steps after the ramp; the data grow with the draws."""
    fit: FitSettings = bench.settings.fit
    factor = n_draws / fit.kl_batch_size
    ladder = bench.settings.sampling.temperatures
    settings = replace(
        fit,
        temperatures=ladder,
        kl_batch_size=n_draws,
        batch_size=round(factor * fit.batch_size),
        n_chains=max(fit.n_chains, 2 * n_draws),
    )
    bench.reset_memory()
    flow = bench.untrained_flow(bench.settings.flow)
    with bench.potential(n_draws) as potential:
        trainer = Trainer(flow, [frames], potential, settings, bench.seed)
        first, _ = step_costs(trainer, settings.n_steps, CostMeter(potential))
        median, calls = bench.median_seconds(trainer.train_step, 0.5 if bench.smoke else 4.0)
        waits = bench.count_waits(trainer.train_step)
        profile = bench.profile(trainer.train_step)
    result = {
        "ms": round(1e3 * median, 2),
        "us_per_draw": round(1e6 * median / n_draws, 2),
        "steps": calls,
        "first_step_seconds": round(float(first[0]), 2),
        "data_in_a_batch": settings.batch_size,
        "waits_per_step": waits,
        "peak_MiB": bench.peak_mib(),
    }
    if profile is not None:
        result["busy_share"] = round(profile["busy_seconds"] / median, 3)
        result["kernels_per_step"] = profile["kernels"]
    return result
