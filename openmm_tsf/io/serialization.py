"""Settings to plain numbers, strings and lists for a JSON file, and back."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import torch


def changed(settings: Any, **changes: Any) -> Any:
    """A dataclass with those fields replaced that are not None."""
    return replace(settings, **{key: value for key, value in changes.items() if value is not None})


def plain(value: Any) -> Any:
    """Settings as json-able dictionaries, lists and numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value


def from_plain(cls: type, content: Any, where: str) -> Any:
    """The dataclass that `plain` wrote; fields of later versions are refused, missing ones default.

    Parameters
    ----------
    cls
        The dataclass.
    content
        What was read.
    where
        File, for the message.

    Raises
    ------
    ValueError
        If it does not fit.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected {cls.__name__} as an object, got {content!r}")
    hints = get_type_hints(cls)
    unknown = sorted(content.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    try:
        return cls(**{name: _back(hints[name], item, where) for name, item in content.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: these are no {cls.__name__}: {error}") from error


def _back(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if hint is torch.dtype:
        name = str(value).removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"expected the name of a dtype, got {value!r}")
        return getattr(torch, name)
    if isinstance(value, list) and any(
        get_origin(kind) is tuple for kind in (hint, *get_args(hint))
    ):
        return tuple(value)
    return value
