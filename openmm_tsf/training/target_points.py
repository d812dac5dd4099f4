"""Points of the target with what path gradients need of them, computed once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from openmm_tsf.training.target import Target

#: Points that are evaluated at once, on the CPU and on a GPU, which blocks of a few thousand do
#: not fill; a point takes some 15 kB besides its energy.
_BLOCK, _GPU_BLOCK = 4096, 2**15


def check_tensor_like(value: Any, like: Tensor, name: str) -> Tensor:
    """Return a value from a file if it is a finite tensor with the type and shape of `like`."""
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype} of shape {tuple(like.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return value


@dataclass
class Points:
    """B points y [B, d] in the network's output space, each with T/T_ref tau [B].

    The reduced energy [B] is float64 (:meth:`Target.reduced_energy`), its gradient [B, d], y and
    tau have the training's precision, the basin [B] is int64.
    """

    y: Tensor
    reduced_energy: Tensor
    gradient: Tensor
    basin: Tensor
    tau: Tensor

    @classmethod
    def at(cls, target: Target, y: Tensor, tau: Tensor) -> Self:
        """Evaluate the target at y [B, d] and tau [B]: one energy with forces per point."""
        energies, gradients, basins = [], [], []
        size = _BLOCK if y.device.type == "cpu" else _GPU_BLOCK
        for block, block_tau in zip(y.split(size), tau.split(size), strict=True):
            leaf = block.detach().double().requires_grad_()
            with torch.enable_grad():
                energy, x = target.reduced_energy(leaf, block_tau.double())
                finite = torch.isfinite(energy)
                (gradient,) = torch.autograd.grad(torch.where(finite, energy, 0.0).sum(), leaf)
            energies.append(energy.detach())
            gradients.append(gradient.to(y.dtype))
            basins.append(target.basins.labels(x))
        return cls(y.detach(), torch.cat(energies), torch.cat(gradients), torch.cat(basins), tau)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> "Points":
        """Return the points at `index`, integers or bools."""
        return Points(*(getattr(self, field.name)[index] for field in fields(self)))

    def rows(self, part: slice) -> "Points":
        """Return a part of the points that shares their memory."""
        return Points(*(getattr(self, field.name)[part] for field in fields(self)))

    def put(self, index: Tensor, other: "Points") -> None:
        """Replace the points at `index`, integers."""
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(other, field.name)

    def replace(self, index: Tensor, other: "Points", chosen: Tensor) -> None:
        """Replace the points at `index`, each named once, where `chosen` is true."""
        for field in fields(self):
            tensor, new = getattr(self, field.name), getattr(other, field.name)
            mask = chosen.view(-1, *(1,) * (new.ndim - 1))
            tensor[index] = torch.where(mask, new, tensor[index])

    @staticmethod
    def join(parts: "list[Points]") -> "Points":
        """Concatenate several sets of points."""
        return Points(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Points))
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if a tensor does not fit."""
        for name, like in self.state_dict().items():
            tensor = check_tensor_like(content.get(name), like, name)
            if name == "tau" and not torch.equal(tensor, like.cpu()):
                raise ValueError("tau: expected the temperatures of the training, got others")
            setattr(self, name, tensor.to(like, copy=True))
