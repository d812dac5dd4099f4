"""Checks of tensors, and what the processor can do with them."""

from functools import cache
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


@cache
def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies matrices of bfloat16, and torch makes use of it.

    Emulated products are slower than those of float32. Versions of torch that cannot tell what a
    processor can do count as without.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return native and torch.backends.mkldnn.is_available()
