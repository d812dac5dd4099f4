"""Importance weights of configurations with momenta."""

from torch import Tensor


def log_weight(
    reduced_energy: Tensor, momenta: Tensor, tau: Tensor | float, log_density: Tensor
) -> Tensor:
    """Return ln(p/q) [B] of (x, p), up to a constant of the temperature.

    The target is p(x, p) = exp(-U(x)/kT - |p|^2 / 2 tau), U/kT being `reduced_energy` [B], `tau`
    T/T_ref. `log_density` is ln q [B]; the volume element alone, -log|J_D| for (x, p) = D(v), gives
    the log-density of the target in the latent space.
    """
    return -reduced_energy - 0.5 * momenta.square().sum(dim=1) / tau - log_density
