"""The two losses of a flow: likelihood of data, and free energy of the flow's draws.

Both are per sample; callers weight and average them.
"""

import math

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.training.target import Target


def whiten(
    flow: AugmentedFlow, x: Tensor, tau: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Map data x [B, *event] to the network's output space; done once before training.

    Returns y [B, d] and log|det dy/dx| [B], less the ln of the number of labelled configurations
    with the same y and, where copies overlap, of the partition weight of the copy that `generator`
    draws at T/T_ref `tau`.
    """
    log_det = x.new_full((len(x),), -flow.log_multiplicity)
    with torch.no_grad():
        copies = None
        if flow.overlap:
            assert generator is not None
            kelvin = tau * flow.reference_temperature
            copies, log_partition = flow.draw_copies(x, kelvin, generator)
            log_det = log_det - log_partition
        return flow.undo_layers(x, log_det, copies)


def draw_normal(tau: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Draw from N(0, tau): [B, width] for tau [B]."""
    noise = torch.randn(len(tau), width, generator=generator, dtype=tau.dtype, device=tau.device)
    return noise * tau.sqrt()[:, None]


def negative_log_likelihood(
    network: Chain, y: Tensor, log_det: Tensor, momenta: Tensor, tau: Tensor
) -> Tensor:
    """Return -log p(x, p) [B] (arXiv:2012.00429, eq. 5).

    `y` and `log_det` are data as :func:`whiten` returns them, `momenta` [B, m] newly drawn from
    N(0, tau), `tau` T/T_ref of each sample [B].
    """
    v, log_det_network = network.inverse_and_log_det(torch.cat([y, momenta], dim=1))
    prior = 0.5 * (v.square().sum(dim=1) / tau + v.shape[1] * torch.log(2 * math.pi * tau))
    return prior - log_det_network - log_det


def marginal_nll_bound(joint: Tensor, n_momenta: int, tau: Tensor) -> Tensor:
    """Return a joint NLL less the momenta's entropy: an upper bound on E[-log p(x)].

    E[-log p(x, p)] - (m/2)(1 + ln 2 pi tau); the gap is a conditional KL divergence.
    """
    return joint - 0.5 * n_momenta * (1 + torch.log(2 * math.pi * tau))


def variational_free_energy(target: Target, network: Chain, v: Tensor, tau: Tensor) -> Tensor:
    """Return U/kT + |p|^2/2tau - log|J_D| of prior draws v [B, d+m] at T/T_ref tau [B], float64.

    arXiv:2012.00429, eq. 6, with its 1/tau; the target's guarded reduced energy replaces U/kT. +inf
    where the energy is not finite. The network may have lower precision than the fixed layers.
    """
    y, log_det = network.forward_and_log_det(v)
    d = target.flow.n_coordinates
    momenta, tau = y[:, d:].double(), tau.double()
    reduced_energy, _ = target.reduced_energy(y[:, :d].double(), tau)
    return -log_weight(reduced_energy, momenta, tau, -log_det.double())
