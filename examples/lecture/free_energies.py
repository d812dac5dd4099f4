"""ln Z by importance sampling, annealing, sequential Monte Carlo and MBAR, and exact values.

    python examples/lecture/free_energies.py --output examples/results/lecture

A mixture of Gaussians, double wells (quadrature), and φ⁴ in one dimension under a field (transfer
matrix). All methods start from the same Gaussian base measure. MBAR has the states
of replica exchange at five temperatures and, at the hottest, the base measure. Writes
free_energies.json and .png, in a minute.
"""

import argparse
import logging
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from phi4_training import gaussian_flow
from tasks import in_parallel

import openmm_tsf as tsf
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.analysis.statistics import as_normal, log_mean_weight, reverse_ess
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import DoubleWell, GaussianMixture, GaussianWell, PhiFourChain
from openmm_tsf.sampling import (
    AnnealingSchedule,
    annealed_importance_sampling,
    importance_sampling,
    sequential_monte_carlo,
)
from openmm_tsf.sampling.kernels import LatentHMC, PlainSwap

#: MBAR's temperatures, in those of the target.
LADDER = (1.0, 1.4, 2.0, 2.8, 4.0)
N_GROUPS, N_LEAPFROG = 10, 3
METHODS = {
    "importance": "importance sampling", "annealed": "annealed importance sampling",
    "smc": "sequential Monte Carlo", "mbar": "MBAR",
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """A target with a Gaussian base measure and a temperature."""

    title: str
    target: object
    base: GaussianWell
    temperature: float


def mixture():
    means = torch.tensor([[-1.5, 0.0, 0.5], [2.0, 1.0, 0.0]], dtype=torch.float64)
    target = GaussianMixture(means, 0.4, torch.tensor([0.7, 0.3]))
    return System("mixture, d = 3", target, GaussianWell(0.3 * torch.eye(3)), 1.0)


def double_wells():
    ones = torch.ones(6, dtype=torch.float64)
    target = DoubleWell(0.1 * ones, -1.5 * ones, 0.5 * ones)
    return System("double wells, d = 6", target, GaussianWell(0.7 * torch.eye(6)), 1.0)


def chain():
    target = PhiFourChain(30, field=0.02)
    return System("φ⁴, 30 sites, b = 0.02", target, target.coupled_gaussian(2.0), 0.05)


SYSTEMS = {"mixture": mixture, "double": double_wells, "phi4": chain}


def local_kernel(base, potential, temperatures):
    """Return Hamiltonian Monte Carlo with the base measure's covariance as inverse mass matrix."""
    flow = gaussian_flow(base, temperatures[0])
    return LatentHMC(flow, potential, temperatures, sigma=0.4, n_leapfrog=N_LEAPFROG)


def replica_exchange(system, options, generator):
    """Return reduced energies [G, K + 1, n] of groups of walkers, and ln Z of the last state.

    The last state is the base measure at the hottest temperature; ``u[g, k]`` are the samples of
    all states, state by state, evaluated in state k.
    """
    base, target = system.base, system.target
    ladder = tuple(system.temperature * t for t in LADDER)
    hmc = local_kernel(base, target, ladder)
    moves = [hmc, PlainSwap(ladder, target.boltzmann_constant)]
    n_walkers = 2 * N_GROUPS
    parts = (None, hmc.flow, ladder, n_walkers, moves, target)
    sampler = tsf.ParallelTempering(*parts, seed=options.seed)
    start = base.sample(n_walkers * len(ladder), ladder[0], generator)
    sampler.set_positions(start.reshape(n_walkers, len(ladder), *base.event_shape))
    sampler.tune(options.iterations // 4)
    x = sampler.run(options.iterations, collect=True, progress=False)
    draws = base.sample(len(x) * n_walkers, ladder[-1], generator)
    draws = draws.reshape(len(x), n_walkers, 1, *base.event_shape)
    x = torch.cat((x, draws), dim=2)  # [n, W, K + 1, d]
    flat = x.flatten(0, 2)
    kelvin = torch.tensor(ladder, dtype=torch.float64)[:, None]
    u = torch.cat((target.energy(flat) / kelvin, base.energy(flat)[None] / ladder[-1]))
    u = u.reshape(len(kelvin) + 1, len(x), N_GROUPS, -1, len(kelvin) + 1)
    u = u.permute(2, 0, 4, 1, 3).flatten(3).flatten(2)
    return u.numpy(), base.log_partition_function(ladder[-1])


def mbar(system, options, generator):
    """Return ln Z, its error and z by MBAR: from the spread of independent groups of walkers."""
    logging.getLogger("pymbar").setLevel(logging.ERROR)  # it greets
    from pymbar import MBAR  # takes seconds to import

    u, log_z_base = replica_exchange(system, options, generator)
    counts = np.full(u.shape[1], u.shape[2] // u.shape[1])
    solver = ({"method": "adaptive", "tol": 1e-8, "options": {"maxiter": 200}},)
    values = []
    for group in u:
        f = MBAR(group, counts, solver_protocol=solver).f_k
        values.append(log_z_base + f[-1] - f[0])
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(N_GROUPS))


def estimate(system, method, options):
    """Return ln Z and its standard error by a method, and what its weights rest on."""
    generator = torch.Generator().manual_seed(options.seed)
    parts = system.base, system.target, system.temperature
    if method == "mbar":
        return mbar(system, options, generator), None
    if method == "importance":
        weights = importance_sampling(*parts, options.draws, generator).log_weights.flatten()
        return log_mean_weight(weights), reverse_ess(weights).fraction * len(weights)
    schedule = AnnealingSchedule.linear(
        options.fractions,
        make_kernels=lambda bridge, ladder: [local_kernel(system.base, bridge, ladder)],
    )
    if method == "annealed":
        result = annealed_importance_sampling(*parts, options.particles, schedule, generator)
        weights = result.log_weights.flatten()
    else:
        shape = (4 * N_GROUPS, options.particles // (4 * N_GROUPS))
        weights = sequential_monte_carlo(*parts, shape, schedule, generator).log_partition
    return log_mean_weight(weights), reverse_ess(weights).fraction * len(weights)


def measure(options, name):
    """Return the rows of a system: a method each."""
    system, rows = SYSTEMS[name](), []
    exact = system.target.log_partition_function(system.temperature)
    for method in METHODS:
        before = system.target.n_evaluations
        (value, stderr), effective = estimate(system, method, options)
        z = (value - exact) / stderr
        rows.append({
            "system": name, "title": system.title, "method": method, "exact": exact,
            "log_z": value, "stderr": stderr, "effective": effective,
            "z": as_normal(z, N_GROUPS - 1) if method == "mbar" else z,
            "evaluations": system.target.n_evaluations - before,
        })  # fmt: skip
    return rows


def plot(rows, path):
    """Draw estimate - exact with its error, of every method and system."""
    names = list(dict.fromkeys(row["system"] for row in rows))
    figure = Figure(figsize=(10, 3.0), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        chosen = [row for row in rows if row["system"] == name]
        at = -np.arange(len(chosen))
        shifts = [row["log_z"] - row["exact"] for row in chosen]
        errors = [row["stderr"] for row in chosen]
        axes.axvline(0.0, color=REFERENCE_COLOUR, lw=1)
        axes.errorbar(shifts, at, xerr=errors, fmt="o", color=RUN_COLOUR, capsize=3)
        for height, row in zip(at, chosen, strict=True):
            words = f"{row['evaluations']:,} evaluations"
            axes.annotate(words, (0.98, height + 0.2), xycoords=("axes fraction", "data"),
                          ha="right", fontsize=7, color="0.4")  # fmt: skip
        axes.set_title(chosen[0]["title"], fontsize=FONT)
        axes.set_xlabel("ln Z - exact", fontsize=FONT)
        widest = 1.2 * max(abs(s) + e for s, e in zip(shifts, errors, strict=True))
        axes.set_xlim(-widest, widest)
        axes.set_ylim(0.5 - len(METHODS), 0.5)
    panels[0].set_yticks(-np.arange(len(METHODS)), METHODS.values())
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--draws", type=int, default=40_000, help="of importance sampling")
    parser.add_argument("--particles", type=int, default=800, help="of the annealed methods")
    parser.add_argument("--fractions", type=int, default=12, help="intermediate distributions")
    parser.add_argument("--iterations", type=int, default=120, help="of replica exchange")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = in_parallel(partial(measure, options), list(SYSTEMS), options.jobs)
    rows = [row for part in parts for row in part]
    for row in rows:
        shift, error = row["log_z"] - row["exact"], row["stderr"]
        print(
            f"{row['title']:24s} {METHODS[row['method']]:28s} {shift:+.4f} ± {error:.4f}  "
            f"z {row['z']:+.1f}  {row['evaluations']} evaluations"
        )
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "jobs")}
    write_json(folder / "free_energies.json", {**settings, "ladder": LADDER, "estimates": rows})
    plot(rows, folder / "free_energies.png")


if __name__ == "__main__":
    main()
