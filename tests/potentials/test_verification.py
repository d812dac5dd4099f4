"""TorchPotential equals OpenMM's Reference platform on molecules, second derivatives included."""

import openmm
import openmm.app as app
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from tests.support import torch_cases as cases
from tests.support.molecules import disulfide, force_field, protein_piece, with_hydrogens
from tests.support.torch_zoo import custom

FORCE_FIELDS = [(protein, solvent) for protein in cases.PROTEINS for solvent in cases.SOLVENTS]
ALL = [
    (residue, protein, solvent)
    for residue in cases.AMINO_ACIDS
    for protein, solvent in FORCE_FIELDS
]
# Each residue once, each force field twice.
COVERING = [
    (residue, *FORCE_FIELDS[k % len(FORCE_FIELDS)]) for k, residue in enumerate(cases.AMINO_ACIDS)
]
VACUUM = [("SER", protein, None) for protein in cases.PROTEINS]
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in COVERING]


def check(case: cases.Case) -> None:
    cases.assert_agrees(TorchPotential.from_system(case.system), case.system, case.x)


@pytest.mark.parametrize("name", ["default", "implicit", "vacuum"])
def test_alanine_dipeptide(name):
    check(cases.alanine_case(name))


@pytest.mark.parametrize(("residue", "protein", "solvent"), [*COVERING, *VACUUM, *OTHERS])
def test_capped_residues(residue, protein, solvent):
    check(cases.dipeptide(residue, protein, solvent))


@pytest.mark.parametrize(
    "options",
    [
        {"soluteDielectric": 2.0, "solventDielectric": 40.0},
        {"implicitSolventKappa": 1.0},
        {"sasaMethod": None},
    ],
    ids=["dielectrics", "salt", "no surface"],
)
@pytest.mark.parametrize("solvent", ["obc2", "gbn2"])
def test_options_of_the_solvents(solvent, options):
    check(cases.dipeptide("ASP", "amber14", solvent, **options))


@pytest.mark.parametrize(("protein", "solvent"), [("amber14", "obc2"), ("amber19", "gbn2")])
def test_peptide_of_twelve_residues(protein, solvent):
    case = cases.peptide(protein, solvent)
    assert case.x.shape[1] > 150
    check(case)


def test_two_chains_with_a_disulfide():
    topology, positions = disulfide()
    x = cases.minimised_and_dynamics(
        cases.build(topology, "amber14", None), positions, seed=2, n_frames=2
    )
    check(cases.Case(cases.build(topology, "amber19", "obc1"), x))


@pytest.mark.slow
def test_charmm():
    """Custom torsions and bonds, a custom pair potential of tabulated coefficients, CMAP."""
    charmm = force_field("charmm36.xml")
    topology, positions = with_hydrogens(*protein_piece(154, 159), charmm)
    system = charmm.createSystem(topology, nonbondedMethod=app.NoCutoff, constraints=None)
    kinds = {type(force) for force in system.getForces()}
    assert {openmm.CustomTorsionForce, openmm.CustomNonbondedForce} < kinds
    check(cases.Case(system, cases.minimised_and_dynamics(system, positions, seed=4, n_frames=2)))


@pytest.mark.parametrize("name", ["default", "implicit"])
def test_second_derivatives_of_alanine_dipeptide(name):
    case = cases.alanine_case(name)
    _check_hessian(cases.Case(case.system, case.x[[1, 6]]))


def test_second_derivatives_of_cmaps_and_custom_torsions():
    case = cases.dipeptide("PRO", "amber19", "gbn2")
    forces = {type(force): force for force in case.system.getForces()}
    periodic = forces[openmm.PeriodicTorsionForce]
    torsions = (
        (*periodic.getTorsionParameters(k)[:4], [10.0 + k, 0.1 * k - 2.0])
        for k in range(0, periodic.getNumTorsions(), 5)
    )
    text = "k*min((theta-t0)^2, (2*pi-abs(theta-t0))^2); pi=3.14159265"
    case.system.addForce(custom("Torsion", text, "k t0", *torsions))
    _check_hessian(cases.Case(case.system, case.x[[0]]))


def _check_hessian(case: cases.Case) -> None:
    """Every seventh row: against differences of OpenMM's forces, and for its symmetry."""
    for row in case.x:
        chosen = list(range(0, row.numel(), 7))
        hessian, expected = cases.hessians(case.system, row, chosen)
        scale = hessian.abs().max()
        assert (hessian - expected).abs().max() <= 1e-8 * scale
        square = hessian[:, chosen]
        assert (square - square.T).abs().max() <= 1e-12 * scale


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("solvent", ["gbn2", None])
def test_compiled(solvent):
    """Fused programs too; a batch that fills no whole number of blocks."""
    case = cases.dipeptide("PRO", "amber19", solvent)
    potential = TorchPotential.from_system(case.system, compile=True)
    x = cases.perturbed(case.x[0].numpy(), seed=1, widths=[0.003] * 300)
    energies, forces = potential.energy_and_forces(x)
    if not potential.is_compiled:
        pytest.skip("torch finds no compiler here")
    assert max(cases.errors((energies, forces), cases.reference_values(case.system, x))) <= 1e-10


@pytest.mark.parametrize("name", ["default", "implicit", "vacuum"])
def test_degenerate_conformations_are_not_finite_for_both(name):
    case = cases.alanine_case(name)
    x, bad = cases.degenerate(case.x[0])
    with OpenMMPotential(case.system, "Reference", n_contexts=1) as reference:
        expected = cases.check_degenerate(reference, x, bad)
    got = cases.check_degenerate(TorchPotential.from_system(case.system), x, bad)
    torch.testing.assert_close(got[0][~bad], expected[0][~bad], rtol=1e-10, atol=0.0)
    torch.testing.assert_close(got[1][~bad], expected[1][~bad], rtol=1e-8, atol=1e-6)


def test_the_system_given_is_not_changed():
    system = cases.alanine_case("implicit").system
    before = openmm.XmlSerializer.serialize(system)
    TorchPotential.from_system(system)
    assert openmm.XmlSerializer.serialize(system) == before
