"""What several benchmarks need: frames and populations of the reference."""

import math
from importlib.resources import as_file, files

import numpy as np
import torch

from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.analysis.statistics import logit_free_energy
from openmm_tsf.systems.slow_torsions import dihedral_angles


def reference_frames(kelvin):
    """Frames [n, N, 3] in nm of the shipped reference at 300 or 600 K."""
    with (
        as_file(files("openmm_tsf.data") / "ala2_reference.npz") as path,
        np.load(path, allow_pickle=False) as data,
    ):
        return torch.tensor(data[f"positions_{kelvin:.0f}K"], dtype=torch.float64)


def has_positive_phi(molecule, x):
    """Whether phi > 0, [B] float64, at x [B, N, 3] in nm; 0 where x is not finite."""
    with np.errstate(invalid="ignore"):
        phi = dihedral_angles(np.asarray(x, dtype=np.float64), [molecule.dihedrals["phi"]])[:, 0]
    return torch.from_numpy((phi > 0).astype(np.float64))


def reference_population(kelvin):
    """P(phi > 0) of the shipped reference at one of its temperatures, with its error."""
    reference = load_reference()
    return reference.phi_positive(reference.rung(kelvin))


def in_hidden_basin(phi, psi):
    """Whether phi > 0 and |psi| > 120 degrees (both in rad): the basin flows draw too rarely."""
    return (phi > 0) & (np.abs(psi) > np.radians(120.0))


def compare_with_reference(p, stderr):
    """P(phi > 0) and delta F at 300 K, given P with its error, against the reference."""
    known = reference_population(300.0)
    (f, error), (f_known, error_known) = logit_free_energy(p, stderr), known.free_energy
    return {
        "p": p,
        "stderr": stderr,
        "z": (p - known.value) / math.hypot(stderr, known.stderr),
        "delta_F_kT": f,
        "delta_F_stderr": error,
        "delta_F_minus_reference": f - f_known,
        "delta_F_reference_stderr": error_known,
    }
