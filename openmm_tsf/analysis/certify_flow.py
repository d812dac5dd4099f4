"""Importance weights of a flow's draws, and of frames, at the temperature of the frames."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.draws import draw_weighted, weigh
from openmm_tsf.potentials.base import Potential
from openmm_tsf.utils.random import seeded_generator

#: Draws at each temperature, and frames that are weighed.
N_DRAWS, MAX_FRAMES = 10_000, 10_000
_SEED = 1


@dataclass(frozen=True)
class FlowWeights:
    """ln(p/q) of independent draws and of frames, up to the same constant."""

    temperature: float  # K
    x: npt.NDArray[np.float32]  # [D, N, 3] draws in nm
    draws: Array  # [D], -inf where p = 0
    inside: npt.NDArray[np.bool_]  # [D], whether in the domain of the flow's coordinates
    frames: Array  # [n, W], +inf where q = 0; every `stride`-th iteration
    stride: int


def weigh_samples(flow: AugmentedFlow, potential: Potential, samples: Samples) -> FlowWeights:
    """Draw from the flow at the temperature of samples, and weigh draws and frames."""
    generator, kelvin = seeded_generator(_SEED), samples.temperature
    drawn = draw_weighted(flow, potential, kelvin, N_DRAWS, generator)
    stride = max(1, -(-samples.n_frames // MAX_FRAMES))
    energy = samples.energy[::stride]
    positions = samples.positions[::stride].reshape(-1, *samples.positions.shape[2:])
    reduced = energy.ravel() / (potential.boltzmann_constant * kelvin)
    frames = weigh(
        flow,
        torch.from_numpy(positions.astype(np.float64)),
        torch.from_numpy(reduced),
        kelvin,
        generator,
    )
    return FlowWeights(
        temperature=kelvin,
        x=drawn.x.numpy().astype(np.float32),
        draws=drawn.log_weights.numpy(),
        inside=drawn.inside.numpy(),
        frames=frames.numpy().reshape(energy.shape),
        stride=stride,
    )
