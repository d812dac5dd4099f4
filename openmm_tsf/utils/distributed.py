"""Ranks: the processes of one job, started by ``torchrun`` or ``srun``, and what they exchange.

A process that was started alone is rank 0 of 1 and needs nothing of torch.distributed.
"""

import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: Time in s within which all ranks must meet in a sum: the others work equally long. So long may a
#: node be silent.
TIMEOUT_SECONDS = 600.0
#: And for what ranks do alone, such as MD or more shards. Meanwhile the end of a process is noticed
#: at once, and that of its node or network after `TIMEOUT_SECONDS`, see `_probe_connections`.
_PATIENCE = timedelta(days=30)
#: Probes of a silent connection within that time.
_PROBES = 10
_POLL_SECONDS = 0.02
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: ``SLURM_NTASKS`` and ``SLURM_PROCID`` are set in a batch script, too, which is one process.
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_FIRST_PORT, _N_PORTS = 20000, 20000


class LostRankError(RuntimeError):
    """Another rank ended, or did not come to a sum or a broadcast in time."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those of a job.

    With `size` 1, sums and broadcasts return their argument. With more they need the process group
    of :func:`connect_ranks`, and every rank has to make the same calls in the same order.

    Parameters
    ----------
    rank, size
        The number of this process, from 0, and how many there are.
    local_rank
        The number of this process among those of its node.
    address, port
        Where rank 0 listens.

    Examples
    --------
    >>> from openmm_tsf.utils.distributed import Ranks
    >>> ranks = Ranks()
    >>> ranks.rank, ranks.size, ranks.is_first, ranks.broadcast({"step": 3})
    (0, 1, True, {'step': 3})
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what all share and shows progress."""
        return self.rank == 0

    def choose_device(self, device: str) -> str:
        """Return the device of this rank: of ``"cuda"``, that of its local rank.

        With one rank the argument itself. Where only one GPU is visible it is taken by every rank:
        ``srun --gpus-per-task=1`` shows each its own.

        Raises
        ------
        ValueError
            If a node has more ranks than GPUs, or all ranks are given one GPU of several.
        """
        if self.size == 1 or not device.startswith("cuda"):
            return device
        import torch

        n = torch.cuda.device_count()
        own = f"cuda:{self.local_rank if n > 1 else 0}"
        if device not in ("cuda", own):
            raise ValueError(
                f"device: expected 'cuda' with {self.size} ranks, of which each takes its own GPU, "
                f"got {device!r}"
            )
        if self.local_rank >= n > 1:
            raise ValueError(
                f"device: expected at most as many ranks on a node as GPUs ({n}), got local rank "
                f"{self.local_rank}"
            )
        return own

    def share(self, n: int) -> slice:
        """Return which of n things are this rank's: the first ranks may have one more.

        Examples
        --------
        >>> from openmm_tsf.utils.distributed import Ranks
        >>> [Ranks(rank, 3).share(8) for rank in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
        """
        each, more = divmod(n, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def count_share(self, n: int) -> int:
        """Return how many of n things are this rank's."""
        part = self.share(n)
        return int(part.stop - part.start)

    def sum_(self, tensor: "Tensor") -> "Tensor":
        """Replace a tensor, float64 or int64, by its sum over the ranks, and return it.

        All ranks get the same bits. Sums of float64 numbers depend in their last bits on how many
        ranks there are, those of int64 do not.

        Raises
        ------
        TypeError
            If it is of another type.
        LostRankError
            If another rank ended or did not come in time.
        """
        import torch
        import torch.distributed as dist

        if tensor.dtype not in (torch.float64, torch.int64):
            raise TypeError(f"tensor: expected float64 or int64, got {tensor.dtype}")
        if self.size > 1:
            self._finish(lambda: dist.all_reduce(tensor, async_op=True), "a sum", poll=False)
        return tensor

    def broadcast_(self, tensor: "Tensor") -> "Tensor":
        """Replace a tensor by that of rank 0, of the same type and shape, and return it."""
        import torch.distributed as dist

        if self.size > 1:
            self._finish(
                lambda: dist.broadcast(tensor, 0, async_op=True), "a broadcast", poll=False
            )
        return tensor

    def broadcast(self, value: Any = None) -> Any:
        """Return plain data, such as JSON can hold, of rank 0; the others' argument is ignored.

        Waits as long as rank 0 takes. Ctrl-C and SIGTERM interrupt the waiting.
        """
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        group = _patient_group
        content = list(json.dumps(value).encode()) if self.is_first else []
        length = torch.tensor(len(content), dtype=torch.int64, device="cpu")
        self._finish(lambda: dist.broadcast(length, 0, group=group, async_op=True), "a broadcast")
        text = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
        if self.is_first:
            text = torch.tensor(content, dtype=torch.uint8, device="cpu")
        self._finish(lambda: dist.broadcast(text, 0, group=group, async_op=True), "a broadcast")
        return json.loads(bytes(text.tolist()))

    def barrier(self) -> None:
        """Wait until every rank has come here, however long the others take, if they live."""
        import torch
        import torch.distributed as dist

        if self.size > 1:
            n_ranks = torch.ones((), dtype=torch.int64, device="cpu")
            group = _patient_group
            self._finish(lambda: dist.all_reduce(n_ranks, group=group, async_op=True), "a barrier")

    def _finish(self, start: Callable[[], Any], what: str, *, poll: bool = True) -> None:
        """Start an operation and wait for it; with `poll`, signals are handled in between."""
        if _patient_group is None:
            raise RuntimeError(f"ranks: expected connect_ranks before {what}, got no process group")
        try:
            work = start()
            while poll and not work.is_completed():
                time.sleep(_POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size}: another rank ended or did not come to {what} "
                f"in time ({_reason(error)})"
            ) from error


def _reason(error: RuntimeError) -> str:
    """What torch.distributed says, without the lines of its source and its advice."""
    text = str(error).splitlines()[0].partition(". This is")[0]
    return re.sub(r"^\[[^\]]*\.\w+:\d+\] ", "", text)


#: The group that waits for what rank 0 does alone; None without a connection.
_patient_group: Any = None
_current = Ranks()


def current_ranks() -> Ranks:
    """Return the ranks that are connected, or rank 0 of 1."""
    return _current


def read_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Return the rank that ``torchrun`` or ``srun`` gave to this process, else rank 0 of 1.

    ``torchrun`` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; ``srun``
    SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and the names of the nodes, of which rank 0 is
    on the first. There, MASTER_ADDR and MASTER_PORT are used where they are set.

    Raises
    ------
    ValueError
        If some of the variables are missing or no such numbers.

    Examples
    --------
    >>> from openmm_tsf.utils.distributed import read_ranks
    >>> started = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}
    >>> read_ranks(started | {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "4321"})
    Ranks(rank=9, size=16, local_rank=1, address='gpu07', port=24321)
    """
    env = os.environ if environment is None else environment
    names: tuple[str, ...]
    if "RANK" in env or "WORLD_SIZE" in env:
        names = _TORCHRUN
    elif env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = _SRUN
    else:
        return Ranks()
    missing = [name for name in names if name not in env]
    if missing:
        raise ValueError(
            f"environment: expected {', '.join(names)} of torchrun or srun, got no "
            f"{', '.join(missing)}"
        )
    rank_name, size_name, local_name = names[:3]
    size = _read_int(env, size_name, 1)
    rank = _read_int(env, rank_name, 0, size - 1)
    local = _read_int(env, local_name, 0, rank)
    if size == 1:
        return Ranks()
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    else:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
        address = first_host(nodes)
    # Two steps of a job, or jobs that share a node, must not meet.
    numbers = {"SLURM_JOB_ID": "0", "SLURM_STEP_ID": "0"} | dict(env)
    job = _read_int(numbers, "SLURM_JOB_ID", 0) + 101 * _read_int(numbers, "SLURM_STEP_ID", 0)
    port = _FIRST_PORT + job % _N_PORTS
    if "MASTER_PORT" in env:
        port = _read_int(env, "MASTER_PORT", 1, 2**16 - 1)
    return Ranks(rank, size, local, address, port)


def _read_int(env: Mapping[str, str], name: str, least: int, most: int = 2**31) -> int:
    try:
        number = int(env[name])
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name}: expected an integer from {least} to {most}, got {env[name]!r}")
    return number


def first_host(nodes: str) -> str:
    """Return the first name of a list of nodes as Slurm writes it.

    Examples
    --------
    >>> from openmm_tsf.utils.distributed import first_host
    >>> first_host("rack1-gpu[007-012,020],login"), first_host("a1,a2")
    ('rack1-gpu007', 'a1')
    """
    # Up to the first comma outside brackets; of each bracket the first number.
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes.strip())
    if match is None:
        raise ValueError(
            f"SLURM_NODELIST: expected the names of the nodes, got {nodes!r}; or set MASTER_ADDR "
            "to the host of rank 0"
        )
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0])


@contextmanager
def connect_ranks(
    ranks: Ranks, device: str | None = None, timeout: float = TIMEOUT_SECONDS
) -> Iterator[Ranks]:
    """Connect all ranks within the ``with`` block; afterwards, also after an error, no longer.

    Ranks that wait for one that has left get a :class:`LostRankError`. Tensors of the CPU are
    exchanged by gloo, those of GPUs by NCCL. With one rank nothing is connected.

    Parameters
    ----------
    ranks
        The rank of this process, from :func:`read_ranks`.
    device
        The device of this rank, see :meth:`Ranks.choose_device`.
    timeout
        Seconds until a rank that does not come to a sum is given up, and, on Linux, in any wait one
        whose node or network is gone.

    Raises
    ------
    LostRankError
        If not all ranks connect in time.
    """
    global _current, _patient_group
    if ranks.size == 1:
        yield ranks
        return
    if _patient_group is not None:
        raise RuntimeError("ranks: expected no connection, got a second one within the first")
    import torch
    import torch.distributed as dist

    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    if device is not None and device.startswith("cuda"):
        torch.cuda.set_device(device)
    host = f"[{ranks.address}]" if ":" in ranks.address else ranks.address
    before = set(_open_sockets())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
            init_method=f"tcp://{host}:{ranks.port}",
            rank=ranks.rank,
            world_size=ranks.size,
            timeout=timedelta(seconds=timeout),
        )
        patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _probe_connections(before, timeout)
    except RuntimeError as error:  # of torch.distributed, and of gloo
        if dist.is_initialized():
            dist.destroy_process_group()
        raise LostRankError(
            f"rank {ranks.rank}: expected {ranks.size} ranks at {ranks.address}:{ranks.port}, "
            f"got {_reason(error)}"
        ) from error
    _patient_group, _current = patient, ranks
    failed = True
    try:
        yield ranks
        failed = False
    finally:
        _patient_group, _current = None, Ranks()
        # NCCL waits for what was begun; after an error the end of the process ends it.
        if not (failed and has_nccl):
            dist.destroy_process_group()


def _open_sockets() -> dict[int, int]:
    """Return the sockets of this process, descriptors by the number of the inode; on Linux."""
    sockets: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with suppress(OSError):  # of the descriptor of the folder itself
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                sockets[status.st_ino] = int(name)
    return sockets


def _probe_connections(before: Set[int], timeout: float) -> None:
    """Let the kernel probe the other ends of the TCP connections made since; on Linux.

    A process that ends closes its connections. A node that loses its power or network does not, and
    a connection on which nothing is sent is never given up by default (RFC 9293, 3.8.4; RFC 5482).
    A process that computes need not do anything to answer.
    """
    if sys.platform != "linux":
        return
    seconds = max(1, round(timeout / _PROBES))
    options = {
        socket.TCP_KEEPIDLE: seconds,
        socket.TCP_KEEPINTVL: seconds,
        socket.TCP_USER_TIMEOUT: round(1000 * timeout),  # in ms; also of what was sent
    }
    for descriptor in [fd for inode, fd in _open_sockets().items() if inode not in before]:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in options.items():
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
