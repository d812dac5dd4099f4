"""Path gradients: training on likelihood and energy with the forces of both.

The gradient of the likelihood -E_p[ln q] is a mean of scores whose norm, some sqrt(d), does not
shrink as the flow gets better; so late training is a fight with noise, and fits the noise of few
frames (overfitting). Path gradients (Roeder, Wu, Duvenaud, arXiv:1703.09194; Vaitl et al.,
arXiv:2206.09016, 2403.15881) have the same mean, and vanish for every single point once the flow is
exact. They need grad ln p at the data: one evaluation with forces a frame, once.
"""

import torch
from torch import Tensor

from openmm_tsf.flows.bijectors import Pullback

#: Points far off have steep slopes; the norm of each one's cotangent is cut to this. Typical norms
#: are 3 to 5 after some training.
COTANGENT_LIMIT = 30.0


def limited(cotangent: Tensor) -> Tensor:
    """Cotangents [B, n] with norms of at most `COTANGENT_LIMIT`; zeros where not finite."""
    norm = cotangent.norm(dim=1, keepdim=True)
    scaled = cotangent * (COTANGENT_LIMIT / norm.clamp(min=COTANGENT_LIMIT))
    return torch.where(torch.isfinite(scaled), scaled, 0.0)


def whole(cotangent: Tensor) -> Tensor:
    """Which cotangents [B] of :func:`limited` were not cut: the others' losses can be any size."""
    norm = cotangent.norm(dim=1)
    return (norm > 0) & (norm < 0.999 * COTANGENT_LIMIT)


def data_cotangent(v: Tensor, pullback: Pullback, slope: Tensor, tau: Tensor) -> Tensor:
    """What v(theta) of data is to be pulled against for KL(p || q), [B, d+m].

    With p*(v) = p(f(v)) |det J_f(v)|, the data's density in the latent space,
    grad KL = E[ d/dv (ln p* - ln prior) . dv/dtheta ], v = f^-1(data).

    Parameters
    ----------
    v
        f^-1 of the data [B, d+m].
    pullback
        Of :meth:`openmm_tsf.flows.bijectors.Chain.inverse_and_pullback`, with v.
    slope
        -grad ln p at the data [B, d+m].
    tau
        T/T_ref [B].
    """
    return limited(v.detach() / tau[:, None] - pullback(slope))


def draw_score(v: Tensor, pullback: Pullback, tau: Tensor) -> Tensor:
    """-grad ln q at draws y = f(v), [B, d+m].

    Parameters
    ----------
    v
        Prior draws [B, d+m].
    pullback
        Of :meth:`openmm_tsf.flows.bijectors.Chain.forward_and_pullback`, with y.
    tau
        T/T_ref [B].
    """
    return pullback(v.detach() / tau[:, None])


def log_density_at_draws(y: Tensor, log_det: Tensor, score: Tensor) -> Tensor:
    """Numbers [B] whose gradient with respect to the parameters is that of ln q at fixed y.

    ln q(y(theta); theta) is ln prior(v) - log_det; what is due to y(theta) is taken off.

    Parameters
    ----------
    y, log_det
        f(v) [B, d+m] and its ln|det J| [B], with their graph.
    score
        Of :func:`draw_score`.
    """
    return (y * score).sum(dim=1) - log_det


def draw_cotangent(score: Tensor, slope: Tensor) -> Tensor:
    """What y(theta) of draws is to be pulled against for KL(q || p), [B, d+m].

    grad KL = E[ d/dy (ln q - ln p) . dy/dtheta ], y = f(v), v drawn from the prior; the
    dependence of q itself on theta has mean zero and is left out.

    Parameters
    ----------
    score
        Of :func:`draw_score`.
    slope
        -grad ln p at y [B, d+m].
    """
    return limited(slope - score)
