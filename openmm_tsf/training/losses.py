"""The two losses of a flow: likelihood of data, free energy of its own draws.

Both are per sample, so that callers weigh and average them.
"""

import math

import torch
from torch import Tensor

from openmm_tsf.coordinates.hydrogen_labels import OVERLAP_STIFFNESS
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.potentials.base import Potential

#: Weight of a squared step (radians, or relative) outside the domain, in nats. Steep enough that
#: the draws turn back within about 0.1 rad of the wall, and what overlapping copies fade out by.
PENALTY = OVERLAP_STIFFNESS


def whitened(
    flow: AugmentedFlow,
    x: Tensor,
    tau: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Data in the network's output space, computed once before training.

    Parameters
    ----------
    flow
        The flow whose fixed layers (coordinates, standardisation) are undone.
    x
        Configurations [B, *event], float64.
    tau, generator
        T/T_ref of the data, and what draws the copy that each configuration is taken for where the
        flow's copies overlap (not needed elsewhere).

    Returns
    -------
    y : Tensor
        [B, d].
    log_det : Tensor
        log|det dy/dx| [B], less the ln of the number of labelled configurations that share one y,
        and less ln of the share of the copy where copies overlap.
    """
    total = x.new_full((len(x),), -flow.log_multiplicity)
    with torch.no_grad():
        if flow.coordinates is not None:
            copies = None
            if flow.overlap:
                assert generator is not None
                kelvin = tau * flow.reference_temperature
                copies, share = flow.draw_copies(x, kelvin, generator)
                total = total - share
            x, extra = flow.coordinates.inverse_and_log_det(x, copies)
            total = total + extra
        if flow.whitening is not None:
            x, extra = flow.whitening.inverse_and_log_det(x)
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


def action(
    flow: AugmentedFlow, potential: Potential, y: Tensor, tau: Tensor, ceiling: float
) -> tuple[Tensor, Tensor]:
    """What training takes for -ln of the target's density on y, up to a constant.

    U/kT less ln of the volume element of the flow's fixed layers. Energies are softened above the
    ceiling and the coordinate layer's domain is guarded by a smooth penalty, so that the value is
    not the true one far off: training only. Where copies of a configuration overlap, the penalty
    is the numerator of their shares (:meth:`InternalCoordinates.log_partition`), and the
    denominator is added.

    Parameters
    ----------
    flow
        The flow's fixed layers and T_ref.
    potential
        Energies with first-order autograd.
    y
        Points in the network's output space [B, d], float64.
    tau
        T/T_ref of each, [B] float64.
    ceiling
        Energy in kJ/mol above which energies are softened.

    Returns
    -------
    action : Tensor
        [B]; +inf where the energy is not finite.
    x : Tensor
        The configurations [B, *event].
    """
    total = y.new_full((len(y),), flow.log_multiplicity)
    x = y
    if flow.whitening is not None:
        x, extra = flow.whitening.forward_and_log_det(x)
        total = total + extra
    penalty = torch.zeros_like(total)
    layer = flow.coordinates
    if layer is not None:
        u = x
        if not layer.is_constant_log_det:
            total = total + layer.log_abs_det(layer.regularise(u)[0])
        x, penalty = layer.forward_regularised(u)
        penalty = PENALTY * penalty
        if flow.overlap:
            # What fades a copy out is part of the target, and steers with it.
            penalty = penalty / tau + layer.log_overlap(u, tau)[1]
    kt = potential.boltzmann_constant * flow.reference_temperature * tau
    energy = soften(potential.energy(x), ceiling, kt)
    return energy / kt + penalty - total, x


def variational_free_energy(
    flow: AugmentedFlow,
    network: Chain,
    potential: Potential,
    v: Tensor,
    tau: Tensor,
    ceiling: float,
) -> Tensor:
    """U/kT + |p|^2/2tau - log|J_D| per draw (arXiv:2012.00429, eq. 6, with its 1/tau).

    With the target of :func:`action`: training only.

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
    momenta, tau = y[:, d:].double(), tau.double()
    configurational, _ = action(flow, potential, y[:, :d].double(), tau, ceiling)
    return configurational + 0.5 * momenta.square().sum(dim=1) / tau - log_det.double()
