r"""What an effective sample costs: trained flows beside OpenMM's replica exchange and metadynamics.

    openmm-tsf run --md --seed 1 --output run1/    # and so on: a training for each seed
    python examples/benchmarks/openmm_samplers.py openmm_samplers/
    python examples/benchmarks/cost.py run1/ run2/ run3/ --samplers openmm_samplers/ \
        --output examples/results/cost.json

An effective sample is one of 1[phi > 0] at 300 K: N_eff = p(1 - p)/SE^2 with the larger of the
standard errors from the correlation time and from the spread of independent walkers or runs. The
frozen flow of each run is used in three ways at 300 K:

- "chain": independence proposals, unbiased samples for any purpose;
- "draws": independent draws with importance weights, for any observable;
- "chosen draws": the same, but energies only of the draws with phi > 0 and of as many others. As
  metadynamics, it uses what the observable is, and so N_eff may be above the evaluations.

Its MD and its training are paid: as many evaluations as the run records, and as many seconds (of
``--timed``, for runs that were not made on free cores). Frames that were shipped are paid at the
speed of MD measured here ("from nothing"), or not ("from frames"). The series of OpenMM's samplers
are read from their folder, and only their speed is measured here. All sampling is in seconds of CPU
of one process on one thread, divided by ``--cores``: other jobs on the machine matter little. MD
and training take what they took. Writes JSON, a figure and tables beside it.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from common import compare_with_reference, in_hidden_basin, reference_population
from cost_report import WAYS, draw, write_tables
from lean_sampling import KELVIN, N_BLOCKS, N_GROUPS, clocks, sample_flow
from openmm_samplers import (
    METADYNAMICS,
    STEPS_PER_EXCHANGE,
    make_sampler,
    make_simulation,
    read_folder,
)
from scipy.stats import chi2

from openmm_tsf.analysis import load_reference
from openmm_tsf.analysis.statistics import n_eff
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import read_json, write_json

EQUILIBRATION = 500  # exchanges, 50 ps a replica
ERROR_KT = 0.1
BUDGET, MINUTES = 1e7, (5, 20)


@dataclass(frozen=True)
class Cost:
    """What effective samples cost: a part paid before the first one, and a rate."""

    evaluations: float  # paid before the first sample
    seconds: float
    per_evaluation: float  # effective samples
    per_second: float  # on all cores

    def samples(self, evaluations):
        """The effective samples of so many evaluations in all."""
        return max(0.0, evaluations - self.evaluations) * self.per_evaluation

    def samples_in(self, seconds):
        """The effective samples of so many seconds in all."""
        return max(0.0, seconds - self.seconds) * self.per_second

    def seconds_until(self, samples):
        """The seconds until there are so many effective samples; inf: never."""
        return self.seconds + samples / self.per_second if self.per_second > 0 else math.inf

    def break_even(self, other):
        """The evaluations from which on this has more samples than another; inf: never."""
        gain = self.per_evaluation - other.per_evaluation
        paid = self.evaluations * self.per_evaluation - other.evaluations * other.per_evaluation
        return max(0.0, paid / gain) if gain > 0 else math.inf


def summarise_exchange(runs, n_rungs):
    """Replica exchange: its replicates are independent walkers."""
    n = min(len(run["phi"]) for run in runs)
    if n <= 2 * EQUILIBRATION:
        raise ValueError(
            f"{n_rungs} rungs: expected more than {2 * EQUILIBRATION} exchanges, got {n}"
        )
    phi, psi = (
        np.stack([run[name][EQUILIBRATION:n] for run in runs], axis=1) for name in ("phi", "psi")
    )
    estimate = estimate_mean(phi > 0)
    if estimate.n_eff == 0:
        raise ValueError(f"{n_rungs} rungs: phi > 0 was never entered in {n} exchanges: too few")
    per_exchange = n_rungs * STEPS_PER_EXCHANGE
    evaluations = phi.size * per_exchange
    return compare_with_reference(*estimate.pair) | {
        "runs": len(runs),
        "p_hidden": float(in_hidden_basin(phi, psi).mean()),
        "n_eff": estimate.n_eff,
        "n_evaluations": evaluations,
        "n_eff_per_million": 1e6 * estimate.n_eff / evaluations,
        # The larger of two errors is too large where there are few replicates.
        "n_eff_per_million_correlation": 1e6
        * n_eff(estimate.value, estimate.stderr_correlation)
        / evaluations,
        "equilibration_evaluations": EQUILIBRATION * per_exchange,
        "evaluations_per_cpu_second": sum(float(run["n_evaluations"]) for run in runs)
        / sum(float(run["cpu_seconds"]) for run in runs),
    }


def summarise_metadynamics(runs):
    """Metadynamics: delta F by the bias at the end, or its mean over the second half of the time.

    The squared error is the variance between runs plus the square of their common deviation from
    the reference: runs that have not converged may agree. Times the evaluations, it is averaged
    over all times from a fifth of the length on: it falls as 1/t then. The better estimate counts.
    """
    n = min(len(run["p_bias"]) for run in runs)
    if len(runs) < 4 or n < 20:
        raise ValueError(f"metadynamics: expected 4 runs of 20 estimates, got {len(runs)} of {n}")
    p = np.stack([run["p_bias"][:n] for run in runs], axis=1)
    last = np.log1p(-p) - np.log(p)
    sums = np.cumsum(np.vstack([np.zeros(len(runs)), last]), axis=0)
    ends = np.arange(1, n + 1)
    mean = (sums[ends] - sums[ends // 2]) / (ends - ends // 2)[:, None]
    evaluations = ends * float(runs[0]["n_evaluations"]) / len(runs[0]["p_bias"])
    known = reference_population(KELVIN)
    f_known, error_known = known.free_energy
    squares = {}
    for name, f in (("last", last), ("mean", mean)):
        spread = f.var(axis=1, ddof=1)
        # What is systematic, less the errors of the runs' mean and of the reference.
        systematic = (f.mean(axis=1) - f_known) ** 2 - spread / len(runs) - error_known**2
        squares[name] = spread + np.maximum(systematic, 0.0)
    late = ends > n // 5
    constants = {k: float(np.mean(s[late] * evaluations[late])) for k, s in squares.items()}
    best = min(constants, key=constants.get)
    value = (last if best == "last" else mean)[-1]
    error = float(value.std(ddof=1) / math.sqrt(len(runs)))
    per_million = 1e6 / (known.value * (1 - known.value) * constants[best])
    return {
        "runs": len(runs),
        "estimate": best,
        "p": float(1 / (1 + np.exp(value.mean()))),
        "delta_F_kT": float(value.mean()),
        "delta_F_stderr": error,
        "delta_F_minus_reference": float(value.mean() - f_known),
        "delta_F_reference_stderr": error_known,
        "z": float((f_known - value.mean()) / math.hypot(error, error_known)),
        "spread_of_runs_kT": float(value.std(ddof=1)),
        "squared_error_times_evaluations": constants,
        "n_evaluations": float(evaluations[-1] * len(runs)),
        "n_eff_per_million": per_million,
        "equilibration_evaluations": 0,
        "evaluations_per_cpu_second": sum(float(run["n_evaluations"]) for run in runs)
        / sum(float(run["cpu_seconds"]) for run in runs),
        "curve": {
            "evaluations": evaluations[late].tolist(),
            "error_kT": np.sqrt(squares[best][late]).tolist(),
        },
    }


def time_method(method, steps, platform, force_field):
    """MD steps per CPU second of one process; "md": plain MD of 1 fs."""
    if method == "md":
        simulation = make_simulation(platform, force_field, 1)[1]
        simulation.integrator.setStepSize(0.001)
        began, n = clocks(), steps
        simulation.step(n)
        simulation.context.getState(energy=True)
    else:
        sampler = make_sampler(method, {}, 1, platform, force_field)
        began = clocks()
        _, n = sampler.advance(steps)
    return float(n / (clocks() - began)[1])


def time_methods(methods, args, settings, pool):
    """Steps per CPU second of each method, as many processes as cores side by side."""
    rates, options = {}, (settings["platform"], settings["force_field"])
    for method in ("md", *methods):
        jobs = [pool.submit(time_method, method, args.steps, *options) for _ in range(args.cores)]
        rates[method] = float(np.mean([job.result() for job in jobs]))
        print(f"{method}: {rates[method]:.0f} steps per CPU second", flush=True)
    return rates


def costs_of_openmm(rows, rates, cores):
    """The Cost of each of OpenMM's methods."""
    costs = {}
    for method, row in rows.items():
        rate, speed = row["n_eff_per_million"] / 1e6, rates[method]
        paid = row["equilibration_evaluations"]
        costs[method] = Cost(paid, paid / speed, rate, cores * rate * speed)
    return costs


def costs_of_flow(estimate, path, timed, md_rate, cores):
    """The Cost of one way to use a run's flow, from nothing and from frames that are there."""
    spent = read_json(path / "summary.json")["energy_evaluations"]
    walls = read_json(timed / "summary.json")["wall_seconds"]
    if spent["md"] is None:
        raise ValueError(f"{path}: does not record what its MD frames cost")
    rate, start = estimate["n_eff_per_million"] / 1e6, estimate["start"]
    training = spent["training"] + start["evaluations"]
    seconds = walls["training"] + start["seconds"]
    md_seconds = walls["md"] or spent["md"] / md_rate
    speed = cores * estimate["n_eff_per_cpu_second"]
    return {
        "nothing": Cost(spent["md"] + training, md_seconds + seconds, rate, speed),
        "frames": Cost(training, seconds, rate, speed),
    }


def compare(flow, costs, needed):
    """What a flow gives of what OpenMM's replica exchange gives, and seconds to the error asked.

    Each figure is over the best of the ladders for it; ``over_metadynamics`` is over that.
    """
    exchange = [cost for method, cost in costs.items() if method != METADYNAMICS]
    result = {}
    for begin, cost in flow.items():
        entry = {
            "paid_evaluations": cost.evaluations,
            "paid_seconds": cost.seconds,
            "all_in": cost.samples(BUDGET) / max(c.samples(BUDGET) for c in exchange),
            "break_even_evaluations": max(cost.break_even(c) for c in exchange),
            "seconds_until_error": cost.seconds_until(needed),
        }
        for minutes in MINUTES:
            best = max(c.samples_in(60 * minutes) for c in exchange)
            entry[f"per_second_{minutes}_minutes"] = cost.samples_in(60 * minutes) / best
        result[begin] = entry
    sampling = flow["frames"]  # the rates are the same from nothing
    result["sampling_only"] = sampling.per_evaluation / max(c.per_evaluation for c in exchange)
    result["per_second_sampling"] = sampling.per_second / max(c.per_second for c in exchange)
    if METADYNAMICS in costs:
        other = costs[METADYNAMICS].per_evaluation
        result["over_metadynamics"] = sampling.per_evaluation / other
    return result


def summarise_runs(estimates):
    """Over the runs: the worst and the median of each figure, and whether the errors hold.

    `estimates` are of one way to use the flows. The chi^2 of the spread of the runs about their
    mean tests the errors that they claim, the mean is set beside the reference.
    """
    p = np.array([row["p"] for row in estimates])
    stderr = np.array([row["stderr"] for row in estimates])
    table = {"hidden_basin_right": sum(is_hidden_right(row) for row in estimates)}
    if len(p) > 1 and np.all(stderr > 0):
        mean, error = float(p.mean()), float(math.sqrt(np.sum(stderr**2)) / len(p))
        table["mean"] = compare_with_reference(mean, error)
        table["p_spread"] = float(chi2.sf(np.sum(((p - mean) / stderr) ** 2), len(p) - 1))
    figures = {"n_eff_per_million": [row["n_eff_per_million"] for row in estimates]}
    figures["n_eff_per_cpu_second"] = [row["n_eff_per_cpu_second"] for row in estimates]
    ratios = [row["ratios"] for row in estimates]
    for key, value in ratios[0].items():
        if isinstance(value, dict):
            for name in value:
                figures[f"{name}_from_{key}"] = [ratio[key][name] for ratio in ratios]
        else:
            figures[key] = [ratio[key] for ratio in ratios]
    for key, values in figures.items():
        costs = key.startswith(("paid", "break_even", "seconds"))
        table[key] = {
            "worst": max(values) if costs else min(values),
            "median": float(np.median(values)),
        }
    return table


def is_hidden_right(row):
    """Whether the hidden basin was seen, and agrees with the reference."""
    return bool(row["hidden"]["p"] > 0 and abs(row["hidden"]["z"]) < 3)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="finished runs of openmm-tsf, a training each"
    )
    parser.add_argument("--samplers", type=Path, required=True, help="folder of openmm_samplers.py")
    parser.add_argument(
        "--timed",
        type=Path,
        help="run whose seconds of MD and training count for all, by default its own",
    )
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200_000, help="of MD in each timing")
    parser.add_argument("--walkers", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--burn-in", type=int, default=50)
    parser.add_argument(
        "--independent", type=int, default=1, help="proposals of the chain in an iteration"
    )
    parser.add_argument("--dynamics-interval", type=int, default=0, help="of 50 fs; 0: none")
    parser.add_argument("--draws", type=int, default=200_000, help="weighted, without a chain")
    parser.add_argument(
        "--chosen-draws", type=int, default=400_000, help="of which few energies are evaluated"
    )
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("cost.json"))
    args = parser.parse_args()
    if args.walkers % N_GROUPS:
        parser.error(f"--walkers: expected a multiple of {N_GROUPS}, got {args.walkers}")
    for name in ("draws", "chosen_draws"):
        if (value := getattr(args, name)) % N_BLOCKS or value <= 0:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected a multiple of {N_BLOCKS}, got {value}")
    return args


def main():
    args = parse_arguments()
    runs, settings = read_folder(args.samplers)
    rows = {
        method: summarise_metadynamics(found)
        if method == METADYNAMICS
        else summarise_exchange(found, int(method))
        for method, found in runs.items()
    }
    reference = load_reference()
    rung = reference.rung(KELVIN)
    hidden = estimate_mean(in_hidden_basin(reference.phi[..., rung], reference.psi[..., rung]))
    known = reference_population(KELVIN)
    p = known.value
    needed = 1 / (p * (1 - p) * ERROR_KT**2)
    report = {
        "cores": args.cores,
        "openmm": settings,
        "reference": {
            "p": p,
            "stderr": known.stderr,
            "p_hidden": hidden.value,
            "p_hidden_stderr": hidden.stderr,
        },
        "n_eff_for_0.1_kT": needed,
        "samplers": rows,
    }
    with ProcessPoolExecutor(args.cores, get_context("spawn")) as pool:
        rates = report["rates"] = time_methods(rows, args, settings, pool)
        jobs = [pool.submit(sample_flow, path, args) for path in args.runs]
        flows = report["flows"] = [job.result() for job in jobs]
    costs = costs_of_openmm(rows, rates, args.cores)
    for method, cost in costs.items():
        rows[method]["seconds_until_error"] = cost.seconds_until(needed)
    for path, row in zip(args.runs, flows, strict=True):
        for estimate in row["estimates"].values():
            share = estimate["hidden"]
            share["z"] = (share["p"] - hidden.value) / math.hypot(share["stderr"], hidden.stderr)
            flow = costs_of_flow(estimate, path, args.timed or path, rates["md"], args.cores)
            estimate["ratios"] = compare(flow, costs, needed)
    report["over_the_runs"] = {
        way: summarise_runs([row["estimates"][way] for row in flows]) for way in WAYS
    }
    report = json_ready(report)
    write_json(args.output, report)
    write_tables(report, args.output.with_suffix(".md"))
    draw(report, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
