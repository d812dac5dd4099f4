"""CutoffNonPeriodic against OpenMM's Reference platform: energies, forces, second derivatives."""

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_tsf.potentials import TorchPotential
from openmm_tsf.potentials.energy_function import SystemEnergy
from tests.support import torch_zoo
from tests.support.molecules import capped, force_field
from tests.support.refusals import refused
from tests.support.torch_cases import (
    N_PARTICLES,
    alanine_frames,
    assert_agrees,
    cluster,
    hessians,
    reference_values,
    system_of,
)

#: Between the smallest and largest distances of the particles in `cluster`, which fill 0.45 nm.
CUTOFF, SWITCHING = 0.3, 0.22
#: No distance is as close to the cutoff as the steps of differences of forces.
X = cluster(8, seed=3)


def cut(force, switching=None):
    force.setNonbondedMethod(type(force).CutoffNonPeriodic)
    force.setCutoffDistance(CUTOFF)
    if switching is not None:
        force.setUseSwitchingFunction(True)
        force.setSwitchingDistance(switching)
    return force


def charged(dielectric=78.3, switching=None):
    force = torch_zoo.charged_particles(np.random.default_rng(0))
    force.setReactionFieldDielectric(dielectric)
    return cut(force, switching)


def with_exceptions():
    """Some within the cutoff, some beyond it, one without any interaction."""
    force = charged(switching=SWITCHING)
    given = {
        tuple(sorted(force.getExceptionParameters(i)[:2])) for i in range(force.getNumExceptions())
    }
    for first in range(N_PARTICLES):
        for second in range(first + 1, N_PARTICLES):
            if (first, second) not in given and (first + second) % 3 == 0:
                force.addException(first, second, 0.2 * first, 0.1 + 0.01 * second, 0.3)
    force.addGlobalParameter("growth", 0.5)
    force.addParticleParameterOffset("growth", 2, -0.1, 0.01, 0.1)
    force.addExceptionParameterOffset("growth", 0, 0.1, 0.01, 0.1)
    return force


def pairs(expression="10*q1*q2/r + sqrt(0.3001-r)", switching=None):
    force = openmm.CustomNonbondedForce(expression)
    force.addPerParticleParameter("q")
    for index in range(N_PARTICLES):
        force.addParticle([0.3 * index - 0.7])
    force.addExclusion(0, 1)
    force.addExclusion(5, 2)
    return cut(force, switching)


def groups():
    force = pairs("10*(q1+2*q2)/r", SWITCHING)
    force.addInteractionGroup({0, 1, 2}, {1, 2, 3, 4})
    return force


def born(kind, energy="10*q1*q2/sqrt(r^2+B1*B2)"):
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addComputedValue("I", "q2*exp(-3*r)+0.1*sqrt(0.3001-r)", kind)
    force.addComputedValue("B", "1+0.2*I", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("5*q*B^2", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm(energy, kind)
    force.addEnergyTerm("7*B1*B2", openmm.CustomGBForce.ParticlePairNoExclusions)
    for index in range(N_PARTICLES):
        force.addParticle([0.3 * index - 0.7])
    force.addExclusion(0, 1)
    force.addExclusion(2, 5)
    return cut(force)


FORCES = {
    "reaction field": charged,
    "no dielectric": lambda: charged(1.0),
    "switched": lambda: charged(switching=SWITCHING),
    "exceptions": with_exceptions,
    "GBSA": lambda: cut(torch_zoo.gbsa_obc(np.random.default_rng(0))),
    "pairs": pairs,
    "constant pairs": lambda: pairs("q1*q2+0*r"),
    "switched pairs": lambda: pairs(switching=SWITCHING),
    "switched constant": lambda: pairs("q1*q2+1", SWITCHING),
    "interaction groups": groups,
    "born": lambda: born(openmm.CustomGBForce.ParticlePairNoExclusions),
    "born with exclusions": lambda: born(openmm.CustomGBForce.ParticlePair),
}


def test_distances_lie_on_both_sides():
    r = torch.cdist(X, X)[:, *torch.triu_indices(N_PARTICLES, N_PARTICLES, 1)]
    assert 0.2 < float((r > CUTOFF).double().mean()) < 0.8
    assert float((r < SWITCHING).double().mean()) > 0.1
    assert float((r - CUTOFF).abs().min()) > 1e-3 * 0.2


@pytest.mark.parametrize("name", FORCES)
def test_energies_and_forces(name):
    system = system_of(FORCES[name]())
    potential = TorchPotential.from_system(system)
    if name == "constant pairs":  # without any force
        assert torch.allclose(potential.energy(X), reference_values(system, X)[0], rtol=1e-12)
        return
    assert_agrees(potential, system, X)


@pytest.mark.parametrize(
    "force",
    [
        pairs("10*(q1+2*q2)/r"),
        pairs("step(q1-q2)"),
        born(openmm.CustomGBForce.ParticlePair, "B1*q2"),
    ],
)
def test_an_order_of_particles_that_a_list_of_neighbours_decides_is_refused(force):
    """OpenMM's own energy of it changes with the numbering of atoms in its list."""
    with refused(ValueError, "depends on the order of particles, and a cutoff, in Custom"):
        TorchPotential.from_system(system_of(force))


@pytest.mark.parametrize(
    "name", [n for n in FORCES if n != "constant pairs"]
)  # which have no force
def test_second_derivatives(name):
    got, expected = hessians(system_of(FORCES[name]()), X[0], range(0, 3 * N_PARTICLES, 4))
    assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("name", FORCES)
def test_distances_at_the_cutoff_have_finite_derivatives(name):
    """A line of particles, neighbours in steps of the cutoff: none of the parts is NaN."""
    x = torch.zeros(1, N_PARTICLES, 3, dtype=torch.float64)
    x[0, :, 0] = CUTOFF * torch.arange(N_PARTICLES)
    x[0, :, 1] = 0.01 * torch.arange(N_PARTICLES).remainder(2)
    x[0, 1, 1] = 0.0
    x.requires_grad_()
    energy = TorchPotential.from_system(system_of(FORCES[name]())).energy(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    assert energy.isfinite().all()
    assert gradient.isfinite().all()
    if name != "constant pairs":
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert second.isfinite().all()


@pytest.mark.parametrize("name", ["exceptions", "GBSA", "switched pairs", "born"])
def test_traced_for_compilation(name):
    """Other pairs lie within the cutoff in the batch on which the traced function is evaluated."""
    energy = SystemEnergy(system_of(FORCES[name]()))
    parameters = tuple(torch.tensor(v, dtype=X.dtype) for v in energy.default_parameters.values())

    def gradient(y):
        y = y.detach().requires_grad_()
        energies = energy(y, *parameters)
        return energies, torch.autograd.grad(energies.sum(), y)[0]

    y, other = (x.permute(2, 1, 0).contiguous() for x in (X, cluster(8, seed=9)))
    for got, expected in zip(make_fx(gradient)(y)(other), gradient(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("model", ["hct", "obc1", "obc2", "gbn", "gbn2"])
def test_molecules_with_every_model(model):
    """As from ``createSystem`` with nonbondedMethod=CutoffNonPeriodic and a cutoff of 0.5 nm."""
    topology, _ = capped("ALA")
    field = force_field("amber14/protein.ff14SB.xml", f"implicit/{model}.xml")
    options = {"nonbondedMethod": app.CutoffNonPeriodic, "nonbondedCutoff": 0.5 * unit.nanometer}
    system = field.createSystem(topology, constraints=None, **options)
    x = alanine_frames()[:4]
    potential = TorchPotential.from_system(system, positions=x[0])
    assert_agrees(potential, system, x)
    single = TorchPotential.from_system(system, dtype=torch.float32, positions=x[0])
    assert torch.allclose(single.energy(x.float()).double(), potential.energy(x), rtol=1e-3)


def test_a_distant_cutoff_without_a_field_is_none():
    """Energies of the two terms, of which the formulas are written apart, agree."""
    with_cutoff, without = charged(1.0), torch_zoo.charged_particles(np.random.default_rng(0))
    with_cutoff.setCutoffDistance(1e6)
    got = TorchPotential.from_system(system_of(with_cutoff)).energy_and_forces(X)
    expected = TorchPotential.from_system(system_of(without)).energy_and_forces(X)
    # The reaction field of a dielectric of 1 is a shift of every regular pair by 1 / cutoff.
    assert torch.allclose(got[0], expected[0], rtol=0, atol=1e-2)
    assert torch.allclose(got[1], expected[1], rtol=1e-10, atol=1e-9)
