"""TorchPotential equals OpenMM Force by Force, alone and together, on particles at random."""

import math

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from tests.support import torch_cases as cases
from tests.support.torch_cases import N_PARTICLES as N
from tests.support.torch_zoo import PLAIN, custom, everything, nonbonded, offsets


def check(*forces: openmm.Force, x: Tensor | None = None) -> None:
    x = cases.cluster() if x is None else x
    system = cases.system_of(*forces, n=x.shape[1])
    cases.assert_agrees(TorchPotential.from_system(system), system, x)


@pytest.mark.parametrize("builder", [*PLAIN, offsets], ids=lambda b: b.__name__)
def test_one_force(builder):
    check(builder(np.random.default_rng(1)))


@pytest.mark.parametrize("builder", [*PLAIN, None])
def test_second_derivatives_of_one_force_and_of_everything(builder):
    """The whole Hessian against differences of OpenMM's forces."""
    system = everything() if builder is None else cases.system_of(builder(np.random.default_rng(2)))
    x = cases.cluster(1)[0]
    hessian, expected = cases.hessians(system, x, range(x.numel()))
    assert (hessian - expected).abs().max() <= 1e-7 * hessian.abs().max()


def test_third_derivatives_of_everything():
    """The gradient of the curvature along a direction, against its differences."""
    potential, x = TorchPotential.from_system(everything()), cases.cluster(1)
    direction = torch.from_numpy(np.random.default_rng(12).normal(size=x.shape))

    def curvatures(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(potential.energy(y).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), y, create_graph=True)
        return (second * direction).sum(dim=(1, 2))

    leaf = x.clone().requires_grad_()
    (third,) = torch.autograd.grad(curvatures(leaf).sum(), leaf)
    steps = 1e-5 * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    ends = [curvatures((x + k * steps).requires_grad_()).detach() for k in (1, -1, 2, -2)]
    expected = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 12e-5
    assert (third.flatten() - expected).abs().max() <= 1e-6 * third.abs().max()


def test_cmap_everywhere_on_the_torus():
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
        angle = torch.from_numpy(phi)
        x[:, start, 0] = 0.1
        x[:, start + 2, 2] = 0.15
        x[:, start + 3] = torch.stack(
            [0.1 * angle.cos(), 0.1 * angle.sin(), torch.full_like(angle, 0.2)], dim=1
        )
    check(force, x=x)


def test_torsions_at_planar_conformations():
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
def test_angles_without_a_plane(end):
    """Exactly 180 and 0 degrees, as drawn by hand: finite for OpenMM, with a force of zero."""
    x = torch.tensor([[0.1, 0, 0], [0, 0, 0], [end, 0, 0]], dtype=torch.float64)[None]
    harmonic = openmm.HarmonicAngleForce()
    harmonic.addAngle(0, 1, 2, 2.0, 100.0)
    custom = openmm.CustomAngleForce("50*(theta-2)^2")
    custom.addAngle(0, 1, 2)
    for force in (harmonic, custom):
        system = cases.system_of(force, n=3)
        expected = cases.reference_values(system, x)
        assert expected[0].isfinite().all()
        assert not expected[1].any()
        got = TorchPotential.from_system(system).energy_and_forces(x)
        assert max(cases.errors(got, expected)) < 1e-12


@pytest.mark.parametrize(
    ("bend", "energy_limit", "force_limit"),
    [(1e-2, 1e-12, 1e-12), (1e-3, 1e-11, 1e-10), (1e-4, 1e-10, 1e-8), (1e-6, 1e-8, 1.0)],
)
def test_nearly_straight_angles(bend, energy_limit, force_limit):
    """OpenMM limits the agreement: its error grows, that of TorchPotential does not.

    Its angle is an inverse cosine, precise to 2e-16 / bend, and its force is divided by the sine's
    numerator, taken as at least 1e-6 nm^2: 1 % of the true force is left at a bend of 1e-6.
    """
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 2.0, 100.0)
    system = cases.system_of(force, n=3)
    end = [-0.1 * math.cos(bend), 0.1 * math.sin(bend), 0.0]
    x = torch.tensor([[[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], end]], dtype=torch.float64)
    stretch = math.pi - bend - 2.0
    energies, forces = TorchPotential.from_system(system).energy_and_forces(x)
    exact = 50.0 * stretch**2, 100.0 * stretch / 0.1
    assert float(energies[0]) == pytest.approx(exact[0], rel=1e-13)
    assert float(forces[0, 0].norm()) == pytest.approx(exact[1], rel=1e-13)
    reference_energies, reference_forces = cases.reference_values(system, x)
    assert float(reference_energies[0]) == pytest.approx(exact[0], rel=energy_limit)
    assert float(reference_forces[0, 0].norm()) == pytest.approx(exact[1], rel=force_limit)
    if bend == 1e-6:
        assert float(reference_forces[0, 0].norm()) == pytest.approx(0.01 * exact[1], rel=1e-6)


@pytest.mark.parametrize("closest", [0.02, 0.05])
def test_overlapping_particles_of_gbsa_obc(closest):
    """Every case of the pair integral: apart, overlapping, one inside the other."""
    rng = np.random.default_rng(4)
    force = openmm.GBSAOBCForce()
    radii = rng.uniform(0.05, 0.35, size=N)
    for radius in radii:
        force.addParticle(rng.uniform(-1, 1), radius, rng.uniform(0.5, 1.1))
    x = cases.cluster(30, closest=closest, seed=5)
    reach = np.array([0.8 * (r - 0.009) for r in radii])
    r = torch.cdist(x, x).numpy()
    assert (r < (reach[None, :] - (radii[:, None] - 0.009))[None]).any(), "no particle is inside"
    check(force, x=x)


def test_global_parameters_changed_afterwards():
    """Offsets, a Custom Force that shares their parameter, and back to the defaults."""
    system, x = everything(), cases.cluster()
    potential = TorchPotential.from_system(system)
    defaults = potential.global_parameters
    assert defaults == {"charging": 0.4, "growth": 0.0, "bridge": 1.3, "k": 60.0, "strength": 2.0}
    changed = {"charging": -0.7, "growth": 0.9, "bridge": 0.0, "k": 11.0, "strength": -1.0}
    for values in (changed, {"growth": 1e-3, "k": 0.0}, defaults):
        for name, value in {**defaults, **values}.items():
            potential.set_global_parameter(name, value)
        cases.assert_agrees(potential, system, x, parameters=values)


@pytest.mark.parametrize("groups", [[0], [1, 3], [0, 1, 2, 3], [5]])
def test_force_groups(groups):
    system, x = everything(), cases.cluster()
    potential = TorchPotential.from_system(system, force_groups=groups)
    expected = cases.reference_values(system, x, groups=groups)
    assert bool(expected[0].any()) == (groups != [5])
    assert max(cases.errors(potential.energy_and_forces(x), expected)) < 1e-10


STANDARD = ("HarmonicBond", "HarmonicAngle", "PeriodicTorsion", "RBTorsion", "CMAPTorsion")
EMPTY = [
    *(getattr(openmm, f"{name}Force")() for name in STANDARD),
    *(custom(kind, "theta", "") for kind in ("Angle", "Torsion")),
    *(custom("Bond", "k*r^2", "k"), custom("External", "x", "")),
]


@pytest.mark.parametrize("force", EMPTY, ids=lambda force: force.getName())
def test_a_force_without_terms(force):
    potential = TorchPotential.from_system(cases.system_of(openmm.XmlSerializer.clone(force)))
    energies, forces = potential.energy_and_forces(cases.cluster())
    assert not energies.any()
    assert not forces.any()
    check(nonbonded(np.random.default_rng(9)), openmm.XmlSerializer.clone(force))


def test_a_system_without_forces():
    for none in ((), (openmm.CMMotionRemover(),)):
        potential = TorchPotential.from_system(cases.system_of(*none))
        energies, forces = potential.energy_and_forces(cases.cluster())
        assert energies.tolist() == [0.0] * 6
        assert not forces.any()


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_particles(n):
    pair = openmm.NonbondedForce()
    born = openmm.GBSAOBCForce()
    well = openmm.CustomExternalForce("50*(x^2+2*y^2+3*z^2)")
    for i in range(n):
        pair.addParticle(0.3, 0.15, 0.4)
        born.addParticle(0.3, 0.15, 0.8)
        well.addParticle(i)
    check(pair, born, well, x=cases.cluster(3, n=n))


def test_conformations_one_by_one():
    potential = TorchPotential.from_system(everything())
    x = cases.cluster()
    together = potential.energy_and_forces(x)
    alone = [potential.energy_and_forces(row[None]) for row in x]
    torch.testing.assert_close(torch.cat([e for e, _ in alone]), together[0], rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(torch.cat([f for _, f in alone]), together[1], rtol=1e-11, atol=1e-6)
    energies, forces = potential.energy_and_forces(x[:0])
    assert (energies.shape, forces.shape) == ((0,), (0, N, 3))
    assert potential.energy(x[:0]).shape == (0,)


def test_coincident_particles_that_do_not_interact():
    """Excluded from each other: the Coulomb energy has no pole there, and nothing is NaN."""
    rng = np.random.default_rng(11)
    system = cases.system_of(nonbonded(rng))
    x = cases.cluster(2)
    x[0, 1] = x[0, 0]  # an exception of nothing
    with OpenMMPotential(system, "Reference", n_contexts=1) as reference:
        expected = reference.energy_and_forces(x)
    got = TorchPotential.from_system(system).energy_and_forces(x)
    assert expected[0].isfinite().all()
    assert max(cases.errors(got, expected)) < 1e-8
