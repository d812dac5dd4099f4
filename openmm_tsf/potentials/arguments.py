"""The settings of a TorchPotential, checked; every error names the argument."""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from openmm_tsf.utils.devices import check_device
from openmm_tsf.utils.validation import list_items, unwrap_scalar

#: Largest relative errors of energies and forces that a TorchPotential may have, by dtype.
TOLERANCES = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-3, 1e-3)}


@dataclass(frozen=True)
class TorchSettings:
    """How a TorchPotential computes.

    `force_groups` are ascending, None for all; `memory` is the bytes that a block of a batch may
    take.
    """

    dtype: torch.dtype
    device: torch.device
    compile: bool
    force_groups: tuple[int, ...] | None
    memory: int


def check_settings(
    dtype: Any, device: Any, compile: Any, force_groups: Any, memory: Any
) -> TorchSettings:
    """Return the settings that a user gave."""
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
    compile, memory = unwrap_scalar(compile), unwrap_scalar(memory)
    if not isinstance(compile, bool):
        raise TypeError(f"compile: expected True or False, got {compile!r}")
    if isinstance(memory, bool) or not isinstance(memory, Integral) or memory < 2**20:
        raise ValueError(f"memory: expected at least {2**20} bytes, got {memory!r}")
    groups = _check_force_groups(force_groups)
    return TorchSettings(dtype, check_device(device), compile, groups, int(memory))


def _check_force_groups(force_groups: Any) -> tuple[int, ...] | None:
    if force_groups is None:
        return None
    items = list_items(force_groups)
    groups = [unwrap_scalar(item) for item in ([force_groups] if items is None else items)]
    are_ints = all(isinstance(g, Integral) and not isinstance(g, bool) for g in groups)
    if not are_ints or not groups or not all(0 <= g <= 31 for g in groups):
        raise ValueError(f"force_groups: expected integers from 0 to 31, got {force_groups!r}")
    return tuple(sorted({int(g) for g in groups}))
