"""Steered swaps: replicas trade temperatures, and the flow moves each to where it belongs."""

from typing import Any

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import kernel_name
from openmm_tsf.sampling.kernels.flow import FlowKernel, SteerableMap
from openmm_tsf.sampling.kernels.pairing import Pairing, Scheme
from openmm_tsf.sampling.state import KernelInfo, WalkerState


class SteeredSwap(FlowKernel):
    """Replica exchange along the flow: one network serves every pair of temperatures.

    Learned replica exchange (arXiv:2210.14104) and neural transport (arXiv:2502.10328) train a map
    for each pair of temperatures; here steering gives all of them. With p_a ~ N(0, tau_a) drawn
    afresh, (x_a, p_a) -> v_a -> v_a sqrt(tau_b / tau_a) -> (x_a', p_a') is proposed at T_b, and the
    converse at T_a:

    log alpha = - [U(x_a')/kT_b + |p_a'|^2/2 tau_b + U(x_b')/kT_a + |p_b'|^2/2 tau_a]
    + [U(x_a)/kT_a + |p_a|^2/2 tau_a + U(x_b)/kT_b + |p_b|^2/2 tau_b] + d log|J_D| of both.

    The scaling's own Jacobian is (tau_b / tau_a)^(n/2) for v_a, n its dimension, and the inverse of
    that for v_b: they cancel, whatever the temperatures, because both replicas are moved at once.

    Configurations keep their pose (and labels of equivalent hydrogens) on the way. Velocities
    travel with their configuration and are scaled by sqrt(T_new / T_old).

    Parameters
    ----------
    flow, potential, temperatures
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.
    scheme
        ``"even_odd"``, ``"random_pairs"`` or pairs such as ``[(0, 6)]``; see
        :class:`openmm_tsf.sampling.kernels.pairing.Pairing`.
    name
        Name in counts and summaries.
    **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.

    Raises
    ------
    TypeError, ValueError
        If the arguments do not fit each other; the message names them.
    """

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        scheme: Scheme = "even_odd",
        name: str = "swap_steered",
        **round_trip: Any,
    ) -> None:
        if "n_steps" in round_trip:
            raise TypeError(
                "n_steps: a steered swap proposes once a call, expected no such argument"
            )
        super().__init__(flow, potential, temperatures, **round_trip)
        self.name = kernel_name(name)
        self.pairing = Pairing(scheme, len(self.temperatures))
        self._calls = 0

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per adjacent pair, or a matrix."""
        return self.pairing.counts_shape

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        settings = {**super().settings(), "scheme": self.pairing.scheme}
        del settings["n_steps"]
        return settings

    def state_dict(self) -> dict[str, Any]:
        """The number of the next call, which chooses the even or the odd pairs."""
        return {"calls": self._calls}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._calls = int(content["calls"])

    @torch.no_grad()
    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """Propose all pairs of all walkers in one batch, and accept or reject pair by pair."""
        low, high = self.pairing.draw(state.n_walkers, self._calls, generator)
        self._calls += 1
        if not low.numel():
            return state, KernelInfo.zero(self.counts_shape)
        # The batch: the lower members of all pairs, then, in the same order, the upper ones.
        walker = torch.arange(state.n_walkers)[:, None].expand_as(low).flatten().repeat(2)
        old = torch.cat([low.flatten(), high.flatten()])
        new = torch.cat([high.flatten(), low.flatten()])
        x, energy = state.x[walker, old], state.energy[walker, old]
        noise = torch.randn(len(x), self.flow.n_momenta, generator=generator, dtype=torch.float64)
        momenta = noise * self._tau[old].sqrt().unsqueeze(1)
        tau_old, tau_new = self._tau[old], self._tau[new]
        v, inverse_log_det = self._inverse(x, momenta, tau_old, generator)
        if state.iteration % self.round_trip_interval == 0:
            self._check_round_trip(state.iteration, x, momenta, v, inverse_log_det, tau_old)
        x_new, momenta_new, log_det_new = self._forward(self._steer(v, old, new), tau_new)

        inside, mirror = self._domain(x_new, log_det_new)
        both = inside.reshape(2, -1).all(dim=0).repeat(2)  # else there is nothing to evaluate
        energy_new = torch.full_like(energy, float("inf"))
        if bool(both.any()):
            x_new = x_new.clone()
            x_new[both] = self._place(x_new[both], x[both])
            energy_new[both] = evaluate.energy(self.potential, x_new[both])
        current = self._weights(energy, momenta, -inverse_log_det, old)
        proposed = self._weights(energy_new, momenta_new, log_det_new, new)
        accepted, non_finite = metropolis(current, proposed, generator)

        mirrors = int(mirror.reshape(2, -1).any(dim=0).sum())  # pairs that hold one
        accepted_pairs = accepted.reshape(low.shape)
        info = KernelInfo(
            self.pairing.counts(accepted_pairs, low, high),
            self.pairing.counts(torch.ones_like(accepted_pairs), low, high),
            rejected_non_finite=int(non_finite.sum()) - mirrors,
            mirror_images=mirrors,
            n_evaluations=int(both.sum()),
            outside_domain=int((~both).sum()) // 2 - mirrors,
        )
        take = accepted.repeat(2)
        walker, old, new = walker[take], old[take], new[take]
        if not len(walker):
            return state, info
        arrive = (walker, new)
        velocities = state.velocities
        if velocities is not None:
            scale = (self._tau[new] / self._tau[old]).sqrt()
            moving = velocities[walker, old]
            moving = moving * scale.reshape(-1, *(1,) * (moving.ndim - 1))
            velocities = velocities.index_put(arrive, moving)
        changed = state.evolve(
            x=state.x.index_put(arrive, x_new[take]),
            velocities=velocities,
            energy=state.energy.index_put(arrive, energy_new[take]),
            replica=state.replica.index_put(arrive, state.replica[walker, old]),
        )
        return changed, info

    def _steer(self, v: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """v [B, n] scaled from the priors of the rungs `old` [B] to those of `new` [B]."""
        return v * (self._tau[new] / self._tau[old]).sqrt().unsqueeze(1)

    def _weights(self, energy: Tensor, momenta: Tensor, log_det: Tensor, rung: Tensor) -> Tensor:
        """log of the joint target density of both members of every pair [B / 2]."""
        weights = self._log_weight(energy, self._kt[rung], momenta, self._tau[rung], log_det)
        return weights.reshape(2, -1).sum(dim=0)
