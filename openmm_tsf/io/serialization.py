"""Settings as data for a JSON file, and back."""

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import torch

#: Metadata of a field that is not written where it has its default: what was written before the
#: field existed stays the same.
OMIT_DEFAULT = {"omit_default": True}


def replace_given(settings: Any, **changes: Any) -> Any:
    """Return a copy of a dataclass with those fields replaced that are given, i.e. not None."""
    return replace(settings, **{key: value for key, value in changes.items() if value is not None})


def to_plain_data(value: Any) -> Any:
    """Return settings as the dictionaries, lists, strings and numbers that JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: to_plain_data(getattr(value, item.name))
            for item in fields(value)
            if not (item.metadata.get("omit_default") and getattr(value, item.name) == item.default)
        }
    if isinstance(value, dict):
        return {str(key): to_plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain_data(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value


def from_plain_data(cls: type, content: Any, where: str) -> Any:
    """Return the dataclass that `to_plain_data` wrote; missing fields take their defaults."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected {cls.__name__} as an object, got {content!r}")
    hints = get_type_hints(cls)
    unknown = sorted(content.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    try:
        values = {name: _from_data(hints[name], item, where) for name, item in content.items()}
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: these are not {cls.__name__}: {error}") from error


def _from_data(hint: Any, value: Any, where: str) -> Any:
    """Return the value of a field with the type `hint`."""
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain_data(hint, value, where)
    if hint is torch.dtype:
        name = str(value).removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"expected the name of a dtype, got {value!r}")
        return getattr(torch, name)
    if isinstance(value, list) and any(
        get_origin(option) is tuple for option in (hint, *get_args(hint))
    ):
        return tuple(value)
    return value
