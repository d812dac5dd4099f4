"""Functions run on several ranks: processes of this machine, connected by gloo."""

import multiprocessing
import os
import pickle
import socket
import traceback
from contextlib import nullcontext

import torch

from openmm_tsf.utils.distributed import Ranks, connect_ranks

#: Processes are forked from one that has imported the package, in a fraction of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["openmm_tsf.training", "tests.support.rank_jobs", "torch._dynamo"])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _work(ranks, timeout, connection, function, arguments):
    torch.set_num_threads(1)
    numbers = {"RANK": ranks.rank, "WORLD_SIZE": ranks.size, "LOCAL_RANK": ranks.local_rank}
    numbers |= {"MASTER_ADDR": ranks.address, "MASTER_PORT": ranks.port}
    os.environ |= {name: str(number) for name, number in numbers.items()}  # as torchrun does
    try:
        with nullcontext() if timeout is None else connect_ranks(ranks, timeout=timeout):
            result = True, function(ranks, *arguments)
    except BaseException as error:
        result = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    connection.send_bytes(pickle.dumps(result))  # torch's own way is gone with the process


def run_ranks(function, *arguments, size=2, timeout=20.0, seconds=60.0):
    """Call ``function(ranks, *arguments)`` on all ranks, and return what each did.

    A pair for each: True and what it returned, or False and its error. A rank that was killed:
    False and "". The processes are killed after so many seconds. Without a `timeout` ranks are not
    connected: the function finds them in the environment.
    """
    port, workers = free_port(), []
    for rank in range(size):
        here, there = _context.Pipe(duplex=False)
        ranks = Ranks(rank, size, rank, "127.0.0.1", port)
        options = ranks, timeout, there, function, arguments
        workers.append((here, _context.Process(target=_work, args=options, daemon=True)))
        workers[-1][1].start()
        there.close()
    results = []
    for here, process in workers:
        try:
            results.append(
                pickle.loads(here.recv_bytes()) if here.poll(seconds) else (False, "hangs")
            )
        except EOFError:
            results.append((False, ""))
        here.close()
        process.join(5)
        process.kill()
    return results


def returned(results):
    """Return what ranks returned, none of which failed."""
    assert all(is_good for is_good, _ in results), "\n".join(str(v) for ok, v in results if not ok)
    return [value for _, value in results]
