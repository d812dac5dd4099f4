"""Damage to files, as hypothesis strategies: byte by byte, and knowing what is in them."""

import io
import json
import os
import struct
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

#: What may stand for a file that is none.
NO_FILES = ("missing", "directory", "fifo", "link to itself", "link to /dev/zero")

TEXTS = ("", " ", "\x00", "\x1b[2J\x1b]0;title\x07", "../../escape", "/etc/passwd", "ü¹∞",
         "{0.__class__}", "%s%n", "x" * 5000, "$\\frac$", "nan", "-1", "\u202egpj")  # fmt: skip
NUMBERS = (0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320, 1e308,
           float("nan"), float("inf"), float("-inf"))  # fmt: skip
VALUES = (*TEXTS, *NUMBERS, None, True, False, [], {}, [[]], [None], ["a"], [1, 2], [1.5] * 40,
          {"a": 1}, [[1, 2], [3]], [float("nan")])  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """What a file becomes: its bytes, or one of `NO_FILES`."""

    kind: str
    content: bytes = b""
    no_file: str | None = None


def damages(name: str, data: bytes, others: dict[str, bytes]) -> st.SearchStrategy[Damage]:
    """Everything that may befall a file of this name."""
    ways = [
        of_bytes(data),
        of_bytes(data),
        st.sampled_from(sorted(others)).map(lambda o: Damage(f"is {o}", others[o])),
        st.sampled_from(NO_FILES).map(lambda kind: Damage(kind, no_file=kind)),
    ]
    by_kind = {".json": of_json, ".npz": of_npz, ".pt": of_tensors, ".dcd": of_dcd}
    suffix = "." + name.rpartition(".")[2]
    aware = by_kind.get(suffix, of_lines)(data)
    return st.one_of(*ways, aware, aware, aware, aware)


@st.composite
def of_bytes(draw: Any, data: bytes) -> Damage:
    kind = draw(
        st.sampled_from(
            [
                "flip",
                "flip",
                "cut",
                "insert",
                "delete",
                "zero",
                "repeat",
                "append",
                "empty",
                "noise",
            ]
        )
    )
    place = draw(st.integers(0, max(0, len(data) - 1)))
    size = draw(st.sampled_from([1, 2, 4, 8, 64, 1000, 20000]))
    if kind == "flip":
        if not data:
            return Damage("empty")
        mask = draw(st.integers(1, 255))
        return Damage(kind, data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
    if kind == "cut":
        return Damage(kind, data[:place])
    if kind == "insert":
        more = draw(st.binary(min_size=1, max_size=8))
        return Damage(kind, data[:place] + more + data[place:])
    if kind == "delete":
        return Damage(kind, data[:place] + data[place + size :])
    if kind == "zero":
        piece = data[place : place + size]
        return Damage(kind, data[:place] + bytes(len(piece)) + data[place + len(piece) :])
    if kind == "repeat":
        return Damage(kind, data[:place] + data[place : place + size] + data[place:])
    if kind == "append":
        return Damage(kind, data + draw(st.binary(min_size=1, max_size=16)))
    return Damage(kind, b"" if kind == "empty" else draw(st.binary(max_size=200)))


# ------------------------------------------------------------------------ JSON


@st.composite
def of_json(draw: Any, data: bytes) -> Damage:
    content = json.loads(data)
    kind = draw(
        st.sampled_from(["value"] * 6 + ["remove", "add", "twice", "deep", "long number", "list"])
    )
    if kind in ("value", "remove", "add"):
        _change(draw, content, kind, VALUES)
        text = json.dumps(content)
    elif kind == "twice":
        key = draw(st.sampled_from(sorted(content)))
        text = json.dumps(content).rstrip("}") + "}" * 0
        text = json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(draw(_plain))}}}"
    elif kind == "deep":
        depth = draw(st.sampled_from([60, 900, 100_000]))
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        key = draw(st.sampled_from(sorted(content)))
        content[key] = "@"
        text = json.dumps(content).replace('"@"', opening * depth + "1" + closing * depth)
    elif kind == "long number":
        key = draw(st.sampled_from(sorted(content)))
        content[key] = "@"
        number = draw(st.sampled_from(["1" * 5000, "1e999", "-1e999", "1" * 400, "NaN", "-0"]))
        text = json.dumps(content).replace('"@"', number)
    else:
        text = json.dumps([content])
    return Damage(f"JSON: {kind}", text.encode())


_plain = st.sampled_from([value for value in VALUES if value is None or value == value])


def _paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(content, dict):
        for key, value in content.items():
            found += _paths(value, (*path, key))
    elif isinstance(content, list) and len(content) <= 30:
        for index, value in enumerate(content):
            found += _paths(value, (*path, index))
    return found


def _change(draw: Any, content: Any, kind: str, values: tuple[Any, ...]) -> None:
    """Change one entry of nested dictionaries and lists, at any depth."""
    paths = _paths(content)
    if not paths:
        return
    *outer, last = draw(st.sampled_from(paths))
    for key in outer:
        content = content[key]
    if kind == "remove":
        del content[last]
    elif kind == "add" and isinstance(content, dict):
        content[draw(st.sampled_from(TEXTS))] = draw(st.sampled_from(values))
    else:
        content[last] = draw(st.sampled_from(values))


# ------------------------------------------------------------------------ arrays


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(descr: str, shape: str, fortran: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


#: What is written where a file's code is run.
BOOM = Path(tempfile.gettempdir()) / f"openmm_tsf_boom_{os.getpid()}"


class Boom:
    """A pickle that would tell on whoever loads it."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (_boom, (str(BOOM),))


def _boom(path: str) -> None:
    open(path, "w").close()


def _zip(entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that are there twice
            for name, data in entries:
                archive.writestr(name, data)
    return buffer.getvalue()


@st.composite
def of_npz(draw: Any, data: bytes) -> Damage:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = draw(st.integers(0, len(entries) - 1))
    name, old = entries[index]
    array = np.load(io.BytesIO(old))
    ways = {
        "float": lambda: _npy(array.astype(np.float32) + 0.5),
        "text": lambda: _npy(array.astype("U8")),
        "complex": lambda: _npy(array.astype(complex)),
        "bool": lambda: _npy(array.astype(bool)),
        "time": lambda: _npy(np.zeros(array.shape, "M8[s]")),
        "object": lambda: _npy(np.array([Boom()], dtype=object)),
        "record": lambda: _npy(np.zeros(array.shape, [("a", "f8"), ("b", "i4")])),
        "flat": lambda: _npy(array.reshape(-1)),
        "deep": lambda: _npy(array[None]),
        "fewer": lambda: _npy(array[..., :-1] if array.ndim else array),
        "more": lambda: _npy(np.concatenate([array, array]) if array.ndim else array[None]),
        "none": lambda: _npy(np.zeros((0,) * array.ndim)),
        "turned": lambda: _npy(np.asfortranarray(array)),
        "NaN": lambda: _npy(np.full(array.shape, np.nan)),
        "infinite": lambda: _npy(np.full(array.shape, np.inf)),
        "negative": lambda: _npy(-1 - np.abs(array)),
        "large": lambda: _npy(np.full(array.shape, 2**62, dtype=np.int64)),
        "tiny": lambda: _npy(np.full(array.shape, 1e-310)),
        "huge header": lambda: _header("'<f8'", "(1000000000000000,)") + bytes(64),
        "large header": lambda: _header("'<f8'", "(20000000000,)") + bytes(64),
        "many axes": lambda: _header("'<f8'", "(" + "1," * 60 + ")") + bytes(8),
        "negative shape": lambda: _header("'<f8'", "(-1, 4)") + bytes(64),
        "overflowing shape": lambda: _header("'<f8'", "(4294967296, 4294967296)") + bytes(64),
        "odd header": lambda: _header("'<f8'", draw(st.sampled_from(
            ["()", "(True,)", "'a'", "None", "(" * 90 + ")" * 90, "1", "(1.5,)", "[3]"]))
        ) + bytes(64),
        "odd dtype": lambda: _header(draw(st.sampled_from(
            ["'O'", "'|V0'", "'<f8,<f8'", "[('a','<f8')]", "'<U0'", "'|S0'", "None", "3",
             "'<f16'", "'<m8'", "('<f8', (1000000,))"])), "(2,)") + bytes(64),
        "short": lambda: old[: draw(st.integers(0, len(old) - 1))],
        "long": lambda: old + b"\x00",
        "version 3": lambda: old[:6] + b"\x03" + old[7:],
        "pickle": lambda: f"cposix\nsystem\n(S'touch {BOOM}'\ntR.".encode(),
    }  # fmt: skip
    kind = draw(
        st.sampled_from([*sorted(ways), "remove", "add", "twice", "rename", "bomb", "deflate"])
    )
    if kind in ways:
        entries[index] = (name, ways[kind]())
    elif kind == "remove":
        del entries[index]
    elif kind == "add":
        other = draw(st.sampled_from(
            ["accepted_\x1b[2Jx.npy", "proposed_new.npy", "../../escape.npy", "more.npy",
             "a/b.npy"]))  # fmt: skip
        entries.append((other, old))
    elif kind == "twice":
        entries.append((name, ways[draw(st.sampled_from(["NaN", "fewer", "float"]))]()))
    elif kind == "rename":
        entries[index] = (draw(st.sampled_from(["", "x.npy", name[:-4]])) or "y", old)
    elif kind == "bomb":
        bomb = _header("'|u1'", "(200000000,)") + bytes(200_000_000)
        entries[index] = (name, bomb)
        return Damage("npz: bomb", _zip(entries, zipfile.ZIP_DEFLATED))
    return Damage(f"npz: {kind}", _zip(entries, zipfile.ZIP_DEFLATED if kind == "deflate" else 0))


# ------------------------------------------------------------------------ tensors


def _shared(depth: int) -> Any:
    """A list of 2^depth numbers in a few bytes."""
    nested: Any = [0]
    for _ in range(depth):
        nested = [nested, nested]
    return nested


def _nested(depth: int) -> Any:
    nested: Any = 0
    for _ in range(depth):
        nested = [nested]
    return nested


def _round(depth: int = 1) -> Any:
    ring: list[Any] = []
    ring.append(ring)
    return ring


_TENSORS = {
    "NaN": lambda t: torch.full(t.shape, float("nan"), dtype=torch.float64),
    "infinite": lambda t: torch.full(t.shape, float("inf"), dtype=torch.float64),
    "other dtype": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "integers": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "half": lambda t: t.to(torch.float16),
    "complex": lambda t: t.to(torch.complex64),
    "flat": lambda t: t.reshape(-1),
    "deep": lambda t: t[None],
    "fewer": lambda t: t[..., :-1].clone() if t.ndim else t,
    "none": lambda t: torch.zeros((0,) * max(1, t.ndim)),
    "number": lambda t: torch.zeros(()),
    "negative": lambda t: -1 - t.abs() if t.dtype != torch.uint8 else t * 0,
    "large": lambda t: torch.full(t.shape, 2**62, dtype=torch.int64),
    "repeated": lambda t: torch.zeros(1, dtype=t.dtype).expand(10**12),
    "repeated in shape": lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape or (1,)),
    "sparse": lambda t: t.to_sparse() if t.ndim else torch.zeros(3).to_sparse(),
    "meta": lambda t: torch.empty(t.shape, device="meta"),
    "gradient": lambda t: t.double().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.double()),
    "one more": lambda t: t + 1 if t.dtype != torch.bool else ~t,
    "list": lambda t: t.reshape(-1)[:50].tolist(),
}
_SHAPES = {
    "shared": lambda: _shared(40),
    "few shared": lambda: _shared(12),
    "nested": lambda: _nested(400),
    "ring": _round,
    "set": lambda: {1, 2},
    "bytes": lambda: bytearray(b"abc"),
    "tuple": lambda: (1, 2),
    "complex": lambda: 1 + 2j,
    "dtype": lambda: torch.float32,
    "size": lambda: torch.Size([2, 3]),
    "tensor": lambda: torch.ones(2),
}


@st.composite
def of_tensors(draw: Any, data: bytes) -> Damage:
    content = torch.load(io.BytesIO(data), weights_only=True)
    kind = draw(
        st.sampled_from(
            ["value"] * 4
            + ["tensor"] * 5
            + ["shape", "remove", "remove", "add", "whole", "code", "legacy", "deflate", "record"]
        )
    )
    options: dict[str, Any] = {}
    what = ""
    if kind in ("value", "remove", "add"):
        _change(draw, content, kind, VALUES)
    elif kind == "tensor":
        paths = [path for path in _paths(content) if isinstance(_at(content, path), torch.Tensor)]
        path = draw(st.sampled_from(paths))
        what = draw(st.sampled_from(sorted(_TENSORS)))
        _put(content, path, _TENSORS[what](_at(content, path)))
    elif kind == "shape":
        what = draw(st.sampled_from(sorted(_SHAPES)))
        _put(content, draw(st.sampled_from(_paths(content))), _SHAPES[what]())
    elif kind == "whole":
        content = draw(st.sampled_from([None, [], {}, 3, "a", torch.zeros(3), {1: 2}, [content]]))
    elif kind == "code":
        _put(content, draw(st.sampled_from(_paths(content))), Boom())
    elif kind == "legacy":
        options["_use_new_zipfile_serialization"] = False
    try:
        saved = _saved(content, options)
    except (OverflowError, ValueError, RuntimeError, RecursionError, AttributeError):
        return Damage("tensors: not to be written", b"")
    if kind in ("deflate", "record"):
        with zipfile.ZipFile(io.BytesIO(saved)) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
        if kind == "record":  # whose checksum is right
            index = draw(st.integers(0, len(entries) - 1))
            name, old = entries[index]
            entries[index] = (name, draw(of_bytes(old)).content)
        saved = _zip(entries, zipfile.ZIP_DEFLATED if kind == "deflate" else 0)
    return Damage(f"tensors: {kind} {what}".strip(), saved)


def _saved(content: Any, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _put(content: Any, path: tuple[Any, ...], value: Any) -> None:
    *outer, last = path
    _at(content, tuple(outer))[last] = value


# ------------------------------------------------------------------------ DCD, XML, PDB, CSV


@st.composite
def of_dcd(draw: Any, data: bytes) -> Damage:
    places = [0, 4, 8, 12, 16, 20, 40, 44, 48, 84, 88, 92, 96, 256, 260, 264, 268, 272, 276, 280]
    place = draw(st.sampled_from(places))
    value = draw(
        st.sampled_from([0, -1, 1, 2, 5, 22, 88, 100, 2**20, 2**31 - 1, -(2**31), 0x7FC00000])
    )
    changed = data[:place] + struct.pack("<i", value) + data[place + 4 :]
    return Damage(f"DCD: {value} at {place}", changed)


@st.composite
def of_lines(draw: Any, data: bytes) -> Damage:
    lines = data.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    index = draw(st.integers(0, len(lines) - 1))
    kind = draw(
        st.sampled_from(["word", "word", "word", "remove", "repeat", "swap", "insert", "encode"])
    )
    line = lines[index]
    if kind == "word":
        pieces = [piece for piece in line.replace('"', " ").split() if piece]
        old = draw(st.sampled_from(pieces)) if pieces else ""
        new = draw(
            st.sampled_from([*TEXTS, *map(str, NUMBERS), "9" * 20, "1e400", "****", "H", "C"])
        )
        lines[index] = line.replace(old, new, 1) if old else new
    elif kind == "remove":
        del lines[index]
    elif kind == "repeat":
        lines[index] = line * draw(st.sampled_from([2, 3, 500]))
    elif kind == "swap":
        other = draw(st.integers(0, len(lines) - 1))
        lines[index], lines[other] = lines[other], lines[index]
    elif kind == "insert":
        extra = draw(st.sampled_from(
            ["MODEL        1\n", "END\n", "TER\n", "ENDMDL\n", "CRYST1\n", "CONECT    1    2\n",
             "<Force type=\"PythonForce\"/>\n", "<!DOCTYPE a [<!ENTITY b 'c'>]>\n", "\x00\n",
             "ATOM\n", "HETATM99999  X\n", ",,,,\n", "\"\n", "]]>\n"]))  # fmt: skip
        lines.insert(index, extra)
    else:
        return Damage("lines: UTF-16", "".join(lines).encode("utf-16"))
    return Damage(f"lines: {kind}", "".join(lines).encode("utf-8", "surrogatepass"))
