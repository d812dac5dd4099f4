"""Importance weights of independent draws of a flow, and of given configurations."""

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

    The flow need not have been trained at the temperature, in K (or a Quantity). `batch_size` draws
    are made at once; the random numbers depend on it.
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


@torch.no_grad()
def weigh(
    flow: AugmentedFlow,
    x: Tensor,
    reduced_energy: Tensor,
    temperature: Any,
    generator: torch.Generator,
    batch_size: int = 5000,
) -> Tensor:
    """Return ln(p/q) [B] of given configurations x [B, *event] with newly drawn momenta.

    Up to the constant of :func:`draw_weighted`, so that weights of draws and of configurations can
    be compared. +inf outside the domain of the flow's coordinates, where q = 0. `reduced_energy`
    is U/kT [B].
    """
    kelvin, batch_size = as_temperature(temperature), check_int(batch_size, "batch_size")
    tau = kelvin / flow.reference_temperature
    parts = []
    for block, energy in zip(x.split(batch_size), reduced_energy.split(batch_size), strict=True):
        block = block.to(flow.dtype)
        noise = torch.randn(
            (len(block), flow.n_momenta), generator=generator, dtype=flow.dtype, device=block.device
        )
        momenta = noise * math.sqrt(tau)
        copies, partition = None, block.new_zeros(len(block))
        if flow.overlap:
            copies, partition = flow.draw_copies(block, kelvin, generator)
        v, log_det = flow.inverse_and_log_det(block, momenta, copies)
        log_prob = flow.prior_log_prob(v, kelvin) + log_det - partition - flow.log_multiplicity
        log_prob = torch.where(torch.isfinite(log_det), log_prob, -math.inf)
        parts.append(log_weight(energy, momenta, tau, log_prob))
    return torch.cat(parts)
