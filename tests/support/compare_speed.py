"""Compare the CPU time of this package with that of an earlier commit, both in turn.

    python -m tests.support.compare_speed 692c10c^ --output examples/results/cpu_speed.json

Of each an iteration of the default kernels, 64 walkers at three temperatures, with and without
dynamics, and a step of the default training, eager, on one thread: medians of each process, then
the least of the processes, since other programs of the machine only add to it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
LADDER = (300.0, 424.26, 600.0)
N_WALKERS, N_CYCLES, N_STEPS = 64, 3, 9


def measure():
    """Print the CPU time in ms of iterations and steps of the package that is imported."""
    from dataclasses import replace

    import torch

    import openmm_tsf as tsf
    from openmm_tsf.sampling.kernels import default_kernels
    from openmm_tsf.training.trainer import Trainer
    from openmm_tsf.workflow.presets import preset

    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    data = tsf.MDDataset.shipped(molecule, stride=20)
    sizes, result = preset("default"), {}
    shape = {"n_blocks": sizes.flow.n_blocks, "hidden": sizes.flow.hidden, "overlap": True}
    flow = tsf.TemperatureSteerableFlow.from_dataset(data, seed=1, **shape)
    potential = tsf.TorchPotential.from_system(molecule.system)
    kernels = default_kernels(potential, flow, LADDER, molecule.heavy_hydrogen_masses)
    sampler = tsf.ParallelTempering(
        molecule, flow, LADDER, N_WALKERS, kernels=kernels, potential=potential, seed=1
    )
    chosen = torch.arange(N_WALKERS * len(LADDER)) % len(data)
    sampler.set_positions(data.positions[chosen].unflatten(0, (N_WALKERS, len(LADDER))))
    sampler.run(2, progress=False)
    times = []
    for _ in range(4 * N_CYCLES):
        start = time.process_time()
        sampler.run(1, progress=False)
        times.append(1e3 * (time.process_time() - start))
    # Every other or every fourth iteration has dynamics, and takes longer.
    result["iteration"] = statistics.median(times)
    result["mean iteration"] = statistics.mean(times)

    step, times = Trainer.train_step, []

    def timed(self, *given):
        start = time.process_time()
        step(self, *given)
        times.append(1e3 * (time.process_time() - start))

    Trainer.train_step = timed
    settings = replace(
        sizes.fit, n_steps=N_STEPS, ramp=(0.0, 0.1), n_chains=512, validate_interval=N_STEPS,
        n_validation_draws=100, temperatures=LADDER,
    )  # fmt: skip
    tsf.fit(flow, data, potential, settings=settings, seed=1, progress=False)
    result["training step"] = statistics.median(times[3:])  # the first with draws relaxes chains
    print(json.dumps({"file": tsf.__file__, **result}))


def extract(commit, folder):
    """Write the files of a commit into a folder, with its data where a package has them."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as file:
        file.extractall(folder, filter="data")
    link = folder / "openmm_tsf" / "data"
    if not link.exists():
        link.symlink_to(Path("..") / "data")


def run_of(tree):
    """Return what `measure` prints with the package in a folder."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure"]
    done = subprocess.run(command, env=env, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result.pop("file")).is_relative_to(tree)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commit", nargs="?", help="the earlier one")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure()
        return
    if args.commit is None:
        parser.error("expected an earlier commit, got none")
    commits = [
        subprocess.run(
            ["git", "rev-parse", "--short", name], cwd=ROOT, capture_output=True, text=True,
            check=True,
        ).stdout.strip()
        for name in (args.commit, "HEAD")
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        trees = [Path(name) / commit for commit in commits]
        for commit, tree in zip(commits, trees, strict=True):
            tree.mkdir()
            extract(commit, tree)
        runs = [[run_of(tree) for tree in trees] for _ in range(args.pairs)]
    least = [
        {what: round(min(run[which][what] for run in runs), 1) for what in runs[0][0]}
        for which in (0, 1)
    ]
    ratios = {what: round(least[1][what] / least[0][what], 3) for what in least[0]}
    result = {
        "command": f"python -m tests.support.compare_speed {args.commit} --pairs {args.pairs}",
        "cpu_ms": dict(zip(commits, least, strict=True)),
        "now_over_before": ratios,
    }
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
