"""Independent draws of a flow with importance weights."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.potentials.base import Potential
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_int


class WeightedDraws(NamedTuple):
    """Draws x [n, *event], energies U [n], log weights [n] and which are inside the domain [n].

    Outside the domain of the flow's coordinates the energy is +inf and the log weight -inf.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf import TemperatureSteerableFlow
    >>> from openmm_tsf.flows.draws import draw_weighted
    >>> from openmm_tsf.potentials import DoubleWell
    >>> harmonic = DoubleWell(0.0, 0.5, 0.0)  # U = x^2/2, which an untrained flow samples exactly
    >>> flow = TemperatureSteerableFlow(1, 1, 2, (8,), 1.0, seed=1)
    >>> draws = draw_weighted(flow, harmonic, 2.0, 100, torch.Generator().manual_seed(1))
    >>> tuple(draws.x.shape), bool(draws.log_weights.std() < 1e-6)
    ((100, 1), True)
    """

    x: Tensor
    energy: Tensor
    log_weights: Tensor
    inside: Tensor


@torch.no_grad()
def draw_weighted(
    flow: AugmentedFlow,
    potential: Potential,
    temperature: Any,
    n: int,
    generator: torch.Generator,
    batch_size: int = 5000,
) -> WeightedDraws:
    """Draw n configurations at a temperature, with the weights of (x, p) up to a constant.

    Parameters
    ----------
    flow
        The flow, trained at its reference temperature.
    potential
        Energies of the target.
    temperature
        In K (or a Quantity); the flow need not have been trained at it.
    n
        Number of draws.
    generator
        Source of the random numbers.
    batch_size
        The number of draws in a batch; the random numbers depend on it.
    """
    n, batch_size = check_int(n, "n"), check_int(batch_size, "batch_size")
    kelvin = as_temperature(temperature)
    tau, kt = kelvin / flow.reference_temperature, potential.boltzmann_constant * kelvin
    parts = []
    for start in range(0, n, batch_size):
        x, momenta, log_prob = flow.sample(min(batch_size, n - start), kelvin, generator)
        inside = torch.isfinite(log_prob)
        energy = torch.full_like(log_prob, math.inf)
        energy[inside] = potential.energy(x[inside])
        log_weights = log_weight(energy / kt, momenta, tau, log_prob)
        log_weights = torch.where(inside & torch.isfinite(energy), log_weights, -math.inf)
        parts.append((x, energy, log_weights, inside))
    return WeightedDraws(*map(torch.cat, zip(*parts, strict=True)))
