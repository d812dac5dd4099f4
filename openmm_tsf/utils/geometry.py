"""Products of batched vectors, components first and batch last: [3, ..., B]."""

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the scalar products [..., B] of vectors [3, ..., B]."""
    # unbind, not a[0]: the derivative of an index is a whole array of zeros with one row filled.
    (ax, ay, az), (bx, by, bz) = a.unbind(0), b.unbind(0)
    return ax * bx + ay * by + az * bz


def cross(a: Tensor, b: Tensor) -> Tensor:
    """Return the vector products [3, ..., B] of vectors [3, ..., B]."""
    (ax, ay, az), (bx, by, bz) = a.unbind(0), b.unbind(0)
    return torch.stack((ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx))
