"""The two losses of a flow: likelihood of data, free energy of its own draws.

Both are per sample, so that callers weigh and average them.
"""

import math

import torch
from torch import Tensor

from openmm_tsf.flows.augmented import AugmentedFlow
from openmm_tsf.flows.bijector import Chain
from openmm_tsf.potentials.base import Potential

#: Weight of a squared step (radians, or relative) outside the domain, in nats. Steep enough that
#: the draws turn back within about 0.1 rad of the wall.
PENALTY = 50.0


def whitened(flow: AugmentedFlow, x: Tensor) -> tuple[Tensor, Tensor]:
    """Data in the network's output space, computed once before training.

    Parameters
    ----------
    flow
        The flow whose fixed layers (coordinates, standardisation) are undone.
    x
        Configurations [B, *event], float64.

    Returns
    -------
    y : Tensor
        [B, d].
    log_det : Tensor
        log|det dy/dx| [B], less the ln of the number of labelled configurations that share one y.
    """
    total = x.new_full((len(x),), -flow.log_multiplicity)
    with torch.no_grad():
        for layer in (flow.coordinates, flow.whitening):
            if layer is not None:
                x, extra = layer.inverse_and_log_det(x)
                total = total + extra
    return x, total


def negative_log_likelihood(
    network: Chain, y: Tensor, log_det: Tensor, momenta: Tensor, tau: Tensor
) -> Tensor:
    """-log p(x, p) per sample (arXiv:2012.00429, eq. 5).

    Parameters
    ----------
    network
        The trainable part of D.
    y, log_det
        Data as :func:`whitened` returns it: [B, d] and [B].
    momenta
        Auxiliary momenta [B, m], drawn afresh from N(0, tau).
    tau
        T/T_ref of each sample, [B].
    """
    v, log_det_network = network.inverse_and_log_det(torch.cat([y, momenta], dim=1))
    prior = 0.5 * (v.square().sum(dim=1) / tau + v.shape[1] * torch.log(2 * math.pi * tau))
    return prior - log_det_network - log_det


def marginal_nll_bound(joint: Tensor, n_momenta: int, tau: Tensor) -> Tensor:
    """A joint NLL less the momenta's entropy: an upper bound on the marginal's E[-log p(x)].

    E[-log p(x, p)] - (m/2)(1 + ln 2 pi tau), the gap being a conditional KL divergence.
    """
    return joint - 0.5 * n_momenta * (1 + torch.log(2 * math.pi * tau))


def soften(energy: Tensor, ceiling: float, kt: Tensor) -> Tensor:
    """Energies [B] that grow only logarithmically above a ceiling: training only.

    Below the ceiling (kJ/mol) nothing changes; above it U becomes
    ceiling + kT ln(1 + (U - ceiling)/kT), with a continuous first derivative.
    """
    excess = (energy - ceiling).clamp(min=0)
    return torch.where(energy > ceiling, ceiling + kt * torch.log1p(excess / kt), energy)


def variational_free_energy(
    flow: AugmentedFlow,
    network: Chain,
    potential: Potential,
    v: Tensor,
    tau: Tensor,
    ceiling: float,
) -> Tensor:
    """U/kT + |p|^2/2tau - log|J_D| per draw (arXiv:2012.00429, eq. 6, with its 1/tau).

    Energies are softened above the ceiling and the coordinate layer's domain is guarded by a
    smooth penalty, so the value is not the true free energy for draws far off: training only.

    Parameters
    ----------
    flow
        The flow's fixed layers and T_ref.
    network
        The trainable part of D; may be of lower precision than the fixed layers.
    potential
        Energies with first-order autograd.
    v
        Prior draws [B, d+m] at tau.
    tau
        T/T_ref of each draw, [B].
    ceiling
        Energy in kJ/mol above which energies are softened.

    Returns
    -------
    Tensor
        [B], float64; +inf where the energy is not finite.
    """
    y, log_det = network.forward_and_log_det(v)
    d = flow.n_coordinates
    momenta = y[:, d:].double()
    x = y[:, :d].double()
    total = log_det.double() + flow.log_multiplicity
    if flow.whitening is not None:
        x, extra = flow.whitening.forward_and_log_det(x)
        total = total + extra
    penalty = torch.zeros_like(total)
    if flow.coordinates is not None:
        if not flow.coordinates.is_constant_log_det:
            total = total + flow.coordinates.log_abs_det(flow.coordinates.regularise(x)[0])
        x, penalty = flow.coordinates.forward_regularised(x)
    tau = tau.double()
    kt = potential.boltzmann_constant * flow.reference_temperature * tau
    energy = soften(potential.energy(x), ceiling, kt)
    return energy / kt + PENALTY * penalty + 0.5 * momenta.square().sum(dim=1) / tau - total
