"""Exchanges of replicas between rungs of the temperature ladder."""

import math
from typing import Any

import torch

from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels.base import kernel_name
from openmm_tsf.sampling.kernels.pairing import Pairing, Scheme
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.units import as_temperatures


class PlainSwap:
    """Replica exchange: configurations trade temperatures (Swendsen and Wang 1986).

    log alpha = (1/kT_a - 1/kT_b) (U_a - U_b). Velocities travel with their configuration and are
    scaled by sqrt(T_new / T_old), which leaves their part of the weight unchanged.

    Parameters
    ----------
    temperatures
        The ladder, K.
    boltzmann_constant
        k_B in the potential's energy unit per kelvin: ``potential.boltzmann_constant``.
    scheme
        ``"even_odd"``, ``"random_pairs"`` or pairs such as ``[(0, 6)]``; see
        :class:`openmm_tsf.sampling.kernels.pairing.Pairing`.

    Raises
    ------
    TypeError, ValueError
        If the scheme is unknown or does not fit the ladder, or the constant is not positive; the
        message says why.
    """

    exact = True

    def __init__(
        self,
        temperatures: Any,
        boltzmann_constant: float,
        scheme: Scheme = "even_odd",
        name: str = "swap_plain",
    ) -> None:
        self.name = kernel_name(name)
        self.temperatures = as_temperatures(temperatures)
        number = isinstance(boltzmann_constant, int | float)
        if not (number and math.isfinite(boltzmann_constant) and boltzmann_constant > 0):
            raise ValueError(
                f"boltzmann_constant: expected a finite, positive number, got "
                f"{boltzmann_constant!r}"
            )
        self.boltzmann_constant = float(boltzmann_constant)
        self.pairing = Pairing(scheme, len(self.temperatures))
        self._kelvin = torch.tensor(self.temperatures, dtype=torch.float64)
        self._beta = 1 / (self.boltzmann_constant * self._kelvin)
        self._calls = 0

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """Shape of the counts: one number per adjacent pair, or a matrix."""
        return self.pairing.counts_shape

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        return {"kernel": "PlainSwap", "scheme": self.pairing.scheme}

    def state_dict(self) -> dict[str, Any]:
        """The number of the next call, which chooses the even or the odd pairs."""
        return {"calls": self._calls}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Set what :meth:`state_dict` returned."""
        self._calls = int(content["calls"])

    def __call__(
        self, state: WalkerState, generator: torch.Generator
    ) -> tuple[WalkerState, KernelInfo]:
        """One sweep of swaps within every walker's ladder."""
        n_walkers, n_rungs = state.n_walkers, state.n_rungs
        low, high = self.pairing.draw(n_walkers, self._calls, generator)
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
            self.pairing.counts(accepted, low, high),
            self.pairing.counts(everything, low, high),
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
