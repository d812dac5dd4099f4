"""Path gradients: training on likelihood and energy with the forces of both.

The gradient of the likelihood -E_p[ln q] is a mean of scores whose norm, of order sqrt(d), does not
shrink as the flow improves; late training fits noise. Path gradients (Roeder, Wu, Duvenaud,
arXiv:1703.09194; Vaitl et al., arXiv:2206.09016, 2403.15881) have the same mean, and vanish at
every point once the flow is exact. They need grad ln p at the data: one evaluation of each frame.
"""

import torch
from torch import Tensor

from openmm_tsf.flows.bijectors import Pullback

#: The norm of each point's cotangent is cut to this, as gradients far from the data are large.
#: Typical norms are 3 to 5 after some training.
COTANGENT_LIMIT = 30.0


def limit_norm(cotangent: Tensor, limit: float | None = None) -> Tensor:
    """Return cotangents [B, n] with norms cut to `limit`; zeros where not finite.

    The limit is COTANGENT_LIMIT by default.
    """
    limit = COTANGENT_LIMIT if limit is None else limit
    norm = cotangent.norm(dim=1, keepdim=True)
    scaled = cotangent * (limit / norm.clamp(min=limit))
    return torch.where(torch.isfinite(scaled), scaled, 0.0)


def is_uncut(cotangent: Tensor) -> Tensor:
    """Return which results [B] of :func:`limit_norm` were not cut: other losses are unbounded."""
    norm = cotangent.norm(dim=1)
    return (norm > 0) & (norm < 0.999 * COTANGENT_LIMIT)


def data_cotangent(v: Tensor, gradient: Tensor, tau: Tensor, beta: Tensor) -> Tensor:
    """Return the cotangent [B, d+m] of v(theta) at data for grad KL(p || q).

    With p*(v) = p(f(v)) |det J_f(v)|, the data's density in the latent space, v = f^-1(data),
    c = v/tau and g = -d/dv ln p*(v),

        grad KL = E_p[ (c - beta g) . dv/dtheta ] - (1 - beta) E_p[ grad ln|det df^-1| ]

    for every number beta: that of c is the gradient of the likelihood, g a control variate, and
    beta = 1 gives the path gradient, which is zero at every point where the flow is exact.
    `gradient` is g [B, d+m], to which :meth:`Chain.inverse_and_pullback` maps -grad ln p at the
    data; `beta` [B] is that of each point.
    """
    return limit_norm(v.detach() / tau[:, None] - beta[:, None] * gradient)


def draw_score(v: Tensor, pullback: Pullback, tau: Tensor) -> Tensor:
    """Return -grad ln q [B, d+m] at y = f(v), which :meth:`Chain.forward_and_pullback` returned."""
    return pullback(v.detach() / tau[:, None])


def log_density_at_draws(y: Tensor, log_det: Tensor, score: Tensor) -> Tensor:
    """Return numbers [B] whose gradient in the parameters is that of ln q at fixed y.

    ln q(y(theta); theta) is ln prior(v) - log_det; the part that comes from y(theta) is subtracted.
    `y` and `log_det` have their graph, `score` is from :func:`draw_score`.
    """
    return (y * score).sum(dim=1) - log_det


def draw_cotangent(score: Tensor, gradient: Tensor) -> Tensor:
    """Return the cotangent [B, d+m] of y(theta) at draws for grad KL(q || p).

    grad KL = E[ d/dy (ln q - ln p) . dy/dtheta ], y = f(v), v drawn from the prior; the explicit
    dependence of q on theta has mean zero and is left out. `gradient` is -grad ln p at y [B, d+m].
    """
    return limit_norm(gradient - score)
