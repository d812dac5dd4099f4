"""Ways to write the System of one molecule: ethanol with other Forces, glycine in force fields."""

from collections.abc import Callable

import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from tests.support.molecules import capped
from tests.support.torch_cases import SOLVENTS, build
from tests.support.torch_zoo import custom
from tests.support.zoo import Specimen, charges_and_sizes, implicit_solvent, specimen

# Ethanol's atoms: carbons 0 and 1, oxygen 2, hydrogens 3 4 5, 6 7 and 8.
_N = 9
_BONDS = [(0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7), (2, 8)]
_OUTER = [(3, 4), (0, 2), (1, 8), (6, 7)]
_TORSIONS = [(0, 1, 2, 8), (3, 0, 1, 2), (6, 1, 2, 8)]


def ethanol(*forces: openmm.Force, without: tuple[str, ...] = ()) -> openmm.System:
    """Return the System of the zoo's ethanol with more Forces, `without` those of some kinds."""
    system = openmm.XmlSerializer.clone(specimen("ethanol").system)
    for index in reversed(range(system.getNumForces())):
        if type(system.getForce(index)).__name__ in without:
            system.removeForce(index)
    for force in forces:
        system.addForce(force)
    return system


def with_topology() -> app.Topology:
    return specimen("ethanol").topology


def bonds_only() -> openmm.System:
    return ethanol(
        without=("HarmonicAngleForce", "PeriodicTorsionForce", "NonbondedForce", "GBSAOBCForce")
    )


def no_nonbonded() -> openmm.System:
    return ethanol(without=("NonbondedForce", "GBSAOBCForce"))


def no_forces() -> openmm.System:
    system = ethanol()
    while system.getNumForces():
        system.removeForce(0)
    return system


def scaled_pairs(coulomb: float, lennard_jones: float) -> openmm.System:
    amber, force = charges_and_sizes(with_topology()), openmm.NonbondedForce()
    for index in range(_N):
        force.addParticle(*amber.getParticleParameters(index))
    force.createExceptionsFromBonds(_BONDS, coulomb, lennard_jones)
    return ethanol(force, without=("NonbondedForce",))


def no_exceptions() -> openmm.System:
    force = openmm.NonbondedForce()
    for _ in range(_N):
        force.addParticle(0.05, 0.1, 0.05)
    return ethanol(force, without=("NonbondedForce",))


def cutoff() -> openmm.System:
    force = charges_and_sizes(with_topology())
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(1.0)
    return ethanol(force, without=("NonbondedForce",))


def offsets() -> openmm.System:
    force = charges_and_sizes(with_topology())
    force.addGlobalParameter("growth", 0.5)
    force.addParticleParameterOffset("growth", 2, -0.1, 0.01, 0.1)
    force.addParticleParameterOffset("growth", 8, 0.1, 0.0, 0.0)
    return ethanol(force, without=("NonbondedForce",))


def gbsa(surface: float) -> openmm.System:
    force = implicit_solvent(with_topology())
    force.setSurfaceAreaEnergy(surface)
    return ethanol(force)


def urey_bradley() -> openmm.System:
    force = openmm.HarmonicBondForce()
    for i, j in _OUTER:
        force.addBond(i, j, 0.2, 5000.0)
    return ethanol(force)


def impropers() -> openmm.System:
    """CHARMM's harmonic ones."""
    text = "k*min(d, 2*pi-d)^2; d=abs(theta-theta0); pi=3.141592653589793"
    terms = (1, 0, 2, 6, [20.0, 2.0]), (0, 1, 3, 4, [20.0, -2.0])
    return ethanol(custom("Torsion", text, "k theta0", *terms))


def cmap() -> openmm.System:
    force = openmm.CMAPTorsionForce()
    force.addMap(24, np.random.default_rng(1).uniform(-2, 2, size=24 * 24))
    force.addTorsion(0, *_TORSIONS[1], *_TORSIONS[0])
    return ethanol(force)


def rb_torsions() -> openmm.System:
    force = openmm.RBTorsionForce()
    for atoms in _TORSIONS:
        force.addTorsion(*atoms, 1.0, -2.0, 0.5, 3.0, -0.2, 0.1)
    return ethanol(force, without=("PeriodicTorsionForce",))


def nbfix() -> openmm.System:
    """Pairs of types in a table, as CHARMM's NBFIX, and charges apart."""
    force = openmm.CustomNonbondedForce("(a/r6)^2 - b/r6; r6=r^6; a=A(t1,t2); b=B(t1,t2)")
    force.addTabulatedFunction("A", openmm.Discrete2DFunction(2, 2, [1e-3, 4e-5, 4e-5, 1e-6]))
    force.addTabulatedFunction("B", openmm.Discrete2DFunction(2, 2, [1e-3, 1e-4, 1e-4, 1e-5]))
    force.addPerParticleParameter("t")
    for index in range(_N):
        force.addParticle([0.0 if index < 3 else 1.0])
    force.createExclusionsFromBonds(_BONDS, 3)
    charges = charges_and_sizes(with_topology())
    for index in range(_N):
        charge, size, _ = charges.getParticleParameters(index)
        charges.setParticleParameters(index, charge, size, 0.0)
    return ethanol(force, charges, without=("NonbondedForce",))


def softcore() -> openmm.System:
    text = "4*lam*e*(1/s^2-1/s); s=0.5*(1-lam)+(r/0.3)^6; e=sqrt(e1*e2)"
    force = openmm.CustomNonbondedForce(text)
    force.addPerParticleParameter("e")
    force.addGlobalParameter("lam", 0.7)
    for index in range(_N):
        force.addParticle([0.1 + 0.01 * index])
    force.createExclusionsFromBonds(_BONDS, 3)
    force.addInteractionGroup([0, 1, 2], range(3, _N))
    return ethanol(force)


def born() -> openmm.System:
    force = openmm.CustomGBForce()
    force.addPerParticleParameter("q")
    force.addComputedValue("I", "exp(-r/0.2)", openmm.CustomGBForce.ParticlePairNoExclusions)
    force.addComputedValue("B", "0.1+0.05*I", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("-20*q^2/B", openmm.CustomGBForce.SingleParticle)
    force.addEnergyTerm("-40*q1*q2/sqrt(r^2+B1*B2)", openmm.CustomGBForce.ParticlePair)
    for index in range(_N):
        force.addParticle([0.1 * (-1) ** index])
    return ethanol(force)


def morse() -> openmm.System:
    bonds = ((i, j, [400.0, 18.0, 0.15 if j < 3 else 0.11]) for i, j in _BONDS)
    force = custom("Bond", "d*(1-exp(-a*(r-r0)))^2", "d a r0", *bonds)
    return ethanol(force, without=("HarmonicBondForce",))


def quartic_angles() -> openmm.System:
    angles = ((i, 1, j, [1.9]) for i, j in ((0, 2), (0, 6), (2, 7)))
    return ethanol(custom("Angle", "60*(theta-t0)^2-10*(theta-t0)^3", "t0", *angles))


def cosine_torsions() -> openmm.System:
    torsions = ((*atoms, [1.5]) for atoms in _TORSIONS)
    return ethanol(custom("Torsion", "k*(1+cos(3*theta))+0.2*sin(theta)^2", "k", *torsions))


def compound() -> openmm.System:
    """The coupling of bonds and angles, as in MM3."""
    text = "30*(distance(p1,p2)-0.15)*(angle(p1,p2,p3)-1.9)"
    force = openmm.CustomCompoundBondForce(3, text)
    force.addBond([0, 1, 2], [])
    return ethanol(force)


def centroids() -> openmm.System:
    force = openmm.CustomCentroidBondForce(2, "200*(distance(g1,g2)-0.2)^2")
    force.addGroup([0, 3, 4, 5])
    force.addGroup([2, 8])
    force.addBond([0, 1], [])
    return ethanol(force)


def hydrogen_bond() -> openmm.System:
    force = openmm.CustomHbondForce("-5*exp(-distance(d1,a1)/0.2)*cos(angle(d2,d1,a1))^2")
    force.addDonor(8, 2, -1, [])
    force.addAcceptor(0, 1, -1, [])
    return ethanol(force)


def three_bodies() -> openmm.System:
    text = "1e-4*(1+3*cos(angle(p1,p2,p3)))/distance(p1,p2)/distance(p2,p3)"
    force = openmm.CustomManyParticleForce(3, text)
    for _ in range(_N):
        force.addParticle([])
    return ethanol(force)


def collective_variable() -> openmm.System:
    """The Gaussian of a metadynamics."""
    variable = openmm.CustomTorsionForce("theta")
    variable.addTorsion(*_TORSIONS[0], [])
    force = openmm.CustomCVForce("5*exp(-(cv-1)^2)")
    force.addCollectiveVariable("cv", variable)
    return ethanol(force)


def rmsd() -> openmm.System:
    positions = specimen("ethanol").positions
    force = openmm.CustomCVForce("500*deviation^2")
    force.addCollectiveVariable("deviation", openmm.RMSDForce(positions, [0, 1, 2]))
    return ethanol(force)


def force_groups() -> openmm.System:
    system = ethanol(openmm.CMMotionRemover(10))
    for index, force in enumerate(system.getForces()):
        force.setForceGroup(31 - index)
        force.setName(f"force {index}")
    return system


def repeated_terms() -> openmm.System:
    """Every Force twice, and bonds without a force constant."""
    system = ethanol()
    for force in system.getForces():
        system.addForce(openmm.XmlSerializer.clone(force))
    empty = openmm.HarmonicBondForce()
    for i, j in _BONDS:
        empty.addBond(j, i, 0.1, 0.0)
    system.addForce(empty)
    return system


def heavy_hydrogens() -> openmm.System:
    system = ethanol()
    for i, j in _BONDS:
        if j > 2:
            system.setParticleMass(i, system.getParticleMass(i) - 2.0 * unit.amu)
            system.setParticleMass(j, system.getParticleMass(j) + 2.0 * unit.amu)
    return system


def equal_masses() -> openmm.System:
    system = ethanol()
    for index in range(_N):
        system.setParticleMass(index, 10.0)
    return system


def in_a_box() -> openmm.System:
    """Box vectors that no Force uses."""
    system = ethanol()
    system.setDefaultPeriodicBoxVectors((3, 0, 0), (0, 3, 0), (0, 0, 3))
    return system


ETHANOL: dict[str, Callable[[], openmm.System]] = {
    "plain": ethanol,
    "bonds_only": bonds_only,
    "no_nonbonded": no_nonbonded,
    "no_forces": no_forces,
    "amber_1-4": lambda: scaled_pairs(1 / 1.2, 0.5),
    "charmm_1-4": lambda: scaled_pairs(1.0, 1.0),
    "no_1-4": lambda: scaled_pairs(0.0, 0.0),
    "no_exceptions": no_exceptions,
    "cutoff": cutoff,
    "offsets": offsets,
    "gbsa": lambda: gbsa(2.25936),
    "gbsa_without_surface": lambda: gbsa(0.0),
    "urey_bradley": urey_bradley,
    "impropers": impropers,
    "cmap": cmap,
    "rb_torsions": rb_torsions,
    "nbfix": nbfix,
    "softcore": softcore,
    "born": born,
    "morse": morse,
    "quartic_angles": quartic_angles,
    "cosine_torsions": cosine_torsions,
    "compound": compound,
    "centroids": centroids,
    "hydrogen_bond": hydrogen_bond,
    "three_bodies": three_bodies,
    "collective_variable": collective_variable,
    "rmsd": rmsd,
    "force_groups": force_groups,
    "repeated_terms": repeated_terms,
    "heavy_hydrogens": heavy_hydrogens,
    "equal_masses": equal_masses,
    "in_a_box": in_a_box,
}
GLYCINE: dict[str, Callable[[app.Topology], openmm.System]] = {
    "amber14_vacuum": lambda t: build(t, "amber14", None),
    "amber19_vacuum": lambda t: build(t, "amber19", None),
    "amber14_hmr": lambda t: build(t, "amber14", None, hydrogenMass=3.0),
    "amber14_salt": lambda t: build(t, "amber14", "obc2", implicitSolventKappa=0.7),
    **{f"amber14_{s}": lambda t, s=s: build(t, "amber14", s) for s in SOLVENTS},
}
#: Whose Forces TorchPotential does not have; energies are OpenMM's.
NOT_COVERED = (
    "compound",
    "centroids",
    "hydrogen_bond",
    "three_bodies",
    "collective_variable",
    "rmsd",
)
VARIANTS = (*ETHANOL, *GLYCINE)


def variant(name: str) -> Specimen:
    """Return the molecule with one of `VARIANTS` of its System."""
    if name in ETHANOL:
        molecule = specimen("ethanol")
        return Specimen(ETHANOL[name](), molecule.topology, molecule.positions)
    topology, positions = capped("GLY")
    return Specimen(GLYCINE[name](topology), topology, positions, "phi psi")
