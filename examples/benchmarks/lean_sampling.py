"""Sampling of the frozen flow of a run at 300 K with few kernels, for cost.py."""

import math
import time

import mdtraj
import numpy as np
import torch
from common import compare_with_reference, in_hidden_basin

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import n_eff, weighted_mean
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    OnRungs,
    PlainSwap,
    Scheduled,
    SteeredSwap,
    TorchLangevin,
)
from openmm_tsf.workflow.start import start_positions

LADDER_K = (300.0, 600.0)
N_GROUPS = 20


def lean_kernels(flow, potential, molecule, args):
    """Independence proposals at 300 K; now and then all rungs, swaps, dynamics."""
    lowest = FlowIndependence(flow, potential, LADDER_K[:1], "lowest", n_steps=args.independent)
    kernels = [Scheduled(OnRungs(lowest, LADDER_K, "flow_lowest"))]
    if args.swap_interval:
        kernels += [
            Scheduled(kernel, interval=args.swap_interval)
            for kernel in (
                FlowIndependence(flow, potential, LADDER_K),
                SteeredSwap(flow, potential, LADDER_K, [(0, 1)]),
                PlainSwap(LADDER_K, potential.boltzmann_constant),
            )
        ]
    if args.dynamics_interval:
        masses = torch.tensor(molecule.heavy_hydrogen_masses)
        dynamics = TorchLangevin(
            potential, LADDER_K, masses, flow, n_steps=25, timestep=0.002, friction=5.0
        )
        kernels.append(Scheduled(dynamics, interval=args.dynamics_interval))
    return kernels


class Angles:
    """A reporter that keeps phi and psi of every walker at the lowest rung, and its own time."""

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
    frames = tsf.MDDataset.shipped(molecule, stride=40)
    with molecule.potential(compile=True) as potential:
        potential.energy(frames.positions[:512])  # compiled now, not in what is timed
        return {"run": path.name} | measure_flow(flow, potential, molecule, frames, args)


def measure_flow(flow, potential, molecule, frames, args):
    """Estimates, N_eff, evaluations and seconds of a flow."""
    generator = torch.Generator().manual_seed(args.seed)
    weighted = weigh_draws(flow, potential, molecule, args.draws, generator)
    sampler = tsf.ParallelTempering(
        molecule, flow, LADDER_K, args.walkers, lean_kernels(flow, potential, molecule, args),
        potential, seed=args.seed,
    )  # fmt: skip
    before, began = potential.n_evaluations, clocks()
    sampler.set_positions(
        start_positions(frames, flow, potential, LADDER_K, args.walkers, generator)
    )
    sampler.tune(args.burn_in)
    start = potential.n_evaluations - before, clocks() - began
    angles = Angles(molecule)
    sampler.reporters = [angles]
    before, began = potential.n_evaluations, clocks()
    sampler.run(args.iterations, progress=False)
    seconds = clocks() - began - angles.seconds
    evaluations = potential.n_evaluations - before
    phi, psi = np.moveaxis(np.array(angles.values), 2, 0)
    estimate = estimate_mean(phi > 0)
    groups = (phi > 0).mean(axis=0).reshape(N_GROUPS, -1).mean(axis=1)
    hidden = in_hidden_basin(phi, psi)
    visits = int((hidden[1:] & ~hidden[:-1]).sum())
    share = estimate_mean(hidden)
    acceptance = {
        name: [round(a, 4) for a in total.acceptance.flatten().tolist() if math.isfinite(a)]
        for name, total in sampler.totals.items()
    }
    return compare_with_reference(estimate) | {
        "g": estimate.g,
        # Each group's error by the claim; the spread of 20 groups gives chi^2 with 19 degrees.
        "chi2_of_20_groups": float(
            ((groups - estimate.value) ** 2).sum() / (estimate.stderr**2 * N_GROUPS)
        ),
        "hidden": {"p": share.value, "stderr": share.stderr, "visits": visits},
        "n_eff": estimate.n_eff,
        "n_evaluations": evaluations,
        "n_eff_per_million": 1e6 * estimate.n_eff / evaluations,
        "wall_seconds": float(seconds[0]),
        "cpu_seconds": float(seconds[1]),
        "n_eff_per_core_second": estimate.n_eff / float(seconds[0]),
        "start": {"evaluations": start[0], "seconds": float(start[1][0])},
        "acceptance": acceptance,
        "weighted_draws": weighted,
    }


def weigh_draws(flow, potential, molecule, n_draws, generator):
    """The flow alone at 300 K: independent draws with importance weights, no Markov chain."""
    before = potential.n_evaluations
    draws = draw_weighted(flow, potential, LADDER_K[0], n_draws, generator)
    inside = draws.inside.numpy()
    phi, psi = measure_angles(molecule, draws.x[draws.inside]).T
    log_weights = draws.log_weights.numpy()[inside]
    p, stderr = weighted_mean(phi > 0, log_weights)
    hidden = weighted_mean(in_hidden_basin(phi, psi), log_weights)
    evaluations = potential.n_evaluations - before
    return {
        "p": p,
        "stderr": stderr,
        "hidden": {"p": hidden[0], "stderr": hidden[1]},
        "p_unweighted": float((phi > 0).mean()),
        "n_eff_per_million": 1e6 * n_eff(p, stderr) / evaluations,
    }
