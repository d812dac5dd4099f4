"""The terms of the Custom Forces against OpenMM's Reference platform."""

from functools import cache, partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from openmm_tsf.potentials.forces.base import NotCovered, Term
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch
from openmm_tsf.potentials.forces.registry import TERMS
from tests.support.molecules import alanine, capped
from tests.support.torch_cases import perturbed, reference_values, system_of
from tests.support.torch_zoo import custom

GB = openmm.CustomGBForce

#: Particles of the clusters that most tests use, and their conformations [B, N, 3] in nm.
N = 7
CLUSTERS = 0.3 * torch.tensor(
    np.random.default_rng(5).normal(size=(4, N, 3)) + np.arange(N)[:, None] * [0.6, 0.3, 0.0]
)
CHARGES = [0.4, -0.3, 0.2, -0.5, 0.1, 0.6, -0.5]
RADII = [0.15, 0.12, 0.17, 0.15, 0.155, 0.12, 0.16]


def prepared_pairs(n_atoms: int) -> AllPairs:
    pairs = AllPairs(n_atoms)
    pairs.prepare_list()
    return pairs


def term_of(force, n_atoms: int) -> Term:
    return TERMS[type(force)](force, AllPairs(n_atoms))


def defaults(force, **changed: float) -> dict[str, float]:
    names = [force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())]
    values = [force.getGlobalParameterDefaultValue(i) for i in range(len(names))]
    return dict(zip(names, values, strict=True)) | changed


def energy(term: Term, x: torch.Tensor, parameters: dict[str, float]) -> torch.Tensor:
    """Energies [B] of positions [B, N, 3]."""
    batch = Batch(x.permute(2, 1, 0).contiguous(), prepared_pairs(x.shape[1]))
    scalars = {name: torch.tensor(value, dtype=x.dtype) for name, value in parameters.items()}
    return term.energy(batch, scalars)


def energy_and_forces(force, x: torch.Tensor, **changed: float):
    x = x.clone().requires_grad_()
    energies = energy(term_of(force, x.shape[1]), x, defaults(force, **changed))
    (gradient,) = torch.autograd.grad(energies.sum(), x)
    return energies.detach().numpy(), -gradient.numpy()


def reference(force, x: torch.Tensor, **changed: float):
    system = system_of(openmm.XmlSerializer.clone(force), n=x.shape[1])
    energies, forces = reference_values(system, x, changed)
    return energies.numpy(), forces.numpy()


def assert_agrees(force, x: torch.Tensor = CLUSTERS, **changed: float) -> None:
    """Energies relative to themselves, forces to the largest force."""
    energies, forces = energy_and_forces(force, x, **changed)
    exact_energies, exact_forces = reference(force, x, **changed)
    assert energies.shape == exact_energies.shape
    assert np.isfinite(exact_energies).all()
    assert np.abs(energies / exact_energies - 1).max() < 1e-10
    assert np.abs(forces - exact_forces).max() < 1e-8 * np.abs(exact_forces).max()


bonds, angles = partial(custom, "Bond"), partial(custom, "Angle")
torsions, external = partial(custom, "Torsion"), partial(custom, "External")

INTERNAL = {
    "harmonic bond": bonds(
        "0.5*k*(r-r0)^2", "k r0", (0, 1, [3e5, 0.1]), (5, 2, [2e5, 0.14]), (1, 0, [1e3, 0.3])
    ),
    "Morse bond": bonds(
        "D*(1-exp(-a*(r-r0)))^2", "D a r0", (0, 1, [400, 20, 0.1]), (3, 6, [1, 2, 3])
    ),
    "global bond": bonds("scale*k*(r-r0)^2", "r0", (0, 3, [0.2]), (4, 2, [0.1]), scale=2, k=11),
    "flat-bottom bond": bonds(
        "step(r-upper)*k*(r-upper)^2+step(lower-r)*k*(lower-r)^2",
        "lower upper",
        (0, 1, [0.2, 0.3]),
        (0, 2, [0.5, 0.7]),
        (1, 4, [0.1, 0.4]),
        k=7.5,
    ),
    "harmonic angle": angles(
        "0.5*k*(theta-theta0)^2", "k theta0", (0, 1, 2, [300, 1.9]), (3, 1, 5, [50, 2])
    ),
    "cosine angle": angles(
        "k*(cos(theta)-cos(theta0))^2", "theta0", (2, 1, 0, [1.9]), (6, 3, 0, [1]), k=40
    ),
    "periodic harmonic torsion": torsions(
        "0.5*k*min(dtheta, 2*pi-dtheta)^2; dtheta=abs(theta-theta0); pi=3.1415926535",
        "k theta0",
        (0, 1, 2, 3, [10, 3.0]),
        (5, 1, 4, 2, [20, -2.9]),
        (3, 2, 1, 0, [7, 0.5]),
    ),
    "cosine torsion": torsions(
        "k*(1-cos(n*theta-theta0))", "n theta0", (0, 1, 2, 3, [2, 0.4]), (4, 3, 6, 1, [3, 1]), k=5
    ),
    "restraint": external(
        "k*((x-x0)^2+(y-y0)^2+(z-z0)^2)",
        "x0 y0 z0",
        (1, [0.1, 0.2, 0.3]),
        (5, [0.3, -0.2, 0]),
        k=100,
    ),
    "field on all": external(
        "-q*(E*z+x*y^2)", "q", *((i, [q]) for i, q in enumerate(CHARGES)), E=3
    ),
    "wall": external("select(step(x), 10*x^2, 0)+0*y", "", *((i, []) for i in range(N))),
}


@pytest.mark.parametrize("name", INTERNAL)
def test_internal_coordinates(name):
    assert_agrees(INTERNAL[name])


def test_torsions_of_both_signs_and_near_the_cut():
    force = torsions("theta+0.1*theta^2", "", (6, 8, 14, 16, []), (4, 6, 8, 14, []))
    assert_agrees(force, conformations(alanine, 16, 0.03))


LORENTZ_BERTHELOT = ";sigma=0.5*(sigma1+sigma2); epsilon=sqrt(epsilon1*epsilon2)"
SOFT_CORE = "4*epsilon*lam^0.5*(1/alpha^2-1/alpha); alpha=0.5*(1-lam)+(r/sigma)^6"


def nonbonded(text: str, **parameters: list[float]) -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce(text)
    for name in parameters:
        force.addPerParticleParameter(name)
    for row in zip(*parameters.values(), strict=True) if parameters else [()] * N:
        force.addParticle(row)
    return force


def soft_core() -> openmm.CustomNonbondedForce:
    force = nonbonded(
        SOFT_CORE + LORENTZ_BERTHELOT,
        sigma=[2 * r for r in RADII],
        epsilon=[abs(q) for q in CHARGES],
    )
    force.addGlobalParameter("lam", 0.6)
    return force


def test_lennard_jones_with_exclusions():
    text = "4*epsilon*((sigma/r)^12-(sigma/r)^6)"
    force = nonbonded(
        text + LORENTZ_BERTHELOT, sigma=[2 * r for r in RADII], epsilon=[abs(q) for q in CHARGES]
    )
    assert_agrees(force)
    for pair in [(0, 1), (2, 1), (5, 6), (0, 6)]:
        force.addExclusion(*pair)
    assert_agrees(force)


def test_global_parameters_change_after_construction():
    force = soft_core()
    term = term_of(force, N)
    for value in (0.6, 0.1, 1.0):
        exact, _ = reference(force, CLUSTERS, lam=value)
        np.testing.assert_allclose(energy(term, CLUSTERS, {"lam": value}), exact, rtol=1e-10)
    assert term.global_parameters == {"lam": 0.6}


@pytest.mark.parametrize("with_exclusions", [False, True])
@pytest.mark.parametrize(
    "groups",
    [
        [],
        [({0, 1}, {3, 4})],
        [({3, 4}, {0, 1})],
        [({0, 1, 2}, {1, 2, 3})],
        [({1, 2, 3}, {0, 1, 2})],
        [({1, 3, 5}, {1, 3, 5})],
        [({0, 1}, {1, 2}), ({0, 1}, {1, 2}), ({2}, {0, 1})],
    ],
)
def test_interaction_groups_of_an_asymmetric_expression(groups, with_exclusions):
    force = nonbonded("(q1+10*q2)/r+s1*s2^2*r", q=CHARGES, s=RADII)
    for one, two in groups:
        force.addInteractionGroup(one, two)
    for i in (1, 3) if with_exclusions else ():
        force.addExclusion(i, 0)
    assert_agrees(force)


def test_computed_values_of_nonbonded():
    text = "4*epsilon*((sigma/r)^12-(sigma/r)^6)+c1; sigma=0.5*(sigma1+sigma2); epsilon=0.3*w1+w2"
    force = nonbonded(text, sigmaA=[2 * r for r in RADII], sigmaB=RADII)
    force.addComputedValue("sigma", "(1-lam)*sigmaA+lam*sigmaB")
    force.addComputedValue("w", "sigmaA^2")
    force.addComputedValue("c", "2")
    force.addGlobalParameter("lam", 0.3)
    assert_agrees(force)
    assert_agrees(force, lam=0.8)


def test_tables_of_nonbonded():
    force = nonbonded("q1*q2*shape(r)+pick(kind1, kind2)*r", q=CHARGES, kind=[0, 1, 1, 0, 1, 0, 0])
    values = list(np.exp(-np.linspace(0, 3, 40)))
    force.addTabulatedFunction("shape", openmm.Continuous1DFunction(values, 0.0, 5.0))
    force.addTabulatedFunction("pick", openmm.Discrete2DFunction(2, 2, [1.0, -2.0, -2.0, 3.0]))
    assert_agrees(force)


def test_switching_and_long_range_corrections_act_on_cutoffs_only():
    force = soft_core()
    force.setUseLongRangeCorrection(True)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.2)
    assert_agrees(force)


BORN_SUM = (
    "step(r+sr2-or1)*0.5*(1/L-1/U+0.25*(1/U^2-1/L^2)*(r-sr2*sr2/r)+0.5*log(L/U)/r+C); U=r+sr2;"
    "C=2*(1/or1-1/L)*step(sr2-r-or1); L=max(or1, D); D=abs(r-sr2); sr2=scale2*or2;"
    "or1=radius1-0.009; or2=radius2-0.009"
)
BORN_RADIUS = "1/(1/or-tanh(1*psi-0.8*psi^2+4.85*psi^3)/radius); psi=I*or; or=radius-0.009"
SELF_ENERGY = (
    "28.3919551*(radius+0.14)^2*(radius/B)^6"
    "-0.5*138.935456*(1/soluteDielectric-1/solventDielectric)*q^2/B"
)
PAIR_ENERGY = (
    "-138.935456*(1/soluteDielectric-1/solventDielectric)*q1*q2/f;"
    "f=sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))"
)


def born(values, terms, excluded=(), scale=(0.8,) * N) -> openmm.CustomGBForce:
    force = openmm.CustomGBForce()
    for name in ("q", "radius", "scale"):
        force.addPerParticleParameter(name)
    for row in zip(CHARGES, RADII, scale, strict=True):
        force.addParticle(row)
    force.addGlobalParameter("solventDielectric", 78.5)
    force.addGlobalParameter("soluteDielectric", 1.0)
    for name, text, kind in values:
        force.addComputedValue(name, text, kind)
    for text, kind in terms:
        force.addEnergyTerm(text, kind)
    for pair in excluded:
        force.addExclusion(*pair)
    return force


@pytest.mark.parametrize("excluded", [(), ((0, 1), (4, 2), (5, 6))])
@pytest.mark.parametrize("pair_energy", [GB.ParticlePair, GB.ParticlePairNoExclusions])
@pytest.mark.parametrize("pair_value", [GB.ParticlePair, GB.ParticlePairNoExclusions])
def test_manual_obc(pair_value, pair_energy, excluded):
    force = born(
        [("I", BORN_SUM, pair_value), ("B", BORN_RADIUS, GB.SingleParticle)],
        [(SELF_ENERGY, GB.SingleParticle), (PAIR_ENERGY, pair_energy)],
        excluded,
    )
    assert_agrees(force)
    assert_agrees(force, solventDielectric=4.0)


def test_stages_that_use_positions_and_each_other():
    force = born(
        [
            ("I", "q1*radius2^2/r", GB.ParticlePair),
            ("V", "I*x+y*z", GB.SingleParticle),
            ("W", "V^2+I+scale", GB.SingleParticle),
            ("unused", "7", GB.SingleParticle),
            ("fixed", "q*soluteDielectric", GB.SingleParticle),
        ],
        [
            ("V*I*z+W", GB.SingleParticle),
            ("(V1-2*V2)*r+W1*fixed2", GB.ParticlePairNoExclusions),
            ("q1+2*q2", GB.ParticlePair),
            ("3", GB.SingleParticle),
        ],
        [(0, 3), (6, 2)],
    )
    assert_agrees(force)


def test_sums_of_constants():
    force = born(
        [("n", "2", GB.ParticlePair), ("m", "n*radius", GB.SingleParticle)],
        [("n+m*x", GB.SingleParticle)],
        [(0, 3)],
    )
    assert_agrees(force)


def test_pair_values_after_others_follow_their_definition():
    """OpenMM's platforms refuse such Forces: against a loop over pairs instead."""
    force = born(
        [
            ("S", "q*x", GB.SingleParticle),
            ("I", "S1*radius2/r", GB.ParticlePair),
            ("J", "I1*I2^2*r", GB.ParticlePairNoExclusions),
        ],
        [("J*I", GB.SingleParticle)],
        [(0, 3)],
    )
    got, _ = energy_and_forces(force, CLUSTERS)
    for x, value in zip(CLUSTERS.numpy(), got, strict=True):
        s = np.array(CHARGES) * x[:, 0]
        r = np.linalg.norm(x[:, None] - x, axis=-1)
        i = np.zeros(N)
        for a, b in np.ndindex(N, N):
            if a != b and (a, b) not in ((0, 3), (3, 0)):
                i[a] += s[a] * RADII[b] / r[a, b]
        j = [sum(i[a] * i[b] ** 2 * r[a, b] for b in range(N) if b != a) for a in range(N)]
        assert value == pytest.approx(float(np.dot(i, j)), rel=1e-12)


def test_tables_of_born():
    force = born(
        [("I", "neck(r)*step(0.6-r)*select(radius1-0.12, radius2, 2)", GB.ParticlePair)],
        [("I^2+pick(q*10+5)", GB.SingleParticle)],
    )
    values = list(np.sin(np.linspace(0, 3, 30)))
    force.addTabulatedFunction("neck", openmm.Continuous1DFunction(values, 0.0, 3.0))
    force.addTabulatedFunction("pick", openmm.Discrete1DFunction(list(range(20))))
    assert_agrees(force)


def conformations(build, n: int, width: float = 0.01) -> torch.Tensor:
    return perturbed(build()[1], 3, [width] * n)


@cache
def _system(build, model: str) -> openmm.System:
    force_field = app.ForceField("amber14-all.xml", f"implicit/{model}.xml")
    return force_field.createSystem(build()[0])


def implicit(build, model: str) -> openmm.CustomGBForce:
    (force,) = (f for f in _system(build, model).getForces() if isinstance(f, GB))
    return force


@pytest.mark.parametrize("model", ["hct", "obc1", "obc2", "gbn", "gbn2"])
def test_implicit_solvents(model):
    force = implicit(alanine, model)
    assert_agrees(force, conformations(alanine, 6))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hct", "obc1", "obc2", "gbn", "gbn2"])
def test_implicit_solvents_on_larger_peptides(model):
    for build in (lambda: capped("ARG"), lambda: capped("TRP")):
        assert_agrees(implicit(build, model), conformations(build, 3))


def test_ff96_obc1_of_openmmtools():
    """The Force of AlanineDipeptideImplicit, built as openmmtools does it."""
    spec = find_spec("openmmtools")  # found, not imported: that takes seconds
    folder = Path(spec.origin).parent / "data" / "alanine-dipeptide-gbsa"
    system = app.AmberPrmtopFile(str(folder / "alanine-dipeptide.prmtop")).createSystem(
        implicitSolvent=app.OBC1
    )
    coordinates = app.AmberInpcrdFile(str(folder / "alanine-dipeptide.crd")).positions
    (force,) = (f for f in system.getForces() if isinstance(f, GB))
    assert_agrees(force, conformations(lambda: (None, np.array(coordinates._value)), 6))


def rich_forces() -> list:
    groups = nonbonded("(q1+10*q2)/r", q=CHARGES)
    groups.addInteractionGroup({0, 1, 2}, {1, 2, 3})
    obc = born(
        [("I", BORN_SUM, GB.ParticlePair), ("B", BORN_RADIUS, GB.SingleParticle)],
        [(SELF_ENERGY, GB.SingleParticle), (PAIR_ENERGY, GB.ParticlePairNoExclusions)],
        [(0, 1), (4, 2)],
    )
    names = ["Morse bond", "cosine angle", "periodic harmonic torsion", "restraint"]
    return [*(INTERNAL[name] for name in names), soft_core(), groups, obc]


@pytest.mark.parametrize("force", rich_forces(), ids=lambda force: force.getName())
def test_second_derivatives_are_those_of_the_reference_forces(force):
    x = CLUSTERS[:2]
    direction = torch.tensor(np.random.default_rng(2).normal(size=x.shape))
    y = x.clone().requires_grad_()
    energies = energy(term_of(force, N), y, defaults(force))
    (gradient,) = torch.autograd.grad(energies.sum(), y, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), y)
    h = 1e-5
    _, plus = reference(force, x + h * direction)
    _, minus = reference(force, x - h * direction)
    expected = (minus - plus) / (2 * h)
    assert np.abs(product.numpy() - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("force", rich_forces(), ids=lambda force: force.getName())
def test_traced_energy_and_gradient_are_the_same_on_another_batch(force):
    term = term_of(force, N)
    pairs = prepared_pairs(N)
    parameters = {k: torch.tensor(v, dtype=torch.float64) for k, v in defaults(force).items()}

    def gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        energies = term.energy(Batch(x.permute(2, 1, 0).contiguous(), pairs), parameters)
        return energies, torch.autograd.grad(energies.sum(), x)[0]

    graph = make_fx(gradient)(CLUSTERS)
    moved = CLUSTERS + 0.01 * torch.tensor(np.random.default_rng(4).normal(size=CLUSTERS.shape))
    for got, expected in zip(graph(moved), gradient(moved), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-10)


@pytest.mark.parametrize("force", rich_forces(), ids=lambda force: force.getName())
def test_single_precision(force):
    term = term_of(force, N).to(torch.float32)
    got = energy(term, CLUSTERS.float(), defaults(force))
    assert got.dtype == torch.float32
    exact = energy(term_of(force, N), CLUSTERS, defaults(force)).float()
    torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-3)


def without_pairs() -> openmm.CustomNonbondedForce:
    force = nonbonded("1/r")
    for i, j in combinations(range(N), 2):
        force.addExclusion(i, j)
    return force


CONSTANT = bonds("k+2", "k", (0, 1, [3.0]), (1, 2, [4.0]))


@pytest.mark.parametrize(("force", "expected"), [(without_pairs(), 0.0), (CONSTANT, 11.0)])
def test_forces_without_pairs_and_of_constants(force, expected):
    assert energy(term_of(force, N), CLUSTERS, {}).tolist() == [expected] * len(CLUSTERS)


def called(force, method: str, argument):
    getattr(force, method)(argument)
    return force


cutoff = partial(called, method="setNonbondedMethod")
periodic = partial(called, method="setUsesPeriodicBoundaryConditions", argument=True)


@pytest.mark.parametrize(
    ("force", "what"),
    [
        (cutoff(soft_core(), argument=2), r"periodic cutoff \(CutoffPeriodic\) in CustomNonbonded"),
        (cutoff(born([], []), argument=2), r"periodic cutoff \(CutoffPeriodic\) in CustomGBForce"),
        (born([], []), "absence of computed values in CustomGBForce"),
        (periodic(bonds("r", "")), "periodic boundary conditions in CustomBondForce"),
        (periodic(torsions("theta", "")), "periodic boundary conditions in CustomTorsionForce"),
        (
            external("periodicdistance(x,y,z,0,0,0)", ""),
            "periodic boundary conditions in CustomExternalForce",
        ),
        (bonds("k*r", ""), "undefined variable 'k'"),
        (nonbonded("q*r", q=CHARGES), "undefined variable 'q'"),
    ],
)
def test_what_is_not_covered_is_named(force, what):
    with pytest.raises(NotCovered, match=what):
        term_of(force, N)
