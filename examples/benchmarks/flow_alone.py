"""The flow alone, without Monte Carlo: its distance to the Boltzmann distribution.

    python examples/benchmarks/flow_alone.py run/ --output flow_alone.json

Draws from the run's flow at 300 and 600 K, beside those of a RealNVP of about as many parameters
that is trained here on the same frames with the same loop: Ramachandran distance, ESS, P(phi > 0),
held-out NLL. Writes JSON and a picture.
"""

import argparse
import json
import math
import time
from pathlib import Path

import mdtraj
import numpy as np
import torch
from common import reference_frames
from matplotlib.figure import Figure

import openmm_tsf as tsf
from openmm_tsf.analysis.ramachandran import chance_distance
from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.analysis.statistics import (
    forward_ess,
    kl_divergence,
    reverse_ess,
    torus_histogram,
    total_variation,
)
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.io.serialization import replace_given
from openmm_tsf.training.losses import marginal_nll_bound, negative_log_likelihood, whiten
from openmm_tsf.workflow.presets import preset

BINS = 64


def dihedrals(molecule, x):
    trajectory = mdtraj.Trajectory(x.numpy(), molecule.mdtraj_topology)
    return mdtraj.compute_dihedrals(trajectory, [molecule.dihedrals[k] for k in ("phi", "psi")])


@torch.no_grad()
def likelihood(flow, x, temperature, generator):
    """Held-out NLL: a bound on the marginal's for a TSF, exact for RealNVP."""
    tau = torch.full((len(x),), temperature / flow.reference_temperature, dtype=torch.float64)
    noise = torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
    y, log_det = whiten(flow, x, float(tau[0]), generator)
    joint = negative_log_likelihood(flow.network, y, log_det, noise * tau.sqrt()[:, None], tau)
    nll = marginal_nll_bound(joint, flow.n_momenta, tau)
    return float(nll.mean()), float(nll.std() / len(x) ** 0.5)


@torch.no_grad()
def forward_weights(flow, potential, x, temperature, generator):
    """Log weights [n] of the joint (x, p) at frames x; -inf outside the domain."""
    tau = temperature / flow.reference_temperature
    noise = torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
    momenta = noise * math.sqrt(tau)
    log_prob = flow.log_prob(x, momenta, temperature)
    reduced_energy = potential.energy(x) / (potential.boltzmann_constant * temperature)
    log_weights = log_weight(reduced_energy, momenta, tau, log_prob)
    return torch.where(torch.isfinite(log_prob), log_weights, -math.inf).numpy()


def train_realnvp(molecule, potential, n_parameters, seed):
    """A RealNVP on the shipped frames: the first training of the default preset, same length."""
    settings = preset("default")
    dataset = tsf.MDDataset.shipped(molecule)
    width = 32
    while True:  # the widest network with no more parameters than the TSF
        wider = tsf.RealNVPFlow(3 * molecule.n_atoms - 6, 0, hidden=(width + 8, width + 8))
        if wider.n_parameters > n_parameters:
            break
        width += 8
    flow = tsf.RealNVPFlow.from_dataset(dataset, hidden=(width, width), seed=seed)
    fit = replace_given(settings.fit, temperatures=settings.sampling.temperatures)
    result = tsf.fit(flow, dataset, potential, settings=fit, seed=seed)
    return flow, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a finished openmm-tsf run")
    parser.add_argument("--draws", type=int, default=100_000, help="draws per repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", default="flow_alone.json")
    args = parser.parse_args()
    molecule = tsf.systems.alanine_dipeptide()
    potential = molecule.potential()
    steered = tsf.TemperatureSteerableFlow.load(Path(args.run) / "flow.pt", molecule)
    began = time.monotonic()
    baseline, trained = train_realnvp(molecule, potential, steered.n_parameters, args.seed)
    report = {
        "draws": args.draws,
        "repeats": args.repeats,
        "seed": args.seed,
        "realnvp_training": {"kept_step": trained.best.step, "seconds": trained.wall_seconds},
        "flows": {},
    }
    panels = {}
    for name, flow in (("TSF", steered), ("RealNVP", baseline)):
        report["flows"][name] = {"n_parameters": flow.n_parameters}
        for temperature in (300.0, 600.0):
            generator = torch.Generator().manual_seed(args.seed)
            reference, frames = load_reference(), reference_frames(temperature)
            rung = reference.rung(temperature)
            phi, psi = reference.phi[:, :, rung].ravel(), reference.psi[:, :, rung].ravel()
            target = torus_histogram(phi, psi, BINS)
            draws = [
                draw_weighted(flow, potential, temperature, args.draws, generator)
                for _ in range(args.repeats)
            ]
            ess = [reverse_ess(part.log_weights.numpy()) for part in draws]
            angles = np.concatenate([dihedrals(molecule, part.x[part.inside]) for part in draws])
            histogram = torus_histogram(angles[:, 0], angles[:, 1], BINS)
            nll, nll_error = likelihood(flow, frames, temperature, generator)
            forward = forward_ess(forward_weights(flow, potential, frames, temperature, generator))
            floor = chance_distance(
                (target * len(phi)).round().astype(np.int64).ravel(), len(phi) / 2
            )
            report["flows"][name][f"{temperature:.0f} K"] = {
                "ramachandran_total_variation": float(total_variation(target, histogram)),
                "ramachandran_kl": float(kl_divergence(target, histogram)),
                "floor_of_half_the_reference": list(floor),
                "reverse_ess_joint_mean": float(np.mean([e.fraction for e in ess])),
                "reverse_ess_joint_spread": float(np.std([e.fraction for e in ess])),
                "largest_weight": float(max(e.largest_weight for e in ess)),
                "forward_ess_joint": float(forward.fraction),
                "phi_positive": float((angles[:, 0] > 0).mean()),
                "phi_positive_reference": float((phi > 0).mean()),
                "held_out_nll": nll,
                "held_out_nll_stderr": nll_error,
                "inside_domain": len(angles) / (args.repeats * args.draws),
            }
            panels[name, temperature] = histogram
            panels["reference", temperature] = target
    report["wall_seconds"] = time.monotonic() - began
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    draw(panels, Path(args.output).with_suffix(".png"))


def draw(panels, path):
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    image = None
    for row, temperature in zip(axes, (300.0, 600.0), strict=True):
        for axis, name in zip(row, ("reference", "TSF", "RealNVP"), strict=True):
            with np.errstate(divide="ignore"):
                energy = -np.log(panels[name, temperature].reshape(BINS, BINS).T)
            energy -= -np.log(panels["reference", temperature].max())
            image = axis.imshow(
                energy, origin="lower", extent=(-180, 180, -180, 180), vmin=0, vmax=8,
                cmap="viridis",
            )  # fmt: skip
            axis.set_title(f"{name}, {temperature:.0f} K")
            axis.set_xticks(range(-180, 181, 90))
            axis.set_yticks(range(-180, 181, 90))
    for axis in axes[-1]:
        axis.set_xlabel("φ / degrees")
    for axis in axes[:, 0]:
        axis.set_ylabel("ψ / degrees")
    figure.colorbar(image, ax=axes, label="free energy / kT (zero: the reference's deepest bin)")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
