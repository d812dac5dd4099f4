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
    """Map data to the network's output space; done once before training.

    Parameters
    ----------
    flow
        The flow whose fixed layers (coordinates, standardisation) are undone.
    x
        Configurations [B, *event], float64.
    tau, generator
        T/T_ref of the data, and the source of randomness for the copy of each configuration;
        needed only where the flow's copies overlap.

    Returns
    -------
    y : Tensor
        [B, d].
    log_det : Tensor
        log|det dy/dx| [B], less the ln of the number of labelled configurations with the same y,
        and less the ln of the copy's partition weight where copies overlap.
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
    noise = torch.randn(len(tau), width, generator=generator, dtype=tau.dtype)
    return noise * tau.sqrt()[:, None]


def negative_log_likelihood(
    network: Chain, y: Tensor, log_det: Tensor, momenta: Tensor, tau: Tensor
) -> Tensor:
    """Return -log p(x, p) per sample (arXiv:2012.00429, eq. 5).

    Parameters
    ----------
    network
        The trainable part of D.
    y, log_det
        Data as :func:`whiten` returns it: [B, d] and [B].
    momenta
        Auxiliary momenta [B, m], newly drawn from N(0, tau).
    tau
        T/T_ref of each sample, [B].
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
    """Return U/kT + |p|^2/2tau - log|J_D| per draw (arXiv:2012.00429, eq. 6, with its 1/tau).

    Parameters
    ----------
    target
        The training's target, whose guarded reduced energy replaces U/kT.
    network
        The trainable part of D; may have lower precision than the fixed layers.
    v
        Prior draws [B, d+m] at tau.
    tau
        T/T_ref of each draw, [B].

    Returns
    -------
    Tensor
        [B], float64; +inf where the energy is not finite.
    """
    y, log_det = network.forward_and_log_det(v)
    d = target.flow.n_coordinates
    momenta, tau = y[:, d:].double(), tau.double()
    reduced_energy, _ = target.reduced_energy(y[:, :d].double(), tau)
    return -log_weight(reduced_energy, momenta, tau, -log_det.double())
