"""Crank-Nicolson proposals in the flow's latent space: between a random walk and a fresh draw."""

from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import SteerableMap, check_name
from openmm_tsf.sampling.kernels.flow import FlowProposalKernel
from openmm_tsf.sampling.tuning import StepSizes, step_sizes
from openmm_tsf.utils.validation import check_float


class FlowCrankNicolson(StepSizes, FlowProposalKernel):
    """Preconditioned Crank-Nicolson in the latent space (Cotter et al. 2013, Stat. Sci. 28, 424).

    p ~ N(0, tau); v = D^-1(x, p); v' = sqrt(1 - beta^2) v + beta xi, xi ~ N(0, tau); the prior
    N(0, tau) is left invariant, and so only the flow's error is accepted or rejected:

    log alpha = -dU/kT - d|p|^2 / 2 tau + d|v|^2 / 2 tau + d log|J_D|.

    beta -> 0 is a random walk that is always accepted, beta -> 1 the independence proposal. The
    step size that is tuned is sigma = beta / sqrt(1 - beta^2), any positive number: where draws of
    the flow are accepted often it grows without bound, and the kernel becomes
    :class:`openmm_tsf.sampling.kernels.flow.FlowIndependence`. Velocities stay as they are.

    Parameters
    ----------
    flow, potential, temperatures, n_steps, name, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow_base.FlowKernel`.
    beta
        Between 0 and 1, both excluded: one number or one per rung [R].
    share
        The probability with which each component of v is moved; which ones is drawn anew for every
        walker and step, independently of v. 1: all of v.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> step = tsf.kernels.FlowCrankNicolson(flow, potential, ladder, beta=[0.6, 0.8])
    >>> step.sigma
    tensor([0.7500, 1.3333], dtype=torch.float64)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [step], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 1))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["flow_crank_nicolson"].proposed
    tensor([40, 40])
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        beta: Any = 0.5,
        share: float = 1.0,
        name: str = "flow_crank_nicolson",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, n_steps, **round_trip)
        self.name = check_name(name)
        sizes = step_sizes(beta, len(self.temperatures), "beta")
        if not bool((sizes < 1).all()):
            raise ValueError(
                f"beta: expected numbers below 1 (1 is FlowIndependence), got {sizes.tolist()}"
            )
        self.sigma = sizes / (1 - sizes.square()).sqrt()
        self.share = check_float(share, "share")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a number above 0, at most 1, got {share!r}")

    @property
    def beta(self) -> Tensor:
        """The share of noise in a proposal [R], sigma / sqrt(1 + sigma^2)."""
        return self.sigma.atan().sin()

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        return {**super().settings(), "share": self.share}

    def propose(self, v: Tensor, tau: Tensor, generator: Generator) -> Tensor:
        """Return cos(a) v + sin(a) xi, tan(a) = sigma, in the components that are moved."""
        sigma = self.on_device("sigma", v.device)
        angle = sigma.atan().repeat(len(v) // len(sigma)).unsqueeze(1)
        noise = torch.randn(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        moved = angle.cos() * v + angle.sin() * tau.sqrt().unsqueeze(1) * noise
        if self.share == 1:
            return moved
        uniform = torch.rand(v.shape, generator=generator, dtype=v.dtype, device=v.device)
        return torch.where(uniform < self.share, moved, v)

    def log_proposal_density(self, v: Tensor, tau: Tensor) -> Tensor:
        """Return the log-density [B] of the prior, for which proposals are reversible."""
        return -v.square().sum(dim=1) / (2 * tau)
