"""DCD files of other programs: the same frames, in each of the format's variants."""

import struct

import mdtraj
import numpy as np
import pytest

from openmm_tsf.io.dcd import read_dcd_frames
from tests.support.refusals import refused

N_ATOMS, N_FRAMES = 7, 5


def record(content, order, width):
    length = struct.pack(order + ("i" if width == 4 else "q"), len(content))
    return length + content + length


def dcd(x, order="<", width=4, cell=False, fourth=False, version=24, fixed=0):
    """Return the bytes of a DCD file with positions x [F, N, 3] in nm."""
    flags = [len(x), 0, 1, 0, 0, 0, 0, 0, fixed, 0, int(cell), int(fourth), *[0] * 7, version]
    parts = [
        b"CORD" + struct.pack(order + "20i", *flags),
        struct.pack(order + "i80s", 1, b"a title"),
        struct.pack(order + "i", x.shape[1]),
    ]
    for frame in x:
        if cell:
            parts.append(struct.pack(order + "6d", *[9.0] * 6))
        axes = [*(10 * frame).T, np.zeros(len(frame))] if fourth else list((10 * frame).T)
        parts += [axis.astype(order + "f4").tobytes() for axis in axes]
    return b"".join(record(part, order, width) for part in parts)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(N_FRAMES, N_ATOMS, 3))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(
    "variant", [{}, {"cell": True}, {"fourth": True}, {"cell": True, "fourth": True},
                {"version": 0}], ids=str
)  # fmt: skip
def test_variants(x, order, width, variant, tmp_path):
    path = tmp_path / "a.dcd"
    path.write_bytes(dcd(x, order, width, **variant) + b"part of a frame")
    np.testing.assert_allclose(read_dcd_frames(path, N_ATOMS), x, atol=1e-6)


def test_the_same_bits_as_mdtraj(x, tmp_path):
    """Last bits decide which numbers a seeded training gives."""
    path = tmp_path / "a.dcd"
    path.write_bytes(dcd(100 * x, cell=True))
    with mdtraj.formats.DCDTrajectoryFile(str(path)) as file:
        angstrom = file.read()[0]
    expected = mdtraj.utils.in_units_of(angstrom, "angstroms", "nanometers", inplace=True)
    assert np.array_equal(read_dcd_frames(path, N_ATOMS), expected)


def test_damaged_files(x, tmp_path):
    path = tmp_path / "a.dcd"
    good = dcd(x)
    broken = bytearray(good)
    broken[-(4 * N_ATOMS + 8)] ^= 1  # the length before the last record
    for content, message in (
        (dcd(x, fixed=2), "fixed atoms are not supported"),
        (dcd(x[:0]), "no complete frame"),
        (good[:100], "no complete frame"),
        (b"CORD" + good, "not a DCD file"),
        (bytes(broken), "corrupt: a frame does not begin or end"),
        (dcd(x[:, :3]), f"expected {N_ATOMS} atoms as in the topology, got 3"),
    ):
        path.write_bytes(content)
        with refused(ValueError, message):
            read_dcd_frames(path, N_ATOMS)
