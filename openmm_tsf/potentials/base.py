"""The interface of a potential: batched, differentiable, counting its evaluations."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class Potential(ABC):
    """A potential energy U(x) for batches of configurations.

    A subclass sets `event_shape` and `boltzmann_constant`, computes energies that torch can
    differentiate, and counts its evaluations.

    Attributes
    ----------
    event_shape : tuple of int
        Shape of one configuration: (N, 3) for molecules, (d,) for toy systems.
    boltzmann_constant : float
        k_B in the potential's energy unit per kelvin (1 for toy systems).
    n_evaluations : int
        Number of energies computed so far; an energy with its forces counts once.
    n_non_finite : int
        Number of them that were not finite. Such energies are +inf, with zero force.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf import Potential
    >>> class Spring(Potential):
    ...     event_shape = (1,)
    ...     boltzmann_constant = 1.0
    ...
    ...     def energy(self, x):
    ...         self.check_positions(x)
    ...         self.n_evaluations += len(x)
    ...         return 0.5 * x.square().sum(dim=1)
    ...
    ...     def energy_and_forces(self, x):
    ...         return self.energy(x.detach()), -x.detach()
    >>> spring = Spring()
    >>> spring.energy(torch.tensor([[1.0], [2.0]]))
    tensor([0.5000, 2.0000])
    >>> spring.n_evaluations
    2
    """

    event_shape: tuple[int, ...]
    boltzmann_constant: float
    n_evaluations: int = 0
    n_non_finite: int = 0

    @abstractmethod
    def energy(self, x: Tensor) -> Tensor:
        """Return the potential energies [B] of configurations [B, *event], differentiable."""

    @abstractmethod
    def energy_and_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the detached energies [B] and forces [B, *event] of configurations [B, *event]."""

    def check_positions(self, x: Tensor) -> None:
        """Refuse anything but a floating-point tensor [B, *event]."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point torch.Tensor, got {type(x).__name__}")
        if x.ndim != 1 + len(self.event_shape) or tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"x: expected shape [B, {self.event_shape}], got {tuple(x.shape)}")

    def close(self) -> None:  # noqa: B027 (most potentials hold no resources)
        """Free the potential's resources. Calling it twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@runtime_checkable
class HasSinglePrecision(Protocol):
    """A potential that also computes forces in float32."""

    dtype: torch.dtype

    def single_precision_forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies [B] and forces [B, *event] of x [B, *event], in the dtype of x."""


def describe_potential(potential: Potential) -> dict[str, Any]:
    """Return what a resumed run needs to open the same potential again, JSON-serialisable."""
    return {
        "class": type(potential).__name__,
        "platform": getattr(potential, "platform_name", None),
        "n_contexts": getattr(potential, "n_contexts", None),
        "compiled": getattr(potential, "compile_requested", None),
    }


def is_potential_description(content: Any) -> bool:
    """Return whether `content`, read from a file, can be from :func:`describe_potential`."""
    if not isinstance(content, dict) or not {"platform", "n_contexts"} <= content.keys():
        return False
    platform, count = content["platform"], content["n_contexts"]
    return (platform is None or isinstance(platform, str)) and (
        count is None or (isinstance(count, int) and not isinstance(count, bool))
    )
