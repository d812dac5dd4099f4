"""A chain of five atoms with harmonic bonds and angles, and its dynamics: fast, and any variant."""

import numpy as np
import openmm

import openmm_tsf as tsf
from tests.support.molecules import graph_molecule

ZIGZAG = np.array([[0, 0, 0], [0.12, 0.09, 0], [0.24, 0, 0], [0.36, 0.09, 0.03], [0.48, 0, 0.05]])
#: Of bonds in kJ/(mol nm^2).
CONSTANT = 2e5
N_ATOMS = len(ZIGZAG)


def chain_of(
    custom: bool = False,
    length: float = 0.15,
    constant: float = CONSTANT,
    barrier: float = 2.0,
    elements: str = "C" * N_ATOMS,
) -> tsf.MolecularSystem:
    """Return the chain, its bonds with harmonic terms or custom ones."""
    pairs = [(i, i + 1) for i in range(N_ATOMS - 1)]
    topology, positions = graph_molecule(pairs, ZIGZAG, elements)
    system = openmm.System()
    for _ in range(N_ATOMS):
        system.addParticle(12.011)
    if custom:
        bonds = openmm.CustomBondForce(f"0.5*{constant}*(r-{length})^2")
        for pair in pairs:
            bonds.addBond(*pair, [])
    else:
        bonds = openmm.HarmonicBondForce()
        for pair in pairs:
            bonds.addBond(*pair, length, constant)
    system.addForce(bonds)
    angles, torsions = openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(N_ATOMS - 2):
        angles.addAngle(i, i + 1, i + 2, 1.9, 400.0)
    for i in range(N_ATOMS - 3):
        torsions.addTorsion(i, i + 1, i + 2, i + 3, 3, 0.0, barrier)
    system.addForce(angles)
    system.addForce(torsions)
    return tsf.MolecularSystem(system, topology, positions)


def dynamics(
    molecule: tsf.MolecularSystem,
    temperature: float,
    constrained: list[int] | None = None,
    timestep: float = 0.001,
    mass_of_ends: float | None = None,
    n_frames: int = 300,
    steps_per_frame: int = 50,
) -> np.ndarray:
    """Return frames [F, N, 3] in nm of Langevin dynamics, with constraints of some bonds."""
    system = openmm.XmlSerializer.clone(molecule.system)
    for bond in constrained or ():
        system.addConstraint(bond, bond + 1, 0.15)
    if mass_of_ends is not None:
        for atom in (0, N_ATOMS - 1):
            system.setParticleMass(atom, mass_of_ends)
    integrator = openmm.LangevinMiddleIntegrator(temperature, 10.0, timestep)
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, integrator, platform)
    context.setPositions(molecule.positions)
    context.applyConstraints(1e-6)
    context.setVelocitiesToTemperature(temperature, 1)
    integrator.step(1000)
    frames = []
    for _ in range(n_frames):
        integrator.step(steps_per_frame)
        frames.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    return np.array(frames)
