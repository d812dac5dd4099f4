"""Proposals by gradients in the flow's latent space: Langevin (MALA) and Hamiltonian (HMC).

The target is the Boltzmann distribution as a density of v (NeuTra, arXiv:1903.03704), momenta
included: pi(v) = exp(-U(x(v))/kT - |p(v)|^2 / 2 tau + log|J_D(v)|).
"""

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.energies import energy_and_forces
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.flow import FlowWalk
from openmm_tsf.sampling.kernels.flow_base import rows_where
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.utils.validation import check_float, check_int


class LatentBatch(NamedTuple):
    """What belongs to each row: tau and kT of its rung [B], its pose [B, *event], step [B, 1]."""

    tau: Tensor
    kt: Tensor
    like: Tensor
    step: Tensor


class LatentPoint(NamedTuple):
    """v [B, n], log pi [B] and its gradient [B, n], x [B, *event] and its energy [B]."""

    v: Tensor
    log_weight: Tensor
    gradient: Tensor  # NaN where pi vanishes: a trajectory through such a point is rejected
    x: Tensor
    energy: Tensor
    inside: Tensor  # [B], whether x is in the flow's domain
    mirror: Tensor  # [B], whether it is a mirror image

    def where(self, chosen: Tensor, other: "LatentPoint") -> "LatentPoint":
        """Return these rows where `chosen` [B], those of the other point elsewhere."""
        return LatentPoint(*map(partial(rows_where, chosen), self, other))


class LatentGradientKernel(FlowWalk, ABC):
    """What latent MALA and HMC share: pi with its gradient, and the acceptance.

    As in FlowWalk the momenta are drawn once a call; with several `n_steps` the end of a proposal,
    and its gradient, is the beginning of the next. Step sizes are those of FlowWalk.
    """

    #: The acceptance to tune for.
    target_acceptance: float

    @torch.no_grad()
    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Propose for every walker at every rung in one batch, and accept or reject."""
        shape = state.energy.shape
        latent = self.latents_of(state, generator)
        x, tau, energy = latent.x, latent.tau, state.energy.flatten()
        kt, sigma = (self.on_device(name, x.device).repeat(shape[0]) for name in ("kt", "sigma"))
        step = (sigma * tau.sqrt()).unsqueeze(1)
        rows = LatentBatch(tau, kt, x, step)
        point, n_evaluations = self.evaluate_at(latent.v, rows)
        # The stored configuration and energy, without the rounding of the round trip.
        log_weight = self.log_weight(energy, kt, latent.momenta, tau, latent.log_det)
        point = point._replace(log_weight=log_weight, x=x, energy=energy)
        total = KernelInfo.zero(self.counts_shape, x.device)
        for _ in range(self.n_steps):
            end, correction, n_more = self.propose_point(point, rows, generator)
            n_evaluations += n_more
            proposed = end.log_weight + correction
            accepted, non_finite = metropolis(point.log_weight, proposed, generator)
            total += self._counts(accepted, non_finite, end.inside, end.mirror, n_evaluations)
            n_evaluations = 0
            point = end.where(accepted, point)
        new = state.evolve(x=point.x.reshape(state.x.shape), energy=point.energy.reshape(shape))
        return new, total

    @abstractmethod
    def propose_point(
        self, start: LatentPoint, rows: LatentBatch, generator: Generator
    ) -> tuple[LatentPoint, Tensor, int]:
        """Return a proposal, log alpha [B] less the difference of log pi, and the evaluations."""

    def evaluate_at(self, v: Tensor, rows: LatentBatch) -> tuple[LatentPoint, int]:
        """Return pi and its gradient at v [B, n], and the number of energies with forces."""
        if v.device.type != "cpu":
            return self._evaluate_all(v, rows), len(v)
        energy = torch.full_like(rows.kt, float("inf"))
        gradient = torch.full_like(v, float("nan"))
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            x, momenta, log_det = self._forward(leaf, rows.tau)
            allowed, mirror = self._domain(x.detach(), log_det.detach())
            inside = allowed.nonzero().flatten()
            stored = x.detach()
            if len(inside):
                posed = self._match_pose(x[inside], rows.like[inside])
                stored = stored.index_put((inside,), posed.detach())
                energies, forces = energy_and_forces(self.potential, posed.detach())
                energy[inside] = energies.to(energy)
                # Has the gradient of U, without a graph through the potential.
                work = -(forces * posed).flatten(1).sum(dim=1)
                log_weight = self.log_weight(
                    work, rows.kt[inside], momenta[inside], rows.tau[inside], log_det[inside]
                )
                # Rows are independent of each other: NaN outside the domain stays in its row.
                (all_gradients,) = torch.autograd.grad(log_weight.sum(), leaf)
                finite = torch.isfinite(energy[inside]).unsqueeze(1)
                gradient[inside] = torch.where(finite, all_gradients[inside], float("nan"))
        log_weight = self.log_weight(energy, rows.kt, momenta.detach(), rows.tau, log_det.detach())
        return LatentPoint(v, log_weight, gradient, stored, energy, allowed, mirror), len(inside)

    def _evaluate_all(self, v: Tensor, rows: LatentBatch) -> LatentPoint:
        """Return what `evaluate_at` does without choosing rows, which would wait for a GPU."""
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            x, momenta, log_det = self._forward(leaf, rows.tau)
            allowed, mirror = self._domain(x.detach(), log_det.detach())
            posed = rows_where(allowed, self._match_pose(x, rows.like), rows.like)
            energy, forces = energy_and_forces(self.potential, posed.detach())
            energy = torch.where(allowed, energy.to(rows.kt), torch.inf)
            work = -(forces * posed).flatten(1).sum(dim=1)
            log_weight = self.log_weight(work, rows.kt, momenta, rows.tau, log_det)
            # Rows are independent of each other: NaN outside the domain stays in its row.
            (gradient,) = torch.autograd.grad(log_weight.sum(), leaf)
        gradient = torch.where(torch.isfinite(energy).unsqueeze(1), gradient, torch.nan)
        log_weight = self.log_weight(energy, rows.kt, momenta.detach(), rows.tau, log_det.detach())
        stored = rows_where(allowed, posed.detach(), x.detach())
        return LatentPoint(v, log_weight, gradient, stored, energy, allowed, mirror)


class LatentMALA(LatentGradientKernel):
    """Metropolis-adjusted Langevin algorithm in the latent space (Roberts and Tweedie 1996).

    p ~ N(0, tau); v = D^-1(x, p); v' ~ q(.|v) = N(v + s^2/2 grad log pi(v), s^2), s = sigma
    sqrt(tau); log alpha = d log pi + log q(v|v') - log q(v'|v). Velocities stay as they are.
    A call takes n_steps + 1 energies with forces for each walker and rung.

    Parameters
    ----------
    flow, potential, temperatures, sigma, name, n_steps, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> mala = tsf.kernels.LatentMALA(flow, potential, ladder, sigma=0.5)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [mala], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 1))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["latent_mala"].n_evaluations
    160
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

    def propose_point(
        self, start: LatentPoint, rows: LatentBatch, generator: Generator
    ) -> tuple[LatentPoint, Tensor, int]:
        """Draw v' around the drift from v; the rest is the ratio of proposal densities."""
        noise = torch.randn(
            start.v.shape, generator=generator, dtype=start.v.dtype, device=start.v.device
        )
        drift = 0.5 * rows.step.square()
        v = start.v + drift * start.gradient + rows.step * noise
        end, n_evaluations = self.evaluate_at(v, rows)
        back = (start.v - end.v - drift * end.gradient) / rows.step
        return end, self.log_density_ratio(noise, back), n_evaluations

    def log_density_ratio(self, forward: Tensor, back: Tensor) -> Tensor:
        """Return log q(v|v') - log q(v'|v) [B] from the standard normal noise [B, n] of each."""
        return 0.5 * (forward.square() - back.square()).sum(dim=1)


class LatentHMC(LatentGradientKernel):
    """Hamiltonian Monte Carlo in the latent space (Duane et al. 1987; Neal 2011).

    p ~ N(0, tau); v = D^-1(x, p); w ~ N(0, 1); leapfrog steps of length sigma in v / sqrt(tau)
    under H = -log pi + |w|^2 / 2; log alpha = -dH. A trajectory that leaves the domain at any step
    is rejected, and so is its reverse. The atoms' velocities stay as they are. A call takes
    n_steps * n_leapfrog + 1 energies with forces for each walker and rung.

    Parameters
    ----------
    flow, potential, temperatures, sigma, name, n_steps, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`; n_steps counts trajectories.
    n_leapfrog, jitter
        The number of leapfrog steps of a trajectory, each sigma times a number drawn from
        [1 - jitter, 1 + jitter]: no period resonates with its length (Neal 2011, section 5.4.2).

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> hmc = tsf.kernels.LatentHMC(flow, potential, ladder, sigma=0.3, n_leapfrog=4)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [hmc], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 1))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["latent_hmc"].n_evaluations
    400
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
        """Return the choices made."""
        return {**super().settings(), "n_leapfrog": self.n_leapfrog, "jitter": self.jitter}

    def propose_point(
        self, start: LatentPoint, rows: LatentBatch, generator: Generator
    ) -> tuple[LatentPoint, Tensor, int]:
        """Integrate a leapfrog trajectory; the rest is the change of kinetic energy."""
        uniform = torch.rand(
            rows.step.shape, generator=generator, dtype=start.v.dtype, device=start.v.device
        )
        noise = torch.randn(
            start.v.shape, generator=generator, dtype=start.v.dtype, device=start.v.device
        )
        step = rows.step * (1 + self.jitter * (2 * uniform - 1))
        # A gradient of NaN makes all that follows NaN: such a trajectory is rejected.
        velocity = noise + 0.5 * step * start.gradient
        end, n_evaluations = start, 0
        for number in range(self.n_leapfrog):
            v = end.v + step * velocity
            running = torch.isfinite(v).all(dim=1)
            point, n_more = self.evaluate_at(v, rows)
            n_evaluations += n_more
            # Trajectories that have left the domain keep the reason for which they did.
            end = point._replace(
                inside=torch.where(running, point.inside, end.inside),
                mirror=torch.where(running, point.mirror, end.mirror),
            )
            half = 0.5 if number == self.n_leapfrog - 1 else 1.0
            velocity = velocity + half * step * end.gradient
        return end, self.kinetic_energy(noise) - self.kinetic_energy(velocity), n_evaluations

    def kinetic_energy(self, velocity: Tensor) -> Tensor:
        """Return |w|^2 / 2 [B] of velocities w [B, n] in latent space."""
        return 0.5 * velocity.square().sum(dim=1)
