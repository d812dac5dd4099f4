"""Checks of tensors."""

from typing import Any

import torch
from torch import Tensor


def check_tensor(value: Any, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    """Refuse anything but a tensor [B, *shape] with the dtype and device of `like`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")
    if value.ndim != 1 + len(shape) or tuple(value.shape[1:]) != shape:
        expected = ", ".join(map(str, ("B", *shape)))
        raise ValueError(f"{name}: expected shape [{expected}], got {tuple(value.shape)}")
