"""Each check of samples finds its planted fault, and passes the faultless twin."""

import numpy as np
import openmm
import pytest

from openmm_tsf.analysis.burn_in import BurnIn
from openmm_tsf.analysis.certify_checks import (
    MISSING,
    PASSED,
    UNDECIDED,
    WRONG,
    check_copies,
    check_energies,
    check_forces,
    check_ratio,
    check_structure,
)
from openmm_tsf.analysis.certify_convergence import check_convergence, check_start
from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.convergence import assess_mean, assess_probability
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.units import KB
from tests.support.chain import CONSTANT, N_ATOMS, chain_of
from tests.support.exact_chain import draw_frames

KELVIN = 300.0


def samples_of(positions, energy=None, kelvin=KELVIN):
    x = np.asarray(positions, dtype=np.float32)
    return Samples(kelvin, x, np.zeros(x.shape[:2]) if energy is None else energy, ("test",))


def of_energies(energy, kelvin=KELVIN):
    return samples_of(np.zeros((*energy.shape, 1, 3)), energy, kelvin)


def harmonic(rng, kelvin, shape=(600, 8), modes=60):
    return 0.5 * KB * kelvin * rng.chisquare(modes, shape)


def outcome(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


def test_energies():
    rng = np.random.default_rng(1)
    for modes in (1, 3, 60):  # long tails are no outliers
        energy = harmonic(rng, KELVIN, (2000, 8), modes)
        assert check_energies(of_energies(energy)).status == PASSED
    for bad in (np.inf, np.nan, 500.0, -200.0):
        planted = energy.copy()
        planted[100, 3] = bad
        check = check_energies(of_energies(planted))
        assert check.status == WRONG, bad
        assert check.words.startswith("1 of 16,000")


def test_a_temperature_that_is_5_percent_off():
    rng = np.random.default_rng(2)
    low, high = harmonic(rng, 300.0), harmonic(rng, 350.0)
    assert check_ratio(of_energies(low, 300.0), of_energies(high, 350.0)).status == PASSED
    off = harmonic(rng, 315.0)
    check = check_ratio(of_energies(off, 300.0), of_energies(high, 350.0))
    assert check.status == WRONG
    assert check.sentence.startswith("300.00-350.00 K: the slope of ln[P(U)/P(U)] is 0.0")


def test_ratios_that_cannot_be_tested_say_why():
    rng = np.random.default_rng(3)
    low, high = of_energies(harmonic(rng, 300.0, (10, 2))), harmonic(rng, 320.0, (10, 2))
    check = check_ratio(low, of_energies(high, 320.0))
    assert check.status == UNDECIDED
    assert "effective samples of <U>, fewer than 100" in check.words
    check = check_ratio(low, of_energies(1000.0 + high, 320.0))
    assert check.status == UNDECIDED
    assert "do not overlap" in check.words
    # Different lengths and numbers of walkers: what both have is compared.
    check = check_ratio(of_energies(harmonic(rng, 300.0, (900, 8))),
                        of_energies(harmonic(rng, 350.0, (700, 4)), 350.0))  # fmt: skip
    assert check.status == PASSED


def test_copies():
    x = np.random.default_rng(4).normal(size=(40, 3, N_ATOMS, 3))

    def status(*positions, repeats_allowed=False):
        return check_copies([samples_of(each) for each in positions], repeats_allowed)

    assert status(x).status == PASSED
    half = status(np.concatenate([x[:20], x[:20]]))
    assert half.status == WRONG
    assert half.words.startswith("60 of 120 frames are copies of others")
    twice = np.repeat(x[:20], 2, axis=0)
    assert status(twice).status == WRONG
    assert status(twice, repeats_allowed=True).status == PASSED
    # Monte Carlo does not come back to a frame, nor give it to another walker or temperature ...
    assert status(np.concatenate([x, x[:1]]), repeats_allowed=True).status == WRONG
    swapped = x.copy()
    swapped[1:, 0] = x[:-1, 1]
    assert status(swapped, repeats_allowed=True).status == WRONG
    assert status(x, x, repeats_allowed=True).status == WRONG
    # ... unless by an exchange of temperatures.
    other = np.random.default_rng(5).normal(size=x.shape)
    other[7, 1], x[7, 1] = x[6, 1], other[6, 1]
    assert status(x, other, repeats_allowed=True).status == PASSED


@pytest.fixture(scope="module")
def dipeptide():
    molecule = alanine_dipeptide()
    frames = MDDataset.shipped(molecule, stride=1000).positions.numpy()
    return molecule, frames.reshape(20, 2, 22, 3)


def test_faultless_structure(dipeptide):
    molecule, frames = dipeptide
    checks = check_structure(molecule, samples_of(frames, kelvin=600.0))
    assert [check.status for check in checks] == [PASSED] * 4
    assert [check.name for check in checks] == [
        "bonds", "vibrations", "handedness", "peptide bonds"
    ]  # fmt: skip


def test_an_inverted_centre(dipeptide):
    """CA in one frame: its hydrogen and CB (with the methyl's hydrogens) change places."""
    molecule, frames = dipeptide
    x = frames.copy()
    one, names = x[3, 1], [atom.name for atom in molecule.topology.atoms()]
    centre, n, c = one[8].copy(), one[names.index("N")], one[names.index("C", 8)]
    # A reflection of HA and the side chain in the plane of N, CA and C.
    normal = np.cross(n - centre, c - centre)
    normal /= np.linalg.norm(normal)
    for atom in range(9, 14):
        one[atom] -= 2 * ((one[atom] - centre) @ normal) * normal
    assert names[8:14] == ["CA", "HA", "CB", "HB1", "HB2", "HB3"]
    check = outcome(check_structure(molecule, samples_of(x, kelvin=600.0)), "handedness")
    assert check.status == WRONG
    assert "1 of 40 frames" in check.words
    assert "ALA2-CA" in check.words
    # So is the whole mirror image, which has the same energy.
    checks = check_structure(molecule, samples_of(frames * [1, 1, -1], kelvin=600.0))
    assert "40 of 40 frames" in outcome(checks, "handedness").words


def test_a_cis_bond_and_a_broken_one(dipeptide):
    molecule, frames = dipeptide
    x = frames.copy()
    names = [atom.name for atom in molecule.topology.atoms()]
    one = x[0, 0]
    carbon, nitrogen = names.index("C", 8), names.index("N", 10)
    axis = one[nitrogen] - one[carbon]
    axis /= np.linalg.norm(axis)
    for atom in range(nitrogen + 1, 22):  # half a turn
        arm = one[atom] - one[nitrogen]
        one[atom] = one[nitrogen] + 2 * (arm @ axis) * axis - arm
    check = outcome(check_structure(molecule, samples_of(x, kelvin=600.0)), "peptide bonds")
    assert check.status == WRONG
    assert "ALA2-NME3 in 1" in check.words
    x = frames.copy()
    x[5, 0, 21] += 0.5
    check = outcome(check_structure(molecule, samples_of(x, kelvin=600.0)), "bonds")
    assert check.status == WRONG
    assert "1 of 40 frames have others" in check.words


def leapfrog(molecule, kelvin, timestep, n_frames=640):
    """Frames [n, 1, N, 3] of leapfrog dynamics with velocities that are drawn afresh."""
    integrator = openmm.VerletIntegrator(timestep)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(molecule.system, integrator, platform)
    context.setPositions(molecule.positions)
    frames = []
    for k in range(n_frames + 50):
        context.setVelocitiesToTemperature(kelvin, k + 1)
        integrator.step(int(0.1 / timestep))
        frames.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    return np.array(frames[50:])[:, None]


def test_time_steps_that_are_too_long():
    """Steps of 4 fs without a Metropolis test: stiff bonds are far too hot."""
    molecule = chain_of(constant=3 * CONSTANT)
    biased = check_forces(molecule, samples_of(leapfrog(molecule, KELVIN, 0.004)))
    check = outcome(biased, "configurational temperature")
    assert check.status == WRONG
    assert "a time step that is too long" in check.words
    short = check_forces(molecule, samples_of(leapfrog(molecule, KELVIN, 0.0005)))
    assert outcome(short, "configurational temperature").status == PASSED


def test_forces_of_exact_frames():
    molecule, rng = chain_of(), np.random.default_rng(6)
    exact = check_forces(molecule, samples_of(draw_frames(rng, (160, 4), KELVIN)))
    assert [check.status for check in exact] == [PASSED] * 2
    # Another force field: torsions with five times the barrier.
    other = check_forces(molecule, samples_of(draw_frames(rng, (160, 4), KELVIN, barrier=10.0)))
    assert outcome(other, "configurational temperature").status == PASSED
    assert outcome(other, "mean torques").status == WRONG
    few = check_forces(molecule, samples_of(draw_frames(rng, (10, 1), KELVIN)))
    assert [check.status for check in few] == [UNDECIDED]


def test_what_is_known_of_rare_basins_and_of_drifting_runs():
    """An interval narrower than 0.01 is enough, as for runs, and only for states."""
    rng = np.random.default_rng(7)
    rare = assess_probability(rng.random((2000, 8)) < 3e-4, n_pieces=8000.0)
    assert not rare.converged
    short = assess_mean(-1000.0 + rng.normal(size=(4, 8)))
    assert short.high < 0 and not short.converged  # noqa: PT018
    checks = check_convergence({"basin A": {"300.00": rare}, "energy_kJ_mol": {"300.00": short}})
    assert [check.status for check in checks] == [PASSED, MISSING]
    assert "P(A) is between" in checks[0].words
    assert check_start(BurnIn(0, 100)).status == PASSED
    assert check_start(BurnIn(7, 100)).words.startswith("the first 7 of 100")
    assert check_start(BurnIn(50, 100, is_equilibrated=False)).status == MISSING
