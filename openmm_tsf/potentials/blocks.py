"""A batch evaluated block by block: within a budget of memory, on several threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: From positions [3, N, B] and global parameters to energies [B].
Total = Callable[..., Tensor]

#: Elements below which torch runs an operation on one thread; a block's arrays [N, N, B] stay below
#: it and in a core's cache, and threads share blocks instead.
_GRAIN = 32768
#: Arrays [N, N, B] that a block needs at once, derivatives included (measured, rounded up).
_ARRAYS = 80
#: Rows of a block that are worth fusing.
LEAST_COMPILED = 16


def bytes_per_conformation(n_atoms: int, dtype: torch.dtype) -> int:
    """What one conformation of a block takes."""
    return _ARRAYS * n_atoms**2 * torch.finfo(dtype).bits // 8


def block_size(n_atoms: int, dtype: torch.dtype, device: torch.device, memory: int) -> int:
    """Conformations in a block of single operations."""
    fits = max(1, memory // bytes_per_conformation(n_atoms, dtype))
    if device.type != "cpu":
        return fits
    return min(fits, max(16, _GRAIN // n_atoms**2))


def compiled_block_size(n_atoms: int, dtype: torch.dtype, device: torch.device, memory: int) -> int:
    """Conformations in a fused block."""
    fits = memory // bytes_per_conformation(n_atoms, dtype)
    return min(fits, 128 if device.type == "cpu" else 16384)


def slices(n: int, size: int) -> Iterator[slice]:
    """Blocks of `size` rows and what is left."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def share(run: Callable[[slice], None], blocks: list[slice], n_threads: int) -> None:
    """Run all blocks; the threads end with the call, so that nothing outlives a fork."""
    if n_threads == 1 or len(blocks) < 2 * n_threads:
        for rows in blocks:
            run(rows)
        return
    with ThreadPoolExecutor(n_threads, f"torch-potential-{os.getpid()}") as pool:
        for future in [pool.submit(run, rows) for rows in blocks]:
            future.result()


def threads_for(n_atoms: int, device: torch.device) -> int:
    """Threads that share blocks: torch's, unless a single operation already uses them."""
    small = n_atoms**2 * 16 <= _GRAIN
    return torch.get_num_threads() if device.type == "cpu" and small else 1


def plain(
    total: Total, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
) -> tuple[Tensor, Tensor | None]:
    """Energies [B] and their derivative [3, N, B] by single operations."""
    if not with_forces:
        with torch.no_grad():
            return total(y, *parameters), None
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        energy = total(y, *parameters)
        if not energy.requires_grad:  # nothing depends on the positions
            return energy, torch.zeros_like(y)
        (slope,) = torch.autograd.grad(energy.sum(), y)
    return energy.detach(), slope


def settle_non_finite(energies: Tensor, forces: Tensor | None) -> int:
    """Set non-finite rows to +inf and zero force, in place; return how many there are."""
    finite = energies.isfinite()
    if forces is not None:
        finite = finite & forces.isfinite().flatten(1).all(dim=1)
    count = int((~finite).sum())
    if count:
        energies[~finite] = torch.inf
        if forces is not None:
            forces[~finite] = 0.0
    return count
