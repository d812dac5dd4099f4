"""What the layers check of configurations that were read from a file."""

from typing import Any

import numpy as np
import torch

from openmm_tsf.utils.validation import check_choice, require_array, require_entry


def dtype_entry(config: Any) -> torch.dtype:
    """The entry ``dtype``, by name.

    Raises
    ------
    ValueError
        If it is neither float32 nor float64.
    """
    name = check_choice(require_entry(config, "dtype", str), "dtype", ("float32", "float64"))
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def layer_entries(config: Any, n_atoms: int) -> dict[str, Any]:
    """What internal coordinates of so many atoms are made of, besides their Z-matrix.

    Raises
    ------
    ValueError
        If an entry is missing, or has another shape or a value that cannot be.
    """
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
        "handedness": torch.tensor(handedness, dtype=torch.float64),
        "reference_bonds": torch.tensor(bonds, dtype=torch.float64),
        "branch_cuts": torch.tensor(cuts, dtype=torch.float64),
        "metric": require_entry(config, "metric", str),
        "dtype": dtype_entry(config),
        "equivalent": equivalent.tolist(),
        # Files of earlier versions do not name it.
        "overlap": require_entry(config, "overlap", bool) if "overlap" in config else False,
    }


def check_rows(rows: np.ndarray, levels: np.ndarray) -> None:
    """Refuse Z-matrix rows [N, 4] that do not place every atom once, by others that are placed.

    Raises
    ------
    ValueError
        If rows or levels [N] are not in order.
    """
    n_atoms = len(rows)
    if n_atoms < 4 or not np.array_equal(np.sort(rows[:, 0]), np.arange(n_atoms)):
        raise ValueError(f"rows: expected each of 4 or more atoms once, got {rows[:, 0].tolist()}")
    place = np.empty(n_atoms, dtype=np.int64)
    place[rows[:, 0]] = np.arange(n_atoms)
    for index, (row, level) in enumerate(zip(rows.tolist(), levels.tolist(), strict=True)):
        partners = row[1 : min(index, 3) + 1]
        root, unused = index < 3, row[len(partners) + 1 :]
        ahead = all(0 <= atom < n_atoms for atom in partners) and all(
            place[atom] < index or levels[place[atom]] <= level for atom in partners
        )
        distinct = len({row[0], *partners}) == len(partners) + 1
        if not ahead or not distinct or any(atom != -1 for atom in unused):
            raise ValueError(f"rows: expected partners that are placed before, got {row}")
        if level != (0 if root else levels[place[row[1]]] + 1):
            raise ValueError(f"levels: expected one more than the bond partner's, got {level}")
    if (np.diff(levels) < 0).any():
        raise ValueError(f"levels: expected ascending ones, got {levels.tolist()}")
