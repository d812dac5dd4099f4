"""Of many short runs that are called converged, at least 93 % hold the truth in their intervals."""

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import kernels
from openmm_tsf.analysis.convergence import assess_mean, assess_probability, assess_variance
from openmm_tsf.potentials import DoubleWell
from tests.support.correlated import Pareto, alternating, autoregressive
from tests.support.fabricate import two_state_chains

RUNS = 200
slow = pytest.mark.slow


def assert_covered(assessments, truth, least_converged):
    """At least 93 % of the converged ones hold the truth, and some are converged."""
    converged = [each for each in assessments if each.converged]
    assert len(converged) >= least_converged * len(assessments)
    held = [each.low <= truth <= each.high for each in converged]
    assert np.mean(held or [True]) >= 0.93, f"{np.mean(held):.3f} of {len(held)}"
    # So does a normal distribution of this error, about: N_eff, error and interval are one.
    if held:
        z = np.array([(each.value - truth) / each.stderr for each in converged])
        assert abs(z.mean()) < 0.5
        assert z.std() < 1.3


def assess_runs(assess, draw, seed=3):
    rng = np.random.default_rng(seed)
    return [assess(draw(rng)) for _ in range(RUNS)]


@pytest.mark.parametrize(
    ("shape", "rho", "least_converged"),
    [
        ((200, 16), 0.5, 0.95),
        pytest.param((400, 4), 0.8, 0.5, marks=slow),
        pytest.param((2000, 2), 0.9, 0.5, marks=slow),
        pytest.param((3000, 1), 0.9, 0.5, marks=slow),
        pytest.param((1000, 64), 0.9, 0.9, marks=slow),
        pytest.param((400, 64), 0.95, 0.0, marks=slow),
        pytest.param((100, 64), 0.95, 0.0, marks=slow),
    ],
)
def test_autoregressive_series(shape, rho, least_converged):
    def draw(rng):
        return autoregressive(rng, shape, rho)

    assert_covered(assess_runs(assess_mean, draw), 0.0, least_converged)
    assert_covered(assess_runs(assess_variance, draw), 1.0, least_converged)


@pytest.mark.parametrize(
    ("shape", "p", "rho", "least_converged"),
    [
        ((400, 16), 0.1, 0.6, 0.95),
        pytest.param((400, 16), 0.5, 0.5, 0.95, marks=slow),
        pytest.param((3000, 2), 0.5, 0.9, 0.5, marks=slow),
        pytest.param((6000, 1), 0.3, 0.9, 0.5, marks=slow),
        pytest.param((1000, 4), 0.5, 0.99, 0.0, marks=slow),  # slow
        pytest.param((1000, 16), 0.98, 0.9, 0.2, marks=slow),
        pytest.param((600, 64), 0.02, 0.8, 0.9, marks=slow),
        pytest.param((1000, 64), 0.002, 0.0, 0.9, marks=slow),
        pytest.param((1000, 64), 0.002, 0.8, 0.2, marks=slow),
        pytest.param((1000, 64), 0.002, 0.99, 0.0, marks=slow),  # rare and slow
    ],
)
def test_two_state_chains(shape, p, rho, least_converged):
    """From p = 0.5 to 0.002, fast, and so slow that none is converged."""
    found = assess_runs(assess_probability, lambda rng: two_state_chains(rng, shape, p, rho))
    assert_covered(found, p, least_converged)
    # Converged or not: intervals of short runs are wide, not wrong.
    assert np.mean([each.low <= p <= each.high for each in found]) >= 0.93


@slow
@pytest.mark.parametrize(
    ("leave", "index", "longest"), [(300, 2.0, 1000), (400, 1.5, 100), (500, 1.5, 500)]
)
def test_visits_of_heavy_tailed_length(leave, index, longest):
    """The longest of some 100 to 200 visits are a good part of the population.

    Visits so long and so rare that a run has seen none of them are beyond what its own series can
    say: neighbouring rungs can, see `openmm_tsf.analysis.ensemble_checks.basin_ratio`.
    """
    lengths = Pareto(index, longest)
    p = lengths.mean / (lengths.mean + leave)
    shape = (1000, 64)
    found = assess_runs(
        assess_probability, lambda rng: alternating(rng, shape, leave, lengths, 4000)
    )
    assert_covered(found, p, 0.5)


@slow
@pytest.mark.parametrize("tilt", [0.3, 1.0])
def test_double_well_by_the_sampler(tilt):
    """Metropolised Langevin dynamics and swaps; 200 runs of 16 walkers, side by side."""
    n_walkers, ladder = 16, [1.0, 2.0]
    well = DoubleWell(tilt, -3.0, 0.8)
    flow = tsf.TemperatureSteerableFlow(1, 2, 1, (4,))
    mala = kernels.CartesianMALA(well, ladder, 1.0, timestep=0.5)
    swap = kernels.PlainSwap(ladder, 1.0)
    sampler = tsf.ParallelTempering(
        None, flow, ladder, RUNS * n_walkers, [mala, swap], potential=well, seed=4
    )
    generator = torch.Generator().manual_seed(5)
    start = [well.sample(RUNS * n_walkers, kelvin, generator) for kelvin in ladder]
    sampler.set_positions(torch.stack(start, dim=1))
    x = sampler.run(1200, progress=False, collect=True)
    energy = well.energy(x.reshape(-1, 1)).reshape(x.shape[:3]).numpy()
    inside = x[..., 0].numpy() > 0
    for rung, kelvin in enumerate(ladder):
        runs = [slice(k * n_walkers, (k + 1) * n_walkers) for k in range(RUNS)]
        means = [assess_mean(energy[:, run, rung]) for run in runs]
        assert_covered(means, well.mean_energy(kelvin), 0.5)
        states = [assess_probability(inside[:, run, rung]) for run in runs]
        assert_covered(states, well.probability_positive(kelvin).item(), 0.2)
