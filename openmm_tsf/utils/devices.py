"""Devices of torch: checked, described, and constants on them."""

from typing import Any

import numpy as np
import numpy.typing as npt
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


class HostCopy:
    """Tensors of 8 bytes an element as arrays on the host, without waiting for a GPU.

    All of a GPU's go in one packet into pinned memory, behind what it computes; only `arrays` waits
    for it. Of the CPU's nothing is copied: they must not be changed in place.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.utils.devices import HostCopy
    >>> copy = HostCopy(torch.ones(2, dtype=torch.float64), torch.tensor([3], dtype=torch.int64))
    >>> [array.tolist() for array in copy.arrays()], copy.n_bytes
    ([[1.0, 1.0], [3]], 24)
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.n_bytes = sum(tensor.nbytes for tensor in tensors)
        self._like = [(tensor.shape, tensor.dtype, tensor.numel()) for tensor in tensors]
        self._tensors, self._packet = tensors, None
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return
        parts = [tensor.reshape(-1).view(torch.float64) for tensor in tensors]
        packet = torch.cat(parts)
        self._tensors = ()
        self._packet = torch.empty(packet.shape, dtype=packet.dtype, device=CPU, pin_memory=True)
        self._packet.copy_(packet, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return the arrays, in the order of the tensors, once they have arrived."""
        if self._packet is None:
            return [tensor.detach().numpy() for tensor in self._tensors]
        self._arrived.synchronize()
        parts = np.split(self._packet.numpy(), np.cumsum([n for *_, n in self._like])[:-1])
        kinds = {torch.float64: np.float64, torch.int64: np.int64}
        return [
            part.view(kinds[dtype]).reshape(shape)
            for part, (shape, dtype, _) in zip(parts, self._like, strict=True)
        ]
