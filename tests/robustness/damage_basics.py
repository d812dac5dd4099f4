"""Damage that any file can suffer, and values that its entries can take."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: What may take the place of a file.
NOT_FILES = ("missing", "directory", "fifo", "link to itself", "link to /dev/zero")

TEXTS = ("", " ", "\x00", "\x1b[2J\x1b]0;title\x07", "../../escape", "/etc/passwd", "ü¹∞",
         "{0.__class__}", "%s%n", "x" * 5000, "$\\frac$", "nan", "-1", "\u202egpj")  # fmt: skip
NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308,
           float("nan"), float("inf"), float("-inf"))  # fmt: skip
VALUES = (*TEXTS, *NUMBERS, None, True, False, [], {}, [[]], [None], ["a"], [1, 2], [1.5] * 40,
          {"a": 1}, [[1, 2], [3]], [float("nan")])  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """The new content of a file, or one of `NOT_FILES` in its place."""

    kind: str
    content: bytes = b""
    not_file: str | None = None


def put_in_place(kind: str, path: Path, nothing: Path = Path("nowhere")) -> None:
    """Replace a file by one of `NOT_FILES`, or a link to `nothing`."""
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        targets = {"link to itself": path, "link to /dev/zero": Path("/dev/zero")}
        path.symlink_to(targets.get(kind, nothing))


_KINDS = ("flip", "flip", "cut", "insert", "delete", "zero", "repeat", "append", "empty", "noise")


@st.composite
def of_bytes(draw: Any, data: bytes) -> Damage:
    kind = draw(st.sampled_from(_KINDS))
    start = draw(st.integers(0, max(0, len(data) - 1)))
    end = min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 64, 1000, 20000])))
    before, piece, after = data[:start], data[start:end], data[end:]
    changes = {
        "flip": lambda: (
            before + bytes(b ^ draw(st.integers(1, 255)) for b in piece[:1]) + data[start + 1 :]
        ),
        "cut": lambda: before,
        "insert": lambda: before + draw(st.binary(min_size=1, max_size=8)) + data[start:],
        "delete": lambda: before + after,
        "zero": lambda: before + bytes(len(piece)) + after,
        "repeat": lambda: before + piece + data[start:],
        "append": lambda: data + draw(st.binary(min_size=1, max_size=16)),
        "empty": lambda: b"",
        "noise": lambda: draw(st.binary(max_size=200)),
    }
    return Damage(kind, changes[kind]())


def get_entry(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def set_entry(content: Any, path: tuple[Any, ...], value: Any) -> None:
    *outer, last = path
    get_entry(content, tuple(outer))[last] = value


def entry_paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the keys that lead to every entry of nested dictionaries and lists."""
    paths, entries = [path] if path else [], ()
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, list) and len(content) <= 30:
        entries = enumerate(content)
    return paths + [p for key, value in entries for p in entry_paths(value, (*path, key))]


def change_entry(draw: Any, content: Any, kind: str) -> None:
    """Change one entry of nested dictionaries and lists, at any depth."""
    paths = entry_paths(content)
    if not paths:
        return
    *outer, last = draw(st.sampled_from(paths))
    content = get_entry(content, tuple(outer))
    if kind == "remove":
        del content[last]
    elif kind == "add" and isinstance(content, dict):
        content[draw(st.sampled_from(TEXTS))] = draw(st.sampled_from(VALUES))
    else:
        content[last] = draw(st.sampled_from(VALUES))
