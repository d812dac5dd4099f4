"""A temporary number of torch's threads, and rows shared by those that are then left."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_outside: ContextVar[int] = ContextVar("_outside", default=1)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads within the ``with`` block."""
    before = torch.get_num_threads()
    token = _outside.set(max(before, _outside.get()))
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _outside.reset(token)


def available_threads() -> int:
    """Return torch's number of threads, or the one before :func:`torch_threads` if larger."""
    return max(torch.get_num_threads(), _outside.get())


def share_rows(
    function: Callable[[slice], tuple[Tensor, ...]], n_rows: int, least: int
) -> tuple[Tensor, ...]:
    """Return what `function` computes of all rows, its parts by threads, each `least` or more.

    The threads end with the call, so that none is forked.
    """
    n_threads = min(available_threads(), n_rows // least)
    if n_threads < 2:
        return function(slice(0, n_rows))
    size = -(-n_rows // n_threads)
    parts = [slice(start, start + size) for start in range(0, n_rows, size)]
    with ThreadPoolExecutor(len(parts), "share-rows") as pool:
        results = list(pool.map(function, parts))
    return tuple(map(torch.cat, zip(*results, strict=True)))
