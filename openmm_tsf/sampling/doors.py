"""What kernels check of their arguments: an error that names the argument, or the plain value."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

_FLOW = ("n_momenta", "reference_temperature", "event_shape", "dtype", "forward_and_log_det",
         "inverse_and_log_det", "place", "is_mirror_image")  # fmt: skip


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """An integer of at least `least`, no bool.

    Raises
    ------
    ValueError
        If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value


def real_number(value: Any, name: str) -> float:
    """One finite number.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is not finite.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected one number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def numbers_of(value: Any, name: str) -> Tensor:
    """A copy of one or more numbers as a Tensor, float64.

    Raises
    ------
    TypeError
        If they are no numbers.
    """
    try:
        return torch.as_tensor(value, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {value!r}") from error


def kernel_name(name: Any) -> str:
    """A name: files and summaries are keyed by it.

    Raises
    ------
    TypeError
        If it is no string, or an empty one.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: expected a string that is not empty, got {name!r}")
    return name


def check_flow(flow: Any) -> None:
    """Refuse what has not the face of a flow.

    Raises
    ------
    TypeError
        If something is missing.
    """
    missing = [part for part in _FLOW if not hasattr(flow, part)]
    if missing:
        raise TypeError(
            f"flow: expected a flow, got {type(flow).__name__}, which has no {missing[0]}"
        )
