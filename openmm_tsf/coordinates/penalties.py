"""Finite geometry and smooth penalties outside the domain, for training only.

Never for samples: proposals outside the domain are rejected.
"""

import math

import torch
from torch import Tensor

from openmm_tsf.coordinates.geometry import TWO_PI, wrap

#: Bonds r^3/3 (or r) are clamped to at least this fraction of the reference's.
BOND_FLOOR = 0.3
#: |cos theta| is clamped to at most this.
COS_CEILING = 0.999
#: Violations by cosines are relative to this, that of 8 degrees from a line: about as far as linear
#: groups bend. With a much wider penalty, most of the target's weight would be beyond the line.
COS_SCALE = 0.01


def clamp_bonds_and_angles(
    bonds: Tensor, angles: Tensor, reference_bonds: Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamp bonds [B, N-1] and angles [B, N-2] to where the geometry is finite.

    The third result is the sum of the squared changes [B], those of bonds relative to the
    reference's, those of cosines to `COS_SCALE`.
    """
    limit, scale, angle_scale = COS_CEILING, reference_bonds, 1.0
    if metric == "volume":
        scale, low, high, angle_scale = scale**3 / 3.0, -limit, limit, COS_SCALE
    else:
        low, high = math.acos(limit), math.acos(-limit)
    bonds, bond_penalty = _clamp(bonds / scale, BOND_FLOOR, math.inf)
    angles, angle_penalty = _clamp(angles, low, high)
    return bonds * scale, angles, bond_penalty + angle_penalty / angle_scale**2


def _clamp(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    clamped = values.clamp(low, high)
    return clamped, (values - clamped).square().sum(-1)


def branch_penalty(torsions: Tensor, cuts: Tensor) -> Tensor:
    """Sum of squared distances [B] of torsions [B, n] to [cut, cut + 2 pi], in radians^2."""
    clamped = torch.maximum(torch.minimum(torsions, cuts + TWO_PI), cuts)
    return (torsions - clamped).square().sum(-1)


def half_circle_penalty(offsets: Tensor, sign: float) -> Tensor:
    """Sum of squared distances [B] of offsets [B, n] to the angles whose sine has a sign."""
    from_middle = offsets - sign * (0.5 * math.pi)
    distance = wrap(from_middle, torch.full_like(from_middle[:1], -math.pi)).abs()
    return torch.relu(distance - 0.5 * math.pi).square().sum(-1)
