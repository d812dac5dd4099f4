"""What TorchPotential does not cover raises, naming Force and feature; nothing is silent."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import openmm
import pytest

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from tests.support.torch_cases import N_PARTICLES as N
from tests.support.torch_cases import assert_agrees, cluster, system_of

COVERED = {
    openmm.HarmonicBondForce,
    openmm.HarmonicAngleForce,
    openmm.PeriodicTorsionForce,
    openmm.RBTorsionForce,
    openmm.CMAPTorsionForce,
    openmm.NonbondedForce,
    openmm.GBSAOBCForce,
    openmm.CustomBondForce,
    openmm.CustomAngleForce,
    openmm.CustomTorsionForce,
    openmm.CustomExternalForce,
    openmm.CustomNonbondedForce,
    openmm.CustomGBForce,
    openmm.CMMotionRemover,
}
OTHERS = sorted(
    name
    for name, kind in vars(openmm).items()
    if inspect.isclass(kind) and issubclass(kind, openmm.Force) and kind is not openmm.Force
    if kind not in COVERED
)


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


@pytest.mark.parametrize("name", OTHERS)
def test_other_forces(name: str) -> None:
    force = getattr(openmm, name)(*ARGUMENTS.get(name, ()))
    # The last can not even be serialized, which OpenMM says.
    error = openmm.OpenMMException if name == "RPMDMonteCarloBarostat" else ValueError
    with pytest.raises((ValueError, error), match=name):
        TorchPotential.from_system(system_of(force))


def test_a_force_behind_covered_ones_is_found() -> None:
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1, 100.0)
    compound = openmm.CustomCompoundBondForce(2, "distance(p1,p2)")
    compound.addBond([0, 1], [])
    compound.setName("restraint")
    with pytest.raises(ValueError, match=r"CustomCompoundBondForce.*restraint"):
        TorchPotential.from_system(system_of(bond, nonbonded(), compound))


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
def test_cutoffs(build: Callable[[], openmm.Force], method: str) -> None:
    force = build()
    force.setNonbondedMethod(getattr(type(force), method))
    with pytest.raises(ValueError, match=r"(?i)cutoff|periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def custom_bond() -> openmm.CustomBondForce:
    force = openmm.CustomBondForce("strength*r^2")
    force.addGlobalParameter("strength", 3.0)
    force.addBond(0, 1)
    return force


def custom_angle() -> openmm.CustomAngleForce:
    force = openmm.CustomAngleForce("theta^2")
    force.addAngle(0, 1, 2)
    return force


def custom_torsion() -> openmm.CustomTorsionForce:
    force = openmm.CustomTorsionForce("cos(theta)")
    force.addTorsion(0, 1, 2, 3)
    return force


def harmonic_bond() -> openmm.HarmonicBondForce:
    force = openmm.HarmonicBondForce()
    force.addBond(0, 1, 0.1, 100.0)
    return force


def harmonic_angle() -> openmm.HarmonicAngleForce:
    force = openmm.HarmonicAngleForce()
    force.addAngle(0, 1, 2, 1.5, 100.0)
    return force


def periodic_torsion() -> openmm.PeriodicTorsionForce:
    force = openmm.PeriodicTorsionForce()
    force.addTorsion(0, 1, 2, 3, 2, 0.3, 5.0)
    return force


def rb_torsion() -> openmm.RBTorsionForce:
    force = openmm.RBTorsionForce()
    force.addTorsion(0, 1, 2, 3, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    return force


def cmap() -> openmm.CMAPTorsionForce:
    force = openmm.CMAPTorsionForce()
    force.addMap(4, np.arange(16.0))
    force.addTorsion(0, 0, 1, 2, 3, 1, 2, 3, 4)
    return force


@pytest.mark.parametrize(
    "build",
    [
        harmonic_bond,
        harmonic_angle,
        periodic_torsion,
        rb_torsion,
        cmap,
        custom_bond,
        custom_angle,
        custom_torsion,
    ],
)
def test_periodic_bonded_forces(build: Callable[[], openmm.Force]) -> None:
    force = build()
    force.setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(ValueError, match=r"(?i)periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def test_periodic_distances() -> None:
    force = openmm.CustomExternalForce("periodicdistance(x, y, z, 0, 0, 0)^2")
    force.addParticle(0)
    with pytest.raises(ValueError, match="CustomExternalForce"):
        TorchPotential.from_system(system_of(force))


def test_virtual_sites() -> None:
    system = system_of(nonbonded())
    system.setVirtualSite(4, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"virtual site.*4"):
        TorchPotential.from_system(system)


def test_contradicting_global_parameters() -> None:
    one, two = custom_bond(), custom_bond()
    two.setGlobalParameterDefaultValue(0, 4.0)
    with pytest.raises((ValueError, openmm.OpenMMException), match="strength"):
        TorchPotential.from_system(system_of(one, two))


@pytest.mark.parametrize("what", ["system", None, openmm.HarmonicBondForce()])
def test_no_system(what: object) -> None:
    with pytest.raises(TypeError, match="system: expected an openmm"):
        TorchPotential.from_system(what)  # type: ignore[arg-type]


def test_a_system_without_particles() -> None:
    with pytest.raises(ValueError, match="at least one particle"):
        TorchPotential.from_system(openmm.System())


# What OpenMM ignores without a cutoff, or what is rare: covered or refused, never silently wrong.


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
def test_covered_or_refused(name: str) -> None:
    system = BORDERLINE[name]()
    try:
        potential = TorchPotential.from_system(system)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert "Force" in refusal or "constraint" in refusal or "Function" in refusal
        return
    x = cluster()
    if name == "no direct space":
        with OpenMMPotential(system, "Reference", n_contexts=1) as reference:
            assert not reference.energy(x).any()
        assert not potential.energy(x).any()
    else:
        assert_agrees(potential, system, x)
