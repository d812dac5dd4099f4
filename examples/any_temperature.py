"""Temperatures without a rung: MBAR over the run's rungs beside the flow's own weighted draws.

    python examples/any_temperature.py run/ --temperatures 330 380 500 --output any_temperature.json

<U>, C_V, delta F_phi and the phi profile at each temperature, twice: from the samples of a finished
run, and from independent draws of its flow at that very temperature, weighted to the Boltzmann
distribution (ESS with its error). Writes JSON and a picture of the profiles.
"""

import argparse
import json
import math
from pathlib import Path

import mdtraj
import numpy as np
import torch
from matplotlib.figure import Figure

import openmm_tsf as tsf
from openmm_tsf.analysis import importance_profile, importance_thermodynamics, load_run
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.systems.files import load_molecule

BATCH = 5000


@torch.no_grad()
def weighted_draws(flow, potential, temperature, n, generator, phi_atoms):
    """Log weights of the joint (x, p), energies and phi of n draws; -inf outside the domain."""
    tau = temperature / flow.reference_temperature
    parts = []
    for start in range(0, n, BATCH):
        x, momenta, log_prob = flow.sample(min(BATCH, n - start), temperature, generator)
        inside = torch.isfinite(log_prob)
        energy = torch.full((len(x),), math.inf, dtype=torch.float64)
        energy[inside] = potential.energy(x[inside].to(torch.float64))
        action = energy / (potential.boltzmann_constant * temperature)
        log_weight = -action - 0.5 * momenta.square().sum(dim=1) / tau - log_prob
        log_weight = torch.where(inside & torch.isfinite(energy), log_weight, -math.inf)
        phi = np.full(len(x), np.nan)
        frames = mdtraj.Trajectory(x[inside].numpy(), flow.molecule.mdtraj_topology)
        phi[inside.numpy()] = mdtraj.compute_dihedrals(frames, [phi_atoms])[:, 0]
        parts.append((log_weight.numpy(), energy.numpy(), phi))
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def beside(run_pair, flow_pair):
    """Two estimates (value, stderr) and how far apart they are."""
    difference = flow_pair[0] - run_pair[0]
    return {
        "mbar": list(run_pair),
        "flow_weighted": list(flow_pair),
        "z": float(difference / math.hypot(run_pair[1], flow_pair[1])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a finished openmm-tsf run, phi recorded")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[330.0, 380.0, 500.0])
    parser.add_argument("--draws", type=int, default=100_000, help="per temperature")
    parser.add_argument("--bins", type=int, default=60)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", default="any_temperature.json")
    args = parser.parse_args()
    run = load_run(args.run)
    table = run.thermodynamics(args.temperatures)
    name = table.dihedral
    if name is None:
        parser.error("run: no phi was recorded")
    folder = Path(args.run)
    system = folder / "system.xml"
    molecule = (
        load_molecule(folder / "topology.pdb", system=system)
        if system.exists()
        else tsf.systems.alanine_dipeptide()
    )
    flow = tsf.TemperatureSteerableFlow.load(folder / "flow.pt", molecule)
    flow.molecule = molecule
    generator = torch.Generator().manual_seed(args.seed)
    report = {"run": str(folder), "draws": args.draws, "seed": args.seed, "temperatures": {}}
    profiles = {}
    with molecule.potential() as potential:
        for i, kelvin in enumerate(args.temperatures):
            log_weights, energy, phi = weighted_draws(
                flow, potential, kelvin, args.draws, generator, run.dihedral_atoms[name]
            )
            found = importance_thermodynamics(
                log_weights, energy, kelvin, run.boltzmann_constant, phi > 0
            )
            report["temperatures"][f"{kelvin:.2f}"] = {
                "ess_fraction": found.ess.fraction,
                "ess_stderr": found.ess_stderr,
                "largest_weight": found.ess.largest_weight,
                "energy_kJ_mol": beside((table.energy[i], table.energy_stderr[i]), found.energy),
                "heat_capacity_kJ_mol_K": beside(
                    (table.heat_capacity[i], table.heat_capacity_stderr[i]), found.heat_capacity
                ),
                f"delta_F_{name}_kT": beside(
                    (table.delta_f[i], table.delta_f_stderr[i]), found.delta_f
                ),
            }
            profiles[kelvin] = (
                run.phi_profile(kelvin, args.bins),
                importance_profile(log_weights, phi, kelvin, args.bins),
            )
    text = json.dumps(json_ready(report), indent=1, allow_nan=False)
    Path(args.output).write_text(text + "\n")
    print(text)
    draw(profiles, Path(args.output).with_suffix(".png"))


def draw(profiles, path):
    figure = Figure(figsize=(4.4 * len(profiles), 4.0), layout="constrained")
    axes = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for axis, (kelvin, (mbar, weighted)) in zip(axes, profiles.items(), strict=True):
        centres = np.degrees(0.5 * (mbar.edges[1:] + mbar.edges[:-1]))
        drawn = np.where(mbar.kish >= 10, mbar.free_energy, np.nan)
        axis.plot(centres, drawn, color="#0b5394", lw=1.4, label="MBAR, run")
        band = np.nan_to_num(mbar.stderr)
        axis.fill_between(centres, drawn - band, drawn + band, color="#0b5394", alpha=0.25, lw=0)
        seen = weighted.kish >= 10
        axis.errorbar(
            centres[seen], weighted.free_energy[seen], weighted.stderr[seen],
            fmt="s", ms=3, capsize=2, lw=0.8, color="#e69138", label="flow's draws, weighted",
        )  # fmt: skip
        axis.set_title(f"{kelvin:g} K, no rung needed")
        axis.set_xlabel("φ (°)")
        axis.set_xlim(-180, 180)
        axis.set_xticks(range(-180, 181, 90))
    axes[0].set_ylabel("free energy (kT)")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
