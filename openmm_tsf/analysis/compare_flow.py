"""What a flow's density says of a reference, and what its draws are worth, at one temperature.

All numbers are of the joint density of coordinates and auxiliary momenta: effective sample sizes
are lower bounds of those of the coordinates' marginal density, EUBO and NLL upper bounds.
"""

import math
from typing import Any

import numpy as np

from openmm_tsf.analysis.certify_flow import N_DRAWS, weigh_samples
from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.compare_distances import split_halves
from openmm_tsf.analysis.statistics import Array, forward_ess, reverse_ess, reverse_ess_stderr
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.potentials.base import Potential


def measure_flow(
    flow: AugmentedFlow, potential: Potential, reference: Samples, rng: np.random.Generator
) -> dict[str, Any]:
    """Weigh 10 000 draws, and frames of the reference, at the temperature of the frames.

    With w = exp(-U/kT)/q: ``reverse_ess`` of the draws; of the frames ``forward_ess``, EUBO, the
    mean of ln w, an upper bound of ln Z, and NLL = -E[ln q(x)], EUBO + ⟨U⟩/kT, where the momenta's
    own part is left out. ``halves`` has the same from each half of the reference. Frames outside
    the domain of the flow's coordinates, where q = 0, are left out: ``outside`` is their fraction.
    """
    kelvin = reference.temperature
    weights = weigh_samples(flow, potential, reference)
    tau = kelvin / flow.reference_temperature
    norm = 0.5 * flow.n_momenta * math.log(2.0 * math.pi * tau)  # ln of the momenta's own Z
    frames = weights.frames - norm
    reduced = reference.energy[:: weights.stride] / (potential.boltzmann_constant * kelvin)
    halves = split_halves(frames.shape, 1, rng)[0]
    result: dict[str, Any] = {
        "n_draws": N_DRAWS,
        "inside": float(weights.inside.mean()),
        "reverse_ess": None,
        "n_frames": int(frames.size),
        "outside": float((~np.isfinite(frames)).mean()),
    }
    if np.isfinite(weights.draws).any():
        ess = reverse_ess(weights.draws)
        result["reverse_ess"] = {
            "value": ess.fraction,
            "stderr": reverse_ess_stderr(weights.draws),
            "largest_weight": ess.largest_weight,
        }
    whole = _of_frames(frames, reduced)
    parts = [_of_frames(frames.ravel()[k, None], reduced.ravel()[k, None]) for k in halves]
    for name, entry in whole.items():
        entry["halves"] = [part[name]["value"] if part else None for part in parts]
    return result | whole


def _of_frames(log_weights: Array, reduced_energy: Array) -> dict[str, dict[str, Any]]:
    """Return forward ESS, EUBO and NLL from ln w and U/kT [n, W] of frames."""
    inside = np.isfinite(log_weights)
    if not inside.any():
        return {}
    mean = float(log_weights[inside].mean())
    # An error of frames in order; those outside the domain are rare, and count as the mean.
    eubo = estimate_mean(np.where(inside, log_weights, mean))
    log_density = log_weights + reduced_energy
    level = float(log_density[inside].mean())
    nll = estimate_mean(np.where(inside, log_density, level))
    return {
        "forward_ess": {"value": forward_ess(log_weights[inside]).fraction},
        "eubo": {"value": mean, "stderr": eubo.stderr},
        "nll": {"value": level, "stderr": nll.stderr},
    }
