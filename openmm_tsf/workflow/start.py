"""Configurations that walkers start from: random frames and weighted draws of the flow."""

import logging
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies
from openmm_tsf.systems.dataset import MDDataset

logger = logging.getLogger(__name__)

_DRAWS_PER_WALKER = 20


def start_positions(
    frames: MDDataset | None,
    flow: AugmentedFlow,
    potential: Potential,
    temperatures: Sequence[float],
    n_walkers: int,
    generator: Generator,
) -> Tensor:
    """Return configurations [W, R, *event] to start from.

    Without frames they are draws of the flow at each rung, resampled by their importance weights.
    With frames, the first half of the walkers starts from random ones, and only the others from
    draws: walkers that start alike would agree with each other before they have equilibrated.
    Draws above the highest energy of such frames are not used; frames replace them.

    Raises
    ------
    ValueError
        If there are no frames, and no draw at a rung has a finite energy.
    """
    n, n_rungs = n_walkers, len(temperatures)
    if frames is None:
        return torch.stack([_draw(flow, potential, t, n, generator) for t in temperatures], dim=1)
    index = torch.randint(
        len(frames), (n * n_rungs,), generator=generator, dtype=torch.int64, device=generator.device
    )
    x = frames.positions[index.to(frames.positions.device)].unflatten(0, (n, n_rungs))
    return replace_half_by_draws(x.to(flow.device), flow, potential, temperatures, generator)


def replace_half_by_draws(
    x: Tensor,
    flow: AugmentedFlow,
    potential: Potential,
    temperatures: Sequence[float],
    generator: Generator,
) -> Tensor:
    """Return configurations [W, R, *event], those of the second half of walkers by draws.

    They are draws of the flow at each rung, chosen by their importance weights, but for those above
    the highest energy of what they replace.
    """
    n = len(x)
    n_draws = n // 2
    if n_draws == 0:
        return x
    x = x.clone()
    with torch.no_grad():
        highest = float(energies.energy(potential, x[-n_draws:].flatten(0, 1)).max())
    for rung, kelvin in enumerate(temperatures):
        drawn = _draw_distinct(flow, potential, kelvin, n_draws, highest, generator)
        if len(drawn) < n_draws:
            logger.info(
                "%.2f K: %d of %d walkers start from draws of the flow, the others from frames: no "
                "other of %d draws has an energy that such frames have",
                kelvin, len(drawn), n, _DRAWS_PER_WALKER * n_draws,
            )  # fmt: skip
        x[n - len(drawn) :, rung] = drawn
    return x


def _weighted_draws(
    flow: AugmentedFlow, potential: Potential, kelvin: float, n: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return n draws [n, *event], energies and log weights [n]; not finite where unusable."""
    drawn = flow.sample(n, kelvin, generator)
    x = drawn.x.to(torch.float64)
    inside = torch.isfinite(drawn.log_prob).reshape(-1, *(1,) * (x.ndim - 1))
    x = torch.where(inside, x, torch.nan)
    tau = kelvin / flow.reference_temperature
    energy = energies.energy(potential, x)
    log_weight = -energy / (potential.boltzmann_constant * kelvin)
    log_weight = log_weight - 0.5 * drawn.momenta.square().sum(dim=1) / tau - drawn.log_prob
    return x, energy, log_weight


def _draw_distinct(
    flow: AugmentedFlow,
    potential: Potential,
    kelvin: float,
    n: int,
    highest: float,
    generator: Generator,
) -> Tensor:
    """Draw up to n different configurations of at most an energy, by their importance weights.

    Without replacement (Efraimidis and Spirakis 2006): where few draws carry all of the weight,
    walkers would start from the same one.
    """
    x, energy, log_weight = _weighted_draws(
        flow, potential, kelvin, _DRAWS_PER_WALKER * n, generator
    )
    usable = torch.isfinite(log_weight) & (energy <= highest)
    usable[usable.clone()] &= _is_in_domain(flow, x[usable])
    return x[choose_by_weight(torch.where(usable, log_weight, -torch.inf), n, generator)]


def choose_by_weight(log_weight: Tensor, n: int, generator: Generator) -> Tensor:
    """Return the indices of up to n different samples, chosen by their weights, of log weight [N].

    Samples of weight zero are not chosen. Without replacement (Efraimidis and Spirakis 2006).
    """
    device = generator.device
    noise = torch.rand(len(log_weight), generator=generator, dtype=torch.float64, device=device)
    key = log_weight - (-noise.log()).log().to(log_weight.device)
    return key.topk(min(n, int((log_weight > -torch.inf).sum()))).indices


def _is_in_domain(flow: AugmentedFlow, x: Tensor) -> Tensor:
    """Return whether the flow can compute configurations and they are no mirror images."""
    x = x.to(flow.dtype)
    momenta = torch.zeros(len(x), flow.n_momenta, dtype=flow.dtype, device=x.device)
    with torch.no_grad():
        _, log_det = flow.inverse_and_log_det(x, momenta)
    return torch.isfinite(log_det) & ~flow.is_mirror_image(x)


def _draw(
    flow: AugmentedFlow, potential: Potential, kelvin: float, n: int, generator: Generator
) -> Tensor:
    """Draw n configurations from the flow, resampled by their importance weights."""
    x, _, log_weight = _weighted_draws(flow, potential, kelvin, _DRAWS_PER_WALKER * n, generator)
    usable = torch.isfinite(log_weight)
    if not bool(usable.any()):
        raise ValueError(
            f"flow: none of {len(x)} draws at {kelvin:.2f} K has a finite energy; give frames to "
            "start from, or train the flow for longer"
        )
    weight = torch.where(usable, (log_weight - log_weight[usable].max()).exp(), 0.0)
    return x[torch.multinomial(weight, n, replacement=True, generator=generator)]
