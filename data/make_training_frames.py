"""Molecular dynamics of alanine dipeptide at 600 K: the training frames of the default flow.

    python data/make_training_frames.py

writes ``data/ala2_600K.dcd``: 10 ns of Langevin dynamics (1 fs, friction 1/ps, unchanged masses),
10^7 energy evaluations after 20 ps of equilibration, a frame every 0.25 ps.
"""

import argparse
from pathlib import Path

import openmm
import openmm.app as app

from openmm_tsf.systems import alanine_dipeptide

HERE = Path(__file__).resolve().parent
TEMPERATURE_K = 600.0
TIMESTEP_PS = 0.001
FRICTION_PER_PS = 1.0
EQUILIBRATION_STEPS = 20_000
STEPS_PER_FRAME = 250
N_FRAMES = 40_000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(HERE / "ala2_600K.dcd"))
    parser.add_argument("--seed", type=int, default=600)
    args = parser.parse_args()
    molecule = alanine_dipeptide()
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE_K, FRICTION_PER_PS, TIMESTEP_PS)
    integrator.setRandomNumberSeed(args.seed)
    platform = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
    simulation.context.setPositions(molecule.positions)
    simulation.minimizeEnergy()
    simulation.context.setVelocitiesToTemperature(TEMPERATURE_K, args.seed)
    simulation.step(EQUILIBRATION_STEPS)
    simulation.reporters.append(app.DCDReporter(args.output, STEPS_PER_FRAME))
    simulation.step(STEPS_PER_FRAME * N_FRAMES)


if __name__ == "__main__":
    main()
