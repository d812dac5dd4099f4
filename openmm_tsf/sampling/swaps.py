"""Exchanges of replicas between rungs of the temperature ladder."""

from typing import Any

import torch
from torch import Tensor

from openmm_tsf.sampling.accept import metropolis
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.units import as_temperatures

SCHEMES = ("even_odd", "random_pairs")


class PlainSwap:
    """Replica exchange: configurations trade temperatures (Swendsen and Wang 1986).

    log alpha = (1/kT_a - 1/kT_b) (U_a - U_b). Velocities travel with their configuration and are
    scaled by sqrt(T_new / T_old), which leaves their part of the weight unchanged.

    Parameters
    ----------
    temperatures
        The ladder, K.
    boltzmann_constant
        k_B in the potential's energy unit per kelvin.
    scheme
        ``"even_odd"``: neighbours, pairs (0,1), (2,3), ... on even calls, (1,2), (3,4), ... on odd
        ones. ``"random_pairs"``: every rung gets a partner drawn at random, walker by walker
        (arXiv:2012.00429 draws the two temperatures at random).

    Raises
    ------
    ValueError
        If the scheme is unknown.
    """

    exact = True

    def __init__(
        self,
        temperatures: Any,
        boltzmann_constant: float,
        scheme: str = "even_odd",
        name: str = "swap_plain",
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {SCHEMES}, got {scheme!r}")
        self.name = name
        self.temperatures = as_temperatures(temperatures)
        self.boltzmann_constant = float(boltzmann_constant)
        self.scheme = scheme
        self._kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
        self._beta = 1 / (self.boltzmann_constant * self._kelvin)
        self._calls = 0

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per adjacent pair, or a matrix."""
        n_rungs = len(self.temperatures)
        return (n_rungs - 1,) if self.scheme == "even_odd" else (n_rungs, n_rungs)

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        return {"kernel": "PlainSwap", "scheme": self.scheme}

    def state_dict(self) -> dict[str, Any]:
        """The parity of the next call."""
        return {"calls": self._calls}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._calls = int(content["calls"])

    def _pairs(self, n_walkers: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Disjoint pairs of rungs (low, high), each [W, P]."""
        n_rungs = len(self.temperatures)
        if self.scheme == "even_odd":
            # Not arange(parity, n_rungs - 1, 2), which refuses to be empty for a single rung.
            low = torch.arange(n_rungs - 1)[self._calls % 2 :: 2].expand(n_walkers, -1)
            return low, low + 1
        order = torch.rand(n_walkers, n_rungs, generator=generator).argsort(dim=1)
        n_pairs = n_rungs // 2
        first, second = order[:, 0 : 2 * n_pairs : 2], order[:, 1 : 2 * n_pairs : 2]
        return torch.minimum(first, second), torch.maximum(first, second)

    def _counts(self, chosen: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """How often each pair occurs among the chosen [W, P]."""
        n_rungs = len(self.temperatures)
        table = torch.zeros(n_rungs, n_rungs, dtype=torch.int64)
        table.index_put_((low[chosen], high[chosen]), torch.tensor(1), accumulate=True)
        if self.scheme == "even_odd":
            return torch.diagonal(table, offset=1).clone()
        return table

    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """One sweep of swaps within every walker's ladder."""
        n_walkers, n_rungs = state.n_walkers, state.n_rungs
        low, high = self._pairs(n_walkers, generator)
        self._calls += 1
        walker = torch.arange(n_walkers)[:, None].expand_as(low)
        u_low, u_high = state.energy[walker, low], state.energy[walker, high]
        stay = -(u_low * self._beta[low] + u_high * self._beta[high])
        trade = -(u_high * self._beta[low] + u_low * self._beta[high])
        accepted, non_finite = metropolis(stay.flatten(), trade.flatten(), generator)
        accepted = accepted.reshape(low.shape)

        source = torch.arange(n_rungs).repeat(n_walkers, 1)  # rung from which each rung is filled
        source[walker[accepted], low[accepted]] = high[accepted]
        source[walker[accepted], high[accepted]] = low[accepted]
        rows = torch.arange(n_walkers)[:, None].expand_as(source)
        velocities = state.velocities
        if velocities is not None:
            scale = (self._kelvin[None, :] / self._kelvin[source]).sqrt()
            trailing = (1,) * (velocities.ndim - 2)
            velocities = velocities[rows, source] * scale.reshape(*scale.shape, *trailing)
        everything = torch.ones_like(accepted)
        info = KernelInfo(
            self._counts(accepted, low, high),
            self._counts(everything, low, high),
            rejected_non_finite=int(non_finite.sum()),
        )
        return (
            state.evolve(
                x=state.x[rows, source],
                velocities=velocities,
                energy=state.energy[rows, source],
                replica=state.replica[rows, source],
            ),
            info,
        )
