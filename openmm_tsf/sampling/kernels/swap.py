"""Exchanges of replicas between rungs of the temperature ladder."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Generator

from openmm_tsf.metropolis import metropolis
from openmm_tsf.sampling.kernels.base import check_name
from openmm_tsf.sampling.kernels.pairing import Pairing, Scheme, SwapKernel
from openmm_tsf.sampling.state import KernelInfo, WalkerState
from openmm_tsf.units import KELVIN, KJ_PER_MOLE, as_temperatures, in_unit
from openmm_tsf.utils.deferred import as_count
from openmm_tsf.utils.devices import DeviceConstants
from openmm_tsf.utils.validation import unwrap_scalar


class PlainSwap(SwapKernel, DeviceConstants):
    """Replica exchange: two rungs exchange their configurations (Swendsen and Wang 1986).

    log alpha = (1/kT_a - 1/kT_b) (U_a - U_b). Velocities stay with their configuration and are
    scaled by sqrt(T_new / T_old), which leaves their part of the weight unchanged.

    Parameters
    ----------
    temperatures, boltzmann_constant
        The ladder in K, and ``potential.boltzmann_constant``.
    scheme, first_pairs, name
        Which rungs exchange: see :class:`openmm_tsf.sampling.kernels.pairing.Pairing`; a name.


    Examples
    --------
    >>> from openmm_tsf.sampling.kernels import PlainSwap
    >>> swap = PlainSwap((300.0, 400.0, 520.0), boltzmann_constant=0.00831446, scheme=[(0, 2)])
    >>> swap.settings()
    {'kernel': 'PlainSwap', 'scheme': [[0, 2]], 'first_pairs': 'even'}
    """

    exact = True

    def __init__(
        self,
        temperatures: Any,
        boltzmann_constant: float,
        scheme: Scheme = "even_odd",
        name: str = "swap_plain",
        first_pairs: str = "even",
    ) -> None:
        self.name = check_name(name)
        self.temperatures = as_temperatures(temperatures)
        constant = in_unit(boltzmann_constant, KJ_PER_MOLE / KELVIN, "boltzmann_constant")
        constant = unwrap_scalar(constant)
        is_number = isinstance(constant, Real) and not isinstance(constant, bool)
        if not (is_number and math.isfinite(constant) and constant > 0):
            raise ValueError(
                f"boltzmann_constant: expected a finite, positive number, got "
                f"{boltzmann_constant!r}"
            )
        self.boltzmann_constant = float(constant)
        self.pairing = Pairing(scheme, len(self.temperatures), first_pairs)
        self._kelvin = torch.tensor(self.temperatures, dtype=torch.float64, device="cpu")
        self.kt = self.boltzmann_constant * self._kelvin

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        return {"kernel": "PlainSwap", **self.pairing.settings()}

    def __call__(self, state: WalkerState, generator: Generator) -> tuple[WalkerState, KernelInfo]:
        """Propose the exchange of every pair of rungs within every walker, and accept or reject."""
        n_walkers, n_rungs = state.n_walkers, state.n_rungs
        low, high = self.pairing.draw(n_walkers, generator)
        kt, kelvin = (self.on_device(name, low.device) for name in ("kt", "_kelvin"))
        u_low, u_high = state.energy.gather(1, low), state.energy.gather(1, high)
        beta_low, beta_high = 1 / kt[low], 1 / kt[high]
        current = -(u_low * beta_low + u_high * beta_high)
        proposed = -(u_high * beta_low + u_low * beta_high)
        accepted, non_finite = metropolis(current.flatten(), proposed.flatten(), generator)
        accepted = accepted.reshape(low.shape)

        # Where each rung's replica comes from.
        source = torch.arange(n_rungs, dtype=torch.int64, device=low.device).repeat(n_walkers, 1)
        source.scatter_(1, low, torch.where(accepted, high, low))
        source.scatter_(1, high, torch.where(accepted, low, high))
        rows = torch.arange(n_walkers, dtype=torch.int64, device=low.device)[:, None]
        rows = rows.expand_as(source)
        velocities = state.velocities
        if velocities is not None:
            scale = (kelvin[None, :] / kelvin[source]).sqrt()
            trailing = (1,) * (velocities.ndim - 2)
            velocities = velocities[rows, source] * scale.reshape(*scale.shape, *trailing)
        info = KernelInfo(
            self.pairing.counts(accepted, low, high),
            self.pairing.counts(torch.ones_like(accepted), low, high),
            rejected_non_finite=as_count(non_finite.sum()),
        )
        moved = {k: getattr(state, k)[rows, source] for k in ("x", "energy", "replica")}
        return state.evolve(velocities=velocities, **moved), info
