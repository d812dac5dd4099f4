"""Metropolised proposals through the flow: TSF-MCMC walk and independence moves."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import check_flow, kernel_name
from openmm_tsf.sampling.state import KernelInfo, WalkerState, per_rung
from openmm_tsf.sampling.tuning import step_sizes
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import check_float, check_int


@runtime_checkable
class SteerableMap(Protocol):
    """What the moves ask of a flow v -> (x, p)."""

    n_coordinates: int
    n_momenta: int
    reference_temperature: float

    @property
    def event_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
    def inverse_and_log_det(self, x: Tensor, momenta: Tensor) -> tuple[Tensor, Tensor]: ...
    def place(self, x: Tensor, like: Tensor) -> Tensor: ...
    def is_mirror_image(self, x: Tensor) -> Tensor: ...


class FlowKernel:
    """What both moves share: the augmented state, the proposal's evaluation, the acceptance.

    The momenta are drawn once a call, and v = D^-1(x, p) is computed once: after each of the
    `n_steps` decisions the state's v is known, v' if accepted and v if not. Every step leaves the
    joint density of (x, p) invariant, and so does drawing p from its conditional; their product
    therefore leaves that of x invariant. That v' is also the preimage of the stored x', which has
    the pose and the labels of x, is what the round-trip check sees in the next call.

    Parameters
    ----------
    flow
        The flow; float64, or a dtype in which the round trip stays below the tolerance.
    potential
        The energy.
    temperatures
        The ladder, K. The prior of v at temperature T is N(0, tau), tau = T / T_ref.
    n_steps
        Proposals, each accepted or rejected, in one call.
    round_trip_interval
        Every so many iterations, check D(D^-1(x)) = x for some walkers.
    round_trip_walkers
        For how many; a different set each time.
    round_trip_tolerance
        Largest deviation of a coordinate that is let pass (nm for molecules).
    """

    exact = True
    name: str

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        n_steps: int = 1,
        round_trip_interval: int = 25,
        round_trip_walkers: int = 4,
        round_trip_tolerance: float = 1e-6,
    ) -> None:
        check_flow(flow)
        if tuple(flow.event_shape) != tuple(potential.event_shape):
            raise ValueError(
                f"flow: expected configurations of the potential's shape "
                f"{tuple(potential.event_shape)}, got {tuple(flow.event_shape)}"
            )
        if not check_float(round_trip_tolerance, "round_trip_tolerance") > 0:
            raise ValueError(
                f"round_trip_tolerance: expected a positive number, got {round_trip_tolerance!r}"
            )
        self.flow, self.potential = flow, potential
        self.temperatures = as_temperatures(temperatures)
        self.n_steps = check_int(n_steps, "n_steps")
        self.round_trip_interval = check_int(round_trip_interval, "round_trip_interval")
        self.round_trip_walkers = check_int(round_trip_walkers, "round_trip_walkers")
        self.round_trip_tolerance = round_trip_tolerance
        kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
        # Copies of a configuration that overlap: one is drawn with the momenta, and its share is
        # part of the joint density.
        self._overlap = bool(getattr(flow, "overlap", False))
        self._kt = potential.boltzmann_constant * kelvin
        self._tau = kelvin / flow.reference_temperature

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per rung."""
        return (len(self.temperatures),)

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        return {
            "kernel": type(self).__name__,
            "n_steps": self.n_steps,
            "round_trip_interval": self.round_trip_interval,
            "round_trip_walkers": self.round_trip_walkers,
            "round_trip_tolerance": self.round_trip_tolerance,
        }

    def state_dict(self) -> dict[str, Any]:
        """What tuning changes."""
        return {}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""

    def _evaluate(
        self, v: Tensor, like: Tensor, tau: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x in the pose of `like`, p, log|J_D|, U of each v [B, d+m]; see :meth:`_domain`."""
        x, momenta, log_det = self._forward(v, tau)
        # Outside the domain there is nothing to evaluate; the energy is +inf there.
        inside, mirror = self._domain(x, log_det)
        energy = torch.full_like(log_det, float("inf"))
        if bool(inside.any()):
            # The pose is the walker's own: only internal coordinates are proposed. The energy is
            # that of what would be stored, whatever the potential does with the pose and the
            # flow's dtype with the last digits.
            x = x.clone()
            x[inside] = self._place(x[inside], like[inside])
            energy[inside] = evaluate.energy(self.potential, x[inside])
        return x, momenta, log_det, energy, inside, mirror

    def _domain(self, x: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows [B] are in the domain, and which are mirror images, whatever their log|J_D|.

        No walker starts at a mirror image: a flow that could propose one and not come back from it
        would not be reversible.
        """
        finite = torch.isfinite(x).flatten(1).all(dim=1)
        mirror = torch.zeros_like(finite)
        if bool(finite.any()):
            mirror[finite] = self.flow.is_mirror_image(x[finite].to(self.flow.dtype))
        return finite & torch.isfinite(log_det) & ~mirror, mirror

    def _log_weight(
        self, energy: Tensor, kt: Tensor, momenta: Tensor, tau: Tensor, log_det: Tensor
    ) -> Tensor:
        """log of the target density of v [B]: -U/kT - |p|^2 / 2 tau + log|J_D|."""
        return -energy / kt - momenta.square().sum(dim=1) / (2 * tau) + log_det

    def _forward(self, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, p and log|J_D|, plus the log-share of the copy where copies overlap."""
        (x, momenta), log_det = self.flow.forward_and_log_det(v.to(self.flow.dtype))
        if self._overlap:
            inside = torch.isfinite(log_det.detach()).nonzero().flatten()
            kelvin = (tau[inside] * self.flow.reference_temperature).to(x)
            share = self.flow.log_partition(x[inside], kelvin)  # type: ignore[attr-defined]
            log_det = log_det.index_add(0, inside, share)
        return x.to(v), momenta.to(v), log_det.to(v)

    def _place(self, x: Tensor, like: Tensor) -> Tensor:
        dtype = self.flow.dtype
        return self.flow.place(x.to(dtype), like=like.to(dtype)).to(x)

    def _inverse(
        self, x: Tensor, momenta: Tensor, tau: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """v and -log|J_D|, less the log-share of the copy drawn where copies overlap."""
        dtype = self.flow.dtype
        x_own, momenta = x.to(dtype), momenta.to(dtype)
        if self._overlap:
            kelvin = (tau * self.flow.reference_temperature).to(x_own)
            copies, share = self.flow.draw_copies(x_own, kelvin, generator)  # type: ignore[attr-defined]
            v, log_det = self.flow.inverse_and_log_det(x_own, momenta, copies)  # type: ignore[call-arg]
            log_det = log_det - share
        else:
            v, log_det = self.flow.inverse_and_log_det(x_own, momenta)
        return v.to(x), log_det.to(x)

    def _check_round_trip(
        self,
        iteration: int,
        x: Tensor,
        momenta: Tensor,
        v: Tensor,
        inverse_log_det: Tensor,
        tau: Tensor,
    ) -> None:
        """Compare D(D^-1(x, p)) with (x, p), and the two log-determinants.

        Raises
        ------
        RuntimeError
            If they differ by more than the tolerance: the chain would be biased.
        """
        n = min(self.round_trip_walkers, len(x))
        start = iteration // self.round_trip_interval * n
        rows = (start + torch.arange(n)) % len(x)
        # All rows, as in a move: a product of a few rows may be rounded in another way.
        x_back, momenta_back, log_det = (part[rows] for part in self._forward(v, tau))
        x_back = self._place(x_back, x[rows])
        deviations = {
            "positions": (x_back - x[rows]).abs().max().item(),
            "momenta": (momenta_back - momenta[rows]).abs().max().item() if momenta.numel() else 0,
            "log-determinant": (log_det + inverse_log_det[rows]).abs().max().item(),
        }
        for what, deviation in deviations.items():
            if not deviation <= self.round_trip_tolerance:
                raise RuntimeError(
                    f"{self.name}: the flow's round trip D(D^-1(x)) misses the {what} by "
                    f"{deviation:.3g} at iteration {iteration} (tolerance "
                    f"{self.round_trip_tolerance:.3g}, flow in {self.flow.dtype}); the chain "
                    "would be biased. Use flow.double() and conditioner_dtype=None, or retrain the "
                    "flow with weight decay"
                )


class FlowProposalKernel(FlowKernel, ABC):
    """A proposal for every walker by itself."""

    @abstractmethod
    def _propose(self, v: Tensor, tau: Tensor, generator: torch.Generator) -> Tensor:
        """Proposed latents [B, d + m]."""

    @abstractmethod
    def _reverse(self, v: Tensor, tau: Tensor) -> Tensor | float:
        """Minus the log-density [B] of proposing v, up to a constant; 0 if symmetric."""

    @torch.no_grad()
    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """Propose for every walker at every rung in one batch, and accept or reject."""
        shape, x, energy = state.energy.shape, state.x.flatten(0, 1), state.energy.flatten()
        tau, kt = self._tau.repeat(shape[0]), self._kt.repeat(shape[0])
        momenta = torch.randn(
            len(x), self.flow.n_momenta, generator=generator, dtype=torch.float64
        ) * tau.sqrt().unsqueeze(1)
        v, inverse_log_det = self._inverse(x, momenta, tau, generator)
        if state.iteration % self.round_trip_interval == 0:
            self._check_round_trip(state.iteration, x, momenta, v, inverse_log_det, tau)
        current = self._log_weight(energy, kt, momenta, tau, -inverse_log_det)
        total = KernelInfo.zero(self.counts_shape)
        for _ in range(self.n_steps):
            v_new = self._propose(v, tau, generator)
            x_new, momenta_new, log_det_new, energy_new, inside, mirror = self._evaluate(
                v_new, x, tau
            )
            proposed = self._log_weight(energy_new, kt, momenta_new, tau, log_det_new)
            accepted, non_finite = metropolis(
                current + self._reverse(v, tau), proposed + self._reverse(v_new, tau), generator
            )
            mirrors, n_evaluations = int(mirror.sum()), int(inside.sum())
            total = total + KernelInfo(
                *per_rung(accepted.reshape(shape), shape[0]),
                rejected_non_finite=int(non_finite.sum()) - mirrors,
                mirror_images=mirrors,
                n_evaluations=n_evaluations,
                outside_domain=len(x) - n_evaluations - mirrors,  # nothing there is evaluated
            )
            x = torch.where(accepted.reshape(-1, *(1,) * (x.ndim - 1)), x_new, x)
            v = torch.where(accepted.unsqueeze(1), v_new, v)
            energy = torch.where(accepted, energy_new, energy)
            current = torch.where(accepted, proposed, current)
        return state.evolve(x=x.reshape(state.x.shape), energy=energy.reshape(shape)), total


class FlowWalk(FlowProposalKernel):
    """TSF-MCMC (arXiv:2012.00429, section 2): a random step in the latent space.

    p ~ N(0, tau); v = D^-1(x, p); v' = v + xi, xi ~ N(0, sigma^2 tau); (x', p') = D(v');
    log alpha = -dU/kT - d|p|^2 / 2 tau + d log|J_D|. Velocities stay as they are.

    Parameters
    ----------
    flow, potential, temperatures, n_steps
        See :class:`FlowKernel`.
    sigma
        Step size, one number or one per rung [R].
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        sigma: Any = 0.1,
        name: str = "flow_walk",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, n_steps, **round_trip)
        self.name = kernel_name(name)
        self.sigma = sigma

    @property
    def sigma(self) -> Tensor:
        """Step sizes [R]."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: Any) -> None:
        self._sigma = step_sizes(value, len(self.temperatures))

    def state_dict(self) -> dict[str, Any]:
        """The step sizes."""
        return {"sigma": self._sigma.clone()}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set the step sizes."""
        self.sigma = content["sigma"]

    def _propose(self, v: Tensor, tau: Tensor, generator: torch.Generator) -> Tensor:
        width = self._sigma.repeat(len(v) // len(self._sigma)) * tau.sqrt()
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype)
        return v + noise * width.unsqueeze(1)

    def _reverse(self, v: Tensor, tau: Tensor) -> float:
        return 0.0


class FlowIndependence(FlowProposalKernel):
    """A fresh draw from the flow: v' ~ N(0, tau).

    log alpha = -dU/kT - d|p|^2 / 2 tau + d|v|^2 / 2 tau + d log|J_D|. Velocities stay as they are.

    Parameters
    ----------
    flow, potential, temperatures, n_steps
        See :class:`FlowKernel`.
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        name: str = "flow_independent",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, n_steps, **round_trip)
        self.name = kernel_name(name)

    def _propose(self, v: Tensor, tau: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype)
        return noise * tau.sqrt().unsqueeze(1)

    def _reverse(self, v: Tensor, tau: Tensor) -> Tensor:
        return v.square().sum(dim=1) / (2 * tau)
