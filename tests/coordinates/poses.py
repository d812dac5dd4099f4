"""Rotations with coordinates in which the volume of rotations is constant."""

import torch
from torch import Tensor


def rotation(alpha: Tensor, cos_beta: Tensor, gamma: Tensor) -> Tensor:
    """The rotation [3, 3] (axes as columns) of Euler angles."""
    sin_beta = torch.sqrt(1 - cos_beta**2)
    e1 = torch.stack((sin_beta * alpha.cos(), sin_beta * alpha.sin(), cos_beta))
    up = torch.stack((cos_beta * alpha.cos(), cos_beta * alpha.sin(), -sin_beta))
    side = torch.stack((-alpha.sin(), alpha.cos(), torch.zeros_like(alpha)))
    e2 = gamma.cos() * up + gamma.sin() * side
    return torch.stack((e1, e2, torch.linalg.cross(e1, e2)), dim=1)
