"""Damage to archives of arrays and of tensors, as hypothesis strategies."""

import io
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tests.robustness import damage_basics as basics
from tests.support.marker import MARKER, WritesMarker


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(descr: str, shape: str, fortran: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _zip(entries: list[tuple[str, bytes]], deflate: bool) -> bytes:
    buffer, compression = io.BytesIO(), zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


_NEW_NAMES = [
    "accepted_\x1b[2Jx.npy",
    "proposed_new.npy",
    "../../escape.npy",
    "more.npy",
    "a/b.npy",
]


@st.composite
def of_npz(draw: Any, data: bytes) -> basics.Damage:
    entries = _entries(data)
    index = draw(st.integers(0, len(entries) - 1))
    name, old = entries[index]
    array = np.load(io.BytesIO(old))
    ways = {
        "float": lambda: _npy(array.astype(np.float32) + 0.5),
        "text": lambda: _npy(array.astype("U8")), "complex": lambda: _npy(array.astype(complex)),
        "bool": lambda: _npy(array.astype(bool)),
        "time": lambda: _npy(np.zeros(array.shape, "M8[s]")),
        "object": lambda: _npy(np.array([WritesMarker()], dtype=object)),
        "record": lambda: _npy(np.zeros(array.shape, [("a", "f8"), ("b", "i4")])),
        "flat": lambda: _npy(array.reshape(-1)), "deep": lambda: _npy(array[None]),
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
        "short": lambda: old[: draw(st.integers(0, len(old) - 1))], "long": lambda: old + b"\x00",
        "version 3": lambda: old[:6] + b"\x03" + old[7:],
        "pickle": lambda: f"cposix\nsystem\n(S'touch {MARKER}'\ntR.".encode(),
    }  # fmt: skip
    others = ["remove", "add", "twice", "rename", "bomb", "deflate"]
    kind = draw(st.sampled_from([*sorted(ways), *others]))
    if kind in ways:
        entries[index] = (name, ways[kind]())
    elif kind == "remove":
        del entries[index]
    elif kind == "add":
        other = draw(st.sampled_from(_NEW_NAMES))
        entries.append((other, old))
    elif kind == "twice":
        entries.append((name, ways[draw(st.sampled_from(["NaN", "fewer", "float"]))]()))
    elif kind == "rename":
        entries[index] = (draw(st.sampled_from(["", "x.npy", name[:-4]])) or "y", old)
    elif kind == "bomb":
        entries[index] = (name, _header("'|u1'", "(200000000,)") + bytes(200_000_000))
    return basics.Damage(f"npz: {kind}", _zip(entries, kind in ("bomb", "deflate")))


def _nested(depth: int, width: int) -> Any:
    """Return nested lists of width^depth numbers that take a few bytes."""
    nested: Any = 0
    for _ in range(depth):
        nested = [nested] * width
    return nested


def _ring() -> Any:
    ring: list[Any] = []
    ring.append(ring)
    return ring


_TENSORS = {
    "NaN": lambda t: torch.full(t.shape, float("nan"), dtype=torch.float64),
    "infinite": lambda t: torch.full(t.shape, float("inf"), dtype=torch.float64),
    "other dtype": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "integers": lambda t: t.to(torch.int64), "bool": lambda t: t.to(torch.bool),
    "half": lambda t: t.to(torch.float16), "complex": lambda t: t.to(torch.complex64),
    "flat": lambda t: t.reshape(-1), "deep": lambda t: t[None],
    "fewer": lambda t: t[..., :-1].clone() if t.ndim else t,
    "none": lambda t: torch.zeros((0,) * max(1, t.ndim)), "number": lambda t: torch.zeros(()),
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
}  # fmt: skip
_SHAPES = {
    "shared": lambda: _nested(40, 2), "few shared": lambda: _nested(12, 2),
    "nested": lambda: _nested(400, 1), "ring": _ring, "set": lambda: {1, 2},
    "bytes": lambda: bytearray(b"abc"), "tuple": lambda: (1, 2), "complex": lambda: 1 + 2j,
    "dtype": lambda: torch.float32, "size": lambda: torch.Size([2, 3]),
    "tensor": lambda: torch.ones(2),
}  # fmt: skip


@st.composite
def of_tensors(draw: Any, data: bytes) -> basics.Damage:
    content = torch.load(io.BytesIO(data), weights_only=True)
    paths = basics.entry_paths(content)
    others = ["shape", "remove", "remove", "add", "whole", "code", "legacy", "deflate", "record"]
    kind = draw(st.sampled_from(["value"] * 4 + ["tensor"] * 5 + others))
    what = ""
    if kind in ("value", "remove", "add"):
        basics.change_entry(draw, content, kind)
    elif kind == "tensor":
        tensors = [path for path in paths if torch.is_tensor(basics.get_entry(content, path))]
        path = draw(st.sampled_from(tensors))
        what = draw(st.sampled_from(sorted(_TENSORS)))
        basics.set_entry(content, path, _TENSORS[what](basics.get_entry(content, path)))
    elif kind == "shape":
        what = draw(st.sampled_from(sorted(_SHAPES)))
        basics.set_entry(content, draw(st.sampled_from(paths)), _SHAPES[what]())
    elif kind == "whole":
        content = draw(st.sampled_from([None, [], {}, 3, "a", torch.zeros(3), {1: 2}, [content]]))
    elif kind == "code":
        basics.set_entry(content, draw(st.sampled_from(paths)), WritesMarker())
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer, _use_new_zipfile_serialization=kind != "legacy")
    except (OverflowError, ValueError, RuntimeError, RecursionError, AttributeError):
        return basics.Damage("tensors: cannot be written", b"")
    saved = buffer.getvalue()
    if kind in ("deflate", "record"):
        entries = _entries(saved)
        if kind == "record":  # whose checksum is right
            index = draw(st.integers(0, len(entries) - 1))
            name, old = entries[index]
            entries[index] = (name, draw(basics.of_bytes(old)).content)
        saved = _zip(entries, kind == "deflate")
    return basics.Damage(f"tensors: {kind} {what}".strip(), saved)
