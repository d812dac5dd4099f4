"""Damage to files of every kind, as hypothesis strategies."""

import json
import struct
from typing import Any

from hypothesis import strategies as st

from tests.robustness import damage_basics as basics
from tests.robustness.damage_archives import of_npz, of_tensors

_NOT_NAN = st.sampled_from([value for value in basics.VALUES if value is None or value == value])


def damages(name: str, data: bytes, others: dict[str, bytes]) -> st.SearchStrategy[basics.Damage]:
    """Return a strategy for the damage of a file of this name."""
    ways = [
        basics.of_bytes(data),
        basics.of_bytes(data),
        st.sampled_from(sorted(others)).map(lambda o: basics.Damage(f"is {o}", others[o])),
        st.sampled_from(basics.NOT_FILES).map(lambda kind: basics.Damage(kind, not_file=kind)),
    ]
    by_kind = {"json": of_json, "npz": of_npz, "pt": of_tensors, "dcd": of_dcd}
    specific = by_kind.get(name.rpartition(".")[2], of_lines)(data)
    return st.one_of(*ways, specific, specific, specific, specific)


@st.composite
def of_json(draw: Any, data: bytes) -> basics.Damage:
    content = json.loads(data)
    others = ["remove", "add", "twice", "deep", "long number", "list"]
    kind = draw(st.sampled_from(["value"] * 6 + others))
    if kind in ("value", "remove", "add"):
        basics.change_entry(draw, content, kind)
        text = json.dumps(content)
    elif kind == "twice":
        key = draw(st.sampled_from(sorted(content)))
        text = json.dumps(content)[:-1] + f", {json.dumps(key)}: {json.dumps(draw(_NOT_NAN))}}}"
    elif kind in ("deep", "long number"):
        new = draw(st.sampled_from(["1" * 5000, "1e999", "-1e999", "1" * 400, "NaN", "-0"]))
        if kind == "deep":
            depth = draw(st.sampled_from([60, 900, 100_000]))
            opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
            new = opening * depth + "1" + closing * depth
        content[draw(st.sampled_from(sorted(content)))] = "@"
        text = json.dumps(content).replace('"@"', new)
    else:
        text = json.dumps([content])
    return basics.Damage(f"JSON: {kind}", text.encode())


@st.composite
def of_dcd(draw: Any, data: bytes) -> basics.Damage:
    places = [0, 4, 8, 12, 16, 20, 40, 44, 48, 84, 88, 92, 96, 256, 260, 264, 268, 272, 276, 280]
    place = draw(st.sampled_from(places))
    values = [0, -1, 1, 2, 5, 22, 88, 100, 2**20, 2**31 - 1, -(2**31), 0x7FC00000]
    value = draw(st.sampled_from(values))
    changed = data[:place] + struct.pack("<i", value) + data[place + 4 :]
    return basics.Damage(f"DCD: {value} at {place}", changed)


@st.composite
def of_lines(draw: Any, data: bytes) -> basics.Damage:
    lines = data.decode("utf-8", "replace").splitlines(keepends=True) or [""]
    index = draw(st.integers(0, len(lines) - 1))
    kinds = ["word", "word", "word", "remove", "repeat", "swap", "insert", "encode"]
    kind = draw(st.sampled_from(kinds))
    line = lines[index]
    if kind == "word":
        pieces = [piece for piece in line.replace('"', " ").split() if piece]
        old = draw(st.sampled_from(pieces)) if pieces else ""
        words = [*basics.TEXTS, *map(str, basics.NUMBERS), "9" * 20, "1e400", "****", "H", "C"]
        new = draw(st.sampled_from(words))
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
        return basics.Damage("lines: UTF-16", "".join(lines).encode("utf-16"))
    return basics.Damage(f"lines: {kind}", "".join(lines).encode("utf-8", "surrogatepass"))
