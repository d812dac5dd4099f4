"""Training over ranks: the gradients of one process, the same weights everywhere, and faults."""

import dataclasses
import signal
import time

import pytest
import torch

from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.training.parallel import check_ranks, seed_of_rank
from openmm_tsf.utils.distributed import Ranks
from tests.support.rank_jobs import (
    DIRECT,
    DOUBLE,
    PLAIN,
    TRAINING,
    direct_gradients,
    make_steps,
    path_gradients,
    train,
)
from tests.support.ranks import returned, run_ranks

SIZES = pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
BOTH = pytest.mark.parametrize(
    "settings", [TRAINING, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=["path", "direct"]
)


@SIZES
@pytest.mark.parametrize(
    ("job", "arguments"),
    [(path_gradients, ()), (direct_gradients, (1e9,)), (direct_gradients, (3.0,))],
    ids=["path", "direct", "infinite"],
)
def test_sums_are_the_gradients_of_one_rank_with_the_same_points(job, arguments, size):
    for together, alone in returned(run_ranks(job, *arguments, size=size)):
        assert float(alone[0].abs().max()) > 0.01
        for summed, one in zip(together, alone, strict=True):
            scale = float(one.abs().max())
            assert float((summed - one).abs().max()) < 1e-12 * max(1.0, scale)


@BOTH
def test_all_ranks_make_the_same_steps(settings):
    """Bit by bit, with other points on each of them; NaN on one of them skips a step on both."""
    first, second = returned(run_ranks(make_steps, settings, 4, 2))
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)
        assert torch.isfinite(one).all()
    assert first[1:] == second[1:]
    assert first[1] == 1
    assert first[2] > 0


def test_a_stopped_training_continues_exactly_and_on_another_number_of_ranks(tmp_path):
    """SIGTERM on rank 1 stops both after the same step, with a checkpoint of both."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    expected = returned(run_ranks(train, whole, TRAINING))
    assert expected[0][1] == expected[1][1]
    assert [validation.step for validation in expected[0][1]] == [0, 4, 8]
    assert torch.equal(expected[0][2], expected[1][2])
    both = returned(run_ranks(train, stopped, TRAINING, False, 5))
    assert [what for what, _, _ in both] == ["interrupted"] * 2
    assert torch.equal(both[0][2], both[1][2])
    checkpoint = stopped / "training.pt"
    assert read_tensors(checkpoint, "checkpoint")["step"] == 6  # agreed on in the next step
    content = checkpoint.read_bytes()
    again = returned(run_ranks(train, stopped, TRAINING, True))
    for one, other in zip(again, expected, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])
    for size in (1, 3):
        checkpoint.write_bytes(content)
        results = returned(run_ranks(train, stopped, TRAINING, True, size=size))
        assert all(torch.equal(each[2], results[0][2]) for each in results)
        assert not torch.equal(results[0][2], expected[0][2])  # other points
        assert [validation.step for validation in results[0][1]] == [0, 4, 8]
        assert results[0][1][:2] == expected[0][1][:2]


def test_the_death_of_a_rank_ends_the_others(tmp_path):
    start = time.monotonic()
    results = run_ranks(train, tmp_path, TRAINING, False, 5, signal.SIGKILL)
    assert time.monotonic() - start < 30
    assert results[1] == (False, "")
    assert not results[0][0]
    assert results[0][1].startswith("LostRankError: rank 0 of 2: another rank ended")
    assert read_tensors(tmp_path / "training.pt", "checkpoint")["step"] == 4  # to continue from


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({"batch_size": 2}, 3, "batch_size: expected one frame for each of 3 ranks, got 2"),
        ({"kl_batch_size": 4}, 3, "kl_batch_size: expected one draw of each of 2 temperatures"),
        ({"n_chains": 33}, 5, "n_chains: expected 8 of each temperature for each of 5 ranks"),
    ],
)
def test_more_ranks_than_points_are_refused(changes, size, expected):
    settings = dataclasses.replace(DOUBLE, **changes)
    check_ranks(settings, Ranks())
    with pytest.raises(ValueError, match=expected):
        check_ranks(settings, Ranks(0, size))
    if "kl_batch_size" in changes:  # draws of the direct estimator are at random temperatures
        check_ranks(dataclasses.replace(DIRECT, **changes), Ranks(0, size))


def test_ranks_have_seeds_of_their_own():
    assert seed_of_rank(5, 0) == 5
    seeds = {seed_of_rank(5, rank, step) for rank in range(40) for step in range(40)}
    assert len(seeds) == 1600
