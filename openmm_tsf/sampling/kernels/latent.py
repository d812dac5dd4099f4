"""Gradient-driven moves in the flow's latent space: Langevin (MALA) and Hamiltonian (HMC).

The target is the Boltzmann distribution pulled back to v (NeuTra, arXiv:1903.03704), momenta
included: pi(v) = exp(-U(x(v))/kT - |p(v)|^2 / 2 tau + log|J_D(v)|).
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.energies import energy_and_forces
from openmm_tsf.sampling.kernels.flow import FlowWalk, SteerableMap
from openmm_tsf.sampling.state import KernelInfo, WalkerState, per_rung
from openmm_tsf.utils.validation import check_float, check_int


class _Rows(NamedTuple):
    """What belongs to each row of a batch: rung's tau and kT [B], pose [B, *event], step [B, 1]."""

    tau: Tensor
    kt: Tensor
    like: Tensor
    step: Tensor


class _Point(NamedTuple):
    """v [B, n], log pi [B] and its gradient [B, n] there, x [B, *event], its energy [B].

    `inside` [B]: whether x is in the flow's domain; `mirror` [B]: whether it is a mirror image.

    Where pi vanishes the gradient is NaN, so that whoever steps on from there stays rejected.
    """

    v: Tensor
    log_weight: Tensor
    gradient: Tensor
    x: Tensor
    energy: Tensor
    inside: Tensor
    mirror: Tensor

    def where(self, chosen: Tensor, other: "_Point") -> "_Point":
        """These rows where `chosen` [B], the other's elsewhere."""
        pairs = zip(self, other, strict=True)
        return _Point(*(torch.where(_along(chosen, a), a, b) for a, b in pairs))


def _along(rows: Tensor, like: Tensor) -> Tensor:
    """rows [B] with trailing axes, to be broadcast against `like` [B, ...]."""
    return rows.reshape(-1, *(1,) * (like.ndim - 1))


class _LatentGradientMove(FlowWalk, ABC):
    """What both share: pi with its gradient, and the acceptance. Step sizes as FlowWalk's.

    As in FlowWalk the momenta are drawn once a call; with several `n_steps` the end of a proposal,
    and its gradient, is the beginning of the next.
    """

    #: The acceptance to tune for.
    target_acceptance: float

    @torch.no_grad()
    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """Propose for every walker at every rung in one batch, and accept or reject."""
        shape = state.energy.shape
        x, energy = state.x.flatten(0, 1), state.energy.flatten()
        tau, kt = self._tau.repeat(shape[0]), self._kt.repeat(shape[0])
        step = (self.sigma.repeat(shape[0]) * tau.sqrt()).unsqueeze(1)
        noise = torch.randn(len(x), self.flow.n_momenta, generator=generator, dtype=torch.float64)
        momenta = noise * tau.sqrt().unsqueeze(1)
        v, inverse_log_det = self._inverse(x, momenta, tau, generator)
        if state.iteration % self.round_trip_interval == 0:
            self._check_round_trip(state.iteration, x, momenta, v, inverse_log_det, tau)
        rows = _Rows(tau, kt, x, step)
        point, n_evaluations = self._at(v, rows)
        # The walker's own configuration and energy, not those that rounding makes of them.
        log_weight = self._log_weight(energy, kt, momenta, tau, -inverse_log_det)
        point = point._replace(log_weight=log_weight, x=x, energy=energy)
        total = KernelInfo.zero(self.counts_shape)
        for _ in range(self.n_steps):
            end, correction, n_more = self._advance(point, rows, generator)
            n_evaluations += n_more
            proposed = end.log_weight + correction
            accepted, non_finite = metropolis(point.log_weight, proposed, generator)
            mirrors = int(end.mirror.sum())
            total = total + KernelInfo(
                *per_rung(accepted.reshape(shape), shape[0]),
                rejected_non_finite=int(non_finite.sum()) - mirrors,
                mirror_images=mirrors,
                n_evaluations=n_evaluations,
                outside_domain=int((~end.inside).sum()) - mirrors,
            )
            n_evaluations = 0
            point = end.where(accepted, point)
        new = state.evolve(x=point.x.reshape(state.x.shape), energy=point.energy.reshape(shape))
        return new, total

    @abstractmethod
    def _advance(
        self, start: _Point, rows: _Rows, generator: torch.Generator
    ) -> tuple[_Point, Tensor, int]:
        """A proposal, what the acceptance has besides the two densities [B], evaluations."""

    def _at(self, v: Tensor, rows: _Rows) -> tuple[_Point, int]:
        """pi and its gradient at v [B, n]: one energy with forces for each row in the domain."""
        energy = torch.full_like(rows.kt, float("inf"))
        gradient = torch.full_like(v, float("nan"))
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            x, momenta, log_det = self._forward(leaf, rows.tau)
            allowed, mirror = self._domain(x.detach(), log_det.detach())
            inside = allowed.nonzero().flatten()
            stored = x.detach()
            if len(inside):
                placed = self._place(x[inside], rows.like[inside])
                stored = stored.index_put((inside,), placed.detach())
                found, forces = energy_and_forces(self.potential, placed.detach())
                energy[inside] = found.to(energy)
                # Its gradient is that of U, without asking the potential for a graph.
                work = -(forces * placed).flatten(1).sum(dim=1)
                log_weight = self._log_weight(
                    work, rows.kt[inside], momenta[inside], rows.tau[inside], log_det[inside]
                )
                # Rows do not see each other: those outside, with NaN here, spoil nobody.
                (slope,) = torch.autograd.grad(log_weight.sum(), leaf)
                good = torch.isfinite(energy[inside]).unsqueeze(1)
                gradient[inside] = torch.where(good, slope[inside], float("nan"))
        log_weight = self._log_weight(energy, rows.kt, momenta.detach(), rows.tau, log_det.detach())
        return _Point(v, log_weight, gradient, stored, energy, allowed, mirror), len(inside)


class LatentMALA(_LatentGradientMove):
    """Metropolis-adjusted Langevin in the latent space (Roberts and Tweedie 1996).

    p ~ N(0, tau); v = D^-1(x, p); v' ~ q(.|v) = N(v + s^2/2 grad log pi(v), s^2), s = sigma
    sqrt(tau); log alpha = d log pi + log q(v|v') - log q(v'|v). Velocities stay as they are.
    n_steps + 1 energies with forces each.

    Parameters
    ----------
    flow, potential, temperatures, sigma, n_steps
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.
    """

    target_acceptance = 0.57

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        sigma: Any = 0.3,
        name: str = "latent_mala",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, sigma, name, n_steps, **round_trip)

    def _advance(
        self, start: _Point, rows: _Rows, generator: torch.Generator
    ) -> tuple[_Point, Tensor, int]:
        noise = torch.randn(start.v.shape, generator=generator, dtype=start.v.dtype)
        drift = 0.5 * rows.step.square()
        end, n_evaluations = self._at(start.v + drift * start.gradient + rows.step * noise, rows)
        back = (start.v - end.v - drift * end.gradient) / rows.step
        return end, self._density_ratio(noise, back), n_evaluations

    def _density_ratio(self, there: Tensor, back: Tensor) -> Tensor:
        """log q(v|v') - log q(v'|v) [B] from the standard normal noise [B, n] that each takes."""
        return 0.5 * (there.square() - back.square()).sum(dim=1)


class LatentHMC(_LatentGradientMove):
    """Hamiltonian Monte Carlo in the latent space (Duane et al. 1987; Neal 2011).

    p ~ N(0, tau); v = D^-1(x, p); w ~ N(0, 1); leapfrog steps of length sigma in v / sqrt(tau)
    under H = -log pi + |w|^2 / 2; log alpha = -dH. A trajectory that leaves the domain on its way
    is rejected, wherever it would have ended: so is its reverse. The atoms' velocities stay as
    they are. n_steps * n_leapfrog + 1 energies with forces each.

    Parameters
    ----------
    flow, potential, temperatures, sigma, n_steps
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`; n_steps counts trajectories.
    n_leapfrog
        Leapfrog steps of a trajectory.
    jitter
        Each trajectory's step is sigma times a number drawn from [1 - jitter, 1 + jitter], so that
        no period of the motion resonates with the trajectory's length (Neal 2011, section 5.4.2).

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    target_acceptance = 0.7

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        sigma: Any = 0.2,
        name: str = "latent_hmc",
        n_steps: int = 1,
        n_leapfrog: int = 5,
        jitter: float = 0.2,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, sigma, name, n_steps, **round_trip)
        self.n_leapfrog = check_int(n_leapfrog, "n_leapfrog")
        self.jitter = check_float(jitter, "jitter")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter: expected a number from 0 to below 1, got {jitter!r}")

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        return {**super().settings(), "n_leapfrog": self.n_leapfrog, "jitter": self.jitter}

    def _advance(
        self, start: _Point, rows: _Rows, generator: torch.Generator
    ) -> tuple[_Point, Tensor, int]:
        uniform = torch.rand(rows.step.shape, generator=generator, dtype=start.v.dtype)
        noise = torch.randn(start.v.shape, generator=generator, dtype=start.v.dtype)
        step = rows.step * (1 + self.jitter * (2 * uniform - 1))
        # A gradient of NaN makes all that follows NaN: such a trajectory is rejected.
        velocity = noise + 0.5 * step * start.gradient
        end, n_evaluations = start, 0
        for number in range(self.n_leapfrog):
            v = end.v + step * velocity
            on_its_way = torch.isfinite(v).all(dim=1)
            point, n_more = self._at(v, rows)
            n_evaluations += n_more
            # Of those that left it stays known where to.
            end = point._replace(
                inside=torch.where(on_its_way, point.inside, end.inside),
                mirror=torch.where(on_its_way, point.mirror, end.mirror),
            )
            half = 0.5 if number == self.n_leapfrog - 1 else 1.0
            velocity = velocity + half * step * end.gradient
        return end, self._kinetic(noise) - self._kinetic(velocity), n_evaluations

    def _kinetic(self, velocity: Tensor) -> Tensor:
        return 0.5 * velocity.square().sum(dim=1)
