"""Metropolis-adjusted Langevin steps of points, without a flow; relaxation to a temperature."""

from collections.abc import Callable

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.training.target_points import Points

#: Initial step, in standard deviations of the data.
FIRST_STEP = 0.2
#: Rate of its tuning.
_TUNING = 0.15
#: Roberts and Rosenthal, J. R. Statist. Soc. B 60, 255 (1998).
_ACCEPTANCE = 0.574


def relax_mala(
    points: Points,
    evaluate: Callable[[Tensor, Tensor], Points],
    n_steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Move points by steps of the Metropolis-adjusted Langevin algorithm (MALA), in place.

    Whitened coordinates have one scale, so that one step size serves all. It is tuned on the way:
    this is for initial states, not for samples. `evaluate` computes the target at y [B, d] and
    tau [B]. Returns the fraction of accepted steps in the second half.
    """
    step = points.reduced_energy.new_full((), FIRST_STEP)
    every = torch.arange(len(points), dtype=torch.int64, device=step.device)
    late_acceptance = step.new_zeros(())
    for number in range(n_steps):
        size = step.to(points.tau).expand(len(points))
        y, noise = propose_mala(points, size, generator)
        new = evaluate(y, points.tau)
        accepted = accept_mala(points, new, noise, size, generator)
        points.replace(every, new, accepted)
        acceptance = accepted.sum() / step.new_full((), len(points))
        step = step * tuning_factor(acceptance)
        if 2 * number >= n_steps:
            late_acceptance = late_acceptance + acceptance
    return late_acceptance / max(1, n_steps // 2)


def tuning_factor(acceptance: Tensor) -> Tensor:
    """Return the factors by which step sizes change after steps with these acceptances, float64."""
    exponent = _TUNING * (acceptance - _ACCEPTANCE) / _ACCEPTANCE
    if exponent.device.type == "cpu":  # as the mathematical library rounds, not torch's vectors
        powers = [2.0**value for value in exponent.flatten().tolist()]
        return exponent.new_tensor(powers).view(exponent.shape)
    return torch.pow(2.0, exponent)


def propose_mala(points: Points, step: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the proposals y [B, d] of a MALA step of size `step` [B], and their noise [B, d]."""
    like = points.y
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    size = step[:, None]
    return points.y - 0.5 * size**2 * points.gradient + size * noise, noise


def accept_mala(
    points: Points, new: Points, noise: Tensor, step: Tensor, generator: torch.Generator
) -> Tensor:
    """Return which proposals of :func:`propose_mala`, evaluated as `new`, are accepted [B]."""
    size = step[:, None]
    reverse_noise = (points.y - new.y + 0.5 * size**2 * new.gradient) / size
    current = -points.reduced_energy - 0.5 * noise.double().square().sum(1)
    proposed = -new.reduced_energy - 0.5 * reverse_noise.double().square().sum(1)
    # A frame of infinite energy is replaced by any point of finite energy.
    current = torch.nan_to_num(current, nan=torch.finfo(current.dtype).max)
    return metropolis(current, proposed, generator)[0]
