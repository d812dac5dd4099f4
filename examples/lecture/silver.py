"""Two isomers of Ag6: molecular dynamics with adaptive flow proposals, against parallel tempering.

    python examples/lecture/silver.py --output examples/results/lecture

The octahedron and the pentagonal bipyramid without a corner, in effective medium theory at 250 K:
minimised from random starts, with the saddle point between them. Walkers that start in both move
by Langevin dynamics (Metropolised) and by draws from a flow, which learns from them by maximum
likelihood as they run and is then frozen. The free-energy difference of the isomers is compared
with parallel tempering without a flow, and the number of isomer changes with dynamics alone. The
wall of the potential, which excludes evaporation, is a part of the target in all of them. Writes
silver.json and silver.png, in minutes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from silver_isomers import (
    BIPYRAMID,
    NAMES,
    NEITHER,
    PAIRS,
    IsomerJump,
    classify,
    draw_copies,
    harmonic_log_ratio,
    minimise,
    new_flow,
    saddle_between,
    train,
)

from openmm_tsf.analysis.plots.style import save_figure
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import SilverCluster
from openmm_tsf.sampling.initial import with_velocities
from openmm_tsf.sampling.kernels import PlainSwap, TorchLangevin, WalkerState

TEMPERATURE, LADDER = 250.0, (250.0, 310.0, 385.0, 480.0)
MASSES, EV = [107.8682] * 6, 96.4853321
#: ps, steps, 1/ps: accepted 0.94.
DYNAMICS = {"timestep": 0.02, "n_steps": 15, "friction": 2.0}
#: Iterations of dynamics before there is a flow; of the latest that it learns from; frames in each.
WARM_UP, MEMORY, FRAMES = 20, 150, 512


def find_isomers(potential, n_starts, seed):
    """Return the lowest minimum of each isomer [2, 6, 3], and what the random starts led to."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randn(n_starts, 6, 3, generator=generator, dtype=torch.float64)
    x = minimise(potential, 0.15 * starts)
    energy, isomers = potential.energy(x), classify(x)
    found = {name: int((isomers == i).sum()) for i, name in enumerate(NAMES)}
    found["neither"] = int((isomers == NEITHER).sum())
    lowest = [
        x[isomers == i][energy[isomers == i].argmin()] for i in range(2) if (isomers == i).any()
    ]
    if len(lowest) < 2:
        raise RuntimeError(f"{n_starts} random starts led to one isomer only: {found}")
    minima = minimise(potential, torch.stack(lowest))
    return minima - minima.mean(dim=1, keepdim=True), found


def starting_walkers(potential, minima, n_walkers, temperatures, generator):
    """Return walkers at every temperature, every other one in each isomer."""
    x = minima[torch.arange(n_walkers) % 2]
    x = x[:, None].repeat(1, len(temperatures), 1, 1)
    energy = potential.energy(x.flatten(0, 1)).reshape(x.shape[:2])
    replica = torch.arange(len(temperatures)).repeat(n_walkers, 1)
    masses = torch.tensor(MASSES, dtype=torch.float64)
    state = WalkerState(x, None, energy, replica)
    return with_velocities(state, temperatures, potential, masses, generator)


def sample(potential, kernels, state, n_iterations, generator):
    """Return the walkers, isomers [n, W] at the lowest temperature, acceptances, evaluations."""
    before, isomers, totals = potential.n_evaluations, [], {}
    for _ in range(n_iterations):
        for kernel in kernels:
            state, info = kernel(state, generator)
            totals[kernel.name] = totals[kernel.name] + info if kernel.name in totals else info
        isomers.append(classify(state.x[:, 0]))
    accepted = {name: info.acceptance.tolist() for name, info in totals.items()}
    return state, torch.stack(isomers), accepted, potential.n_evaluations - before


def adapt(potential, dynamics, state, n_iterations, seed, generator):
    """Let walkers and flow learn from each other; return the frozen flow, walkers, a history.

    The flow is trained on learnt copies of frames of the last iterations, drawn anew in each.
    Nothing of this enters an estimate but the one that is called so.
    """
    flow = jump = optimiser = None
    memory, history = [], {"isomers": [], "acceptance": [], "nll": []}
    for iteration in range(n_iterations):
        state, _ = dynamics(state, generator)
        acceptance = nll = None
        if jump is not None:
            state, info = jump(state, generator)
            acceptance = float(info.acceptance)
        isomers = classify(state.x[:, 0])
        memory = [*memory, state.x[isomers != NEITHER, 0]][-MEMORY:]
        if iteration >= WARM_UP:
            frames = torch.cat(memory)
            rows = torch.randint(len(frames), (FRAMES,), generator=generator)
            copies, _, _ = draw_copies(frames[rows], generator)
            if flow is None:
                flow = new_flow(copies, TEMPERATURE, seed)
                optimiser = torch.optim.Adam(flow.parameters(), lr=2e-3)
                jump = IsomerJump(flow, potential, TEMPERATURE)
            for group in optimiser.param_groups:  # to a tenth, so that the flow settles
                group["lr"] = 2e-3 * 10 ** -(iteration / n_iterations)
            nll = train(flow, copies, optimiser)
        history["isomers"].append(isomers.tolist())
        history["acceptance"].append(acceptance)
        history["nll"].append(nll)
    return jump, state, history


def summary(isomers, n_evaluations):
    """Return population, free-energy difference, changes per evaluation of isomers [n, W]."""
    mean = estimate_mean((isomers == BIPYRAMID).double().numpy())
    changes = int((isomers[1:] != isomers[:-1]).sum())
    per = 1e6 / n_evaluations
    return {
        "p_bipyramid": mean.pair, "delta_f_kT": mean.free_energy, "g_iterations": mean.g,
        "n_eff": mean.n_eff, "p_neither": float((isomers == NEITHER).double().mean()),
        "evaluations": n_evaluations, "changes": changes,
        "changes_per_million": changes * per, "n_eff_per_million": mean.n_eff * per,
    }  # fmt: skip


def draw_cluster(axes, x, title):
    """Draw six atoms [6, 3] and their neighbours."""
    x = np.asarray(x)
    for i, j in PAIRS:
        if np.linalg.norm(x[i] - x[j]) < 0.33:
            axes.plot(*x[[i, j]].T, color="grey", lw=2)
    axes.scatter(*x.T, s=350, color="silver", edgecolor="black", depthshade=False, alpha=1.0)
    axes.set_title(title, fontsize=10)
    axes.set_box_aspect((1, 1, 1))
    axes.view_init(15, 20)  # no atom hides another one
    axes.set_axis_off()


def plot(content, minima, history, local, frozen, path):
    """Draw the isomers, the chains, the adaptation and the free-energy differences."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    for i, name in enumerate(NAMES):
        axes = figure.add_subplot(2, 3, i + 1, projection="3d")
        energy = content["isomers"][name]["energy_eV"]
        draw_cluster(axes, minima[i], f"{name}, {energy:.3f} eV, order {(48, 4)[i]}")
    axes = figure.add_subplot(2, 3, 3)
    for series, label in ((local, "dynamics alone"), (frozen, "with the frozen flow")):
        share = (series == BIPYRAMID).double().cumsum(0) / torch.arange(1, len(series) + 1)[:, None]
        axes.plot(share.mean(dim=1), label=label)
    exact = content["parallel_tempering"]["p_bipyramid"]
    axes.axhspan(exact[0] - exact[1], exact[0] + exact[1], alpha=0.3, color="grey")
    axes.set(xlabel="iteration", ylabel="share of bipyramids so far", ylim=(0, None))
    axes.legend()
    axes = figure.add_subplot(2, 3, 4)
    axes.plot([np.nan if a is None else a for a in history["acceptance"]])
    axes.set(xlabel="iteration", ylabel="jumps accepted", title="while the flow learns")
    axes = figure.add_subplot(2, 3, 5)
    shown = {"dynamics alone": local, "with flow": frozen}
    for row, (name, series) in enumerate(shown.items()):
        axes.plot((series[:, 0] == BIPYRAMID) + 1.5 * row, lw=0.8, label=name)
    axes.set(xlabel="iteration", yticks=[0, 1, 1.5, 2.5], yticklabels=["oct.", "bip."] * 2)
    axes.set(title="one walker", ylim=(-0.1, 3.3))
    axes.legend(loc="upper center", ncols=2)
    axes = figure.add_subplot(2, 3, 6)
    rows = ("parallel_tempering", "frozen_flow", "while_adapting", "dynamics_alone")
    values = np.array([content[name]["delta_f_kT"] for name in rows])
    axes.errorbar(values[:, 0], range(len(rows)), xerr=values[:, 1], fmt="o")
    axes.axvline(content["harmonic_delta_f_kT"], ls="--", color="black", label="harmonic")
    axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    axes.set(xlabel="F(bipyramid) - F(rest), kT", ylim=(-0.3, len(rows) - 0.2))
    axes.legend(loc="upper left")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--starts", type=int, default=256, help="random starts of minimisations")
    parser.add_argument("--walkers", type=int, default=64)
    parser.add_argument("--adaptation", type=int, default=200, help="iterations with training")
    parser.add_argument("--iterations", type=int, default=300, help="of each chain after that")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    potential, folder = SilverCluster(6), Path(options.output)
    generator = torch.Generator().manual_seed(options.seed)
    kt = potential.boltzmann_constant * TEMPERATURE
    minima, found = find_isomers(potential, options.starts, options.seed)
    energies = potential.energy(minima) / EV
    saddle = float(potential.energy(saddle_between(potential, minima)[None])) / EV

    tempering = [
        TorchLangevin(potential, LADDER, MASSES, **DYNAMICS),
        PlainSwap(LADDER, potential.boltzmann_constant),
    ]
    state = starting_walkers(potential, minima, options.walkers, LADDER, generator)
    n = options.iterations
    state, _, _, _ = sample(potential, tempering, state, n // 4, generator)
    _, isomers, accepted, evaluations = sample(potential, tempering, state, n, generator)
    reference = {**summary(isomers, evaluations), "acceptance": accepted, "ladder": LADDER}

    dynamics = TorchLangevin(potential, (TEMPERATURE,), MASSES, **DYNAMICS)
    state = starting_walkers(potential, minima, options.walkers, (TEMPERATURE,), generator)
    before = potential.n_evaluations
    jump, state, history = adapt(
        potential, dynamics, state, options.adaptation, options.seed, generator
    )
    adapted = potential.n_evaluations - before
    second_half = torch.tensor(history.pop("isomers"))[options.adaptation // 2 :]
    adapting = estimate_mean((second_half == BIPYRAMID).double().numpy())
    round_trip = jump.round_trip_error(state, generator)
    # Both chains go on from the same walkers.
    _, frozen, accepted, evaluations = sample(potential, [dynamics, jump], state, n, generator)
    with_flow = {**summary(frozen, evaluations), "acceptance": accepted}
    _, local, accepted, evaluations = sample(potential, [dynamics], state, n, generator)
    alone = {**summary(local, evaluations), "acceptance": accepted}

    (value, error), (exact, exact_error) = with_flow["delta_f_kT"], reference["delta_f_kT"]
    content = {
        "temperature_K": TEMPERATURE, "seed": options.seed, "walkers": options.walkers,
        "dynamics": DYNAMICS, "wall_nm": potential.wall_radius, "random_starts": found,
        "isomers": {
            name: {"energy_eV": float(energies[i]), "positions_nm": minima[i].tolist()}
            for i, name in enumerate(NAMES)
        },
        "saddle_eV": saddle,
        "barriers_kT": dict(zip(NAMES, ((saddle - energies) * EV / kt).tolist(), strict=True)),
        "harmonic_delta_f_kT": -harmonic_log_ratio(potential, minima, kt),
        "parallel_tempering": reference, "frozen_flow": with_flow, "dynamics_alone": alone,
        "while_adapting": {
            "p_bipyramid": adapting.pair, "delta_f_kT": adapting.free_energy,
            "evaluations": adapted, "history": history,
        },
        "z": (value - exact) / (error**2 + exact_error**2) ** 0.5, "round_trip_nm": round_trip,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "silver.json", content)
    plot(content, minima, history, local, frozen, folder / "silver.png")
    print(f"eV: {energies.tolist()}, saddle {saddle:.4f}; random starts: {found}")
    print(f"harmonic: {content['harmonic_delta_f_kT']:.3f} kT; z = {content['z']:+.2f}")
    for name in ("parallel_tempering", "frozen_flow", "while_adapting", "dynamics_alone"):
        row = content[name]
        value, error = row["delta_f_kT"]
        keys = [k for k in ("changes_per_million", "n_eff_per_million") if k in row]
        rates = "; changes, N_eff per 10⁶: " if keys else ""
        print(f"{name:20s} {value:.3f} ± {error:.3f} kT{rates}", *(f"{row[k]:.0f}" for k in keys))


if __name__ == "__main__":
    main()
