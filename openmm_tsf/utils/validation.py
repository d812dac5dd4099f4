"""Checks of arguments and of entries read from files; every error names what was refused.

Scalars of numpy, and arrays and tensors without a dimension, are accepted like plain numbers. The
checks return the value in the type of their annotation, a plain one that JSON can hold. What is not
such a value is a ValueError; `check_float` and the checks that use it raise a TypeError for what is
not a number.
"""

import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: The largest integer of torch and numpy, and the largest seed of torch's generators.
_MAX_INT, _MAX_SEED = 2**63 - 1, 2**64 - 1


def unwrap_scalar(value: Any) -> Any:
    """Return what numpy's scalars, and arrays and tensors without a dimension, hold."""
    torch = sys.modules.get("torch")  # imported if a tensor exists; analysis needs none
    kinds = (np.generic, np.ndarray) if torch is None else (np.generic, np.ndarray, torch.Tensor)
    return value.item() if isinstance(value, kinds) and value.ndim == 0 else value


def list_items(values: Any) -> list[Any] | None:
    """Return the items of a sequence, an array or another iterable; None of text and scalars."""
    if isinstance(values, (str, bytes)):
        return None
    try:
        return list(values)  # quantities and arrays have __iter__ even if they hold one number
    except TypeError:
        return None


def check_int(value: Any, name: str, least: int = 1, most: int = _MAX_INT) -> int:
    """Return an integer from `least` to `most` as an int; bool is refused."""
    number = unwrap_scalar(value)
    is_integer = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not is_integer or number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if number > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {value!r}")
    return int(number)


def check_seed(value: Any, name: str = "seed") -> int:
    """Return a seed: an integer from 0 to 2^64 - 1."""
    return check_int(value, name, least=0, most=_MAX_SEED)


def max_threads() -> int:
    """Return the largest accepted number of threads; more can end the process."""
    return max(64, os.cpu_count() or 1)


def check_threads(value: Any, name: str = "threads") -> int:
    """Return a number of threads from 1 to `max_threads`."""
    return check_int(value, name, most=max_threads())


def check_seconds(value: Any, name: str = "checkpoint_seconds") -> float:
    """Return a duration in s, from 0 to infinity."""
    number = unwrap_scalar(value)
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not number >= 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return float(number)


def check_float(value: Any, name: str) -> float:
    """Return one finite number as a float."""
    number = unwrap_scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected one number, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(number)


def check_positive(value: Any, name: str) -> float:
    """Return one finite number above zero."""
    number = check_float(value, name)
    if not number > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return number


def check_between(value: Any, name: str, low: float, high: float) -> float:
    """Return one number in [low, high]."""
    number = check_float(value, name)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected a number in [{low:g}, {high:g}], got {value!r}")
    return number


def check_ints(values: Any, name: str, least: int = 1) -> tuple[int, ...]:
    """Return integers of at least `least`; what is not a sequence is a TypeError."""
    items = list_items(values)
    if items is None:
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r}")
    return tuple(check_int(value, name, least) for value in items)


def check_choice(value: Any, name: str, allowed: Sequence[Any]) -> Any:
    """Return the one of `allowed` that equals `value`."""
    given = unwrap_scalar(value)
    for choice in allowed:
        if isinstance(given, type(choice)) and given == choice:
            return choice
    raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


def check_bool(value: Any, name: str) -> bool:
    """Return `value` as a bool; 0 and 1 are refused."""
    given = unwrap_scalar(value)
    if not isinstance(given, bool):
        raise ValueError(f"{name}: expected one of False, True, got {value!r}")
    return given


def check_instance(value: Any, name: str, cls: type) -> None:
    """Refuse what is not an instance of `cls`; None is accepted."""
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"{name}: expected {cls.__name__}, got {type(value).__name__}")


def optional(check: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Return a check that accepts None, too."""
    return lambda value, name: None if value is None else check(value, name)


def require_entry(config: Any, name: str, kind: type | UnionType) -> Any:
    """Return the entry `name` of type `kind` of a mapping that was read from a file."""
    if not isinstance(config, Mapping) or name not in config:
        raise ValueError(f"{name}: expected an entry, got none")
    value = config[name]
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{name}: expected {expected}, got {type(value).__name__}")
    return value


def require_array(config: Any, name: str, kinds: str, *shape: int) -> NDArray[Any]:
    """Return the entry `name`, nested lists, as a finite array of a shape; -1 is any length.

    `kinds` are the accepted ``dtype.kind`` of numpy: ``"b"`` bool, ``"i"`` integer, ``"f"`` float.
    """
    value = require_entry(config, name, list)
    try:
        array = np.array(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers of shape {shape}, got {error}") from error
    if array.size == 0 and 0 in shape:
        return np.zeros(shape)  # nested lists lose the lengths beside a length of zero
    fits = array.ndim == len(shape) and all(
        expected in (-1, length) for expected, length in zip(shape, array.shape, strict=True)
    )
    if array.dtype.kind not in kinds or not fits:
        raise ValueError(
            f"{name}: expected numbers of shape {shape}, got shape {array.shape} of {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def check_fields(settings: Any, **checks: Callable[[Any, str], Any]) -> None:
    """Replace fields of a frozen dataclass by what their checks ``check(value, name)`` return."""
    for name, check in checks.items():
        object.__setattr__(settings, name, check(getattr(settings, name), name))
