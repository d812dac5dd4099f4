"""Sample the frozen flow of a run at 300 K, by few kernels and by weighted draws, for cost.py."""

import math
import time

import mdtraj
import numpy as np
import torch
from common import compare_with_reference, in_hidden_basin

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import n_eff
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.draws import weigh
from openmm_tsf.flows.load import load_flow
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.sampling.kernels import FlowIndependence, Scheduled, TorchLangevin
from openmm_tsf.workflow.start import start_positions

KELVIN = 300.0
N_GROUPS, N_BLOCKS, N_FRAMES = 20, 100, 4000


def lean_kernels(flow, potential, molecule, args):
    """Independence proposals in every iteration; now and then dynamics, if asked for."""
    kernels = [Scheduled(FlowIndependence(flow, potential, [KELVIN], n_steps=args.independent))]
    if args.dynamics_interval:
        masses = torch.tensor(molecule.heavy_hydrogen_masses)
        dynamics = TorchLangevin(
            potential, [KELVIN], masses, flow, n_steps=25, timestep=0.002, friction=5.0
        )
        kernels.append(Scheduled(dynamics, interval=args.dynamics_interval))
    return kernels


class Angles:
    """A reporter that keeps phi and psi of every walker, and the time that it takes."""

    interval = 1

    def __init__(self, molecule):
        self.molecule, self.values, self.seconds = molecule, [], np.zeros(2)

    def __call__(self, sampler, state):
        began = clocks()
        self.values.append(measure_angles(self.molecule, state.x[:, 0]))
        self.seconds += clocks() - began


def measure_angles(molecule, x):
    """phi and psi [B, 2] of x [B, N, 3]."""
    frames = mdtraj.Trajectory(x.numpy().astype(np.float32), molecule.mdtraj_topology)
    return mdtraj.compute_dihedrals(frames, [molecule.dihedrals[n] for n in ("phi", "psi")])


def clocks():
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def sample_flow(path, args):
    """Sample the flow of one run on one core."""
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    flow = load_flow(path / "flow.pt", molecule)
    frames = tsf.MDDataset.shipped(molecule, stride=80).positions
    x = torch.from_numpy(tsf.load_run(path).trajectory(KELVIN).xyz).double()
    with molecule.potential(compile=True) as potential:
        potential.energy(frames)  # compiled now, not in what is timed
        return {"run": path.name, "estimates": estimate_flow(flow, potential, molecule, x, args)}


def estimate_flow(flow, potential, molecule, frames, args):
    """What a Markov chain, weighted draws, and draws chosen by phi say, and their costs.

    `frames` [n, N, 3] are of the Boltzmann distribution at 300 K.
    """
    generator = torch.Generator().manual_seed(args.seed)
    options = (flow, potential, molecule)
    known = weigh_frames(*options, frames, generator)
    return {
        "chain": sample_chain(*options, args, generator),
        "draws": weigh_draws(*options, known, args.draws, False, generator),
        "chosen draws": weigh_draws(*options, known, args.chosen_draws, True, generator),
    }


def sample_chain(flow, potential, molecule, args, generator):
    """Walkers at 300 K that start from weighted draws."""
    sampler = tsf.ParallelTempering(
        molecule, flow, [KELVIN], args.walkers, lean_kernels(flow, potential, molecule, args),
        potential, seed=args.seed,
    )  # fmt: skip
    before, began = potential.n_evaluations, clocks()
    sampler.set_positions(start_positions(None, flow, potential, [KELVIN], args.walkers, generator))
    sampler.tune(args.burn_in)
    start = potential.n_evaluations - before, (clocks() - began)[1]
    angles = Angles(molecule)
    sampler.reporters = [angles]
    before, began = potential.n_evaluations, clocks()
    sampler.run(args.iterations, progress=False)
    seconds = (clocks() - began - angles.seconds)[1]
    phi, psi = np.moveaxis(np.array(angles.values), 2, 0)
    estimate, hidden = estimate_mean(phi > 0), in_hidden_basin(phi, psi)
    share = estimate_mean(hidden)
    groups = (phi > 0).mean(axis=0).reshape(N_GROUPS, -1).mean(axis=1)
    row = describe(
        estimate.pair, share.pair, potential.n_evaluations - before, float(seconds), start
    )
    return row | {
        "g": estimate.g,
        # Each group's error by the claim; the spread of 20 groups gives chi^2 with 19 degrees.
        "chi2_of_20_groups": float(
            ((groups - estimate.value) ** 2).sum() / (estimate.stderr**2 * N_GROUPS)
        ),
        "visits_of_hidden": int((hidden[1:] & ~hidden[:-1]).sum()),
        "acceptance": {
            name: [round(a, 4) for a in total.acceptance.flatten().tolist() if math.isfinite(a)]
            for name, total in sampler.totals.items()
        },
    }


def weigh_frames(flow, potential, molecule, x, generator):
    """ln of the mean weights of frames with phi > 0, phi < 0 and in the hidden basin, its share.

    At most N_FRAMES of either sign; the share is that among phi > 0. Frames outside the domain of
    the flow's coordinates are left out.
    """
    phi, psi = measure_angles(molecule, x).T
    hidden, means = in_hidden_basin(phi, psi), []
    for members in (phi > 0, phi <= 0, hidden):
        rows = np.flatnonzero(members)
        rows = rows[np.linspace(0, len(rows) - 1, min(N_FRAMES, len(rows))).astype(int)]
        frames = x[torch.from_numpy(rows)]
        reduced = potential.energy(frames) / (potential.boltzmann_constant * KELVIN)
        weights = weigh(flow, frames, reduced, KELVIN, generator)
        weights = weights[torch.isfinite(weights)]
        means.append(float(weights.logsumexp(0)) - math.log(max(1, len(weights))))
    return np.array(means), float(hidden.sum() / (phi > 0).sum())


@torch.no_grad()
def weigh_draws(flow, potential, molecule, frames, n, chosen_by_phi, generator):
    """Independent draws with importance weights, no Markov chain.

    Errors are the larger of those from the draws, and from the weights of `frames`
    (:func:`weigh_frames`): what the flow draws too rarely is missing among few draws.

    P(phi > 0) is the share of the draws there times their mean weight, over the same of both sides:
    with `chosen_by_phi` the energy of every draw with phi > 0 is evaluated, and of as many others.
    """
    tau, kt = KELVIN / flow.reference_temperature, potential.boltzmann_constant * KELVIN
    before, began, blocks = potential.n_evaluations, clocks(), []
    for _ in range(N_BLOCKS):
        x, momenta, log_density = flow.sample(n // N_BLOCKS, KELVIN, generator)
        inside = torch.isfinite(log_density)
        phi, psi = measure_angles(molecule, x[inside]).T
        above = phi > 0
        chosen = np.ones_like(above)
        if chosen_by_phi:
            chosen = above | (np.cumsum(~above) <= above.sum())
        index = torch.from_numpy(np.flatnonzero(chosen))
        x, momenta, log_density = (part[inside][index] for part in (x, momenta, log_density))
        weights = log_weight(potential.energy(x) / kt, momenta, tau, log_density).numpy()
        weights[~np.isfinite(weights)] = -np.inf
        drawn = above.sum(), (~above).sum()
        blocks.append((drawn, above[chosen], in_hidden_basin(phi, psi)[chosen], weights))
    population, hidden = estimate_populations(blocks, *frames)
    seconds = (clocks() - began)[1]
    evaluations = potential.n_evaluations - before
    return describe(population, hidden, evaluations, float(seconds), (0, 0.0)) | {"n_draws": n}


def estimate_populations(blocks, log_means, hidden_share):
    """P(phi > 0) and that of the hidden basin, each with its error.

    A block has the numbers of draws with phi > 0 and < 0, and of those whose energy is known:
    whether phi > 0, whether in the hidden basin, and log weights. One error is by a jackknife over
    the blocks, one from the weights of frames: a mean over the target of the weight is the second
    moment of the weights of the draws over their mean. The larger one counts.
    """
    highest = max(weights.max(initial=-np.inf) for *_, weights in blocks)
    if not np.isfinite(highest):
        raise ValueError("draws: expected finite weights, got none")
    sums = []
    for drawn, above, hidden, weights in blocks:
        w = np.exp(weights - highest)
        known = above.sum(), (~above).sum()
        sums.append((*drawn, *known, w[above].sum(), w[~above].sum(), w[hidden].sum()))
    sums = np.array(sums, dtype=np.float64)
    total, n = sums.sum(axis=0), len(sums)
    values = populations_of(total)
    errors = np.sqrt((n - 1) * populations_of(total - sums).var(axis=-1))
    drawn, known, means = total[:2], total[2:4], total[4:6] / np.maximum(total[2:4], 1)
    if (known > 0).all() and (means > 0).all():
        above, below, inside = np.exp(log_means - highest)
        moments = np.array([above, below]) / means
        logit = np.sqrt(np.sum(1 / drawn + np.maximum(moments - 1, 0) / known))
        of_hidden = np.sqrt(hidden_share * inside / means[0] / known[0])
        from_frames = values[0] * np.array([(1 - values[0]) * logit, of_hidden])
        errors = np.fmax(errors, from_frames)
    return tuple((float(v), float(e)) for v, e in zip(values, errors, strict=True))


def populations_of(sums):
    """P(phi > 0) and that of the hidden basin, stacked first, of sums [..., 7] over draws."""
    drawn, known, weights = sums[..., :2], sums[..., 2:4], sums[..., 4:]
    per_draw = drawn / np.maximum(known, 1)
    above, below = weights[..., 0] * per_draw[..., 0], weights[..., 1] * per_draw[..., 1]
    return np.stack([above, weights[..., 2] * per_draw[..., 0]]) / (above + below)


def describe(population, hidden, evaluations, seconds, start):
    """Populations with their errors, against the reference, and what they cost."""
    effective = n_eff(*population)
    return compare_with_reference(*population) | {
        "hidden": {"p": hidden[0], "stderr": hidden[1]},
        "n_eff": effective,
        "n_evaluations": evaluations,
        "n_eff_per_million": 1e6 * effective / evaluations,
        "cpu_seconds": seconds,
        "n_eff_per_cpu_second": effective / seconds,
        "start": {"evaluations": int(start[0]), "seconds": float(start[1])},
    }
