"""What several benchmarks need: frames and populations of the reference."""

from importlib.resources import as_file, files

import numpy as np
import torch

from openmm_tsf.analysis.reference import load_reference


def reference_frames(kelvin):
    """Frames [n, N, 3] in nm of the shipped reference at 300 or 600 K."""
    with (
        as_file(files("openmm_tsf.data") / "ala2_reference.npz") as path,
        np.load(path, allow_pickle=False) as data,
    ):
        return torch.tensor(data[f"positions_{kelvin:.0f}K"], dtype=torch.float64)


def reference_population(kelvin):
    """P(phi > 0) of the shipped reference at one of its temperatures, with its error."""
    reference = load_reference()
    return reference.phi_positive(reference.rung(kelvin))
