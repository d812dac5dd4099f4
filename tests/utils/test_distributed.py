"""Ranks: read from the environment, what they exchange, and what happens without one of them."""

import math
import sys
import time

import pytest
import torch

from openmm_tsf.utils.distributed import (
    LostRankError,
    Ranks,
    connect_ranks,
    current_ranks,
    first_host,
    read_ranks,
)
from tests.support.networks import two_nodes
from tests.support.rank_jobs import exchange, leave, probes, wait_interrupted
from tests.support.ranks import free_port, returned, run_ranks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
    "MASTER_ADDR": "head", "MASTER_PORT": "29501",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07,09-12]", "SLURM_JOB_ID": "4321", "SLURM_STEP_ID": "2",
}  # fmt: skip

#: A rank on each node: rank 1 comes late to the first barrier, and not at all to the second.
WAITING = """
import sys, time
from openmm_tsf.utils.distributed import connect_ranks, read_ranks
try:
    with connect_ranks(read_ranks(), timeout={timeout}) as ranks:
        print("connected", flush=True)
        time.sleep({alone} * ranks.rank)
        ranks.barrier()
        print("met", flush=True)
        time.sleep(60 * ranks.rank)
        ranks.barrier()
except Exception as error:
    print(type(error).__name__ + ":", error, flush=True)
"""


def test_ranks_of_the_environment():
    assert read_ranks({}) == Ranks()
    assert read_ranks(TORCHRUN) == Ranks(3, 8, 1, "head", 29501)
    assert read_ranks(SRUN) == Ranks(3, 8, 1, "gpu07", 20000 + 4321 + 202)
    given = {"MASTER_ADDR": "other", "MASTER_PORT": "1234"}
    assert read_ranks(SRUN | given) == Ranks(3, 8, 1, "other", 1234)
    # torchrun within srun, a job script without srun, and a step of one task.
    assert read_ranks(SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN).size == 8
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert read_ranks(batch) == read_ranks(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == Ranks()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "0"}, "expected RANK, WORLD_SIZE, .*, got no WORLD_SIZE, LOCAL_RANK, MASTER"),
        (TORCHRUN | {"RANK": "8"}, "RANK: expected an integer from 0 to 7, got '8'"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE: expected an integer from 1"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT: expected an integer from 1 to 65535"),
        (SRUN | {"SLURM_LOCALID": "-1"}, "SLURM_LOCALID: expected an integer from 0"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "SLURM_NODELIST: expected the names of the nodes"),
    ],
)
def test_a_wrong_environment_is_refused(environment, expected):
    with pytest.raises(ValueError, match=expected):
        read_ranks(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-5],m", "n3"), ("a,b[1-2]", "a"), ("r[1-2]n[005,7]", "r1n005")],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_each_rank_takes_its_own_device(monkeypatch):
    ranks = Ranks(9, 16, 1)
    assert Ranks().choose_device("cuda:3") == "cuda:3"
    assert ranks.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert ranks.choose_device("cuda") == ranks.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="device: expected 'cuda' with 16 ranks"):
        ranks.choose_device("cuda:0")
    with pytest.raises(ValueError, match=r"as many ranks on a node as GPUs \(8\), got"):
        Ranks(9, 16, 8).choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # each task is shown its own
    assert ranks.choose_device("cuda") == "cuda:0"


def test_parts_make_up_the_whole():
    for size in range(1, 9):
        for n in range(30):
            parts = [Ranks(rank, size).share(n) for rank in range(size)]
            assert [i for part in parts for i in range(n)[part]] == list(range(n))
            counts = [Ranks(rank, size).count_share(n) for rank in range(size)]
            assert max(counts) - min(counts) <= 1
            assert counts == sorted(counts, reverse=True)


def test_one_rank_needs_nothing():
    ranks, values = Ranks(), torch.ones(2, dtype=torch.float64)
    with connect_ranks(ranks) as connected:
        assert connected is ranks
        assert ranks.sum_(values) is values
        assert ranks.broadcast_(values) is values
        assert ranks.broadcast([1]) == [1]
        ranks.barrier()
    assert not torch.distributed.is_initialized()
    with pytest.raises(TypeError, match="tensor: expected float64 or int64, got"):
        ranks.sum_(values.float())
    with pytest.raises(RuntimeError, match="expected connect_ranks before a sum"):
        Ranks(0, 2).sum_(values)
    assert current_ranks() == Ranks()


def test_what_ranks_exchange():
    for rank, result in enumerate(returned(run_ranks(exchange, size=3))):
        sums, counts, weights, plain, current = result
        assert sums.tolist() == [6.5, math.inf]
        assert counts.tolist() == [2**60 + 3]  # no rounding
        assert weights.tolist() == [0.0, 1.0]
        assert plain == {"rank": 0, "numbers": [0.1, math.inf], "text": "\u00e4", "nothing": None}
        assert current == (rank, 3)


@pytest.mark.parametrize("how", ["error", "kill"])
def test_others_end_when_a_rank_does(how):
    start = time.monotonic()
    first, second = run_ranks(leave, how)
    assert time.monotonic() - start < 20
    assert first[1].startswith("LostRankError: rank 0 of 2: another rank ended or did not come to")
    assert second[1].startswith("ValueError: no more" if how == "error" else "")


def test_a_rank_that_does_not_come_is_given_up():
    first, _ = run_ranks(leave, "sleep", timeout=1.0)
    assert "did not come to a sum in time (Timed out" in first[1]


@pytest.mark.skipif(sys.platform != "linux", reason="options of Linux")
def test_every_connection_is_probed():
    """Each rank has one to each other in both groups, and to the store; none waits for ever."""
    for found in returned(run_ranks(probes, size=3, timeout=30.0)):
        assert len(found) >= 5, found
        assert set(found) == {(1, 3, 3, 30_000)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces of Linux")
def test_a_node_whose_network_is_gone_is_noticed():
    """While a rank works alone for longer than the limit it is waited for; not on a dead node."""
    timeout = 6.0
    with two_nodes(WAITING.format(timeout=timeout, alone=2 * timeout)) as nodes:
        assert nodes.read_line(0) == "connected"
        assert nodes.read_line(0, 4 * timeout) == "met"
        nodes.cut()
        start = time.monotonic()
        assert "LostRankError: rank 0 of 2: another rank ended" in nodes.read_line(0, 6 * timeout)
        assert time.monotonic() - start < 4 * timeout
        assert nodes.wait(0) == 0


def test_waiting_for_rank_0_can_be_interrupted():
    _, (is_good, seconds) = run_ranks(wait_interrupted)
    assert is_good
    assert seconds < 3


def test_ranks_that_never_start_are_an_error():
    ranks = Ranks(1, 2, 1, "127.0.0.1", free_port())
    start = time.monotonic()
    with pytest.raises(LostRankError, match=r"rank 1: expected 2 ranks at 127\.0"):
        connect_ranks(ranks, timeout=1.0).__enter__()
    assert time.monotonic() - start < 20
