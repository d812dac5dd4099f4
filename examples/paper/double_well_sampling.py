"""What an effective sample costs: TSF-MCMC on few rungs beside the 100-rung reference.

    python examples/paper/double_well_sampling.py    # d = 5 and 20, three seeds

Three samplers of the same mixed double wells (arXiv:2012.00429, section 3): Gaussian increments on
the reference's 100 rungs; the same on 13 rungs, because 100 are more than swaps need; the default
kernels with a TSF, trained at T = 1, on a few rungs from 0.1 to 1. N_eff is that of the wells'
populations 1[y_i > 0], y = A x, of the worst of the d wells, by the larger of the two standard
errors of ``analysis.uncertainty``; an evaluation is one energy at any rung. All samplers have the
same number of walkers. Populations are also compared with the quadrature: where the root mean
square of z is far above 1, N_eff is too large. The flow is trained on exact samples;
``paid_evaluations`` is what as many effective samples cost by the 100-rung walk, and the training.
Each figure is the median over seeds, with the range. Writes JSON.
"""

import argparse
import math
import statistics
import time

import numpy as np
import torch
from double_well_experiment import (
    POTENTIAL_SEED,
    kept_run,
    ladder,
    start_sampler,
    train,
    walk_sampler,
)
from double_wells import SIZES, settings

import openmm_tsf as tsf
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import MixedDoubleWell
from openmm_tsf.sampling.kernels import default_kernels

COMPARED = (0.1, 1.0)
FEW = tuple(np.geomspace(0.1, 1.0, 7).tolist()) + tuple(np.geomspace(1.0, 10.0, 7).tolist()[1:])
STEERED = {5: (0.1, 0.316, 1.0), 20: (0.1, 0.18, 0.316, 0.56, 1.0)}
#: Burn-in of the walks, in iterations: double_well_experiment.reference gives the reason.
BURN = {5: 2000, 20: 12_000}
#: Iterations of the 100-rung walk.
LENGTH = {5: 4000, 20: 12_000}
#: Training frames of the flow: exact samples.
N_FRAMES = 32_000


def efficiency(sampler, potential, n_iterations, n_burn):
    """N_eff per 10^6 evaluations at the compared temperatures, and z of the populations."""
    rungs = [sampler.temperatures.index(t) for t in COMPARED]
    sampler.tune(n_burn)
    began, before = time.perf_counter(), potential.n_evaluations
    x = kept_run(sampler, rungs, n_iterations)
    evaluations = sum(total.n_evaluations for total in sampler.totals.values())
    assert evaluations == potential.n_evaluations - before
    measured = {"n_evaluations": evaluations, "seconds": time.perf_counter() - began}
    positive = (potential.unmixed(x) > 0).double().numpy()
    for k, temperature in enumerate(COMPARED):
        exact = potential.wells.probability_positive(temperature).tolist()
        estimates = [estimate_mean(positive[:, :, k, i]) for i in range(len(exact))]
        counts = [estimate.n_eff for estimate in estimates]
        z = [(e.value - p) / e.stderr for e, p in zip(estimates, exact, strict=True)]
        measured[f"T = {temperature:g}"] = {
            "n_eff_worst": min(counts),
            "n_eff_median": statistics.median(counts),
            "n_eff_per_million": 1e6 * min(counts) / evaluations,
            "rms_z": math.sqrt(statistics.fmean(value**2 for value in z)),
        }
    measured["acceptance"] = {
        name: [round(float(a), 3) for a in total.acceptance]
        for name, total in sampler.totals.items()
        if len(total.acceptance) <= len(FEW)
    }
    return measured


def three_samplers(d, seed, n_walkers):
    """One seed of one dimension."""
    n_iterations = LENGTH[d]
    potential = MixedDoubleWell.random(d, POTENTIAL_SEED)
    frames = potential.sample(N_FRAMES, 1.0, torch.Generator().manual_seed(seed))
    size = SIZES[d]
    dataset = tsf.MDDataset(frames, 1.0)
    flow, result = train("TSF", potential, dataset, size, settings(size), seed)
    measured = {
        "training_evaluations": result.n_evaluations,
        "training_seconds": result.wall_seconds,
    }
    steered = default_kernels(potential, flow, STEERED[d])
    sides = {
        "walk, 100 rungs": walk_sampler(potential, ladder(), n_walkers, seed),
        f"walk, {len(FEW)} rungs": walk_sampler(potential, FEW, n_walkers, seed),
        f"TSF-MCMC, {len(STEERED[d])} rungs": start_sampler(
            potential, flow, STEERED[d], steered, n_walkers, seed
        ),
    }
    lengths = (n_iterations, n_iterations, n_iterations // 2)
    burns = (BURN[d], BURN[d], n_iterations // 8)
    for (name, sampler), length, burn in zip(sides.items(), lengths, burns, strict=True):
        measured[name] = efficiency(sampler, potential, length, burn)
        print(d, seed, name, measured[name], flush=True)
    frames_cost = 1e6 * N_FRAMES / measured["walk, 100 rungs"]["T = 1"]["n_eff_per_million"]
    measured["paid_evaluations"] = result.n_evaluations + frames_cost
    return measured


def summary(runs):
    """Medians and ranges over the seeds, and how many times more the flow gives."""
    names = [name for name in runs[0] if isinstance(runs[0][name], dict)]
    table = {}
    for temperature in (f"T = {t:g}" for t in COMPARED):
        table[temperature] = {}
        for name in names:
            values = [run[name][temperature]["n_eff_per_million"] for run in runs]
            table[temperature][name] = [statistics.median(values), min(values), max(values)]
        for name in names[:-1]:
            ratios = [
                run[names[-1]][temperature]["n_eff_per_million"]
                / run[name][temperature]["n_eff_per_million"]
                for run in runs
            ]
            table[temperature][f"TSF-MCMC / {name}"] = [
                statistics.median(ratios), min(ratios), max(ratios),
            ]  # fmt: skip
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--walkers", type=int, default=8)
    parser.add_argument("--output", default="double_well_sampling.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"walkers": args.walkers}
    for d in args.dimensions:
        runs = [three_samplers(d, seed, args.walkers) for seed in range(1, args.seeds + 1)]
        report[f"d = {d}"] = {"n_eff_per_million": summary(runs), "runs": runs}
        print(d, report[f"d = {d}"]["n_eff_per_million"], flush=True)
    write_json(args.output, report)


if __name__ == "__main__":
    main()
