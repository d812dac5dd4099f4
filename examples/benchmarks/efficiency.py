r"""What an effective sample costs: flow and Monte Carlo beside OpenMM's own replica exchange.

    openmm-tsf run --preset thorough --md --output run/
    python examples/benchmarks/replica_exchange.py --output examples/results/replica_exchange.json
    python examples/benchmarks/efficiency.py run/ --md examples/results/replica_exchange.json \
        --output examples/results/efficiency.json

Both run here, one after the other, on one core: ``openmm.app.ReplicaExchangeSampler``
(replica_exchange.py; the best ladder in ``--md``), and the run's frozen flow with few kernels for
300 K: an independence proposal at 300 K in every iteration; in every eighth also one at 600 K, a
walk step and a steered swap of the two temperatures, without a rung between them.
N_eff = p(1 - p)/SE^2 of 1[phi > 0] at 300 K, with the larger of the standard errors from the
correlation time and from the spread of the walkers, which are independent; the spread of twenty
groups of walkers is compared with it. Per 10^6 evaluations, per second, and all in (MD and training
included). Writes JSON.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from common import has_positive_phi, reference_population
from replica_exchange import fastest_platform, summarise
from replica_exchange import run as run_md

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    OnRungs,
    PlainSwap,
    Scheduled,
    SteeredSwap,
)

LOW_K, HIGH_K = 300.0, 600.0
N_GROUPS = 20


def lean_kernels(flow, potential, ladder, n_independent, interval):
    """Independence proposals at the lowest rung; the other rung, a walk and swaps now and then."""
    lowest = FlowIndependence(flow, potential, ladder[:1], "lowest", n_steps=n_independent)
    return [
        Scheduled(OnRungs(lowest, ladder, "flow_lowest")),
        Scheduled(FlowIndependence(flow, potential, ladder), interval=interval),
        Scheduled(FlowWalk(flow, potential, ladder), interval=interval),
        Scheduled(SteeredSwap(flow, potential, ladder, [(0, 1)]), interval=interval),
    ]


class Populations:
    """A reporter that keeps 1[phi > 0] of every walker at the lowest rung."""

    interval = 1

    def __init__(self, molecule):
        self.molecule, self.values, self.seconds = molecule, [], 0.0

    def __call__(self, sampler, state):
        began = time.perf_counter()
        self.values.append(has_positive_phi(self.molecule, state.x[:, 0]).bool())
        self.seconds += time.perf_counter() - began


def proposals(flow, potential, molecule, n_draws, n_repeats, generator):
    """The flow alone: reverse ESS of the joint weights, population of the rare basin."""
    report = {}
    for kelvin in (LOW_K, HIGH_K):
        ess, largest, unweighted, weighted = [], [], [], []
        for _ in range(n_repeats):
            draws = draw_weighted(flow, potential, kelvin, n_draws, generator)
            basin = has_positive_phi(molecule, draws.x)
            reverse = reverse_ess(draws.log_weights.numpy())
            ess.append(reverse.fraction)
            largest.append(reverse.largest_weight)
            unweighted.append(float(basin.mean()))
            weighted.append(float((torch.softmax(draws.log_weights, 0) * basin).sum()))
        report[f"{kelvin:g}"] = {
            "reverse_ess_joint": float(np.mean(ess)),
            "spread": float(np.std(ess, ddof=1)) if n_repeats > 1 else 0.0,
            "largest_weight": max(largest),
            "p_flow": float(np.mean(unweighted)),
            "p_weighted": float(np.mean(weighted)),
        }
    return report


def flow_side(flow, potential, molecule, frames, args):
    """The lean sampler: acceptances, N_eff, evaluations, seconds."""
    ladder = (LOW_K, HIGH_K)
    kernels = lean_kernels(flow, potential, ladder, args.independent, args.swap_interval)
    sampler = tsf.ParallelTempering(
        molecule, flow, ladder, args.walkers, kernels, potential, seed=args.seed
    )
    generator = torch.Generator().manual_seed(args.seed)
    index = torch.randint(len(frames), (args.walkers * 2,), generator=generator)
    sampler.set_positions(frames[index].reshape(args.walkers, 2, -1, 3))
    before = potential.n_evaluations
    sampler.tune(args.burn_in)
    burn_in = potential.n_evaluations - before
    kept = Populations(molecule)
    sampler.reporters = [kept]
    before, began = potential.n_evaluations, time.perf_counter()
    sampler.run(args.iterations, progress=not args.quiet)
    seconds = time.perf_counter() - began - kept.seconds
    evaluations = potential.n_evaluations - before
    series = torch.stack(kept.values).double().numpy()
    estimate = estimate_mean(series)
    groups = series.mean(axis=0).reshape(N_GROUPS, -1).mean(axis=1)
    # Each group's error by the claim; the spread of 20 groups gives chi^2 with 19 degrees.
    claimed = estimate.stderr * math.sqrt(N_GROUPS)
    plain_swap = PlainSwap(ladder, potential.boltzmann_constant)
    info = plain_swap(sampler.state, generator)[1]
    acceptance = {
        name: [round(a, 4) for a in total.acceptance.flatten().tolist() if math.isfinite(a)]
        for name, total in sampler.totals.items()
    }
    return {
        "walkers": args.walkers,
        "iterations": args.iterations,
        "p": estimate.value,
        "stderr": estimate.stderr,
        "stderr_correlation": estimate.stderr_correlation,
        "stderr_walkers": estimate.stderr_groups,
        "g": estimate.g,
        "n_eff": estimate.n_eff,
        "n_evaluations": evaluations,
        "burn_in_evaluations": burn_in,
        "seconds": seconds,
        "n_eff_per_million": 1e6 * estimate.n_eff / evaluations,
        "n_eff_per_core_second": estimate.n_eff / seconds,
        "chi2_of_20_groups": float(((groups - estimate.value) ** 2).sum() / claimed**2),
        "acceptance": acceptance
        | {"swap_plain": [float(info.accepted.sum() / info.proposed.sum())]},
    }


def md_side(args, best):
    """Replica exchange of MD on all cores: one replicate a core."""
    platform, rates = fastest_platform("amber99sbildn-obc2")
    with ProcessPoolExecutor(args.cores, get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_md, best, 100 + k, 60 * args.md_minutes, platform, "amber99sbildn-obc2")
            for k in range(args.cores)
        ]
        rows = [job.result() for job in jobs]
    summary = summarise(rows)[str(best)]
    # A run of minutes may not visit the basin: its population then has no error.
    known = {key: value for key, value in summary.items() if math.isfinite(value)}
    return {"platform": platform, "steps_per_second": rates, **known}


def ratios(flow, md, costs, budget, wall):
    """What the flow gives of what MD gives, sampling only and all in."""
    paid = costs["md"] + costs["training"] + flow["burn_in_evaluations"]
    rate, md_rate = flow["n_eff_per_million"] / 1e6, md["n_eff_per_million"] / 1e6
    all_in = max(0.0, budget - paid) * rate
    left = max(0.0, wall - costs["seconds"])
    return {
        "sampling_only": rate / md_rate,
        "all_in": all_in / (budget * md_rate),
        "break_even_evaluations": paid * rate / max(rate - md_rate, 1e-300),
        "paid_evaluations": paid,
        "per_core_second_sampling": flow["n_eff_per_core_second"] / md["n_eff_per_core_second"],
        # The sampler keeps one core busy; MD is given both all the time.
        "per_second_all_in": left
        * flow["n_eff_per_core_second"]
        / (wall * 2 * md["n_eff_per_core_second"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run directory")
    parser.add_argument(
        "--md", type=Path, help="JSON of replica_exchange.py: the best of its ladders"
    )
    parser.add_argument("--md-minutes", type=float, default=5.0, help="of MD here; 0: only --md")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--walkers", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--burn-in", type=int, default=100)
    parser.add_argument("--independent", type=int, default=1)
    parser.add_argument("--swap-interval", type=int, default=8)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--budget", type=float, default=1e7, help="evaluations of the all-in figure"
    )
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="of the all-in figure per second"
    )
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", default="efficiency.json")
    args = parser.parse_args()
    if args.walkers % N_GROUPS:
        parser.error(f"--walkers: expected a multiple of {N_GROUPS}, got {args.walkers}")
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    flow = load_flow(args.run / "flow.pt", molecule)
    potential = molecule.potential(compile=True)
    frames = tsf.MDDataset.shipped(molecule, stride=40).positions
    spent = read_json(args.run / "summary.json")
    evaluations, walls = spent["energy_evaluations"], spent["wall_seconds"]
    if not walls.get("md"):
        parser.error(f"{args.run}: expected a run that made its own frames (--md), to be paid for")
    costs = {
        "md": evaluations["md"],
        "training": evaluations["training"],
        "seconds": walls["md"] + walls["training"],  # what was compiled, too
    }
    potential.energy(frames[:512])  # compiled now, not in what is timed
    generator = torch.Generator().manual_seed(args.seed)
    report = {"costs": costs}
    report["proposals"] = proposals(flow, potential, molecule, args.draws, args.repeats, generator)
    report["reference"] = {}
    for kelvin in (LOW_K, HIGH_K):
        known = reference_population(kelvin)
        report["reference"][f"{kelvin:g}"] = {"p": known.value, "stderr": known.stderr}
    print(report["proposals"], flush=True)
    report["flow"] = flow_side(flow, potential, molecule, frames, args)
    print(report["flow"], flush=True)
    table = read_json(args.md)["by_rungs"]
    best = int(max(table, key=lambda n: table[n]["n_eff_per_million"]))
    longest = table[str(best)]
    report["md_long"] = {"rungs": best, **longest}
    if args.md_minutes > 0:
        report["md"] = {"rungs": best, **md_side(args, best)}
        print(report["md"], flush=True)
    # Minutes of MD see the rare basin once or not at all: N_eff per evaluation is that of the long
    # runs, and only the evaluations per second are measured here.
    here = report.get("md", longest)
    per_second = here["n_evaluations"] / here["core_seconds"]
    md = {
        "n_eff_per_million": longest["n_eff_per_million"],
        "n_eff_per_core_second": longest["n_eff_per_million"] / 1e6 * per_second,
    }
    report["ratios"] = ratios(report["flow"], md, costs, args.budget, 60 * args.minutes)
    write_json(args.output, report)
    print(report["ratios"])


if __name__ == "__main__":
    main()
