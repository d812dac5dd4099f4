"""Random numbers: one seed fixes everything, streams are distinct, interruptions change nothing."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.toy import DoubleWell, GaussianWell
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.chain import tune_chains
from openmm_tsf.sampling.kernels import FlowIndependence, FlowWalk, PlainSwap
from openmm_tsf.utils.random import (
    Purpose,
    Seeds,
    derive_distinct_seeds,
    derive_seed,
    generator_seed,
    make_stream,
    seeded_generator,
)

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


def test_streams_have_64_bits():
    """Of 64 000 of them; seeds of 32 bits would coincide with a probability of 38 %."""
    seeds = derive_distinct_seeds(1, Purpose.SAMPLING, 64_000)
    assert len(set(seeds)) == 64_000
    assert max(seeds) >= 2**63
    others = [derive_seed(s, p, 5) for s in (1, 2) for p in Purpose]
    assert len({*others, seeds[5]}) == len(others)
    # Seeds that the low 32 bits do not tell apart make different streams.
    draws = {
        float(torch.rand(1, generator=make_stream(base * 2**32 + 7), dtype=torch.float64))
        for base in range(50)
    }
    assert len(draws) == 50


def test_a_stream_is_the_mersenne_twister_of_numpy():
    for seed in (0, 5, 2**63 + 11):
        numpy_words = np.random.MT19937(seed).random_raw(1001)[1:]  # it starts one word earlier
        drawn = torch.randint(0, 2**20, (1000,), generator=make_stream(seed))
        assert drawn.tolist() == (numpy_words % 2**20).tolist()


def test_equal_streams_are_refused(monkeypatch):
    monkeypatch.setattr("openmm_tsf.utils.random.derive_seed", lambda *_: 3)
    with pytest.raises(ValueError, match="seed: two of 2 streams would be the same with 1"):
        derive_distinct_seeds(1, Purpose.SAMPLING, 2)


def stream_sampler(number, n_walkers=64):
    """A sampler of a shard's stream on a double well, started in its lower state."""
    potential = DoubleWell(0.1, -1.0, 0.3)
    flow = TemperatureSteerableFlow(1, 1, 1, (4,))
    kernels = [
        FlowWalk(flow, potential, LADDER, 0.7),
        FlowIndependence(flow, potential, LADDER),
        PlainSwap(LADDER, potential.boltzmann_constant),
    ]
    seed = derive_seed(4, Purpose.SAMPLING, number)
    made = ParallelTempering(
        None, flow, LADDER, n_walkers, kernels, potential, seed, make_stream(seed)
    )  # fmt: skip
    made.set_positions(torch.zeros(n_walkers, 2, 1))
    return made


def test_shards_agree_with_each_other_and_with_the_exact_mean():
    """Each with its own stream and the same step sizes; their walkers are independent."""
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64).unsqueeze(1)
    potential = DoubleWell(0.1, -1.0, 0.3)
    weight = torch.exp(-potential.energy(grid) / (potential.boltzmann_constant * LADDER[0]))
    exact = float((weight * (grid[:, 0] > 0)).sum() / weight.sum())
    means = []
    for number in range(4):
        made = stream_sampler(number)
        made.run(20, progress=False)
        x = made.run(60, collect=True, progress=False)
        means.append((x[:, :, 0, 0] > 0).double().mean(dim=0).numpy())  # of each walker
    by_shard = np.array([mean.mean() for mean in means])
    errors = np.array([mean.std(ddof=1) / np.sqrt(len(mean)) for mean in means])
    assert (np.abs(by_shard - exact) < 4 * errors).all()
    z = (by_shard[:, None] - by_shard) / np.hypot(errors[:, None], errors)
    assert np.abs(z).max() < 4
    assert np.unique(np.concatenate(means)).size > 8


def tuned(n_chains, size):
    """The step sizes of chains that `size` processes divide: here, threads."""
    barrier, total, sizes = threading.Barrier(size), [0] * size, [None] * size

    def work(rank):
        def add_up(counts):
            total[rank] = counts.clone()
            barrier.wait()
            result = sum(total)
            barrier.wait()
            return result

        mine = range(rank, n_chains, size)
        chains = [stream_sampler(number, 5) for number in mine or [0]]
        sizes[rank] = tune_chains(chains, 12, n_advanced=len(mine), add_up=add_up)
        for chain in chains:
            assert torch.equal(chain.step_sizes["flow_walk"], sizes[rank]["flow_walk"])

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(work, range(size)))
    return sizes


def test_step_sizes_do_not_depend_on_the_number_of_ranks():
    (alone,) = tuned(3, 1)
    for size in (2, 4):
        for sizes in tuned(3, size):
            assert torch.equal(sizes["flow_walk"], alone["flow_walk"])
    single = stream_sampler(0, 5)
    expected = single.tune(12)
    (shared,) = tuned(1, 1)
    assert torch.equal(shared["flow_walk"], expected["flow_walk"])


def test_step_sizes_of_other_kernels_are_refused():
    made = stream_sampler(0, 2)
    with pytest.raises(ValueError, match=r"step_sizes: expected those of \['flow_walk'\], got"):
        made.step_sizes = {"walk": [1.0, 1.0]}


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
