"""Multiple-try independence proposals: the best of several draws of the flow, by their weights."""

from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.flow import FlowIndependence
from openmm_tsf.sampling.kernels.flow_base import LatentState
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.utils.validation import check_int


class FlowMultipleTry(FlowIndependence):
    """Multiple-try Metropolis with independent draws from the flow (Liu, Liang and Wong 2000).

    k draws v_i ~ N(0, tau) with weights ln w_i = -U/kT - |p|^2 / 2 tau + |v|^2 / 2 tau + log|J_D|;
    draw j is chosen with probability w_j / W, W = sum_i w_i, and accepted with

    log alpha = ln W - ln(W - w_j + w_x), w_x the weight of the walker.

    The other draws are the reference set of the way back, as they may be for independent proposals
    (Martino 2018, Digital Signal Processing 75, 134, section 4.2): the flow of probability
    pi(x) q(j) q(others) w_j / max(W, W - w_j + w_x) is symmetric in x and j. With one try this is
    :class:`FlowIndependence`, which in as many steps as this has tries moves farther for the same
    evaluations (``examples/benchmarks/moves.py``). Velocities stay as they are.

    Counts are of steps; rejections for energy, domain and mirror images are of tries.

    Parameters
    ----------
    flow, potential, temperatures, n_steps, name, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow_base.FlowKernel`.
    n_tries
        The number k of draws in a step, evaluated in one batch.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> potential, ladder = DoubleWell(0.1, -1.0, 0.3), (1.0, 2.0)
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> tries = tsf.kernels.FlowMultipleTry(flow, potential, ladder, n_tries=5)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 4, [tries], potential, seed=1)
    >>> sampler.set_positions(torch.zeros(4, 2, 1))
    >>> sampler.run(10, progress=False)
    >>> info = sampler.totals["flow_multiple_try"]
    >>> info.proposed, info.n_evaluations
    (tensor([40, 40]), 400)
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        n_tries: int = 4,
        name: str = "flow_multiple_try",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        super().__init__(flow, potential, temperatures, name, n_steps, **round_trip)
        self.n_tries = check_int(n_tries, "n_tries")

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        return {**super().settings(), "n_tries": self.n_tries}

    @torch.no_grad()
    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Draw the tries of every walker at every rung in one batch, and choose and accept one."""
        now, energy = self.latents_of(state, generator), state.energy.flatten()
        tau, k = now.tau, self.n_tries
        kt = self.on_device("kt", tau.device).repeat(state.n_walkers)
        row = torch.arange(len(tau), dtype=torch.int64, device=tau.device)
        like, all_tau = now.x.repeat(k, *(1,) * (now.x.ndim - 1)), tau.repeat(k)
        total = KernelInfo.zero(self.counts_shape, tau.device)
        for _ in range(self.n_steps):
            v = self.propose(now.v.repeat(k, 1), all_tau, generator)
            new, n_evaluations = self._evaluate(v, like, all_tau)
            tries = self.log_weight(new.energy, kt.repeat(k), new.momenta, all_tau, new.log_det)
            tries = (tries - self.log_proposal_density(v, all_tau)).reshape(k, -1)
            current = self.log_weight(energy, kt, now.momenta, tau, now.log_det)
            current = current - self.log_proposal_density(now.v, tau)
            chosen, accepted = self.select(current, tries, generator)
            non_finite = ~torch.isfinite(tries)
            total += self._counts(accepted, non_finite, new.inside, new.mirror, n_evaluations)
            taken = chosen * len(row) + row
            energy = torch.where(accepted, new.energy[taken], energy)
            end = LatentState(new.x[taken], new.momenta[taken], v[taken], new.log_det[taken], tau)
            now = end.where(accepted, now)
        return self.with_latents(state, now, energy), total

    def select(self, current: Tensor, tries: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the number of the try chosen for each row [B], and whether it is accepted [B].

        `current` [B] and `tries` [n_tries, B] are log-weights: target over proposal density.
        """
        tries = torch.where(torch.isfinite(tries), tries, -torch.inf)
        uniform = torch.rand(
            tries.shape, generator=generator, dtype=tries.dtype, device=tries.device
        )
        # The largest of ln w plus a Gumbel variable is a draw by weight.
        chosen = (tries - (-uniform.log()).log()).argmax(dim=0)
        back = tries.scatter(0, chosen.unsqueeze(0), current.unsqueeze(0))
        accepted, _ = metropolis(back.logsumexp(dim=0), tries.logsumexp(dim=0), generator)
        return chosen, accepted
