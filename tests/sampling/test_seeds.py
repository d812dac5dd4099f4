"""Random numbers: one seed fixes everything, streams are distinct, interruptions change nothing."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.toy import GaussianWell
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels import FlowIndependence, FlowWalk, PlainSwap
from openmm_tsf.utils.random import Seeds, generator_seed, seeded_generator

LADDER = (1.0, 2.5)
W, N = 3, 400


def sampler(seed, all_kinds=False):
    """Make a sampler of the identity, which accepts everything: the walkers are the noise."""
    potential = GaussianWell(torch.eye(1, dtype=torch.float64))
    flow = TemperatureSteerableFlow(1, 1, 1, (4,))
    kernels = [FlowIndependence(flow, potential, LADDER)]
    if all_kinds:
        kernels += [
            FlowWalk(flow, potential, LADDER, 0.7, n_steps=2),
            PlainSwap(LADDER, potential.boltzmann_constant, "random_pairs"),
        ]
    made = ParallelTempering(None, flow, LADDER, W, kernels, potential, seed=seed)
    made.set_positions(torch.zeros(W, 2, 1))
    return made


def noise(seed, n=N):
    """Return the noise of a run, [n, W R], standard normal."""
    made = sampler(seed)
    x = made.run(n, collect=True, progress=False)
    assert float(made.totals["flow_independent"].acceptance.min()) == 1.0
    return (x[..., 0] / torch.tensor(LADDER).sqrt()).flatten(1).numpy()


def test_walkers_rungs_and_seeds_are_independent():
    """Also neighbouring seeds, and seeds that are the same to torch alone."""
    seeds = (0, 1, 2, 7, 2**32 + 1, 2**33 + 7, 2**64 - 1)
    series = np.concatenate([noise(seed) for seed in seeds], axis=1)
    n_series = series.shape[1]
    for lag in (0, 1):
        z = series[lag:].T @ series[: N - lag] / np.sqrt(N - lag)
        pairs = z[~np.eye(n_series, dtype=bool)] if lag == 0 else z.ravel()
        assert np.abs(pairs).max() < 5.0  # of 861 and 1764 pairs
        assert abs((pairs**2).mean() - 1) < 4 * np.sqrt(2 / (len(pairs) / (2 - lag)))


def test_large_seeds_are_not_truncated():
    assert generator_seed(5) == 5
    assert generator_seed(2**32 + 5) != 5
    numbers = [generator_seed(base * 2**32 + low) for base in range(1, 40) for low in range(25)]
    assert len(set(numbers)) == len(numbers)
    first = torch.rand(3, generator=seeded_generator(2**32 + 1))
    assert not torch.equal(first, torch.rand(3, generator=seeded_generator(1)))
    for bad in (-1, 2**64, 1.0, True, "1"):
        with pytest.raises(ValueError, match="seed: expected an integer of at"):
            seeded_generator(bad)


def test_purposes_of_a_run_have_different_seeds():
    for seed in range(1000):
        seeds = Seeds(seed)
        if len({seeds.next() for _ in range(40)}) < 40:
            pytest.fail(f"seed {seed} gives two purposes the same")


@pytest.mark.parametrize("cut_seed", range(5))
def test_results_do_not_depend_on_interruptions(tmp_path, cut_seed):
    """By calls of run, with several lengths of segments, with reporters, and by resuming."""
    whole = sampler(11, all_kinds=True).run(60, collect=True, progress=False)
    rng = np.random.default_rng(cut_seed)
    cuts = [0, *sorted(rng.choice(np.arange(1, 60), size=4, replace=False).tolist()), 60]
    made, parts = sampler(11, all_kinds=True), []
    path = tmp_path / "run"

    def reporter(owner, state):
        state.x.sum()

    reporter.interval = 3

    for k, (low, high) in enumerate(pairwise(cuts)):
        if k == 2:  # another process continues
            made = sampler(11, all_kinds=True).resume(path)
        if k == 3:
            made.reporters.append(reporter)
        settings = {"checkpoint_interval": int(rng.integers(1, 9)), "progress": False}
        parts.append(made.run(high - low, path, collect=True, **settings))
    assert torch.equal(torch.cat(parts), whole)
    saved = [np.load(p)["positions"] for p in sorted((path / "segments").iterdir())]
    np.testing.assert_array_equal(np.concatenate(saved), whole.numpy())
