"""Checks of coordinate-layer configurations that were read from a file."""

from typing import Any

import numpy as np
import torch

from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.utils.validation import check_choice, require_array, require_entry


def require_dtype(config: Any) -> torch.dtype:
    """Return the entry ``dtype`` of a configuration, which names float32 or float64."""
    name = check_choice(require_entry(config, "dtype", str), "dtype", ("float32", "float64"))
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def parse_layer_config(config: Any, n_atoms: int) -> dict[str, Any]:
    """Return the arguments of internal coordinates of `n_atoms` atoms, except their Z-matrix."""
    handedness = require_array(config, "handedness", "if", n_atoms - 3)
    if not np.isin(handedness, (-1, 0, 1)).all():
        raise ValueError(f"handedness: expected -1, 0 and 1, got {handedness.tolist()}")
    bonds = require_array(config, "reference_bonds", "if", n_atoms - 1)
    if not (bonds > 0).all():
        raise ValueError(f"reference_bonds: expected positive lengths, got {bonds.tolist()}")
    n_groups = len(require_entry(config, "equivalent", list))
    equivalent = require_array(config, "equivalent", "i", n_groups, 3).astype(np.int64)
    if ((equivalent < 0) | (equivalent >= n_atoms)).any():
        raise ValueError(f"equivalent: expected atoms below {n_atoms}, got {equivalent.tolist()}")
    cuts = require_array(config, "branch_cuts", "if", n_atoms - 3)
    return {
        "handedness": torch.tensor(handedness, dtype=torch.float64, device="cpu"),
        "reference_bonds": torch.tensor(bonds, dtype=torch.float64, device="cpu"),
        "chirality": Chirality.from_config(require_entry(config, "chirality", dict), n_atoms),
        "branch_cuts": torch.tensor(cuts, dtype=torch.float64, device="cpu"),
        "metric": require_entry(config, "metric", str),
        "dtype": require_dtype(config),
        "equivalent": equivalent.tolist(),
        "overlap": require_entry(config, "overlap", bool),
        **_parse_constraints(config, n_atoms),
    }


def _parse_constraints(config: Any, n_atoms: int) -> dict[str, Any]:
    """Return the arguments for constraints; none where the configuration has none."""
    if "constraints" not in config:
        return {}
    entries = require_entry(config, "constraints", dict)
    return {
        "constraints": Constraints.from_config(entries, n_atoms),
        "measure": require_entry(config, "measure", str),
    }
