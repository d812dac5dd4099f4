"""What a kernel is."""

from typing import Any, Protocol, runtime_checkable

import torch

from openmm_tsf.sampling.state import KernelInfo, WalkerState


@runtime_checkable
class Kernel(Protocol):
    """A Markov kernel on walkers that leaves the Boltzmann distribution of every rung invariant.

    Attributes
    ----------
    name : str
        Name in counts and summaries.
    exact : bool
        Whether the distribution is left invariant exactly, or up to a time-step error.
    """

    @property
    def name(self) -> str:
        """Name in counts and summaries."""
        ...

    @property
    def exact(self) -> bool:
        """No time-step error."""
        ...

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The ladder, K."""
        ...

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of :attr:`KernelInfo.accepted`."""
        ...

    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """The next state and what happened. All randomness comes from `generator`."""
        ...

    def settings(self) -> dict[str, Any]:
        """Every choice made, as json-able values; equal settings make equal kernels."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What changes from call to call or by tuning, as tensors and plain numbers."""
        ...

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        ...


@runtime_checkable
class Closable(Protocol):
    """A kernel that holds Contexts or threads until it is closed."""

    def close(self) -> None:
        """Free them."""


_FLOW = ("n_momenta", "reference_temperature", "event_shape", "dtype", "forward_and_log_det",
         "inverse_and_log_det", "place", "is_mirror_image")  # fmt: skip


def kernel_name(name: Any) -> str:
    """A name: files and summaries are keyed by it.

    Raises
    ------
    TypeError
        If it is no string, or an empty one.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string that is not empty, got {name!r}")
    return name


def check_flow(flow: Any) -> None:
    """Refuse what has not the face of a flow.

    Raises
    ------
    TypeError
        If something is missing.
    """
    missing = [part for part in _FLOW if not hasattr(flow, part)]
    if missing:
        raise TypeError(
            f"flow: expected a flow, got {type(flow).__name__}, which has no {missing[0]}"
        )
