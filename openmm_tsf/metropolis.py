"""The one Metropolis rule."""

import torch
from torch import Tensor

from openmm_tsf.utils.deferred import check_flag


class InvalidWalker(ValueError):
    """The error of a walker at which the target density vanishes; no kernel moves to one."""


def metropolis(
    current: Tensor, proposed: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Accept or reject a batch of proposals (Metropolis et al. 1953; Hastings 1970).

    The probability is min(1, exp(proposed - current)), compared as logarithms, which cannot
    overflow. Every row draws one uniform number, so that the stream of random numbers does not
    depend on the log-weights.

    Parameters
    ----------
    current, proposed
        Log-weights [B]: the log of the target density, plus the log-density of proposing the other
        state from this one where proposals are not symmetric.
    generator
        Source of the uniform numbers.

    Returns
    -------
    accepted : Tensor
        [B] bool.
    non_finite : Tensor
        [B] bool: proposals that were rejected because their log-weight is NaN or infinite.

    Raises
    ------
    ValueError
        If shapes differ.
    InvalidWalker
        If a current log-weight is not finite (kernels never accept such a state). A ValueError.
        On a GPU within :func:`openmm_tsf.utils.deferred.defer_checks` it is raised at the end.
    """
    if current.ndim != 1 or current.shape != proposed.shape:
        raise ValueError(
            f"proposed: expected log-weights of shape {tuple(current.shape)}, one per row, "
            f"got {tuple(proposed.shape)}"
        )
    bad = ~torch.isfinite(current)
    check_flag(bad.any(), lambda: _raise_invalid(current, bad))
    uniform = torch.rand(
        current.shape, generator=generator, dtype=current.dtype, device=current.device
    )
    non_finite = ~torch.isfinite(proposed)
    accepted = (uniform.log() < proposed - current) & ~non_finite
    return accepted, non_finite


def _raise_invalid(current: Tensor, bad: Tensor) -> None:
    rows = bad.nonzero().flatten().tolist()
    raise InvalidWalker(
        f"current: expected finite log-weights, got {current[rows[0]].item()} at row {rows[0]}"
        f" ({len(rows)} of {len(current)} rows): the walker's state has a non-finite energy "
        "or lies outside the domain of the coordinates"
    )
