"""Blocks of a batch: how large they are, and how threads share them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

#: From positions [3, N, B] and global parameters to energies [B].
EnergyFunction = Callable[..., Tensor]

#: Elements below which torch runs an operation on one thread; a block's arrays [N, N, B] stay below
#: it and in a core's cache, and threads share blocks instead.
_GRAIN = 32768
#: Number of arrays [N, N, B] that a block needs at once, derivatives included (measured).
_ARRAYS_PER_BLOCK = 80
#: Rows below which compiling a block does not pay.
MIN_COMPILED_ROWS = 16


def bytes_per_conformation(n_atoms: int, dtype: torch.dtype) -> int:
    """Return the memory that one conformation of a block takes."""
    return _ARRAYS_PER_BLOCK * n_atoms**2 * torch.finfo(dtype).bits // 8


def eager_block_size(n_atoms: int, dtype: torch.dtype, device: torch.device, memory: int) -> int:
    """Return the number of conformations in a block that is evaluated eagerly."""
    fitting = max(1, memory // bytes_per_conformation(n_atoms, dtype))
    return min(fitting, max(16, _GRAIN // n_atoms**2)) if device.type == "cpu" else fitting


def compiled_block_size(n_atoms: int, dtype: torch.dtype, device: torch.device, memory: int) -> int:
    """Return the number of conformations in a compiled block.

    96 are half of the presets' walkers and rungs, so that two threads share them evenly.
    """
    fitting = memory // bytes_per_conformation(n_atoms, dtype)
    return min(fitting, 96 if device.type == "cpu" else 16384)


def block_threads(n_atoms: int, device: torch.device) -> int:
    """Return how many threads share blocks: one if a single operation uses all of torch's."""
    small = n_atoms**2 * 16 <= _GRAIN
    return torch.get_num_threads() if device.type == "cpu" and small else 1


def run_blocks(run: Callable[[slice], None], n_rows: int, size: int, n_threads: int) -> None:
    """Run all blocks of `size` rows; the threads end with the call, so that none is forked."""
    blocks = [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
    if n_threads == 1 or len(blocks) < 2 * n_threads:
        for rows in blocks:
            run(rows)
        return
    with ThreadPoolExecutor(n_threads, f"torch-potential-{os.getpid()}") as pool:
        for future in [pool.submit(run, rows) for rows in blocks]:
            future.result()


def evaluate_eagerly(
    function: EnergyFunction, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the energies [B], and their gradient [3, N, B] if forces are requested."""
    if not with_forces:
        with torch.no_grad():
            return function(y, *parameters), None
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        energy = function(y, *parameters)
        if not energy.requires_grad:  # no term depends on the positions
            return energy, torch.zeros_like(y)
        (gradient,) = torch.autograd.grad(energy.sum(), y)
    return energy.detach(), gradient


def replace_non_finite(energies: Tensor, forces: Tensor | None) -> int | Tensor:
    """Set non-finite rows to +inf and zero force, in place; return their number."""
    if energies.device.type != "cpu":  # to ask whether there are any would wait for the device
        finite = energies.isfinite()
        if forces is not None:
            finite = finite & forces.isfinite().flatten(1).all(dim=1)
            forces.masked_fill_(~finite.reshape(-1, *(1,) * (forces.ndim - 1)), 0.0)
        energies.masked_fill_(~finite, torch.inf)
        return (~finite).sum()
    total = energies.sum() if forces is None else energies.sum() + forces.sum()
    if bool(total.isfinite()):  # then all are: what is not finite makes a sum that is not
        return 0
    finite = energies.isfinite()
    if forces is not None:
        finite = finite & forces.isfinite().flatten(1).all(dim=1)
    count = int((~finite).sum())
    if count:
        energies[~finite] = torch.inf
        if forces is not None:
            forces[~finite] = 0.0
    return count
