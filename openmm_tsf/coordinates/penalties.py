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
#: Violations by cosines of linear angles are relative to this, that of 8 degrees from the line:
#: about as far as they bend. With 1, most of the target's weight would be beyond the line.
LINEAR_SCALE = 0.01


def clamp_bonds_and_angles(
    bonds: Tensor, angles: Tensor, reference_bonds: Tensor, linear: Tensor, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Clamp bonds [B, n] and angles [B, N-2] to where the geometry is finite.

    The third result is the sum of the squared changes [B], those of bonds relative to the
    reference's, those of cosines of `linear` angles [N-2] to `LINEAR_SCALE`.
    """
    limit, scale = COS_CEILING, reference_bonds
    angle_scale = torch.ones(len(linear), dtype=angles.dtype, device=angles.device)
    if metric == "volume":
        scale, low, high = scale**3 / 3.0, -limit, limit
        angle_scale = torch.where(linear, LINEAR_SCALE, angle_scale)
    else:
        low, high = math.acos(limit), math.acos(-limit)
    bonds, bond_change = _clamp(bonds / scale, BOND_FLOOR, math.inf)
    angles, angle_change = _clamp(angles, low, high)
    penalty = bond_change.square().sum(-1) + (angle_change / angle_scale).square().sum(-1)
    return bonds * scale, angles, penalty


def _clamp(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return the values in [low, high], and by how much they were beyond."""
    clamped = values.clamp(low, high)
    return clamped, values - clamped


def branch_penalty(torsions: Tensor, cuts: Tensor) -> Tensor:
    """Sum of squared distances [B] of torsions [B, n] to [cut, cut + 2 pi], in radians^2."""
    clamped = torch.maximum(torch.minimum(torsions, cuts + TWO_PI), cuts)
    return (torsions - clamped).square().sum(-1)


def half_circle_penalty(offsets: Tensor, sign: float) -> Tensor:
    """Sum of squared distances [B] of offsets [B, n] to the angles whose sine has a sign."""
    from_middle = offsets - sign * (0.5 * math.pi)
    distance = wrap(from_middle, torch.full_like(from_middle[:1], -math.pi)).abs()
    return torch.relu(distance - 0.5 * math.pi).square().sum(-1)
