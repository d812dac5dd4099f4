"""What a kernel is, and what kernels need of a flow."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.devices import CPU, DeviceConstants


@runtime_checkable
class Kernel(Protocol):
    """A Markov kernel on walkers that leaves the Boltzmann distribution of every rung invariant.

    Any class with these members is a kernel; there is nothing to derive from.

    Examples
    --------
    A random walk in Cartesian coordinates:

    >>> import torch
    >>> from openmm_tsf.metropolis import metropolis
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> from openmm_tsf.sampling.kernels import Kernel, KernelInfo
    >>> class CartesianWalk:
    ...     name, exact = "cartesian_walk", True
    ...
    ...     def __init__(self, potential, temperatures, step):
    ...         self.potential, self.temperatures, self.step = potential, temperatures, step
    ...         self.counts_shape = (len(temperatures),)
    ...
    ...     def __call__(self, state, generator):
    ...         noise = torch.randn(state.x.shape, generator=generator, dtype=state.x.dtype)
    ...         x = state.x + self.step * noise
    ...         energy = self.potential.energy(x.flatten(0, 1)).reshape(state.energy.shape)
    ...         kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
    ...         kt = self.potential.boltzmann_constant * kelvin
    ...         current, proposed = -state.energy / kt, -energy / kt
    ...         accepted, _ = metropolis(current.flatten(), proposed.flatten(), generator)
    ...         accepted = accepted.reshape(energy.shape)
    ...         state = state.evolve(
    ...             x=torch.where(accepted[..., None], x, state.x),
    ...             energy=torch.where(accepted, energy, state.energy),
    ...         )
    ...         proposed = torch.full(self.counts_shape, len(energy))
    ...         return state, KernelInfo(accepted.sum(0), proposed, n_evaluations=energy.numel())
    ...
    ...     def settings(self):
    ...         return {"step": self.step}
    ...
    ...     def state_dict(self):
    ...         return {}
    ...
    ...     def load_state_dict(self, content):
    ...         pass
    >>> walk = CartesianWalk(GaussianWell(torch.eye(2).double()), (1.0, 2.0), step=0.5)
    >>> isinstance(walk, Kernel)
    True
    """

    @property
    def name(self) -> str:
        """The name in counts and summaries."""

    @property
    def exact(self) -> bool:
        """Whether the distribution is left invariant exactly, without a time-step error."""

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures of the ladder, K."""

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """The shape of :attr:`KernelInfo.accepted`."""

    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Return the next state and the counts. All random numbers come from `generator`."""

    def settings(self) -> dict[str, Any]:
        """Return every choice made, as JSON values; equal settings make equal kernels."""

    def state_dict(self) -> dict[str, Any]:
        """Return what changes from call to call or by tuning, as tensors and plain numbers."""

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


@runtime_checkable
class Closable(Protocol):
    """A kernel that holds Contexts or threads until it is closed."""

    def close(self) -> None:
        """Free them."""


class RungKernel(DeviceConstants):
    """What kernels with counts per rung share: temperatures, kT [R], and an empty state."""

    def __init__(self, temperatures: Any, boltzmann_constant: float) -> None:
        self.temperatures = as_temperatures(temperatures)
        self.kt = boltzmann_constant * torch.tensor(
            self.temperatures, dtype=torch.float64, device="cpu"
        )

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """The shape of the counts: one number per rung."""
        return (len(self.temperatures),)

    def state_dict(self) -> dict[str, Any]:
        """Return what changes from call to call or by tuning: nothing."""
        return {}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""


class SteerableMap(Protocol):
    """What kernels need of a flow: a bijection v [B, d + m] -> (x [B, *event], p [B, m]).

    d is the number of coordinates and m that of auxiliary momenta p. The prior of v at temperature
    T is N(0, tau), tau = T / T_ref. :class:`openmm_tsf.TemperatureSteerableFlow`,
    :class:`openmm_tsf.RealNVPFlow` and :class:`WhitenedCoordinates` are such maps.

    Lengths are in nm for molecules. All tensors are of :attr:`dtype`. A map that is not on the CPU
    has an attribute ``device``.
    """

    @property
    def n_coordinates(self) -> int:
        """The number d of coordinates."""

    @property
    def n_momenta(self) -> int:
        """The number m of auxiliary momenta."""

    @property
    def reference_temperature(self) -> float:
        """T_ref in K, the temperature at which the prior of v is N(0, 1)."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one configuration, (N, 3) or (d,)."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all inputs and outputs."""

    @property
    def coordinates(self) -> object | None:
        """The layer of internal coordinates; None where all of R^d is in the domain of the map."""

    @property
    def overlap(self) -> bool:
        """Whether one x belongs to several v (copies by equivalent hydrogens), with weights."""

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Map v [B, d + m] to (x [B, *event], p [B, m]) and log|J| [B], -inf outside the domain."""

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x [B, *event] and p [B, m] to v [B, d + m] and -log|J| [B], -inf outside the domain.

        `copies` [B, G], from :meth:`draw_copies`, says which of overlapping copies each x is.
        """

    def draw_copies(
        self, x: Tensor, temperature: Any, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw the copy that each x [B, *event] is: copies [B, G] and ln of their weights [B].

        `temperature` in K, one number or one per row [B]. Called only where :attr:`overlap`.
        """

    def log_partition(self, x: Tensor, temperature: Any) -> Tensor:
        """Return ln of the weight [B] of the copies that the forward map has returned as x.

        `temperature` in K, one number or one per row [B]. Called only where :attr:`overlap`.
        """

    def match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        """Return x in the pose (and with the hydrogen labels) of `like`, all [B, *event]."""

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a centre of the wrong handedness, [B] bool."""

    def is_in_domain(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a v, [B] bool: where the inverse's log|J| is finite."""


_MAP_MEMBERS = tuple(name for name in vars(SteerableMap) if not name.startswith("_"))


def check_flow(flow: Any) -> None:
    """Refuse an object that lacks a member of :class:`SteerableMap`."""
    missing = [name for name in _MAP_MEMBERS if not hasattr(flow, name)]
    if missing:
        name = type(flow).__name__
        raise TypeError(f"flow: expected a flow, got {name}, which has no {missing[0]}")


def device_of_map(flow: Any) -> torch.device:
    """Return the device of a map and of its walkers: the CPU for a map that says none."""
    device: torch.device = getattr(flow, "device", CPU)
    return device


def check_name(name: Any) -> str:
    """Return a kernel's name, which is a key of files and summaries, or raise TypeError."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string that is not empty, got {name!r}")
    return str(name)
