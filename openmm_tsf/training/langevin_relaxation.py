"""Points brought to a temperature by Metropolised Langevin steps: no flow is needed."""

from collections.abc import Callable

import torch
from torch import Tensor

from openmm_tsf.training.target_points import Points

#: Where the step begins, in standard deviations of the data, and how fast it is tuned.
_FIRST_STEP, _TUNING = 0.2, 0.15
#: Roberts and Rosenthal, J. R. Statist. Soc. B 60, 255 (1998).
_ACCEPTANCE = 0.574


def relax(
    points: Points,
    at: Callable[[Tensor, Tensor], Points],
    n_steps: int,
    generator: torch.Generator,
) -> float:
    """Steps of the Metropolis-adjusted Langevin algorithm for all of some points, in place.

    Whitened coordinates have one scale, so one length of step serves all; it is tuned on the way,
    which is why this is for the beginning of chains, not for samples.

    Parameters
    ----------
    points
        Of one temperature, in space y.
    at
        Evaluates the target at y [B, d] of temperatures tau [B].
    n_steps
        Evaluations of each point.

    Returns
    -------
    acceptance
        Share of accepted steps in the second half.
    """
    step, accepted_late = _FIRST_STEP, []
    for number in range(n_steps):
        noise = torch.randn(points.y.shape, generator=generator, dtype=points.y.dtype)
        new = at(points.y - 0.5 * step**2 * points.slope + step * noise, points.tau)
        back = (points.y - new.y + 0.5 * step**2 * new.slope) / step
        log_ratio = points.action - new.action
        log_ratio -= 0.5 * (back.double().square().sum(1) - noise.double().square().sum(1))
        threshold = torch.rand(len(points), generator=generator, dtype=torch.float64).log()
        accepted = (threshold < log_ratio).nonzero().flatten()  # NaN: not accepted
        points.put(accepted, new.take(accepted))
        share = len(accepted) / len(points)
        step *= 2.0 ** (_TUNING * (share - _ACCEPTANCE) / _ACCEPTANCE)
        if 2 * number >= n_steps:
            accepted_late.append(share)
    return sum(accepted_late) / max(1, len(accepted_late))
