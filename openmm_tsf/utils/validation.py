"""What every part checks of numbers it is given: an error that names the argument, or the value."""

import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

#: What torch and numpy count with, and what torch seeds its generators with.
_LARGEST_WHOLE, _LARGEST_SEED = 2**63 - 1, 2**64 - 1


def check_int(value: Any, name: str, least: int = 1, most: int = _LARGEST_WHOLE) -> int:
    """An integer from `least` to `most`, no bool; numpy's are made Python's.

    Raises
    ------
    ValueError
        If it is none.
    """
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {value!r}")
    return int(value)


def check_seed(value: Any, name: str = "seed") -> int:
    """A seed: an integer from 0 to 2^64 - 1.

    Raises
    ------
    ValueError
        If it is none.
    """
    return check_int(value, name, least=0, most=_LARGEST_SEED)


def max_threads() -> int:
    """So many threads may be asked for: more are a slip of the pen, and can end the process."""
    return max(64, os.cpu_count() or 1)


def check_threads(value: Any, name: str = "threads") -> int:
    """A number of threads.

    Raises
    ------
    ValueError
        If it is none, or far more than the machine has cores.
    """
    return check_int(value, name, most=max_threads())


def check_seconds(value: Any, name: str = "checkpoint_seconds") -> float:
    """Time between two events in s, from 0 to infinity.

    Raises
    ------
    ValueError
        If it is none.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not value >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return float(value)


def check_float(value: Any, name: str) -> float:
    """One finite number.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is not finite.
    """
    torch = sys.modules.get("torch")  # who has a tensor has imported it; analysis does without
    if torch is not None and isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected one number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def check_positive(value: Any, name: str) -> float:
    """One finite number above zero.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is not finite and positive.
    """
    number = check_float(value, name)
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def check_between(value: Any, name: str, low: float, high: float) -> float:
    """One number in [low, high].

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is outside.
    """
    number = check_float(value, name)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r}")
    return number


def check_ints(values: Any, name: str, least: int = 1) -> tuple[int, ...]:
    """Integers of at least `least`.

    Raises
    ------
    TypeError
        If `values` is no sequence.
    ValueError
        If one is no such integer.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r}")
    return tuple(check_int(value, name, least) for value in values)


def check_choice(value: Any, name: str, allowed: Sequence[Any]) -> Any:
    """One of a few values.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def require_entry(config: Any, name: str, kind: type | UnionType) -> Any:
    """The entry `name` of a mapping that was read from a file.

    Raises
    ------
    ValueError
        If `config` is no mapping, or has no such entry of this type.
    """
    if not isinstance(config, Mapping) or name not in config:
        raise ValueError(f"{name}: expected an entry, got none")
    value = config[name]
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    return value


def require_array(config: Any, name: str, kinds: str, *shape: int) -> NDArray[Any]:
    """The entry `name`, nested lists, as an array of this shape (-1 for any length).

    Parameters
    ----------
    config, name
        See :func:`require_entry`.
    kinds
        numpy's codes of what the numbers may be: ``"b"`` bool, ``"i"`` integer, ``"f"`` float.
    *shape
        The shape.

    Raises
    ------
    ValueError
        If it is none, or has numbers that are not finite.
    """
    value = require_entry(config, name, list)
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers of shape {shape}, got {error}") from error
    if array.size == 0 and 0 in shape:
        return np.zeros(shape)  # nested lists do not keep what is beside a length of zero
    fits = array.ndim == len(shape) and all(
        wanted in (-1, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind not in kinds or not fits:
        raise ValueError(
            f"{name}: expected numbers of shape {shape}, got shape {array.shape} of {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def check_fields(settings: Any, **checks: Callable[[Any, str], Any]) -> None:
    """Pass fields of a frozen dataclass through checks ``check(value, name)``, and keep the result.

    Raises
    ------
    TypeError, ValueError
        What the checks raise.
    """
    for name, check in checks.items():
        object.__setattr__(settings, name, check(getattr(settings, name), name))


def as_float_tensor(value: Any, name: str) -> "Tensor":
    """A copy of one or more numbers as a Tensor, float64.

    Raises
    ------
    TypeError
        If they are no numbers.
    """
    import torch

    try:
        return torch.as_tensor(value, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {value!r}") from error
