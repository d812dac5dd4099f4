"""Which moves pay: correlation times of each kind of move, alone and in mixtures.

    python examples/benchmarks/moves.py run/ --output moves.json

With the flow of a finished run, from its own frames. Three groups of walkers: of the Boltzmann
distribution, and at the lowest temperature of the basins phi > 0 and phi > 0, |psi| > 120 degrees
(other rungs always of the Boltzmann distribution). For reversible moves the correlation function of
1[basin] is C(t) = (P(t) - p) / (1 - p), P(t) the share of the walkers from the basin that are in it
after t iterations: rare basins need not be found first. Step sizes of the walk are tuned first.
Seconds are of process CPU time on one thread, of iterations with --timed walkers; --again measures
them anew for the correlation times of an earlier output. Runs after the first give frames only.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.sampling.kernels import (
    FlowCrankNicolson,
    FlowIndependence,
    FlowMultipleTry,
    FlowWalk,
    PlainSwap,
    Scheduled,
    SteeredSwap,
    TorchLangevin,
)
from openmm_tsf.systems.slow_torsions import dihedral_angles

#: Iterations in which a correlation below this is noise.
LEVEL = 0.05


def sequences(flow, potential, ladder, masses, sigma):
    """The kernels of an iteration by name: each move alone, and mixtures."""

    def independent(n=1):
        return FlowIndependence(flow, potential, ladder, n_steps=n)

    def crank_nicolson(beta, share=1.0, n=1):
        return FlowCrankNicolson(flow, potential, ladder, beta, share, n_steps=n)

    def swaps():
        steered = SteeredSwap(flow, potential, ladder, first_pairs="odd")
        return [steered, PlainSwap(ladder, potential.boltzmann_constant)]

    def local(interval=1):
        parts = (potential, ladder, masses, flow, 25, 0.002)
        return Scheduled(TorchLangevin(*parts), interval=interval)

    def walk():
        return FlowWalk(flow, potential, ladder, sigma)

    made = {
        "independence": [independent()],
        "independence x 2": [independent(2)],
        "independence x 4": [independent(4)],
        "independence x 8": [independent(8)],
        "multiple try 2": [FlowMultipleTry(flow, potential, ladder, 2)],
        "multiple try 4": [FlowMultipleTry(flow, potential, ladder, 4)],
        "multiple try 8": [FlowMultipleTry(flow, potential, ladder, 8)],
        "walk": [walk()],
        "dynamics": [local()],
    }
    for beta in (0.95, 0.8, 0.5, 0.25):
        made[f"crank nicolson {beta}"] = [crank_nicolson(beta)]
    for beta, share in ((0.999, 0.5), (0.999, 0.2), (0.8, 0.5)):
        made[f"crank nicolson {beta} of {share}"] = [crank_nicolson(beta, share)]
    made |= {
        "2 independence, walk, dynamics, swaps": [local(), independent(2), walk(), *swaps()],
        "2 independence, dynamics, swaps": [local(), independent(2), *swaps()],
        "2 independence, dynamics / 2, swaps": [local(2), independent(2), *swaps()],
        "2 independence, dynamics / 4, swaps": [local(4), independent(2), *swaps()],
        "4 independence, dynamics, swaps": [local(), independent(4), *swaps()],
        "4 independence, dynamics / 2, swaps": [local(2), independent(4), *swaps()],
        "4 independence, dynamics / 4, swaps": [local(4), independent(4), *swaps()],
        "4 independence, swaps": [independent(4), *swaps()],
    }
    for beta in (0.5, 0.25):
        for n in (2, 4):
            made[f"{n} independence, crank nicolson {beta}, dynamics / 4, swaps"] = [
                local(4), independent(n), crank_nicolson(beta), *swaps(),
            ]  # fmt: skip
    return made


class Series:
    """A reporter that keeps energies [n, W, R] and angles [n, W, R, 2] of all walkers."""

    interval = 1

    def __init__(self, molecule):
        self.quartets = [molecule.dihedrals[name] for name in ("phi", "psi")]
        self.energy, self.angles = [], []

    def __call__(self, sampler, state):
        self.energy.append(state.energy.numpy())
        angles = dihedral_angles(state.x.flatten(0, 1).numpy(), self.quartets)
        self.angles.append(angles.reshape(*state.energy.shape, 2))


def in_basins(angles):
    """1[phi > 0] and 1[phi > 0, |psi| > 120 degrees], stacked first, of angles [..., 2]."""
    positive = angles[..., 0] > 0
    return np.stack([positive, positive & (np.abs(angles[..., 1]) > np.deg2rad(120))])


def integrate(correlation):
    """1 + 2 sum C(t) of C(1), C(2), ...; a tail above LEVEL goes on as in its second half.

    Also whether it did; None where the second half is not below the first.
    """
    below = np.flatnonzero(correlation < LEVEL)
    if len(below):
        return 1 + 2 * float(correlation[: below[0]].sum()), False
    half = len(correlation) // 2
    early, late = correlation[:half].mean(), correlation[half:].mean()
    if late >= early:
        return None, True
    ratio = (late / early) ** (1 / half)
    return 1 + 2 * float(correlation.sum() + correlation[-1] * ratio / (1 - ratio)), True


def correlation_of(series):
    """C(t), t = 1, 2, ..., of stationary series [n, W]."""
    series = series - series.mean()
    n, variance = len(series), (series**2).mean()
    return np.array([(series[:-t] * series[t:]).mean() / variance for t in range(1, n // 2)])


def tuned_walk(molecule, flow, potential, ladder, start, seed):
    """The step sizes [R] of the walk, tuned by 100 iterations."""
    walk = FlowWalk(flow, potential, ladder)
    sampler = tsf.ParallelTempering(
        molecule, flow, ladder, len(start), [walk], potential, seed=seed
    )
    with sampler:
        sampler.set_positions(start)
        sampler.tune(100, progress=False)
    return walk.sigma


def measure(molecule, flow, potential, ladder, kernels, start, known, args):
    """Correlation times of one sequence in iterations, its evaluations and acceptances."""
    sampler = tsf.ParallelTempering(
        molecule, flow, ladder, len(start), kernels, potential, seed=args.seed
    )
    with sampler:
        sampler.set_positions(start)
        series = Series(molecule)
        sampler.reporters = [series]
        sampler.run(args.iterations, progress=False)
    energy, group = np.array(series.energy), len(start) // 3
    basins = in_basins(np.array(series.angles)[:, :, 0])  # [2, n, W]
    tau = {}
    for rung, kelvin in enumerate(ladder):
        walkers = slice(None) if rung else slice(group)
        tau[f"U {kelvin:g} K"] = integrate(correlation_of(energy[:, walkers, rung]))
    for number, name in enumerate(("phi>0", "phi>0,|psi|>120")):
        walkers = slice((number + 1) * group, (number + 2) * group)
        share = basins[number][:, walkers].mean(axis=1)
        tau[f"{name} {ladder[0]:g} K"] = integrate((share - known[number]) / (1 - known[number]))
    totals = sampler.totals
    n_replicas = len(start) * len(ladder) * args.iterations
    return {
        "tau": {name: value and round(value, 2) for name, (value, _) in tau.items()},
        "extrapolated": [name for name, (_, extrapolated) in tau.items() if extrapolated],
        "evaluations": sum(info.n_evaluations for info in totals.values()) / n_replicas,
        "acceptance": {
            name: np.round(info.acceptance.numpy(), 3).tolist() for name, info in totals.items()
        },
    }


def time_iterations(molecule, flow, potential, ladder, made, start, args):
    """Median CPU seconds of an iteration of every sequence, measured by turns."""
    samplers = {}
    for name, kernels in made.items():
        samplers[name] = tsf.ParallelTempering(
            molecule, flow, ladder, len(start), kernels, potential, seed=args.seed
        )
        samplers[name].set_positions(start)
        samplers[name].run(4, progress=False)
    seconds = {name: [] for name in made}
    for _ in range(args.repeats):
        for name, sampler in samplers.items():
            began = time.process_time()
            sampler.run(4, progress=False)  # all that is done every fourth iteration, once
            seconds[name].append((time.process_time() - began) / 4)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def starting_points(molecule, runs, ladder, n, generator):
    """Walkers [3 n, R, N, 3] of the three groups, and the populations of the two basins."""
    trajectories = [[run.trajectory(kelvin) for kelvin in ladder] for run in runs]
    frames = [
        torch.tensor(np.concatenate([t.xyz for t in rung])).double()
        for rung in zip(*trajectories, strict=True)
    ]
    x = torch.stack(
        [rung[torch.randint(len(rung), (3 * n,), generator=generator)] for rung in frames], dim=1
    )
    quartets = [molecule.dihedrals[name] for name in ("phi", "psi")]
    inside = in_basins(dihedral_angles(frames[0].numpy(), quartets))
    for group, members in enumerate(inside, start=1):
        if not members.any():
            raise SystemExit("runs: expected frames of phi > 0, |psi| > 120 degrees, got none")
        rows = torch.from_numpy(np.flatnonzero(members))
        rows = rows[torch.randint(len(rows), (n,), generator=generator)]
        x[group * n : (group + 1) * n, 0] = frames[0][rows]
    return x, inside.mean(axis=1).tolist()


def add_rates(report):
    """Effective samples of one replica's series by sequence: per evaluation, per CPU second."""
    for row in report["sequences"].values():
        seconds = row["seconds"] / report["timed_walkers"]
        for key, cost in (("per_evaluation", row["evaluations"]), ("per_second", seconds)):
            row[key] = {name: 1 / (cost * tau) if tau else 0.0 for name, tau in row["tau"].items()}


def table(report):
    """A line for every sequence: correlation times, samples per 1000 evaluations and second."""
    names = list(next(iter(report["sequences"].values()))["tau"])
    lines = [f"tau, per 1000 evaluations, per second of {', '.join(names)}"]
    for name, row in report["sequences"].items():
        parts = [f"{row['evaluations']:6.2f} evaluations {1e3 * row['seconds']:6.1f} ms"]
        for values, scale in (
            (row["tau"], 1),
            (row["per_evaluation"], 1e3),
            (row["per_second"], 1),
        ):
            parts.append(" ".join(f"{scale * (values[key] or 0):7.1f}" for key in names))
        lines.append(f"{name:58s} " + " | ".join(parts))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs: flow and frames")
    parser.add_argument("--walkers", type=int, default=64, help="in each of the three groups")
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--timed", type=int, default=64, help="walkers whose iterations are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the sequences")
    parser.add_argument("--again", type=Path, metavar="JSON", help="earlier output: only time it")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", default="moves.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    flow = load_flow(args.runs[0] / "flow.pt", molecule)
    runs = [tsf.load_run(path) for path in args.runs]
    ladder = tuple(float(t) for t in runs[0].temperatures)
    potential = molecule.potential(compile=True)
    generator = torch.Generator().manual_seed(args.seed)
    start, known = starting_points(molecule, runs, ladder, args.walkers, generator)
    masses = torch.tensor(molecule.heavy_hydrogen_masses, dtype=torch.float64)
    potential.energy(start[:, 0])  # compiled now, not in what is timed
    sigma = tuned_walk(molecule, flow, potential, ladder, start[: args.walkers], args.seed)
    made = sequences(flow, potential, ladder, masses, sigma)
    earlier = read_json(args.again)["sequences"] if args.again else {}
    if only := args.only or list(earlier):
        made = {name: made[name] for name in only}
    report = {
        "temperatures_K": ladder,
        "timed_walkers": args.timed,
        "walkers": args.walkers,
        "iterations": args.iterations,
        "populations": dict(zip(("phi>0", "phi>0,|psi|>120"), known, strict=True)),
        "sequences": {},
    }
    for name, kernels in made.items():
        row = earlier.get(name)
        if row is None:
            row = measure(molecule, flow, potential, ladder, kernels, start, known, args)
            print(name, row, flush=True)
        report["sequences"][name] = row
    seconds = time_iterations(molecule, flow, potential, ladder, made, start[: args.timed], args)
    for name, row in report["sequences"].items():
        row["seconds"] = seconds[name]
    add_rates(report)
    print("\n".join(table(report)))
    write_json(args.output, report)


if __name__ == "__main__":
    main()
