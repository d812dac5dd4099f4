"""Effective sample sizes of weighted populations, and their systematic resampling."""

import torch
from torch import Generator, Tensor


def ess_fractions(log_weights: Tensor) -> Tensor:
    """Return Kish's effective sample size over n [G] of populations with log weights [G, n]."""
    log_ess = 2.0 * log_weights.logsumexp(dim=1) - (2.0 * log_weights).logsumexp(dim=1)
    return log_ess.exp() / log_weights.shape[1]


def log_means(log_weights: Tensor) -> Tensor:
    """Return ln of the mean weight [G] of populations with log weights [G, n]."""
    n = torch.tensor(log_weights.shape[1], dtype=log_weights.dtype, device=log_weights.device)
    return log_weights.logsumexp(dim=1) - n.log()


def resample_systematically(log_weights: Tensor, generator: Generator) -> Tensor:
    """Return the particles [G, n] that replace those of populations with log weights [G, n].

    Particle i has floor(n W_i) or one more copies, n W_i on average (Kitagawa 1996): one uniform
    number places n equally spaced points on the cumulated weights W of a population.
    """
    n_populations, n = log_weights.shape
    cumulated = log_weights.softmax(dim=1).cumsum(dim=1)
    cumulated = cumulated / cumulated[:, -1:]  # ends with 1, whatever the rounding
    uniform = torch.rand(
        n_populations, 1, generator=generator, dtype=log_weights.dtype, device=log_weights.device
    )
    points = (uniform + torch.arange(n, dtype=log_weights.dtype, device=log_weights.device)) / n
    # Rounded to 1, a point would lie beyond the last particle.
    below_one = torch.nextafter(points.new_ones(()), points.new_zeros(()))
    return torch.searchsorted(cumulated, torch.minimum(points, below_one), right=True)


def select_survivors(
    log_weights: Tensor, chosen: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Return the rows [G n] that go on, and their weights [G, n].

    Populations that are `chosen` [G] are resampled. Elsewhere a particle of weight zero, which
    never counts again, takes the place of the heaviest, so that kernels have finite energies.
    """
    n_populations, n = log_weights.shape
    index = torch.arange(n, dtype=torch.int64, device=log_weights.device)
    kept = torch.where(log_weights.isneginf(), log_weights.argmax(dim=1, keepdim=True), index)
    drawn = resample_systematically(log_weights, generator) if bool(chosen.any()) else kept
    rows = torch.where(chosen[:, None], drawn, kept)
    means = log_means(log_weights)[:, None].expand(-1, n)
    offsets = n * torch.arange(n_populations, dtype=torch.int64, device=log_weights.device)
    new_weights = torch.where(chosen[:, None], means, log_weights)
    return (rows + offsets[:, None]).flatten(), new_weights
