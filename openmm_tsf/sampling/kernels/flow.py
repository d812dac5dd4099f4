"""Metropolised proposals through the flow: TSF-MCMC random walks and independence proposals."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import SteerableMap, check_name
from openmm_tsf.sampling.kernels.flow_base import FlowKernel, LatentState, Proposal
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.sampling.tuning import StepSizes

#: Rows that independent proposals are evaluated in; of more, each takes as long.
_ROWS_AT_ONCE = 1024


class FlowProposalKernel(FlowKernel, ABC):
    """A kernel that proposes in latent space; a subclass defines the proposal and its density."""

    #: Whether proposals do not depend on the current v: those of several steps are then one batch.
    independent = False

    @abstractmethod
    def propose(self, v: Tensor, tau: Tensor, generator: Generator) -> Tensor:
        """Draw proposed latents [B, d + m] from the current v [B, d + m] at tau [B]."""

    @abstractmethod
    def log_proposal_density(self, v: Tensor, tau: Tensor) -> Tensor | float:
        """Return the log-density [B] of proposing v, up to a constant; 0 if symmetric."""

    @torch.no_grad()
    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Propose for every walker at every rung in one batch, and accept or reject."""
        now, energy = self.latents_of(state, generator), state.energy.flatten()
        tau, kt = now.tau, self.on_device("kt", energy.device).repeat(state.n_walkers)
        total = KernelInfo.zero(self.counts_shape, energy.device)
        left = self.n_steps
        while left:
            n = min(left, max(1, _ROWS_AT_ONCE // len(tau)) if self.independent else 1)
            left -= n
            like, of_rows = now.x.repeat(n, *(1,) * (now.x.ndim - 1)), tau.repeat(n)
            latents = self.propose(now.v.repeat(n, 1), of_rows, generator)
            proposals, n_all = self._evaluate(latents, like, of_rows)
            steps = (part.split(len(tau)) for part in (latents, *proposals))
            for v_new, *parts in zip(*steps, strict=True):
                new = Proposal(*parts)
                accepted, non_finite = metropolis(
                    self.log_weight(energy, kt, now.momenta, tau, now.log_det)
                    - self.log_proposal_density(now.v, tau),
                    self.log_weight(new.energy, kt, new.momenta, tau, new.log_det)
                    - self.log_proposal_density(v_new, tau),
                    generator,
                )
                n_evaluations = n_all // n if n_all == len(like) else int(new.inside.sum())
                total += self._counts(accepted, non_finite, new.inside, new.mirror, n_evaluations)
                energy = torch.where(accepted, new.energy, energy)
                end = LatentState(new.x, new.momenta, v_new, new.log_det, tau)
                now = end.where(accepted, now)
        return self.with_latents(state, now, energy), total


class FlowWalk(StepSizes, FlowProposalKernel):
    """TSF-MCMC (arXiv:2012.00429, section 2): a random step in the latent space.

    p ~ N(0, tau); v = D^-1(x, p); v' = v + xi, xi ~ N(0, sigma^2 tau); (x', p') = D(v');
    log alpha = -dU/kT - d|p|^2 / 2 tau + d log|J_D|. Velocities stay as they are.

    Parameters
    ----------
    flow, potential, temperatures, n_steps, name, **round_trip
        See :class:`FlowKernel`.
    sigma
        The step size, one number or one per rung [R].

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> walk = tsf.kernels.FlowWalk(flow, potential, ladder, sigma=0.5, n_steps=2)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [walk], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 1))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["flow_walk"].proposed
    tensor([80, 80])
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
        self.name = check_name(name)
        self.sigma = sigma

    def propose(self, v: Tensor, tau: Tensor, generator: Generator) -> Tensor:
        """Return v plus Gaussian noise of width sigma sqrt(tau)."""
        sigma = self.on_device("_sigma", v.device)
        width = sigma.repeat(len(v) // len(sigma)) * tau.sqrt()
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        return v + noise * width.unsqueeze(1)

    def log_proposal_density(self, v: Tensor, tau: Tensor) -> float:
        """Return 0: the step is symmetric."""
        return 0.0


class FlowIndependence(FlowProposalKernel):
    """An independent draw from the flow: v' ~ N(0, tau).

    log alpha = -dU/kT - d|p|^2 / 2 tau + d|v|^2 / 2 tau + d log|J_D|. Velocities stay as they are.

    Parameters
    ----------
    flow, potential, temperatures, n_steps, name, **round_trip
        See :class:`FlowKernel`.

    Examples
    --------
    A flow that is the exact sampler has all its proposals accepted:

    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> potential, ladder = GaussianWell(torch.eye(2).double()), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(2, 2, 1, (4,))  # the identity, before training
    >>> draw = tsf.kernels.FlowIndependence(flow, potential, ladder)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [draw], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 2))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["flow_independent"].acceptance
    tensor([1., 1.], dtype=torch.float64)
    """

    independent = True

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
        self.name = check_name(name)

    def propose(self, v: Tensor, tau: Tensor, generator: Generator) -> Tensor:
        """Draw from the prior."""
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        return noise * tau.sqrt().unsqueeze(1)

    def log_proposal_density(self, v: Tensor, tau: Tensor) -> Tensor:
        """Return the log-density [B] of the prior, up to a constant."""
        return -v.square().sum(dim=1) / (2 * tau)
