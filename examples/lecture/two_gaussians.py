"""Two Gaussians: a local chain, adaptive MCMC, and adaptive MCMC from one walker.

    python examples/lecture/two_gaussians.py --output examples/results/lecture

Two modes of weights 0.3 and 0.7, too far apart for local moves. Walkers in both modes stay there
under MALA alone; with a flow that learns from them (tsf.adapt, then frozen) they move between the
modes. A flow that learns from one walker finds no second mode: acceptance and ESS look well, and
only ln Z of another method, sequential Monte Carlo from a wide Gaussian, tells. Writes
two_gaussians.json and .png, in a minute or two.
"""

import argparse
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import openmm_tsf as tsf
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.analysis.statistics import group_means, log_mean_weight, reverse_ess
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import GaussianMixture, GaussianWell
from openmm_tsf.sampling import AnnealingSchedule, sequential_monte_carlo
from openmm_tsf.sampling.kernels import CartesianMALA, FlowIndependence, Scheduled

MEANS, VARIANCE, WEIGHTS = [[0.0, 0.0], [7.0, 2.0]], 0.5, (0.3, 0.7)
LADDER = (1.0,)
LOCAL_STEPS, TIMESTEP = 5, 0.8
#: Standard errors by which ln Z of the flow has to be too low to say that mass is missing.
ALARM = 4.0
TITLES = {
    "local": "MALA alone",
    "adaptive": "adaptive, walkers in both modes",
    "one_walker": "adaptive, one walker",
}


def make_target():
    """Return the mixture."""
    return GaussianMixture(torch.tensor(MEANS).double(), VARIANCE, torch.tensor(WEIGHTS))


class Watch:
    """A reporter of the walkers' mean population of the second mode."""

    interval = 1

    def __init__(self, target):
        self.target, self.modes = target, []

    def __call__(self, sampler, state):
        self.modes.append(self.target.modes(state.x[:, 0]))


def make_sampler(target, name, n_walkers, seed):
    """Return a sampler of the kind `name` with its walkers at their start, half in each mode."""
    flow = tsf.RealNVPFlow(2, 0, n_blocks=4, hidden=(32, 32), seed=seed)
    mala = CartesianMALA(target, LADDER, masses=1.0, timestep=TIMESTEP)
    moves = [Scheduled(mala, repeats=LOCAL_STEPS)]
    if name != "local":
        moves.append(FlowIndependence(flow, target, LADDER))
    start = target.means[:1] if name == "one_walker" else target.means.repeat(n_walkers // 2, 1)
    sampler = tsf.ParallelTempering(None, flow, LADDER, len(start), moves, target, seed=seed)
    sampler.set_positions(start[:, None])
    sampler.reporters.append(Watch(target))
    return sampler


def mean_and_z(series, exact):
    """Return the mean of a series [n, W], its standard error and z.

    Where no walker ever changes the mean is that of the start, and its error is not known: None.
    """
    means = group_means(series)
    value = float(means.mean())
    if (series == series[0]).all():
        return {"value": value, "stderr": None, "z": None}
    stderr = float(means.std(ddof=1) / math.sqrt(len(means)))
    return {"value": value, "stderr": stderr, "z": (value - exact) / stderr}


def run_chain(target, name, options):
    """Return the numbers of one chain, its frozen flow (None: none) and states [n, W, 2]."""
    n_walkers, n_adapt, n_run = options.walkers, options.adaptation, options.iterations
    sampler = make_sampler(target, name, n_walkers, options.seed)
    watch, row = sampler.reporters[0], {}
    if name == "one_walker":
        n_run *= 3  # one walker is cheap
    memory = n_adapt if name == "one_walker" else 20
    if name == "local":
        sampler.run(n_adapt, progress=False)
    else:
        sizes = {"n_iterations": n_adapt, "memory": memory, "learning_rate": 5e-3}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = tsf.adapt(sampler, tsf.AdaptSettings(**sizes), progress=False)
        row["warnings"] = [str(warning.message) for warning in caught]
        row["evaluations_adapting"] = result.n_evaluations
        row["acceptance_adapting"] = result.acceptance["flow_independent"][:, 0].tolist()
        row["ess_adapting"] = list(zip(result.ess_iterations, result.ess, strict=True))
    x = sampler.run(n_run, collect=True, progress=False)[:, :, 0]
    for kernel, info in sampler.totals.items():
        row[f"acceptance_{kernel}"] = float(info.acceptance[0])
    modes = torch.stack(watch.modes).numpy()
    row["walkers"], row["iterations"] = modes.shape[1], n_run
    row["jumps"] = int((np.diff(modes[n_adapt:], axis=0) != 0).sum())
    kept = modes[n_adapt + n_run // 10 :].astype(float)
    row["population"] = mean_and_z(kept, WEIGHTS[1])
    if name == "adaptive":  # from both modes' equal numbers on, with a flow that changes
        row["population_adapting"] = mean_and_z(modes[:n_adapt].astype(float), WEIGHTS[1])
    row["trace"] = modes.mean(axis=1).round(4).tolist()
    return row, None if name == "local" else sampler.flow, x


def annealed_log_z(target, seed):
    """Return ln Z and its standard error by sequential Monte Carlo from a wide Gaussian."""
    base = GaussianWell(torch.eye(2) / 25.0)

    def moves(bridge, ladder):
        return [CartesianMALA(bridge, ladder, masses=1.0, timestep=TIMESTEP)]

    schedule = AnnealingSchedule.linear(8, make_kernels=moves)
    generator = torch.Generator().manual_seed(seed)
    sample = sequential_monte_carlo(base, target, 1.0, (24, 200), schedule, generator)
    value, stderr = log_mean_weight(sample.log_partition)
    return {"log_z": [value, stderr], "evaluations": sample.n_evaluations}


def judge(flow, target, other, seed):
    """Return what the flow's own draws say of it, and what ln Z of another method does."""
    draws = draw_weighted(flow, target, 1.0, 4000, torch.Generator().manual_seed(seed))
    log_z, stderr = log_mean_weight(draws.log_weights)
    ess = reverse_ess(draws.log_weights)
    shift = log_z - other[0]
    error = math.hypot(stderr, other[1])
    missing = shift < -ALARM * error
    mass = max(0.0, -math.expm1(shift))
    word = (
        f"mass is missing: {mass:.2f} ± {math.exp(shift) * error:.2f} of the target is where the "
        "flow does not draw"
        if missing
        else "no mass is missing"
    )
    return {
        "ess": ess.fraction, "largest_weight": ess.largest_weight, "log_z": [log_z, stderr],
        "z_of_log_z": shift / error, "missing": missing, "missing_mass": mass, "verdict": word,
    }  # fmt: skip


def plot(rows, states, n_adapt, path):
    """Draw the frozen chains' states, and the population of the second mode along each chain."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for column, (name, row) in enumerate(rows.items()):
        top, below = axes[:, column]
        x = states[name].reshape(-1, 2)
        x = x[np.random.default_rng(0).permutation(len(x))[:2000]]  # the order is by walkers
        top.plot(*x.T, ".", ms=3, alpha=0.3, color=RUN_COLOUR, rasterized=True)
        top.plot(*np.array(MEANS).T, "+", ms=12, mew=2, color=REFERENCE_COLOUR)
        top.set_title(TITLES[name], fontsize=FONT)
        top.set_xlim(-4, 11)
        top.set_xlabel("x₁")
        below.plot(row["trace"], color=RUN_COLOUR, lw=0.8, label="walkers")
        below.axhline(WEIGHTS[1], color=REFERENCE_COLOUR, lw=1.2, label="exact")
        if name != "local":
            below.axvline(n_adapt, color="black", ls=":", label="flow frozen")
        below.set_ylim(-0.05, 1.05)
        below.set_xlabel("iteration")
    axes[1, 1].legend(loc="lower right", fontsize=FONT - 2)
    axes[0, 0].set_ylabel("x₂")
    axes[1, 0].set_ylabel("walkers in the mode of weight 0.7")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--walkers", type=int, default=64, help="half of them start in each mode")
    parser.add_argument("--adaptation", type=int, default=300, help="iterations with training")
    parser.add_argument("--iterations", type=int, default=300, help="iterations afterwards")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    target, folder = make_target(), Path(options.output)
    other = annealed_log_z(target, options.seed)
    rows, states = {}, {}
    for name in TITLES:
        rows[name], flow, states[name] = run_chain(target, name, options)
        if flow is not None:
            rows[name]["flow"] = judge(flow, target, other["log_z"], options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "means": MEANS, "variance": VARIANCE, "weights": WEIGHTS, "local_steps": LOCAL_STEPS,
        "timestep": TIMESTEP, "walkers": options.walkers, "adaptation": options.adaptation,
        "seed": options.seed, "sequential_monte_carlo": other, "chains": rows,
    }  # fmt: skip
    write_json(folder / "two_gaussians.json", content)
    plot(rows, states, options.adaptation, folder / "two_gaussians.png")
    for name, row in rows.items():
        value, stderr = (row["population"][k] for k in ("value", "stderr"))
        error = "error not known" if stderr is None else f"± {stderr:.3f}"
        print(f"{TITLES[name]}: {row['jumps']} jumps, second mode {value:.3f}, {error}")
        if "flow" in row:
            accepted, flow = row["acceptance_flow_independent"], row["flow"]
            print(f"  acceptance {accepted:.2f}, ESS {flow['ess']:.2f}: {flow['verdict']}")


if __name__ == "__main__":
    main()
