"""Sums over the cells that points belong to, such as basins, without waiting for a GPU.

``torch.bincount``, and every selection by a mask, waits for the device to know how much there is;
sums by atomic additions differ from run to run. These have the bits of ``torch.bincount``.
"""

import torch
from torch import Tensor


def sum_by_cell(values: Tensor, cell: Tensor, n_cells: int) -> Tensor:
    """Return the sums [n_cells] of values [B], float64, over the points of each cell [B]."""
    cells = torch.arange(n_cells, dtype=torch.int64, device=cell.device)
    # One after the other, as bincount adds: other orders would round differently.
    rows = torch.where(cell == cells[:, None], values, 0.0)
    return rows.cumsum(1)[:, -1]


def count_by_cell(cell: Tensor, n_cells: int) -> Tensor:
    """Return the numbers of points [n_cells], int64, in each cell [B]; others are not counted."""
    cells = torch.arange(n_cells, dtype=torch.int64, device=cell.device)
    return (cell == cells[:, None]).sum(1)


def true_rows(mask: Tensor, number: int) -> Tensor:
    """Return the indices [number] of the rows where a mask [B] is true, of which there are so many.

    As ``mask.nonzero()``, whose number is only known once the device has computed it.
    """
    return torch.argsort((~mask).to(torch.uint8), stable=True)[:number]


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the values [B] where a mask is true; NaN if it is nowhere."""
    if values.device.type == "cpu":
        return values[mask].mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum()
