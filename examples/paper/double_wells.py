"""Figure 2 of the paper (arXiv:2012.00429): mixtures of double wells, TSF beside RealNVP.

    python examples/paper/double_wells.py --output examples/results/double_wells.png   # two cores
    python examples/paper/double_wells.py --quick --output quick.png   # a minute, a short form

For d = 5 and 20: the reference sampler (100 rungs) against the exact marginals; flows of both
kinds trained at T = 1 on its samples, several seeds each; their NLL, its distance to the entropy
and their ESS from T = 0.1 to 10. Writes the figure, all numbers (.json) and two tables (_flows.csv,
_reference.csv) beside it.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from double_well_experiment import (
    POTENTIAL_SEED,
    TEMPERATURES,
    ladder,
    measure,
    reference,
    reference_scores,
    train,
    training_frames,
)
from double_wells_figure import plot_double_wells
from scipy import stats

import openmm_tsf as tsf
from openmm_tsf.io.files import read_json, write_csv, write_json
from openmm_tsf.potentials import MixedDoubleWell

KINDS = ("TSF", "RealNVP")
#: Temperatures of panel A, and of the table.
SHOWN = (0.1, 1.0)
TABLE = (0.1, 0.3, 1.0, 3.0, 10.0)
N_SHOWN, N_BINS = 5, 60
#: Least probability of the largest |z| of the reference sampler's marginals.
LEAST_P = 0.01


@dataclass(frozen=True)
class Size:
    """How much is done at one dimension: the sampler's walkers and iterations, the flows."""

    n_walkers: int
    n_burn: int
    n_iterations: int
    n_blocks: int
    width: int
    n_steps: int
    n_samples: int = 10_000
    temperatures: tuple[float, ...] = TEMPERATURES


SIZES = {5: Size(16, 4000, 4000, 4, 64, 1500), 20: Size(16, 20_000, 10_000, 4, 96, 2500)}
QUICK = {
    5: Size(4, 40, 40, 1, 8, 30, 500, (0.1, 1.0, 10.0)),
    20: Size(4, 40, 40, 1, 8, 30, 500, (0.1, 1.0, 10.0)),
}


def settings(size):
    """The training: the same for both kinds of flow and all dimensions, except for its length."""
    return tsf.FitSettings(
        n_steps=size.n_steps, batch_size=512, kl_batch_size=128, learning_rate=2e-3, lambda_max=0.5
    )


def edges(potential, coordinate, temperature):
    """Edges of the bins of a marginal: 3.2 standard deviations about the mean."""
    mean, variance = potential.cumulants(temperature)[:2, coordinate].tolist()
    return np.linspace(mean - 3.2 * variance**0.5, mean + 3.2 * variance**0.5, N_BINS + 1)


def histograms(potential, x, temperature):
    """Densities of the first coordinates of x [..., d]; values outside the bins count, too."""
    densities = []
    for j in range(N_SHOWN):
        bins = edges(potential, j, temperature)
        counts = np.histogram(x[..., j].numpy().ravel(), bins)[0]
        densities.append((counts / x[..., j].numel() / np.diff(bins)).tolist())
    return densities


def exact_marginals(potential, temperature):
    """The bins, points and exact densities of the first coordinates."""
    marginals = []
    for j in range(N_SHOWN):
        bins = edges(potential, j, temperature)
        x = np.linspace(bins[0], bins[-1], 241)
        density = potential.marginal(j, torch.from_numpy(x), temperature)[0]
        marginals.append({"edges": bins.tolist(), "x": x.tolist(), "density": density.tolist()})
    return marginals


def sample_reference(d, size):
    """The reference sampler of one dimension, its z values, and histograms for panel A."""
    torch.set_num_threads(1)
    began = time.monotonic()
    potential = MixedDoubleWell.random(d, POTENTIAL_SEED)
    samples = reference(potential, size.n_walkers, size.n_burn, size.n_iterations, seed=1)
    return {
        "rows": reference_scores(potential, samples),
        "dataset": training_frames(samples),
        "marginals": {
            f"{t:g}": histograms(potential, samples.x[:, :, samples.temperatures.index(t)], t)
            for t in SHOWN
        },
        "swap_acceptance": [float(f(samples.swap_acceptance)) for f in (torch.min, torch.max)],
        "walk_acceptance": [float(f(samples.walk_acceptance)) for f in (torch.min, torch.max)],
        "n_evaluations": samples.n_evaluations,
        "seconds": time.monotonic() - began,
    }


def train_and_measure(d, kind, seed, size, dataset):
    """Train one flow; return its results by temperature, its training, and draws for panel A."""
    torch.set_num_threads(1)
    potential = MixedDoubleWell.random(d, POTENTIAL_SEED)
    flow, result = train(kind, potential, dataset, size, settings(size), seed)
    which = {"dimension": d, "flow": kind, "seed": seed, "n_parameters": flow.n_parameters}
    rows = [
        which | {"temperature": t} | measure(flow, potential, t, size.n_samples, seed=1000 + seed)
        for t in size.temperatures
    ]
    generator = torch.Generator().manual_seed(seed)
    draws = {
        f"{t:g}": histograms(potential, flow.sample(size.n_samples, t, generator).x, t)
        for t in SHOWN
    }
    cost = {"n_evaluations": result.n_evaluations, "seconds": result.wall_seconds}
    return rows, which | {"kept_step": result.best.step} | cost, draws


def by_seeds(rows, d, kind, temperature, key):
    """Median, lowest and highest over seeds."""
    values = [
        row[key]
        for row in rows
        if (row["dimension"], row["flow"], row["temperature"]) == (d, kind, temperature)
    ]
    return statistics.median(values), min(values), max(values)


def table(rows, temperatures):
    """A table in Markdown: distances to the entropy, and ESS; medians and ranges."""
    shown = [t for t in TABLE if t in temperatures]
    lines = ["| d | flow | parameters | " + " | ".join(f"T = {t:g}" for t in shown) + " |"]
    lines.append("|---" * (3 + len(shown)) + "|")
    for d in sorted({row["dimension"] for row in rows}):
        for kind in KINDS:
            size = next(
                r["n_parameters"] for r in rows if r["flow"] == kind and r["dimension"] == d
            )
            cells = []
            for t in shown:
                distance, low, high = by_seeds(rows, d, kind, t, "distance")
                ess = by_seeds(rows, d, kind, t, "reverse_ess")[0]
                cells.append(f"{distance:.3g} ({low:.3g} to {high:.3g}); {ess:.2g}")
            lines.append(f"| {d} | {kind} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(sizes, n_seeds, n_workers):
    """Sample the references, train the flows; return all that is drawn and written."""
    began = time.monotonic()
    rows, trainings, draws = [], [], {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, context) as pool:
        samplers = {d: pool.submit(sample_reference, d, size) for d, size in sizes.items()}
        references = {d: sampler.result() for d, sampler in samplers.items()}
        jobs = [
            (d, kind, seed)
            for seed in range(1, n_seeds + 1)
            for d in sorted(sizes, reverse=True)  # the long ones first
            for kind in KINDS
        ]
        futures = [
            pool.submit(train_and_measure, *job, sizes[job[0]], references[job[0]]["dataset"])
            for job in jobs
        ]
        for (d, kind, seed), future in zip(jobs, futures, strict=True):
            results, training, sampled = future.result()
            rows += results
            trainings.append(training)
            draws.setdefault((d, kind), sampled)
            print(f"d = {d}, {kind}, seed {seed}: {training['seconds']:.0f} s", flush=True)
    return references, rows, trainings, draws, time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="double_wells.png", help="the figure")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each flow")
    parser.add_argument("--dimensions", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="a short form with two seeds")
    parser.add_argument(
        "--redraw", action="store_true", help="draw the figure from the numbers beside it"
    )
    args = parser.parse_args()
    output = Path(args.output)
    if args.redraw:
        summary = read_json(output.with_suffix(".json"))
        plot_double_wells(output, summary)
        print(table(summary["rows"], TEMPERATURES))
        return
    torch.set_num_threads(1)
    every, n_seeds = (QUICK, 2) if args.quick else (SIZES, args.seeds)
    sizes = {d: every[d] for d in args.dimensions}
    references, rows, trainings, draws, seconds = run(sizes, n_seeds, args.workers)
    scores = [row for d in sizes for row in references[d].pop("rows")]
    d = max(sizes)
    potential = MixedDoubleWell.random(d, POTENTIAL_SEED)
    marginals = {
        f"{t:g}": {
            "exact": exact_marginals(potential, t),
            "sampler": references[d]["marginals"][f"{t:g}"],
            **{kind: draws[d, kind][f"{t:g}"] for kind in KINDS},
        }
        for t in SHOWN
    }
    summary = {
        "seconds": seconds,
        "sizes": {str(d): vars(size) for d, size in sizes.items()},
        "fit": {str(d): settings(size).to_config() for d, size in sizes.items()},
        "ladder": list(ladder()),
        "reference": {
            str(d): {k: v for k, v in content.items() if k not in ("dataset", "marginals")}
            | {
                "worst_z": max(abs(row["z"]) for row in scores if row["dimension"] == d),
                "n_z": sum(row["dimension"] == d for row in scores),
            }
            for d, content in references.items()
        },
        "trainings": trainings,
        "marginals": marginals,
        "rows": rows,
    }
    write_json(output.with_suffix(".json"), summary)
    write_csv(output.with_name(f"{output.stem}_flows.csv"), list(rows[0]), rows)
    write_csv(output.with_name(f"{output.stem}_reference.csv"), list(scores[0]), scores)
    plot_double_wells(output, summary)
    print(table(rows, next(iter(sizes.values())).temperatures))
    print(f"reference: {summary['reference']}\n{seconds:.0f} s")
    worst = max(content["worst_z"] for content in summary["reference"].values())
    by_chance = len(scores) * 2 * stats.norm.sf(worst)
    if by_chance < LEAST_P and not args.quick:
        raise SystemExit(
            f"the reference sampler misses the exact marginals: |z| = {worst:.2f}, one so large "
            f"among {len(scores)} has a probability of {by_chance:.2g}"
        )


if __name__ == "__main__":
    main()
