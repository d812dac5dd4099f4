"""The contract of a potential: batched, differentiable, counting."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


class Potential(ABC):
    """A potential energy U(x) for batches of configurations.

    Attributes
    ----------
    event_shape : tuple of int
        Shape of one configuration: (N, 3) for molecules, (d,) for toy systems.
    boltzmann_constant : float
        k_B in the potential's energy unit per kelvin (1 for toy systems).
    n_evaluations : int
        Energies computed so far; an energy with its forces counts once.
    n_non_finite : int
        How many of them were not finite. Such energies are +inf, with zero force.
    """

    event_shape: tuple[int, ...]
    boltzmann_constant: float
    n_evaluations: int = 0
    n_non_finite: int = 0

    @abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """Potential energies [B] of configurations [B, *event], differentiable."""

    @abstractmethod
    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Detached potential energies [B] and forces [B, *event] of configurations [B, *event]."""

    def check_shape(self, x: Tensor) -> None:
        """Refuse anything but a floating tensor [B, *event].

        Raises
        ------
        TypeError
            If `x` is not a floating-point tensor.
        ValueError
            If its shape is not [B, *event].
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point torch.Tensor, got {type(x).__name__}")
        if x.ndim != 1 + len(self.event_shape) or tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x: expected shape [B, {self.event_shape}], got {tuple(x.shape)}")

    def close(self) -> None:  # noqa: B027 (most potentials hold nothing)
        """Free what the potential holds. Calling it twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def potential_choices(potential: Potential) -> dict[str, Any]:
    """Which potential it is, json-able: what a resumed run opens again."""
    return {
        "class": type(potential).__name__,
        "platform": getattr(potential, "platform_name", None),
        "n_contexts": getattr(potential, "n_contexts", None),
        "compiled": getattr(potential, "compile_requested", None),
    }


def is_potential_choice(content: Any) -> bool:
    """Whether something read from a file can be what `potential_choices` said."""
    if not isinstance(content, dict) or not {"platform", "n_contexts"} <= content.keys():
        return False
    platform, count = content["platform"], content["n_contexts"]
    return (platform is None or isinstance(platform, str)) and (
        count is None or (isinstance(count, int) and not isinstance(count, bool))
    )
