"""Exact marginals of a chain of continuous sites with harmonic bonds, by a transfer matrix."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Largest grid step in widths of a bond's Gaussian: the trapezium rule is then exact to e^-35.
_LARGEST_STEP = 0.75
#: Least size of the sum over waves relative to its terms.
_LEAST_SUM = 1e-9


class ChainMarginals(NamedTuple):
    """ln Z, and the probabilities [N, n] of every site on a grid [n] of equal steps."""

    log_partition: float
    grid: Tensor
    probabilities: Tensor


def solve_chain(
    grid: Tensor,
    log_weights: Tensor,
    bond: float,
    n_sites: int,
    waves: Tensor,
    coefficients: Tensor,
) -> ChainMarginals:
    """Return the marginals of N sites φ between two fixed zeros.

    The weight of a configuration is Re Σ_k c_k Π_i exp[w(φ_i) + i q_k φ_i] times
    exp[-(bond/2) Σ (φ_{i+1} - φ_i)²] over the N + 1 bonds. One wave q = 0 with c = 1 is a chain
    with neighbours only; sums of waves make any function of Σ φ_i.

    Parameters
    ----------
    grid, log_weights
        Equally spaced φ [n] and w(φ) [n]; the weight vanishes at both ends of the grid.
    bond, n_sites
        Stiffness of a bond over the temperature; N.
    waves, coefficients
        q [K], and c [K], complex.
    """
    step = float(grid[1] - grid[0])
    least = int(float(grid[-1] - grid[0]) * bond**0.5 / _LARGEST_STEP) + 2
    if len(grid) < least:
        raise ValueError(f"n_points: expected at least {least} for this chain, got {len(grid)}")
    shift = float(log_weights.max())
    phases = waves[:, None] * grid
    site = torch.polar((log_weights - shift).exp().expand_as(phases).contiguous(), phases)
    hop = step * torch.exp(-0.5 * bond * (grid[:, None] - grid) ** 2)
    arriving = [torch.exp(-0.5 * bond * grid**2).to(site).expand_as(site)]
    log_scales = [0.0]
    for _ in range(n_sites - 1):
        leaving = arriving[-1] * site
        scale = float(leaving.abs().max())
        leaving = leaving / scale
        arriving.append(torch.complex(leaving.real @ hop, leaving.imag @ hop))
        log_scales.append(log_scales[-1] + math.log(scale))
    # The chain is its own mirror image: what arrives from the right is what arrived from the left.
    marginals = []
    for left, right in zip(arriving, reversed(arriving), strict=True):
        terms = coefficients[:, None] * left * site * right
        total = terms.real.sum()
        if not total > _LEAST_SUM * terms.sum(dim=1).abs().sum():
            raise ValueError(
                "restraint: expected a mean that the chain reaches, got one whose probability is "
                "lost in rounding"
            )
        marginals.append(terms.real.sum(dim=0) / total)
    first = (coefficients[:, None] * arriving[0] * site * arriving[-1]).real.sum()
    log_partition = float((first * step).log()) + log_scales[-1] + n_sites * shift
    return ChainMarginals(log_partition, grid, torch.stack(marginals))
