"""Devices of torch: checked, described, and constants on them."""

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def available_devices() -> list[str]:
    """Return the names of torch's devices: ``"cpu"`` and, where there are any, ``"cuda:0"``, ..."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{index}" for index in range(n_cuda))]


def check_device(device: Any, name: str = "device") -> torch.device:
    """Return a device, with its index; None is the CPU.

    Raises
    ------
    ValueError
        If there is no such device here: the error says which there are.
    """
    reason = "only the CPU and CUDA devices are supported"
    try:
        chosen = torch.device(CPU if device is None else device)
        if chosen.type in ("cpu", "cuda"):
            return torch.empty(0, device=chosen, dtype=torch.float32).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
    got = f"{device!r} ({reason}); available here: {', '.join(available_devices())}"
    raise ValueError(f"{name}: expected a torch device, got {got}")


def describe_device(device: torch.device) -> str:
    """Return the kind of a device, with the card's name if it is a GPU."""
    if device.type != "cuda":
        return device.type
    return f"cuda, {torch.cuda.get_device_name(device)}"


class DeviceConstants:
    """Base class of what holds constant tensors and needs them on the device of its arguments."""

    def on_device(self, name: str, device: torch.device) -> Tensor:
        """Return the tensor of an attribute on a device, copied there once for each value."""
        tensor: Tensor = getattr(self, name)
        if tensor.device == device:
            return tensor
        copies: dict[str, tuple[Tensor, int, Tensor]] = self.__dict__.setdefault("_copies", {})
        version = 0 if tensor.is_inference() else tensor._version
        known = copies.get(name)
        if known is None or known[0] is not tensor or known[1] != version:
            known = None
        if known is None or known[2].device != device:
            known = copies[name] = (tensor, version, tensor.to(device))
        return known[2]
