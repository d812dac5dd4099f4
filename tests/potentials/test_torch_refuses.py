"""What TorchPotential does not cover raises, naming Force and feature."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import openmm
import pytest

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from openmm_tsf.potentials.forces.registry import TERMS
from tests.support import torch_zoo
from tests.support.torch_cases import N_PARTICLES as N
from tests.support.torch_cases import assert_agrees, cluster, system_of
from tests.support.torch_zoo import custom

NOT_COVERED = sorted(
    name
    for name, kind in vars(openmm).items()
    if inspect.isclass(kind) and issubclass(kind, openmm.Force) and kind is not openmm.Force
    if kind not in {*TERMS, openmm.CMMotionRemover}
)


def called(target: Any, method: str, *arguments: Any) -> Any:
    """The Force or System, after one of its methods has been called."""
    getattr(target, method)(*arguments)
    return target


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
        TorchPotential.from_system(system_of(harmonic_bonds(), nonbonded(), compound))


def nonbonded() -> openmm.NonbondedForce:
    return torch_zoo.charged_particles(np.random.default_rng(0))


def gbsa() -> openmm.GBSAOBCForce:
    return torch_zoo.gbsa_obc(np.random.default_rng(0))


def harmonic_bonds() -> openmm.Force:
    return torch_zoo.harmonic_bonds(np.random.default_rng(0))


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
        *((nonbonded, m) for m in ("CutoffPeriodic", "Ewald", "PME", "LJPME")),
        *((b, "CutoffPeriodic") for b in (gbsa, pair, born)),
    ],
)
def test_cutoffs(build, method):
    force = build()
    force.setNonbondedMethod(getattr(type(force), method))
    with pytest.raises(ValueError, match=r"(?i)cutoff|periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def custom_bond() -> openmm.CustomBondForce:
    return custom("Bond", "strength*r^2", "", (0, 1, []), strength=3.0)


@pytest.mark.parametrize(
    "force",
    [
        *(builder(np.random.default_rng(0)) for builder in torch_zoo.PLAIN[:5]),
        custom_bond(),
        custom("Angle", "theta^2", "", (0, 1, 2, [])),
        custom("Torsion", "cos(theta)", "", (0, 1, 2, 3, [])),
    ],
    ids=lambda force: force.getName(),
)
def test_periodic_bonded_forces(force):
    force = openmm.XmlSerializer.clone(force)
    force.setUsesPeriodicBoundaryConditions(True)
    with pytest.raises(ValueError, match=r"(?i)periodic") as caught:
        TorchPotential.from_system(system_of(force))
    assert type(force).__name__ in str(caught.value)


def test_contradicting_global_parameters():
    one, two = custom_bond(), custom_bond()
    two.setGlobalParameterDefaultValue(0, 4.0)
    with pytest.raises((ValueError, openmm.OpenMMException), match="strength"):
        TorchPotential.from_system(system_of(one, two))


SITE = 4, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5)


@pytest.mark.parametrize("build", [TorchPotential.from_system, OpenMMPotential])
@pytest.mark.parametrize(
    ("system", "error", "message"),
    [
        *((what, TypeError, "system: expected an openmm") for what in ("system", None, gbsa())),
        (openmm.System(), ValueError, "at least one particle"),
        (
            called(system_of(), "setVirtualSite", *SITE),
            ValueError,
            "virtual sites are not supported, particle 4",
        ),
    ],
)
def test_wrong_systems(build, system, error, message):
    with pytest.raises(error, match=message):
        build(system)


# What OpenMM ignores without a cutoff, or what is rare: covered or refused, never wrong.


def set_up(build: Callable[[], Any], **calls: tuple[Any, ...]) -> Callable[[], openmm.System]:
    def system() -> openmm.System:
        force = build()
        for method, arguments in calls.items():
            getattr(force, method)(*arguments)
        return system_of(force)

    return system


def pair_of(text: str) -> openmm.CustomNonbondedForce:
    """A Force of pairs whose particles have a parameter a."""
    force = pair(text)
    force.addPerParticleParameter("a")
    for i in range(N):
        force.setParticleParameters(i, [0.1 * i])
    return force


TABLE = np.random.default_rng(0).uniform(size=4 * 5 * 6)
CONTINUOUS = openmm.Continuous3DFunction(4, 5, 6, TABLE, 0, 9, 0, 1, 0, 1)

BORDERLINE: dict[str, Callable[[], openmm.System]] = {
    "switch": set_up(nonbonded, setUseSwitchingFunction=(True,), setSwitchingDistance=(0.2,)),
    "no direct space": set_up(nonbonded, setIncludeDirectSpace=(False,)),
    "periodic exceptions": set_up(nonbonded, setExceptionsUsePeriodicBoundaryConditions=(True,)),
    "dispersion": set_up(nonbonded, setUseDispersionCorrection=(True,)),
    "custom switch": set_up(pair, setUseSwitchingFunction=(True,), setSwitchingDistance=(0.2,)),
    "custom dispersion": set_up(pair, setUseLongRangeCorrection=(True,)),
    "interaction groups": set_up(pair, addInteractionGroup=([0, 1, 2], [2, 3, 4, 5])),
    "parameter derivative": set_up(custom_bond, addEnergyParameterDerivative=("strength",)),
    "computed values": set_up(partial(pair_of, "c1*c2/r"), addComputedValue=("c", "1+a^2")),
    "Continuous3D": set_up(
        partial(pair_of, "f(10*r, a1, a2)"), addTabulatedFunction=("f", CONTINUOUS.__copy__())
    ),
    "last group": set_up(harmonic_bonds, setForceGroup=(31,)),
    "two of a kind": lambda: system_of(nonbonded(), nonbonded(), gbsa(), gbsa()),
    "constraint": lambda: called(system_of(nonbonded()), "addConstraint", 0, 1, 0.2),
    "fixed particle": lambda: called(system_of(nonbonded()), "setParticleMass", 3, 0.0),
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
