r"""What an effective sample costs: flow and Monte Carlo beside OpenMM's own replica exchange.

    openmm-tsf run --preset thorough --md --output run/
    python examples/benchmarks/replica_exchange.py --output examples/results/replica_exchange.json
    python examples/benchmarks/efficiency.py run/ --md examples/results/replica_exchange.json \
        --output examples/results/efficiency.json

Both sides here, one after the other, on one core: ``openmm.app.ReplicaExchangeSampler``
(examples/benchmarks/replica_exchange.py; the ladder that was best in ``--md``) and the run's frozen
flow with a lean sequence for 300 K: an independence proposal there in every iteration; in every
eighth also one at 600 K, a walk step and a steered swap of the two, no rung between.
Counted is N_eff = p(1 - p)/SE^2 of 1[phi > 0] at 300 K,
SE the larger of that from the correlation time and that from the spread of the walkers, which are
independent runs; the spread of twenty groups of them is compared with it. Per 10^6 evaluations,
per second, and all in (MD and training paid for). Writes JSON.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from replica_exchange import fastest_platform, summarise
from replica_exchange import run as run_md

import openmm_tsf as tsf
from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.load import load_flow
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    OnRungs,
    PlainSwap,
    Scheduled,
    SteeredSwap,
)
from openmm_tsf.training.basins import basin_labels

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
        self.values.append(basin_labels(self.molecule, state.x[:, 0]).bool())
        self.seconds += time.perf_counter() - began


def weighted_draws(flow, potential, molecule, kelvin, n_draws, generator):
    """ln[exp(-U/kT - |p|^2/2tau)/q] of draws, -inf outside, and their basins."""
    tau, kt = kelvin / flow.reference_temperature, potential.boltzmann_constant * kelvin
    log_weights, labels = [], []
    for _ in range(0, n_draws, 5000):
        drawn = flow.sample(5000, kelvin, generator)
        inside = torch.isfinite(drawn.log_prob)
        energy = torch.full_like(drawn.log_prob, math.inf)
        energy[inside] = potential.energy(drawn.x[inside])
        weight = log_weight(energy / kt, drawn.momenta, tau, drawn.log_prob)
        log_weights.append(torch.where(inside, weight, -math.inf))
        labels.append(basin_labels(molecule, drawn.x))
    return torch.cat(log_weights), torch.cat(labels).double()


def proposals(flow, potential, molecule, n_draws, n_repeats, generator):
    """The flow alone: reverse ESS of the joint weights, population of the rare basin."""
    found = {}
    for kelvin in (LOW_K, HIGH_K):
        ess, largest, own, weighted = [], [], [], []
        for _ in range(n_repeats):
            every, basin = weighted_draws(flow, potential, molecule, kelvin, n_draws, generator)
            figures = reverse_ess(every.numpy())
            ess.append(figures.fraction)
            largest.append(figures.largest_weight)
            own.append(float(basin.mean()))
            weighted.append(float((torch.softmax(every, 0) * basin).sum()))
        found[f"{kelvin:g}"] = {
            "reverse_ess_joint": float(np.mean(ess)),
            "spread": float(np.std(ess, ddof=1)) if n_repeats > 1 else 0.0,
            "largest_weight": max(largest),
            "p_flow": float(np.mean(own)),
            "p_weighted": float(np.mean(weighted)),
        }
    return found


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
    found = estimate_mean(series)
    groups = series.mean(axis=0).reshape(N_GROUPS, -1).mean(axis=1)
    # Each group's error by the claim; the spread of 20 groups gives chi^2 with 19 degrees.
    claimed = found.stderr * math.sqrt(N_GROUPS)
    plain = PlainSwap(ladder, potential.boltzmann_constant)
    info = plain(sampler.state, generator)[1]
    acceptance = {
        name: [round(a, 4) for a in total.acceptance.flatten().tolist() if math.isfinite(a)]
        for name, total in sampler.totals.items()
    }
    return {
        "walkers": args.walkers,
        "iterations": args.iterations,
        "p": found.value,
        "stderr": found.stderr,
        "stderr_correlation": found.stderr_correlation,
        "stderr_walkers": found.stderr_groups,
        "g": found.g,
        "n_eff": found.n_eff,
        "n_evaluations": evaluations,
        "burn_in_evaluations": burn_in,
        "seconds": seconds,
        "n_eff_per_million": 1e6 * found.n_eff / evaluations,
        "n_eff_per_core_second": found.n_eff / seconds,
        "chi2_of_20_groups": float(((groups - found.value) ** 2).sum() / claimed**2),
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
    found = summarise(rows)[str(best)]
    # Minutes may not see the basin: its population has no error then.
    known = {key: value for key, value in found.items() if math.isfinite(value)}
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
    reference = load_reference()
    report["reference"] = {}
    for kelvin in (LOW_K, HIGH_K):
        known = reference.phi_positive(reference.rung(kelvin))
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
