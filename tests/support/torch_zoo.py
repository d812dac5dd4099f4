"""Forces with random parameters for Systems of nine particles, one by one and all together."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm

from tests.support.torch_cases import N_PARTICLES as N
from tests.support.torch_cases import system_of

Builder = Callable[[np.random.Generator], openmm.Force]


def tuples(rng: np.random.Generator, size: int, n_tuples: int = 8) -> list[list[int]]:
    return [[int(a) for a in rng.choice(N, size=size, replace=False)] for _ in range(n_tuples)]


def harmonic_bonds(rng: np.random.Generator) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for i, j in [*tuples(rng, 2), [0, 1], [1, 0]]:  # one pair, twice
        force.addBond(i, j, rng.uniform(0.1, 0.3), rng.uniform(1e3, 3e5))
    return force


def harmonic_angles(rng: np.random.Generator) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for atoms in [*tuples(rng, 3), [0, 1, 2], [2, 1, 0], [0, 1, 2]]:
        force.addAngle(*atoms, rng.uniform(0.5, 3.0), rng.uniform(10, 500))
    return force


def periodic_torsions(rng: np.random.Generator) -> openmm.Force:
    force = openmm.PeriodicTorsionForce()
    for atoms in tuples(rng, 4):
        for periodicity in rng.choice(np.arange(1, 7), size=3, replace=False):
            phase = rng.choice([0.0, math.pi, rng.uniform(-7.0, 7.0)])
            force.addTorsion(*atoms, int(periodicity), float(phase), rng.uniform(-20, 20))
    force.addTorsion(3, 2, 1, 0, 2, 0.3, 4.0)
    force.addTorsion(0, 1, 2, 3, 2, 0.3, 4.0)  # the same dihedral, read backwards
    return force


def rb_torsions(rng: np.random.Generator) -> openmm.Force:
    force = openmm.RBTorsionForce()
    for atoms in tuples(rng, 4):
        force.addTorsion(*atoms, *rng.uniform(-30, 30, size=6))
    return force


def cmap_torsions(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CMAPTorsionForce()
    for size in (24, 5):
        force.addMap(size, rng.uniform(-10, 10, size=size * size))
    for which in (0, 1, 1, 0):
        first, second = tuples(rng, 4, 2)
        force.addTorsion(which, *first, *second)
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    force.addTorsion(1, 0, 1, 2, 3, 0, 1, 2, 3)  # one dihedral in both places
    return force


def charged_particles(rng: np.random.Generator) -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    for _ in range(N):
        force.addParticle(rng.uniform(-1, 1), rng.uniform(0.1, 0.2), rng.uniform(0.1, 1))
    return force


def nonbonded(rng: np.random.Generator) -> openmm.NonbondedForce:
    force = charged_particles(rng)
    force.setParticleParameters(2, 0.4, 0.0, 0.7)  # no size
    force.setParticleParameters(3, 0.4, 0.15, 0.0)  # no depth
    force.setParticleParameters(4, 0.0, 0.2, 0.5)  # no charge
    force.addException(0, 1, 0.0, 0.1, 0.0)
    force.addException(3, 2, 0.0, 0.0, 0.0)
    force.addException(5, 1, 0.3, 0.12, 0.4)
    force.addException(6, 7, 0.0, 0.15, 0.5)
    force.addException(4, 8, -0.6, 0.2, 0.0)
    return force


def nonbonded_from_bonds(rng: np.random.Generator) -> openmm.NonbondedForce:
    force = charged_particles(rng)
    force.createExceptionsFromBonds([(i, i + 1) for i in range(N - 1)], 0.8333, 0.5)
    return force


def gbsa_obc(rng: np.random.Generator) -> openmm.GBSAOBCForce:
    force = openmm.GBSAOBCForce()
    for _ in range(N):
        force.addParticle(rng.uniform(-1, 1), rng.uniform(0.12, 0.2), rng.uniform(0.7, 0.9))
    return force


def gbsa_obc_of_other_constants(rng: np.random.Generator) -> openmm.GBSAOBCForce:
    force = gbsa_obc(rng)
    force.setSoluteDielectric(2.5)
    force.setSolventDielectric(31.0)
    force.setSurfaceAreaEnergy(7.0)
    force.setParticleParameters(0, 0.0, 0.15, 0.8)  # no charge
    force.setParticleParameters(1, 0.5, 0.15, 1e-3)  # does not shield
    force.setParticleParameters(2, 0.5, 0.3, 1.2)  # buries its neighbours
    return force


def gbsa_obc_without_surface(rng: np.random.Generator) -> openmm.GBSAOBCForce:
    force = gbsa_obc(rng)
    force.setSurfaceAreaEnergy(0.0)
    return force


def offsets(rng: np.random.Generator) -> openmm.NonbondedForce:
    force = nonbonded(rng)
    for name, value in (("charging", 0.4), ("growth", 0.0), ("bridge", 1.3)):
        force.addGlobalParameter(name, value)
    force.addParticleParameterOffset("charging", 4, 0.8, 0.0, 0.0)  # charge where there was none
    force.addParticleParameterOffset("charging", 5, -0.3, 0.02, 0.1)
    force.addParticleParameterOffset("growth", 5, 0.1, 0.01, 0.2)
    force.addParticleParameterOffset("growth", 3, 0.0, 0.05, 0.6)  # depth where there was none
    force.addExceptionParameterOffset("bridge", 0, 0.2, 0.03, 0.3)  # an exception of nothing
    force.addExceptionParameterOffset("bridge", 2, -0.1, 0.01, 0.05)
    force.addExceptionParameterOffset("charging", 2, 0.1, 0.01, 0.05)
    return force


def custom(kind: str, text: str, names: str, *groups: Any, **global_parameters: float) -> Any:
    """Return a Custom Force: Bond, Angle, Torsion or External, of groups (*atoms, parameters)."""
    force = getattr(openmm, f"Custom{kind}Force")(text)
    group = "Particle" if kind == "External" else kind
    for name in names.split():
        getattr(force, f"addPer{group}Parameter")(name)
    for name, value in global_parameters.items():
        force.addGlobalParameter(name, value)
    for *atoms, parameters in groups:
        getattr(force, f"add{group}")(*atoms, parameters)
    return force


def scaled_bond(value: float = 0.0) -> openmm.System:
    """Return a bond that a global parameter scales."""
    bond = 0, 1, [300.0, 0.15]
    return system_of(custom("Bond", "lam*k*(r-r0)^2", "k r0", bond, lam=value), n=2)


PLAIN: list[Builder] = [
    harmonic_bonds,
    harmonic_angles,
    periodic_torsions,
    rb_torsions,
    cmap_torsions,
    nonbonded,
    nonbonded_from_bonds,
    gbsa_obc,
    gbsa_obc_of_other_constants,
    gbsa_obc_without_surface,
]


def everything() -> openmm.System:
    """Return a System of all kinds of Forces, with a shared global parameter and groups."""
    rng = np.random.default_rng(8)
    forces = [builder(rng) for builder in PLAIN[:5]]
    forces += [harmonic_bonds(rng), offsets(rng), gbsa_obc(rng), openmm.CMMotionRemover(10)]
    bonds = ((i, j, [rng.uniform(1e3, 1e5), rng.uniform(0.1, 0.3)]) for i, j in tuples(rng, 2))
    bond = custom("Bond", "charging*k*(r-r0)^4", "k r0", *bonds, charging=0.4)
    angles = ((*atoms, [rng.uniform(-1, 1)]) for atoms in tuples(rng, 3))
    angle = custom("Angle", "k*(cos(theta)-c)^2", "c", *angles, k=60.0)
    torsions = ((*atoms, list(rng.uniform(-5, 5, size=2))) for atoms in tuples(rng, 4))
    torsion = custom("Torsion", "a*sin(theta/2)^2 + b*exp(cos(theta))", "a b", *torsions)
    particles = ((i, [rng.uniform(0, 0.4)]) for i in (0, 3, 8))
    well = custom("External", "k*((x-x0)^2 + y^2*z)", "x0", *particles, k=60.0)
    pair = openmm.CustomNonbondedForce("growth + a1*a2*exp(-r/0.1)/r + growth*sqrt(r)")
    pair.addPerParticleParameter("a")
    pair.addGlobalParameter("growth", 0.0)
    for _ in range(N):
        pair.addParticle([rng.uniform(-3, 3)])
    pair.addExclusion(0, 1)
    pair.addExclusion(7, 2)
    born = openmm.CustomGBForce()
    born.addPerParticleParameter("q")
    born.addPerParticleParameter("s")
    born.addGlobalParameter("strength", 2.0)
    born.addComputedValue("I", "s2*exp(-r/s1)", openmm.CustomGBForce.ParticlePairNoExclusions)
    born.addComputedValue("B", "0.1+tanh(I)*s", openmm.CustomGBForce.SingleParticle)
    born.addEnergyTerm("strength*q^2/B", openmm.CustomGBForce.SingleParticle)
    born.addEnergyTerm(
        "-strength*q1*q2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", openmm.CustomGBForce.ParticlePair
    )
    for _ in range(N):
        born.addParticle([rng.uniform(-1, 1), rng.uniform(0.1, 0.3)])
    born.addExclusion(1, 4)
    forces += [bond, angle, torsion, well, pair, born]
    for index, force in enumerate(forces):
        force.setForceGroup(index % 4)
    return system_of(*forces)
