"""Run directories of the analysis tests, with known answers."""

import mdtraj
import numpy as np
from scipy.stats import chi2

from openmm_tsf.analysis import Reference, load_run
from openmm_tsf.units import KB
from tests.support.fabricate import DoubleWell, chain_positions, two_state_chains, write_run

TEMPERATURES = np.array([300.0, 424.26, 600.0])
BETAS = 1 / (KB * TEMPERATURES)
GAP = 5.0  # kJ/mol between the two states
WELL = DoubleWell(20_001)


def assert_calibrated(z):
    """z [runs, ...]: no bias, and a spread that the claimed errors explain."""
    n = len(z)
    assert (np.abs(z.mean(axis=0)) < 4 * z.std(axis=0, ddof=1) / np.sqrt(n)).all()
    # The larger of two errors is claimed: a little too large on average, never too small.
    sums = (z**2).sum(axis=0)
    assert (chi2.sf(sums, n) > 1e-4).all(), sums / n
    assert (sums / n > 0.4).all(), sums / n


def two_state_run(rng, n=60, n_walkers=4, rho=0.5, temperatures=TEMPERATURES):
    """Energies [n, W, R] and states of exact chains: state 1 lies GAP above 0, with five modes.

    -ln[P(1)/P(0)] is GAP / kT.
    """
    betas = 1 / (KB * np.asarray(temperatures))
    p = 1 / (1 + np.exp(betas * GAP))
    states = two_state_chains(rng, (n, n_walkers, len(betas)), p, rho)
    return GAP * states + rng.chisquare(5, states.shape) / (2 * betas), states


def small_run(path, rng=None, **options):
    """A run directory with everything in it; phi is ±1, by state."""
    rng = rng or np.random.default_rng(1)
    sizes = {k: options.pop(k) for k in ("n", "n_walkers", "temperatures") if k in options}
    energy, states = two_state_run(rng, **sizes)
    phi = np.where(states, 1.0, -1.0) + 0.2 * rng.normal(size=states.shape)
    psi = rng.uniform(-np.pi, np.pi, states.shape)
    temperatures = sizes.get("temperatures", TEMPERATURES)
    options = {"per_segment": 25, "positions": chain_positions(phi)} | options
    write_run(path, temperatures, energy, {"phi": phi, "psi": psi}, **options)
    return energy, phi, psi


def well_run(
    rng, path, n=60, n_walkers=6, rho=0.3, temperatures=TEMPERATURES, drawn_at=None, **config
):
    """A run of exact samples of the double well, at its temperatures or others."""
    drawn_at = temperatures if drawn_at is None else drawn_at
    energy, phi = WELL.draw(rng, (n, n_walkers), drawn_at, rho)
    return load_run(write_run(path, temperatures, energy, {"phi": phi, "psi": phi}, **config))


def phi_of(trajectory):
    return mdtraj.compute_dihedrals(trajectory, [[0, 1, 2, 3]])[:, 0]


def angles_of_two_basins(rng, shape, p=0.3, rho=0.6):
    """(φ, ψ) of two basins, exchanging slowly, with fast motion within each."""
    basin = two_state_chains(rng, shape, p, rho)
    phi = np.where(basin, 1.0, -1.5) + 0.3 * rng.normal(size=shape)
    return phi, np.where(basin, 0.7, 2.5) + 0.4 * rng.normal(size=shape)


def sample_basins(rng, shape, energy, p=0.1):
    """φ, ψ and energies of independent samples of two basins."""
    phi = np.where(rng.random(shape) < p, 1.0, -1.5) + 0.3 * rng.normal(size=shape)
    return phi, rng.uniform(-np.pi, np.pi, shape), rng.normal(energy, 8.0, shape)


def make_reference(rng, n=3000, temperatures=(*TEMPERATURES, 700.0)):
    shape = (n, len(temperatures))
    phi, psi = angles_of_two_basins(rng, shape)
    return Reference(temperatures, phi, psi, rng.normal(size=shape), 1.0)


def run_like_reference(rng, path, p=0.3, temperatures=TEMPERATURES, **config):
    shape = (300, 10, len(temperatures))
    phi, psi = angles_of_two_basins(rng, shape, p)
    energy, angles = rng.normal(size=shape), {"phi": phi, "psi": psi}
    return load_run(write_run(path, temperatures, energy, angles, **config))


def energies_far_apart(temperatures, modes=1000):
    """Energies [100, 4, K] of many harmonic modes, whose rungs overlap only if close."""
    rng = np.random.default_rng(0)
    return 0.5 * KB * np.asarray(temperatures) * rng.chisquare(modes, (100, 4, len(temperatures)))
