"""What a file is, by its content: for messages about files of the wrong kind."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from openmm_tsf.io.files import PathLike, decode_text

#: Bytes of a file that are looked at.
_N_BYTES = 2**16

#: Descriptions that are compared with elsewhere.
PDB, MMCIF, XML_SYSTEM, FORCE_FIELD = (
    "a PDB file", "an mmCIF file", "a serialized System", "a force field of OpenMM",
)  # fmt: skip
PRMTOP, INPCRD, TOP, GRO, PSF, CRD, CHARMM_PARAMETERS = (
    "an Amber topology (prmtop)", "Amber coordinates (inpcrd)", "a GROMACS topology (top)",
    "GROMACS coordinates (gro)", "a CHARMM PSF", "CHARMM coordinates (crd)",
    "CHARMM parameters or residues (prm, rtf, str)",
)  # fmt: skip
GZIP, HDF5, NETCDF, DCD, XTC, TRR, TORCH, NPZ = (
    "a file compressed by gzip", "an HDF5 file", "a NetCDF file", "a DCD trajectory",
    "an XTC trajectory", "a TRR trajectory", "a file of torch (a flow or checkpoint)",
    "arrays of NumPy (npz)",
)  # fmt: skip

#: Beginnings of binary files. Those of DCD, GROMACS and archives are distinguished below.
_BINARY = (
    (b"\x1f\x8b", GZIP),
    (b"BZh", "a file compressed by bzip2"),
    (b"\xfd7zXZ\0", "a file compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "a file compressed by zstd"),
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (b"CDF\x01", NETCDF),
    (b"CDF\x02", NETCDF),
    (b"CDF\x05", NETCDF),
    (b"\x00\x00\x07\xcb", XTC),
    (b"\x00\x00\x07\xe7", XTC),
    (b"\x00\x00\x07\xc9", TRR),
    (b"\x93NUMPY", "a NumPy array (npy)"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG", "an image"),
)

_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eEdD][-+]?\d+)?"
_XML_ROOT = re.compile(r"<\s*([A-Za-z_][\w.-]*)((?:[^<>\"']|\"[^\"]*\"|'[^']*')*)>")
_XML_NAMES = {
    "System": XML_SYSTEM,
    "State": "a serialized State",
    "Integrator": "a serialized Integrator",
    "Force": "a serialized Force",
    "ForceField": FORCE_FIELD,
    "html": "an HTML page",
}
_GRO_ATOM = re.compile(r"[ \d]{4}\d.{10}[ \d]{4}\d(\s*-?\d+\.\d+){3}")
_CHARMM_SECTION = re.compile(
    r"(BONDS?|ANGLES?|THETAS?|DIHEDRALS?|IMPROPERS?|IMPHI|NONBONDED|NBONDED|NBFIX|CMAP|"
    r"MASS\s+-?\d+|RESI\s+\S+|PRES\s+\S+|READ\s+(RTF|PARA\w*))\b",
    re.IGNORECASE,
)


def describe_file(path: PathLike) -> str | None:
    """Return what a file is, such as ``"a DCD trajectory"``, by its content; None if unknown."""
    try:
        with open(path, "rb") as file:
            start = file.read(_N_BYTES)
    except OSError:
        return None
    if not start:
        return "an empty file"
    return _describe_binary(start) or _describe_text(start)


def but_got(path: PathLike, expected: tuple[str, ...] = ()) -> str:
    """Return ``", got a DCD trajectory"`` for a message, or nothing if the file is as expected."""
    kind = describe_file(path)
    return "" if kind is None or kind in expected else f", got {kind}"


def check_kind(path: PathLike, argument: str, expected: str, allowed: tuple[str, ...]) -> Path:
    """Return the path of a file, whose content may be of the kinds `allowed` or unknown.

    `expected` says in words what is expected; an absent file is a FileNotFoundError, another kind
    of file a ValueError.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument}: expected the path of {expected}, got {path!r}")
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{argument}: expected {expected}, got the directory {path}")
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: no such file {path}")
    kind = describe_file(file)
    if kind is not None and kind not in allowed:
        hint = "; unpack it first" if "compressed" in kind else ""
        raise ValueError(f"{argument}: expected {expected}, got {kind}: {path}{hint}")
    return file


def _describe_binary(start: bytes) -> str | None:
    for mark, name in _BINARY:
        if start.startswith(mark):
            return name
    if start[4:8] == b"CORD" or start[8:12] == b"CORD":
        return DCD
    if start.startswith(b"PK\x03\x04"):
        names = start[:4096]
        if b".pkl" in names or b"/data/" in names:
            return TORCH
        return NPZ if b".npy" in names else "a zip archive"
    if b"VERSION" in start[:32] and b"\0" in start[:32]:
        return "a GROMACS run input (tpr)"
    is_utf16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    return "a binary file" if b"\0" in start and not is_utf16 else None


def _describe_text(start: bytes) -> str | None:
    lines = [line.rstrip() for line in decode_text(start).split("\n")]
    filled = [line for line in lines if line.strip()]
    if not filled:
        return "an empty file"
    return next((name for test in _TESTS if (name := test(lines, filled))), None)


def _xml(lines: list[str], filled: list[str]) -> str | None:
    if not filled[0].lstrip().startswith("<"):
        return None
    prolog = r"<!--.*?-->|<\?.*?\?>|<!DOCTYPE[^>]*>"
    root = _XML_ROOT.search(re.sub(prolog, "", "\n".join(filled), flags=re.DOTALL))
    if root is None:
        return "an XML file"
    if root[1].endswith("Integrator") or ('type="' in root[2] and "Integrator" in root[2]):
        return _XML_NAMES["Integrator"]
    return _XML_NAMES.get(root[1], f"an XML file (<{root[1][:40]}>)")


def _marked(lines: list[str], filled: list[str]) -> str | None:
    """Formats with a word that no other has."""
    head = filled[:10]
    if any(line.startswith("@<TRIPOS>") for line in head):
        return "a Mol2 file"
    if any(line.endswith(("V2000", "V3000")) for line in head):
        return "an SDF or MOL file"
    if filled[0].startswith("%VERSION") or any(line.startswith("%FLAG") for line in head):
        return PRMTOP
    if filled[0].split()[0] == "PSF":
        return PSF
    if filled[0].lstrip().startswith(("{", "[{")):
        return "a JSON file"
    code = [line for line in filled if not line.startswith("#")]
    if code and code[0].lower().startswith("data_"):
        return (
            MMCIF
            if any("_atom_site." in line for line in code)
            else "a CIF file without the category _atom_site"
        )
    return None


def _pdb(lines: list[str], filled: list[str]) -> str | None:
    marks = ("ATOM  ", "HETATM")
    return PDB if any(line.startswith(marks) for line in filled) else None


def _gro(lines: list[str], filled: list[str]) -> str | None:
    is_gro = len(lines) > 2 and lines[1].strip().isdigit() and _GRO_ATOM.match(lines[2])
    return GRO if is_gro else None


def _crd(lines: list[str], filled: list[str]) -> str | None:
    rest = [line.split() for line in filled if not line.startswith("*")]
    is_crd = (
        filled[0].startswith("*")
        and len(rest) > 1
        and rest[0][0].isdigit()
        and len(rest[0]) <= 2
        and len(rest[1]) == 10
    )
    return CRD if is_crd else None


def _charmm(lines: list[str], filled: list[str]) -> str | None:
    code = (line.split("!")[0].strip() for line in filled)
    return CHARMM_PARAMETERS if any(_CHARMM_SECTION.match(line) for line in code) else None


def _inpcrd(lines: list[str], filled: list[str]) -> str | None:
    if len(lines) < 3:
        return None
    counts, row = lines[1].split(), lines[2]
    numbers = [row[k : k + 12] for k in range(0, len(row), 12)]
    is_inpcrd = (
        1 <= len(counts) <= 3
        and counts[0].isdigit()
        and len(numbers) in (3, 6)
        and all(re.fullmatch(rf"\s*{_NUMBER}\s*", number) for number in numbers)
    )
    return INPCRD if is_inpcrd else None


def _top(lines: list[str], filled: list[str]) -> str | None:
    code = (line.strip() for line in filled if not line.lstrip().startswith((";", "*")))
    sections = r"\[\s*(defaults|system|moleculetype|atomtypes|molecules)\s*\]"
    return TOP if any(re.match(rf"{sections}|#\s*include\b", line) for line in code) else None


def _xyz(lines: list[str], filled: list[str]) -> str | None:
    row = lines[2].split() if len(lines) > 2 else []
    is_xyz = lines[0].strip().isdigit() and len(row) >= 4 and row[0].isalnum()
    return "an XYZ file" if is_xyz else None


_TESTS: tuple[Callable[[list[str], list[str]], str | None], ...] = (
    _xml, _marked, _gro, _charmm, _pdb, _crd, _top, _inpcrd, _xyz,
)  # fmt: skip
