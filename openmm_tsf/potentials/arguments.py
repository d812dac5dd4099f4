"""Arguments of TorchPotential, checked; every error names the argument."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch


def check_flag(compile: Any) -> bool:
    """True or False, and nothing that passes for it."""
    if not isinstance(compile, bool):
        raise TypeError(f"compile: expected True or False, got {compile!r}")
    return compile


def check_bytes(memory: Any) -> int:
    """At least a MiB."""
    if isinstance(memory, bool) or not isinstance(memory, Integral) or memory < 2**20:
        raise ValueError(f"memory: expected at least {2**20} bytes, got {memory!r}")
    return int(memory)


def check_groups(force_groups: Any) -> tuple[int, ...] | None:
    """Force groups in order; None stands for all."""
    if force_groups is None:
        return None
    groups = list(force_groups) if isinstance(force_groups, Iterable) else [force_groups]
    whole = all(isinstance(g, Integral) and not isinstance(g, bool) for g in groups)
    if not whole or not groups or not all(0 <= g <= 31 for g in groups):
        raise ValueError(f"force_groups: expected integers from 0 to 31, got {force_groups!r}")
    return tuple(sorted({int(g) for g in groups}))


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, with its number, if it is there."""
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device: expected a torch device, got {device!r} ({reason}); available here: "
            f"{', '.join(there)}"
        ) from error
