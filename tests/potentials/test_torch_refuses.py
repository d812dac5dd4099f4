"""What TorchPotential does not cover raises, naming Force and feature."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import pytest

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from openmm_tsf.potentials.forces.registry import TERMS
from tests.support.torch_cases import N_PARTICLES as N
from tests.support.torch_cases import assert_agrees, cluster, system_of

NOT_COVERED = sorted(
    name
    for name, kind in vars(openmm).items()
    if inspect.isclass(kind) and issubclass(kind, openmm.Force) and kind is not openmm.Force
    if kind not in {*TERMS, openmm.CMMotionRemover}
)


def added(force: Any, method: str, *arguments: Any) -> Any:
    """The Force, with one term added."""
    getattr(force, method)(*arguments)
    return force


def harmonic_bond() -> openmm.HarmonicBondForce:
    return added(openmm.HarmonicBondForce(), "addBond", 0, 1, 0.1, 100.0)


def no_force(state: openmm.State) -> tuple[float, np.ndarray]:
    return 0.0, np.zeros((N, 3))


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ATMForce": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "AndersenThermostat": (300.0, 1.0),
    "CustomCVForce": ("1",),
    "CustomCentroidBondForce": (2, "distance(g1,g2)"),
    "CustomCompoundBondForce": (2, "distance(p1,p2)"),
    "CustomHbondForce": ("distance(a1,d1)",),
    "CustomManyParticleForce": (3, "distance(p1,p2)"),
    "CustomVolumeForce": ("v",),
    "MonteCarloAnisotropicBarostat": (openmm.Vec3(1, 1, 1), 300.0),
    "MonteCarloBarostat": (1.0, 300.0),
    "MonteCarloFlexibleBarostat": (1.0, 300.0),
    "MonteCarloMembraneBarostat": (1.0, 0.0, 300.0, 0, 0),
    "OrientationRestraintForce": (1.0, [openmm.Vec3(i, i * i, 0) for i in range(N)]),
    "PythonForce": (no_force,),
    "RMSDForce": ([openmm.Vec3(i, i * i, 0) for i in range(N)],),
    "RPMDMonteCarloBarostat": (1.0, 10),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_other_forces(name):
    force = getattr(openmm, name)(*ARGUMENTS.get(name, ()))
    # The last cannot be serialized, for which OpenMM raises.
    error = openmm.OpenMMException if name == "RPMDMonteCarloBarostat" else ValueError
    with pytest.raises((ValueError, error), match=name):
        TorchPotential.from_system(system_of(force))


def test_a_force_after_covered_ones_is_refused():
    compound = openmm.CustomCompoundBondForce(2, "distance(p1,p2)")
    compound.addBond([0, 1], [])
    compound.setName("restraint")
    with pytest.raises(ValueError, match=r"CustomCompoundBondForce.*restraint"):
        TorchPotential.from_system(system_of(harmonic_bond(), nonbonded(), compound))


def nonbonded(n: int = N) -> openmm.NonbondedForce:
    force = openmm.NonbondedForce()
    for i in range(n):
        force.addParticle(0.1 * (i % 3), 0.15, 0.3)
    return force


def gbsa() -> openmm.GBSAOBCForce:
    force = openmm.GBSAOBCForce()
    for i in range(N):
        force.addParticle(0.1 * (i % 3), 0.15, 0.8)
    return force


def pair(expression: str = "exp(-10*r)") -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce(expression)
    for _ in range(N):
        force.addParticle()
    return force


def born() -> openmm.CustomGBForce:
    force = openmm.CustomGBForce()
    force.addComputedValue("I", "exp(-10*r)", openmm.CustomGBForce.ParticlePair)
    force.addEnergyTerm("I^2", openmm.CustomGBForce.SingleParticle)
    for _ in range(N):
        force.addParticle()
    return force


@pytest.mark.parametrize(
    ("build", "method"),
    [
        *((nonbonded, m) for m in ("CutoffNonPeriodic", "CutoffPeriodic", "Ewald", "PME", "LJPME")),
        *((b, m) for b in (gbsa, pair, born) for m in ("CutoffNonPeriodic", "CutoffPeriodic")),
    ],
)
def test_cutoffs(build, method):
    force = build()
    force.setNonbondedMethod(getattr(type(force), method))
    with pytest.raises(ValueError, match=r"(?i)cutoff|periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def custom_bond() -> openmm.CustomBondForce:
    force = openmm.CustomBondForce("strength*r^2")
    force.addGlobalParameter("strength", 3.0)
    return added(force, "addBond", 0, 1)


def cmap() -> openmm.CMAPTorsionForce:
    force = added(openmm.CMAPTorsionForce(), "addMap", 4, np.arange(16.0))
    return added(force, "addTorsion", 0, 0, 1, 2, 3, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "force",
    [
        harmonic_bond(),
        added(openmm.HarmonicAngleForce(), "addAngle", 0, 1, 2, 1.5, 100.0),
        added(openmm.PeriodicTorsionForce(), "addTorsion", 0, 1, 2, 3, 2, 0.3, 5.0),
        added(openmm.RBTorsionForce(), "addTorsion", 0, 1, 2, 3, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
        cmap(),
        custom_bond(),
        added(openmm.CustomAngleForce("theta^2"), "addAngle", 0, 1, 2),
        added(openmm.CustomTorsionForce("cos(theta)"), "addTorsion", 0, 1, 2, 3),
    ],
    ids=lambda force: force.getName(),
)
def test_periodic_bonded_forces(force):
    force = openmm.XmlSerializer.clone(force)
    force.setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(ValueError, match=r"(?i)periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def test_periodic_distances():
    text = "periodicdistance(x, y, z, 0, 0, 0)^2"
    force = added(openmm.CustomExternalForce(text), "addParticle", 0)
    with pytest.raises(ValueError, match="CustomExternalForce"):
        TorchPotential.from_system(system_of(force))


def test_virtual_sites():
    system = system_of(nonbonded())
    system.setVirtualSite(4, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"virtual site.*4"):
        TorchPotential.from_system(system)


def test_contradicting_global_parameters():
    one, two = custom_bond(), custom_bond()
    two.setGlobalParameterDefaultValue(0, 4.0)
    with pytest.raises((ValueError, openmm.OpenMMException), match="strength"):
        TorchPotential.from_system(system_of(one, two))


@pytest.mark.parametrize("what", ["system", None, openmm.HarmonicBondForce()])
def test_no_system(what):
    with pytest.raises(TypeError, match="system: expected an openmm"):
        TorchPotential.from_system(what)


def test_a_system_without_particles():
    with pytest.raises(ValueError, match="at least one particle"):
        TorchPotential.from_system(openmm.System())


# What OpenMM ignores without a cutoff, or what is rare: covered or refused, never wrong.


def set_up(build: Callable[[], Any], **calls: tuple[Any, ...]) -> Callable[[], openmm.System]:
    def system() -> openmm.System:
        force = build()
        for method, arguments in calls.items():
            getattr(force, method)(*arguments)
        return system_of(force)

    return system


def tabulated() -> openmm.CustomNonbondedForce:
    force = pair("f(10*r, a1, a2)")
    values = np.random.default_rng(0).uniform(size=4 * 5 * 6)
    force.addTabulatedFunction("f", openmm.Continuous3DFunction(4, 5, 6, values, 0, 9, 0, 1, 0, 1))
    force.addPerParticleParameter("a")
    for i in range(N):
        force.setParticleParameters(i, [0.1 * i])
    return force


def constrained() -> openmm.System:
    system = system_of(nonbonded())
    system.addConstraint(0, 1, 0.2)
    return system


def fixed() -> openmm.System:
    system = system_of(nonbonded())
    system.setParticleMass(3, 0.0)
    return system


def computed() -> openmm.CustomNonbondedForce:
    force = pair("c1*c2/r")
    force.addPerParticleParameter("a")
    force.addComputedValue("c", "1+a^2")
    for i in range(N):
        force.setParticleParameters(i, [0.1 * i])
    return force


BORDERLINE: dict[str, Callable[[], openmm.System]] = {
    "switch": set_up(nonbonded, setUseSwitchingFunction=(True,), setSwitchingDistance=(0.2,)),
    "no direct space": set_up(nonbonded, setIncludeDirectSpace=(False,)),
    "periodic exceptions": set_up(nonbonded, setExceptionsUsePeriodicBoundaryConditions=(True,)),
    "dispersion": set_up(nonbonded, setUseDispersionCorrection=(True,)),
    "custom switch": set_up(pair, setUseSwitchingFunction=(True,), setSwitchingDistance=(0.2,)),
    "custom dispersion": set_up(pair, setUseLongRangeCorrection=(True,)),
    "interaction groups": set_up(pair, addInteractionGroup=([0, 1, 2], [2, 3, 4, 5])),
    "parameter derivative": set_up(custom_bond, addEnergyParameterDerivative=("strength",)),
    "computed values": lambda: system_of(computed()),
    "Continuous3D": lambda: system_of(tabulated()),
    "last group": set_up(harmonic_bond, setForceGroup=(31,)),
    "two of a kind": lambda: system_of(nonbonded(), nonbonded(), gbsa(), gbsa()),
    "constraint": constrained,
    "fixed particle": fixed,
}


@pytest.mark.parametrize("name", BORDERLINE)
def test_covered_or_refused(name):
    system = BORDERLINE[name]()
    try:
        potential = TorchPotential.from_system(system)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert any(word in refusal for word in ("Force", "constraint", "Function"))
        return
    x = cluster()
    if name == "no direct space":
        with OpenMMPotential(system, "Reference", n_contexts=1) as reference:
            assert not reference.energy(x).any()
        assert not potential.energy(x).any()
    else:
        assert_agrees(potential, system, x)
