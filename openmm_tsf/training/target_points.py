"""Points of the target with what path gradients need of them: computed once."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training.basins import basin_labels
from openmm_tsf.training.losses import action

_BLOCK = 4096


@dataclass
class Points:
    """B points in the network's output space, each of a temperature.

    Attributes
    ----------
    y
        [B, d], in the training's precision.
    action
        :func:`openmm_tsf.training.losses.action` [B], float64.
    slope
        Its gradient [B, d], in the training's precision.
    basin
        Basin [B], int64.
    tau
        T/T_ref [B], in the training's precision.
    """

    y: Tensor
    action: Tensor
    slope: Tensor
    basin: Tensor
    tau: Tensor

    @classmethod
    def at(
        cls,
        flow: AugmentedFlow,
        potential: Potential,
        molecule: MolecularSystem | None,
        y: Tensor,
        tau: Tensor,
        ceiling: float,
    ) -> Self:
        """Evaluate the target at y [B, d] of temperatures tau [B]: one energy with forces each."""
        actions, slopes, basins = [], [], []
        for some, at in zip(y.split(_BLOCK), tau.split(_BLOCK), strict=True):
            leaf = some.detach().double().requires_grad_()
            with torch.enable_grad():
                value, x = action(flow, potential, leaf, at.double(), ceiling)
                finite = torch.isfinite(value)
                (slope,) = torch.autograd.grad(torch.where(finite, value, 0.0).sum(), leaf)
            actions.append(value.detach())
            slopes.append(slope.to(y.dtype))
            basins.append(basin_labels(molecule, x))
        return cls(y.detach(), torch.cat(actions), torch.cat(slopes), torch.cat(basins), tau)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> "Points":
        """Those at `index`, numbers or bools."""
        return Points(*(getattr(self, field.name)[index] for field in fields(self)))

    def put(self, index: Tensor, other: "Points") -> None:
        """Replace those at `index`, numbers."""
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(other, field.name)

    @staticmethod
    def join(parts: "list[Points]") -> "Points":
        """All of several, in order."""
        return Points(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Points))
        )

    def state_dict(self) -> dict[str, Any]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If a tensor is missing, of another shape or type, or not finite.
        """
        for field in fields(self):
            like, found = getattr(self, field.name), content.get(field.name)
            if (
                not isinstance(found, Tensor)
                or found.shape != like.shape
                or found.dtype != like.dtype
            ):
                raise ValueError(
                    f"{field.name}: expected {like.dtype} of shape {tuple(like.shape)}"
                )
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"{field.name}: expected finite numbers, got NaN or infinity")
            if field.name == "basin" and bool(((found < 0) | (found > 1)).any()):
                raise ValueError("basin: expected 0 and 1, got others")
            if field.name == "tau" and not torch.equal(found, like):
                raise ValueError("tau: expected the temperatures of the training, got others")
            setattr(self, field.name, found.clone())
