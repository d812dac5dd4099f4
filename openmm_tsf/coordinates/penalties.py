"""Smooth penalties for leaving the domain. For training only: samples are rejected there."""

import math

import torch
from torch import Tensor

from openmm_tsf.coordinates.geometry import TWO_PI, wrap


def hold(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """`values` [B, n] held in [low, high], and the sum of squares [B] of what was cut off."""
    held = values.clamp(low, high)
    return held, (values - held).square().sum(-1)


def beyond_branch(torsions: Tensor, cuts: Tensor) -> Tensor:
    """Sum of squared distances [B] of torsions [B, n] to [cut, cut + 2 pi], in radians^2."""
    held = torch.maximum(torch.minimum(torsions, cuts + TWO_PI), cuts)
    return (torsions - held).square().sum(-1)


def outside_half_circle(offsets: Tensor, handedness: Tensor) -> Tensor:
    """Sum of squared distances [B] of offsets [B, n] to the half circle of their handedness [n].

    Radians^2; the half circle is where the sine has the sign of the handedness.
    """
    middle = handedness * (0.5 * math.pi)
    apart = wrap(offsets - middle, torch.full_like(middle, -math.pi))
    return torch.relu(apart.abs() - 0.5 * math.pi).square().sum(-1)
