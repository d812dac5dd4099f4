r"""Alanine dipeptide with constrained bonds to hydrogen: a flow against constrained dynamics.

    python examples/benchmarks/constraints.py md --output md.npz --minutes 60
    python examples/benchmarks/constraints.py run --output run/
    python examples/benchmarks/constraints.py compare --md md.npz --run run/ --output z.json

``md`` is replica exchange of LangevinMiddle with steps of 2 fs, several ladders one after the
other; repeated, it goes on. ``run`` samples the same System with a flow (measure ``"rigid"``) by
Metropolised moves, on frames of MD with constraints. ``compare`` gives z of <U>, P(phi > 0) and
<1/2 ln|Z|> at every rung. The same ensemble is meant: exp(-U/kT) |Z|^(1/2) on the manifold of the
constraints. Without |Z| the last mean would be lower by about the variance, which is given, too.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import openmm.app as app
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import write_arrays, write_json
from openmm_tsf.systems.slow_torsions import dihedral_angles
from openmm_tsf.units import KB
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.run import run as run_workflow
from openmm_tsf.workflow.settings import LADDER_K

TIMESTEP_PS, FRICTION_PER_PS, STEPS_PER_EXCHANGE = 0.002, 1.0, 100
#: Exchanges that are left out at the start of a ladder: 100 ps.
N_EQUILIBRATION = 500
#: What is recorded of each ladder, and what is compared.
OBSERVABLES = ("energy", "phi", "metric")


def constrained_alanine():
    """Return the shipped molecule with HBonds."""
    shipped = tsf.systems.alanine_dipeptide()
    forces = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
    system = forces.createSystem(
        shipped.topology, nonbondedMethod=app.NoCutoff, constraints=app.HBonds
    )
    return tsf.MolecularSystem(system, shipped.topology, shipped.positions)


class Ladder:
    """Replicas of OpenMM's constrained dynamics, one for each temperature."""

    def __init__(self, molecule, seed):
        self.phi, self.constraints = [molecule.dihedrals["phi"]], molecule.constraints
        self.rng = np.random.default_rng(seed)
        self.contexts = []
        for rung, kelvin in enumerate(LADDER_K):
            integrator = openmm.LangevinMiddleIntegrator(kelvin, FRICTION_PER_PS, TIMESTEP_PS)
            integrator.setRandomNumberSeed(100 * seed + rung + 1)
            integrator.setConstraintTolerance(1e-7)
            platform = openmm.Platform.getPlatformByName("Reference")
            context = openmm.Context(molecule.system, integrator, platform)
            context.setPositions(molecule.positions)
            openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
            context.setVelocitiesToTemperature(kelvin, 100 * seed + rung + 1)
            self.contexts.append(context)

    def advance(self, first):
        """Return U, phi and 1/2 ln|Z| [R] after dynamics, then exchange pairs from `first` on."""
        states = []
        for context in self.contexts:
            context.getIntegrator().step(STEPS_PER_EXCHANGE)
            parts = {"getPositions": True, "getVelocities": True, "getEnergy": True}
            states.append(context.getState(**parts))
        energy = np.array([state.getPotentialEnergy()._value for state in states])
        x = np.array([state.getPositions(asNumpy=True)._value for state in states])
        phi = dihedral_angles(x, self.phi)[:, 0]
        for low in range(first, len(LADDER_K) - 1, 2):
            self._exchange(low, states, energy)
        return energy, phi, self.constraints.half_log_metric(torch.from_numpy(x)).numpy()

    def _exchange(self, low, states, energy):
        high = low + 1
        beta = [1 / (KB * LADDER_K[rung]) for rung in (low, high)]
        log_ratio = (beta[0] - beta[1]) * (energy[low] - energy[high])
        if math.log(self.rng.random()) >= log_ratio:
            return
        for to, source in ((low, high), (high, low)):
            scale = math.sqrt(LADDER_K[to] / LADDER_K[source])
            velocities = states[source].getVelocities(asNumpy=True)._value
            self.contexts[to].setPositions(states[source].getPositions(asNumpy=True)._value)
            self.contexts[to].setVelocities(scale * velocities)


def simulate(args):
    """Append ladders of `args.ps` until `args.minutes` have passed."""
    path, molecule, began = Path(args.output), constrained_alanine(), time.monotonic()
    ladders = dict(np.load(path)) if path.exists() else {}
    n = round(args.ps / (TIMESTEP_PS * STEPS_PER_EXCHANGE))
    while time.monotonic() - began < 60 * args.minutes:
        number = sum(name.startswith("energy") for name in ladders)
        ladder = Ladder(molecule, number + 1)
        series = [ladder.advance(k % 2) for k in range(-N_EQUILIBRATION, n)][N_EQUILIBRATION:]
        for name, values in zip(OBSERVABLES, zip(*series, strict=True), strict=True):
            ladders[f"{name}_{number}"] = np.array(values)
        write_arrays(path, ladders)
        print(f"{number + 1} ladders of {args.ps:g} ps, {time.monotonic() - began:.0f} s")


def sample(args):
    """Run the workflow with a flow on frames of constrained MD."""
    settings = preset("quick")
    settings = replace(
        settings,
        stride=1,
        md=replace(settings.md, n_frames=args.frames),
        fit=replace(settings.fit, n_steps=args.steps),
        sampling=replace(settings.sampling, n_walkers=args.walkers, n_iterations=args.iterations),
    )
    options = RunOptions(seed=args.seed, resume=True)
    summary = run_workflow(args.output, settings, molecule=constrained_alanine(), options=options)
    print(summary["verdict"]["sentence"])


def compare(args):
    """Print and write z of <U> and P(phi > 0) at each rung."""
    arrays, run = np.load(args.md), tsf.load_run(args.run)
    constraints, rows = constrained_alanine().constraints, {}
    numbers = range(sum(name.startswith("energy") for name in arrays.files))
    for rung, kelvin in enumerate(LADDER_K):
        energy, phi, metric = (
            np.stack([arrays[f"{name}_{k}"][:, rung] for k in numbers], axis=1)
            for name in OBSERVABLES
        )
        x = torch.from_numpy(run.trajectory(kelvin).xyz.astype(np.float64))
        of_frames = constraints.half_log_metric(x).numpy()
        pairs = {
            "U in kJ/mol": (energy, run.energies(kelvin)),
            "P(phi > 0)": (phi > 0, run.dihedral("phi", kelvin) > 0),
            "1/2 ln|Z|": (metric, of_frames.reshape(run.energies(kelvin).shape)),
        }
        for name, (of_md, of_run) in pairs.items():
            md, flow = (estimate_mean(np.asarray(each, float)) for each in (of_md, of_run))
            z = (flow.value - md.value) / math.hypot(md.stderr, flow.stderr)
            row = {"md": md.pair, "flow": flow.pair, "z": z, "variance": md.variance}
            rows[f"{name} at {kelvin:g} K"] = row
            print(
                f"{name:12s} {kelvin:7.2f} K   constrained MD {md.value:11.6f} +- "
                f"{md.stderr:.6f}   flow {flow.value:11.6f} +- {flow.stderr:.6f}   z {z:5.2f}   "
                f"variance {md.variance:.2g}"
            )
    if args.output is not None:
        sizes = {"n_ladders": len(numbers), "n_iterations": run.n_iterations}
        write_json(Path(args.output), {**sizes, "rows": rows})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    md = commands.add_parser("md")
    md.add_argument("--minutes", type=float, default=60.0)
    md.add_argument("--ps", type=float, default=500.0, help="length of each ladder")
    run = commands.add_parser("run")
    run.add_argument("--frames", type=int, default=4000)
    run.add_argument("--steps", type=int, default=1000, help="of the first training")
    run.add_argument("--walkers", type=int, default=64)
    run.add_argument("--iterations", type=int, default=600)
    run.add_argument("--seed", type=int, default=1)
    both = commands.add_parser("compare")
    both.add_argument("--md", required=True)
    both.add_argument("--run", required=True)
    for command, function in ((md, simulate), (run, sample), (both, compare)):
        command.add_argument("--output", required=command is not both)
        command.set_defaults(function=function)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
