"""A planet's orbit from radial velocities: adaptive MCMC on a posterior with two periods.

    python examples/lecture/radial_velocity.py --output examples/results/lecture

Walkers start at draws of the prior, resampled by their likelihood. A flow learns from them while
local and global moves alternate (tsf.adapt) and is then frozen; chains of local moves alone start
at the same points. Means, and the weight of the longer period, are compared with quadrature. Writes
radial_velocity.json and .png, in a minute or two.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import openmm_tsf as tsf
from openmm_tsf.analysis.mixing import split_r_hat
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.analysis.statistics import group_means, reverse_ess, statistical_inefficiency
from openmm_tsf.coordinates import Whitening
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import RadialVelocity
from openmm_tsf.sampling.kernels import CartesianMALA, FlowIndependence, Scheduled

#: Of the observations. The first seed with two periods of similar weight, and little of the
#: posterior at the ends of the range of φ₀, where the density of a flow on R⁴ does not end.
DATA_SEED = 5
#: ln P between the two periods.
BORDER = 1.1
NAMES = ("v₀", "K", "φ₀", "ln P", "P(longer period)")
LADDER, LOCAL_STEPS = (1.0,), 4


def observables(x):
    """Return the parameters and whether the period is the longer one, [..., 5]."""
    return torch.cat((x, (x[..., 3:] > BORDER).double()), dim=-1)


def exact_means(target):
    """Return the exact means [5], by quadrature."""
    log_periods, density = target.log_period_density()
    longer = density[log_periods > BORDER].sum() / density.sum()
    return torch.cat((target.mean(), longer[None])).tolist()


def resampled_prior(target, n_draws, n_walkers, seed):
    """Return walkers [W, 4] drawn from the prior with their likelihood as weight, and the ESS."""
    generator, priors = torch.Generator().manual_seed(seed), target.priors
    normal = torch.randn(n_draws, 2, dtype=torch.float64, generator=generator)
    uniform = torch.rand(n_draws, 2, dtype=torch.float64, generator=generator)
    low, high = math.log(priors.shortest), math.log(priors.longest)
    x = torch.stack(
        (
            priors.offset_width * normal[:, 0],
            priors.amplitude + priors.amplitude_width * normal[:, 1],
            2.0 * math.pi * uniform[:, 0],
            low + (high - low) * uniform[:, 1],
        ),
        dim=1,
    )
    prior = 0.5 * normal.square().sum(dim=1)
    log_likelihood = prior - target.energy(x)  # up to a constant
    weights = log_likelihood.softmax(dim=0)
    rows = torch.multinomial(weights, n_walkers, replacement=True, generator=generator)
    return x[rows], reverse_ess(log_likelihood).fraction * n_draws


def make_sampler(target, start, with_flow, seed):
    """Return a sampler with its walkers at `start` [W, 4], and its flow standardised there."""
    kinds = torch.zeros(4, dtype=torch.int64)
    whitening = Whitening.fit(start, kinds=kinds, mode="full")
    flow = tsf.RealNVPFlow(4, 0, n_blocks=5, hidden=(32, 32), whitening=whitening, seed=seed)
    masses = 1.0 / start.var(dim=0)  # preconditions the steps
    mala = CartesianMALA(target, LADDER, masses, timestep=0.3)
    moves = [Scheduled(mala, repeats=LOCAL_STEPS)]
    if with_flow:
        moves.append(FlowIndependence(flow, target, LADDER))
    sampler = tsf.ParallelTempering(None, flow, LADDER, len(start), moves, target, seed=seed)
    sampler.set_positions(start[:, None])
    sampler.tune(40)
    sampler.set_positions(start[:, None])
    return sampler


def summarise(sampler, x, exact):
    """Return estimates, z, R̂ and correlation times of observables of x [n, W, 4]."""
    kept = observables(x[len(x) // 5 :]).numpy()
    row = {"acceptance": {k: float(i.acceptance[0]) for k, i in sampler.totals.items()}}
    for name, series, value in zip(NAMES, np.moveaxis(kept, 2, 0), exact, strict=True):
        means = group_means(series)
        mean, stderr = float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
        numbers = {
            "mean": mean, "stderr": stderr, "exact": value,
            "z": (mean - value) / stderr if stderr else math.inf,
            "r_hat": split_r_hat(series), "inefficiency": statistical_inefficiency(series),
        }  # fmt: skip
        # A series that does not change has none of them.
        row[name] = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    row["jumps"] = int(np.abs(np.diff(kept[..., 4], axis=0)).sum())
    return row


def plot(target, adapted, chains, path):
    """Draw acceptance and ESS while training, the density of ln P, and ln P along three chains."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rate = adapted.acceptance["flow_independent"][:, 0].numpy()
    left.plot(rate, color=RUN_COLOUR, lw=0.8, label="acceptance of the flow's proposals")
    ess = [fractions[0] for fractions in adapted.ess]
    left.plot(adapted.ess_iterations, ess, "o--", color="black", ms=4, label="ESS of its draws / n")
    left.set_ylim(0, 1)
    left.set_xlabel("iteration of the training")
    left.legend(fontsize=FONT - 2, loc="upper left")
    log_periods, density = target.log_period_density()
    middle.plot(log_periods, density, color=REFERENCE_COLOUR, label="exact")
    samples = chains["adaptive"][len(chains["adaptive"]) // 5 :, :, 3].flatten()
    middle.hist(samples, 80, density=True, color=RUN_COLOUR, alpha=0.5, label="chains, flow frozen")
    middle.set_xlim(0.7, 1.6)
    middle.set_xlabel("ln P")
    middle.set_ylabel("posterior density")
    middle.legend(fontsize=FONT - 2)
    for name, colour, label in (
        ("local", "0.6", "local moves alone"), ("adaptive", RUN_COLOUR, "with the frozen flow"),
    ):  # fmt: skip
        lines = right.plot(chains[name][:150, :3, 3], color=colour, lw=0.8)
        lines[0].set_label(label)
    right.set_xlabel("iteration")
    right.set_ylabel("ln P of three chains")
    right.legend(fontsize=FONT - 2, loc="upper right")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--prior-draws", type=int, default=100_000)
    parser.add_argument("--walkers", type=int, default=64)
    parser.add_argument("--adaptation", type=int, default=400, help="iterations with training")
    parser.add_argument("--iterations", type=int, default=400, help="iterations afterwards")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    target, folder = RadialVelocity.synthetic(seed=DATA_SEED), Path(options.output)
    exact = exact_means(target)
    start, ess = resampled_prior(target, options.prior_draws, options.walkers, options.seed)
    samplers = {
        name: make_sampler(target, start, name == "adaptive", options.seed)
        for name in ("local", "adaptive")
    }
    sizes = {"n_iterations": options.adaptation, "learning_rate": 5e-3, "n_ess_draws": 1000}
    adapted = tsf.adapt(samplers["adaptive"], tsf.AdaptSettings(**sizes), progress=False)
    chains, rows = {}, {}
    for name, sampler in samplers.items():
        x = sampler.run(options.iterations, collect=True, progress=False)[:, :, 0]
        chains[name], rows[name] = x, summarise(sampler, x, exact)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "data_seed": DATA_SEED, "seed": options.seed, "walkers": options.walkers,
        "prior_draws": options.prior_draws, "ess_of_prior_draws": ess,
        "local_steps": LOCAL_STEPS, "adaptation": options.adaptation,
        "iterations": options.iterations, "evaluations_adapting": adapted.n_evaluations,
        "acceptance_adapting": adapted.acceptance["flow_independent"][:, 0].tolist(),
        "ess_adapting": list(zip(adapted.ess_iterations, adapted.ess, strict=True)),
        "chains": rows,
    }  # fmt: skip
    write_json(folder / "radial_velocity.json", content)
    plot(target, adapted, chains, folder / "radial_velocity.png")
    for name, row in rows.items():
        print(f"{name}: {row['jumps']} jumps between periods, acceptance", row["acceptance"])
        for key in NAMES:
            print(f"  {key}:", *(f"{k} {v}" for k, v in row[key].items()), sep="  ")


if __name__ == "__main__":
    main()
