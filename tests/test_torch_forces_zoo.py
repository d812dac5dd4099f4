"""TorchPotential equals OpenMM Force by Force, alone and together, on particles at random."""

import math
from collections.abc import Callable

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor
from torch_cases import N_PARTICLES as N
from torch_cases import assert_agrees, cluster, errors, reference_values, system_of

from openmm_tsf.potentials import OpenMMPotential, TorchPotential

Builder = Callable[[np.random.Generator], openmm.Force]


def tuples(rng: np.random.Generator, size: int, n_tuples: int = 8) -> list[list[int]]:
    return [[int(a) for a in rng.choice(N, size=size, replace=False)] for _ in range(n_tuples)]


def check(*forces: openmm.Force, x: Tensor | None = None) -> None:
    x = cluster() if x is None else x
    system = system_of(*forces, n=x.shape[1])
    assert_agrees(TorchPotential.from_system(system), system, x)


def harmonic_bonds(rng: np.random.Generator) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for i, j in [*tuples(rng, 2), [0, 1], [1, 0]]:  # the last two: one pair, twice
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


def nonbonded(rng: np.random.Generator) -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    for _ in range(N):
        force.addParticle(rng.uniform(-1, 1), rng.uniform(0.1, 0.2), rng.uniform(0.1, 1))
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
    force = openmm.NonbondedForce()
    for _ in range(N):
        force.addParticle(rng.uniform(-1, 1), rng.uniform(0.1, 0.2), rng.uniform(0.1, 1))
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
    force.setParticleParameters(1, 0.5, 0.15, 1e-3)  # shields nobody
    force.setParticleParameters(2, 0.5, 0.3, 1.2)  # buries its neighbours
    return force


def gbsa_obc_without_surface(rng: np.random.Generator) -> openmm.GBSAOBCForce:
    force = gbsa_obc(rng)
    force.setSurfaceAreaEnergy(0.0)
    return force


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


@pytest.mark.parametrize("builder", PLAIN, ids=lambda b: b.__name__)
def test_one_force(builder: Builder) -> None:
    check(builder(np.random.default_rng(1)))


@pytest.mark.parametrize("builder", PLAIN[:6], ids=lambda b: b.__name__)
def test_second_derivatives_of_one_force(builder: Builder) -> None:
    """The whole Hessian against differences of the forces that equal OpenMM's."""
    potential = TorchPotential.from_system(system_of(builder(np.random.default_rng(2))))
    x = cluster(1)[0]
    hessian = torch.autograd.functional.hessian(lambda y: potential.energy(y[None]).sum(), x)
    force = potential.energy_and_forces
    steps = 1e-5 * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    near, far = (force(x - k * steps)[1] - force(x + k * steps)[1] for k in (1, 2))
    expected = ((8 * near - far) / 12e-5).reshape(hessian.shape)  # of fourth order
    assert (hessian - expected).abs().max() <= 1e-7 * hessian.abs().max()


def test_cmap_everywhere_on_the_torus() -> None:
    """Both dihedrals around the whole circle, next to the knots and at the cut too."""
    rng = np.random.default_rng(3)
    size, n = 6, 8
    force = openmm.CMAPTorsionForce()
    force.addMap(size, rng.uniform(-10, 10, size=size * size))
    force.addTorsion(0, 0, 1, 2, 3, 4, 5, 6, 7)
    knots = 2 * math.pi * np.arange(size) / size
    angles = np.concatenate([knots + 1e-4, knots - 1e-4, rng.uniform(0, 2 * math.pi, size=6)])
    first, second = (a.ravel() for a in np.meshgrid(angles, angles))
    x = torch.zeros(len(first), n, 3, dtype=torch.float64)
    for start, phi in ((0, first), (4, second)):
        turn = torch.from_numpy(phi)
        x[:, start, 0] = 0.1
        x[:, start + 2, 2] = 0.15
        x[:, start + 3] = torch.stack(
            [0.1 * turn.cos(), 0.1 * turn.sin(), torch.full_like(turn, 0.2)], dim=1
        )
    check(force, x=x)


def test_torsions_at_planar_conformations() -> None:
    """Dihedrals of exactly 0 and 180 degrees, where an inverse cosine has no derivative."""
    x = torch.tensor([[0.1, 0, 0], [0, 0, 0], [0, 0.14, 0], [0.1, 0.2, 0]], dtype=torch.float64)
    trans = x.clone()
    trans[3, 0] = -0.1
    periodic = openmm.PeriodicTorsionForce()
    for n in (1, 2, 3):
        periodic.addTorsion(0, 1, 2, 3, n, 0.7, 5.0)
    rb = openmm.RBTorsionForce()
    rb.addTorsion(0, 1, 2, 3, 1.0, 2.0, -3.0, 4.0, -5.0, 6.0)
    cmap = openmm.CMAPTorsionForce()
    cmap.addMap(4, np.random.default_rng(0).uniform(-5, 5, size=16))
    cmap.addTorsion(0, 0, 1, 2, 3, 0, 1, 2, 3)
    check(periodic, rb, cmap, x=torch.stack([x, trans]))


@pytest.mark.parametrize("end", [-0.1, 0.1], ids=["straight", "folded"])
def test_angles_without_a_plane(end: float) -> None:
    """Exactly 180 and 0 degrees, as drawn by hand: finite for OpenMM, with a force of zero."""
    x = torch.tensor([[0.1, 0, 0], [0, 0, 0], [end, 0, 0]], dtype=torch.float64)[None]
    harmonic = openmm.HarmonicAngleForce()
    harmonic.addAngle(0, 1, 2, 2.0, 100.0)
    custom = openmm.CustomAngleForce("50*(theta-2)^2")
    custom.addAngle(0, 1, 2)
    for force in (harmonic, custom):
        system = system_of(force, n=3)
        expected = reference_values(system, x)
        assert expected[0].isfinite().all()
        assert not expected[1].any()
        got = TorchPotential.from_system(system).energy_and_forces(x)
        assert max(errors(got, expected)) < 1e-12


@pytest.mark.parametrize("closest", [0.02, 0.05])
def test_overlapping_particles_of_gbsa_obc(closest: float) -> None:
    """Every case of the pair integral: apart, overlapping, one inside the other."""
    rng = np.random.default_rng(4)
    force = openmm.GBSAOBCForce()
    radii = rng.uniform(0.05, 0.35, size=N)
    for radius in radii:
        force.addParticle(rng.uniform(-1, 1), radius, rng.uniform(0.5, 1.1))
    x = cluster(30, closest=closest, seed=5)
    reach = np.array([0.8 * (r - 0.009) for r in radii])
    r = torch.cdist(x, x).numpy()
    assert (r < (reach[None, :] - (radii[:, None] - 0.009))[None]).any(), "no particle is inside"
    check(force, x=x)


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


def test_parameter_offsets() -> None:
    check(offsets(np.random.default_rng(6)))


def everything() -> openmm.System:
    """Plain and custom Forces, two of a kind, one global parameter shared, groups."""
    rng = np.random.default_rng(8)
    forces = [builder(rng) for builder in PLAIN[:5]]
    forces += [harmonic_bonds(rng), offsets(rng), gbsa_obc(rng), openmm.CMMotionRemover(10)]
    bond = openmm.CustomBondForce("charging*k*(r-r0)^4")
    bond.addGlobalParameter("charging", 0.4)
    bond.addPerBondParameter("k")
    bond.addPerBondParameter("r0")
    for i, j in tuples(rng, 2):
        bond.addBond(i, j, [rng.uniform(1e3, 1e5), rng.uniform(0.1, 0.3)])
    angle = openmm.CustomAngleForce("k*(cos(theta)-c)^2")
    angle.addGlobalParameter("k", 60.0)
    angle.addPerAngleParameter("c")
    for atoms in tuples(rng, 3):
        angle.addAngle(*atoms, [rng.uniform(-1, 1)])
    torsion = openmm.CustomTorsionForce("a*sin(theta/2)^2 + b*exp(cos(theta))")
    torsion.addPerTorsionParameter("a")
    torsion.addPerTorsionParameter("b")
    for atoms in tuples(rng, 4):
        torsion.addTorsion(*atoms, list(rng.uniform(-5, 5, size=2)))
    well = openmm.CustomExternalForce("k*((x-x0)^2 + y^2*z)")
    well.addGlobalParameter("k", 60.0)
    well.addPerParticleParameter("x0")
    for i in (0, 3, 8):
        well.addParticle(i, [rng.uniform(0, 0.4)])
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


def test_everything_together() -> None:
    system = everything()
    assert_agrees(TorchPotential.from_system(system), system, cluster())


EMPTY: dict[str, tuple[str, ...]] = {
    "HarmonicBondForce": (),
    "HarmonicAngleForce": (),
    "PeriodicTorsionForce": (),
    "RBTorsionForce": (),
    "CMAPTorsionForce": (),
    "CustomBondForce": ("r^2",),
    "CustomAngleForce": ("theta",),
    "CustomTorsionForce": ("theta",),
    "CustomExternalForce": ("x",),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_force_without_terms(name: str) -> None:
    x = cluster()
    alone = TorchPotential.from_system(system_of(getattr(openmm, name)(*EMPTY[name])))
    energies, forces = alone.energy_and_forces(x)
    assert not energies.any()
    assert not forces.any()
    check(nonbonded(np.random.default_rng(9)), getattr(openmm, name)(*EMPTY[name]))


def test_a_system_without_forces() -> None:
    for force in ((), (openmm.CMMotionRemover(),)):
        energies, forces = TorchPotential.from_system(system_of(*force)).energy_and_forces(
            cluster()
        )
        assert energies.tolist() == [0.0] * 6
        assert not forces.any()


def test_motion_removal_is_ignored() -> None:
    rng = np.random.default_rng(10)
    check(harmonic_bonds(rng), openmm.CMMotionRemover(1))


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_particles(n: int) -> None:
    pair = openmm.NonbondedForce()
    born = openmm.GBSAOBCForce()
    well = openmm.CustomExternalForce("50*(x^2+2*y^2+3*z^2)")
    for i in range(n):
        pair.addParticle(0.3, 0.15, 0.4)
        born.addParticle(0.3, 0.15, 0.8)
        well.addParticle(i)
    check(pair, born, well, x=cluster(3, n=n))


def test_one_conformation_and_none() -> None:
    potential = TorchPotential.from_system(everything())
    x = cluster()
    together = potential.energy_and_forces(x)
    alone = [potential.energy_and_forces(row[None]) for row in x]
    torch.testing.assert_close(torch.cat([e for e, _ in alone]), together[0], rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(torch.cat([f for _, f in alone]), together[1], rtol=1e-11, atol=1e-6)
    energies, forces = potential.energy_and_forces(x[:0])
    assert (energies.shape, forces.shape) == ((0,), (0, N, 3))
    assert potential.energy(x[:0]).shape == (0,)


def test_coincident_particles_that_do_not_interact() -> None:
    """Excluded from each other: the Coulomb energy has no pole there, and nothing is NaN."""
    rng = np.random.default_rng(11)
    system = system_of(nonbonded(rng))
    x = cluster(2)
    x[0, 1] = x[0, 0]  # an exception of nothing
    with OpenMMPotential(system, "Reference", n_contexts=1) as reference:
        expected = reference.energy_and_forces(x)
    got = TorchPotential.from_system(system).energy_and_forces(x)
    assert expected[0].isfinite().all()
    assert max(errors(got, expected)) < 1e-8
