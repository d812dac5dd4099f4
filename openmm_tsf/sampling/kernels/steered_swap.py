"""Steered swaps: replicas exchange temperatures, and the flow maps each to its new temperature."""

from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import SteerableMap, check_name
from openmm_tsf.sampling.kernels.flow_base import FlowKernel, LatentState, rows_where
from openmm_tsf.sampling.kernels.pairing import Pairing, Scheme, SwapKernel
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.utils.deferred import as_count


class SteeredSwap(SwapKernel, FlowKernel):
    """Replica exchange through the flow: one network serves every pair of temperatures.

    Learned replica exchange (arXiv:2210.14104) and neural transport (arXiv:2502.10328) train a map
    for each pair of temperatures; here steering gives all of them. With the flow (x, p) = D(v), its
    Jacobian J_D and p_a ~ N(0, tau_a),
    (x_a, p_a) -> v_a -> v_a sqrt(tau_b / tau_a) -> (x_a', p_a') is proposed at T_b, and likewise
    (x_b', p_b') at T_a:

    log alpha = - [U(x_a')/kT_b + |p_a'|^2/2 tau_b + U(x_b')/kT_a + |p_b'|^2/2 tau_a]
    + [U(x_a)/kT_a + |p_a|^2/2 tau_a + U(x_b)/kT_b + |p_b|^2/2 tau_b] + the changes
    of log|J_D| of both.

    The Jacobian of the scaling is (tau_b / tau_a)^(n/2) for v_a, n its dimension, and the inverse
    of that for v_b: they cancel, because both replicas are proposed together.

    Configurations keep their pose and the labels of equivalent hydrogens. Velocities stay with
    their configuration and are scaled by sqrt(T_new / T_old).

    Parameters
    ----------
    flow, potential, temperatures, name, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow_base.FlowKernel`.
    scheme, first_pairs
        Which rungs exchange: see :class:`openmm_tsf.sampling.kernels.pairing.Pairing`.

    Examples
    --------
    On a Gaussian under the identity the steered map is exact and every swap is accepted:

    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> potential, ladder = GaussianWell(torch.eye(2).double()), (1.0, 4.0)
    >>> flow = tsf.TemperatureSteerableFlow(2, 2, 1, (4,))
    >>> swap = tsf.kernels.SteeredSwap(flow, potential, ladder)
    >>> sampler = tsf.ParallelTempering(None, flow, ladder, 5, [swap], potential, seed=1)
    >>> sampler.set_positions(torch.ones(5, 2, 2))
    >>> sampler.run(2, progress=False)
    >>> sampler.totals["swap_steered"].acceptance
    tensor([1.], dtype=torch.float64)
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        scheme: Scheme = "even_odd",
        name: str = "swap_steered",
        first_pairs: str = "even",
        **round_trip: Any,
    ) -> None:
        if "n_steps" in round_trip:
            raise TypeError("n_steps: a steered swap proposes once a call, expected none")
        super().__init__(flow, potential, temperatures, **round_trip)
        self.name = check_name(name)
        self.pairing = Pairing(scheme, len(self.temperatures), first_pairs)

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        settings = {**super().settings(), **self.pairing.settings()}
        del settings["n_steps"]
        return settings

    @torch.no_grad()
    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Propose all pairs of all walkers in one batch, and accept or reject pair by pair."""
        low, high = self.pairing.draw(state.n_walkers, generator)
        if not low.numel():
            return state, KernelInfo.zero(self.counts_shape, state.x.device)
        # The batch: the lower members of all pairs, then, in the same order, the upper ones.
        walker = torch.arange(state.n_walkers, dtype=torch.int64, device=low.device)
        walker = walker[:, None].expand_as(low).flatten().repeat(2)
        old = torch.cat([low.flatten(), high.flatten()])
        new = torch.cat([high.flatten(), low.flatten()])
        energy = state.energy[walker, old]
        latent = self._latents_at(state, walker, old, generator)
        x = latent.x
        v_new = self.rescale(latent.v, old, new)
        tau = self.on_device("tau", x.device)
        x_new, momenta_new, log_det_new = self._forward(v_new, tau[new])

        inside, mirror = self._domain(x_new, log_det_new)
        both = inside.reshape(2, -1).all(dim=0).repeat(2)  # otherwise the pair is rejected
        x_new = self._match_pose(x_new, x)
        energy_new, n_evaluations = self._energy(x_new, both, x)
        current = self.pair_log_weights(energy, latent.momenta, latent.log_det, old)
        proposed = self.pair_log_weights(energy_new, momenta_new, log_det_new, new)
        accepted, non_finite = metropolis(current, proposed, generator)

        mirrors = as_count(mirror.reshape(2, -1).any(dim=0).sum())  # pairs with at least one
        accepted_pairs = accepted.reshape(low.shape)
        info = KernelInfo(
            self.pairing.counts(accepted_pairs, low, high),
            self.pairing.counts(torch.ones_like(accepted_pairs), low, high),
            rejected_non_finite=as_count(non_finite.sum()) - mirrors,
            mirror_images=mirrors,
            n_evaluations=n_evaluations,
            outside_domain=as_count((~both).sum()) // 2 - mirrors,
        )
        taken, target = accepted.repeat(2), (walker, new)

        def put(into: Tensor, values: Tensor) -> Tensor:
            """Put values where pairs were accepted, and what was there where they were not."""
            return into.index_put(target, rows_where(taken, values, into[target]))

        velocities = state.velocities
        if velocities is not None:
            scale = (tau[new] / tau[old]).sqrt()
            scale = scale.reshape(-1, *(1,) * (velocities.ndim - 2))
            velocities = put(velocities, velocities[walker, old] * scale)
        x = put(state.x, x_new)
        known = self.carried(state)
        if known is not None:
            known = replace(
                known,
                x=x,
                momenta=put(known.momenta, momenta_new),
                v=put(known.v, v_new),
                log_det=put(known.log_det, log_det_new),
            )
        exchanged = state.evolve(
            x=x,
            velocities=velocities,
            energy=put(state.energy, energy_new),
            replica=put(state.replica, state.replica[walker, old]),
            latents=known,
        )
        return exchanged, info

    def _latents_at(
        self, state: WalkerState, walker: Tensor, rung: Tensor, generator: Generator
    ) -> LatentState:
        """Return p and v of some walkers and rungs [B]: those that the state carries, or new."""
        if self.carried(state) is None:  # not all of them: some may have no partner
            x = state.x[walker, rung]
            tau = self.on_device("tau", x.device)
            return self._to_latent(x, tau[rung], state.iteration, generator)
        row = walker * state.n_rungs + rung
        return LatentState(*(part[row] for part in self.latents_of(state, generator)))

    def rescale(self, v: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return v [B, n] scaled from the priors of the rungs `old` [B] to those of `new` [B]."""
        tau = self.on_device("tau", v.device)
        return v * (tau[new] / tau[old]).sqrt().unsqueeze(1)

    def pair_log_weights(
        self, energy: Tensor, momenta: Tensor, log_det: Tensor, rung: Tensor
    ) -> Tensor:
        """Return the log-weight of both members of every pair together [B / 2]."""
        kt, tau = (self.on_device(name, energy.device) for name in ("kt", "tau"))
        weights = self.log_weight(energy, kt[rung], momenta, tau[rung], log_det)
        return weights.reshape(2, -1).sum(dim=0)
