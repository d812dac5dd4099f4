"""Bad trajectories and flow files are refused by an error that names the file."""

import io
import re
import zipfile

import mdtraj
import pytest
import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from tests.support.refusals import cases, from_shell, refused


@pytest.fixture(scope="module")
def frames(molecule):
    return MDDataset.shipped(molecule, stride=2000).positions


@pytest.fixture(scope="module")
def folder(molecule, frames, tmp_path_factory):
    """A folder of bad trajectories."""
    path = tmp_path_factory.mktemp("trajectories")
    good = mdtraj.Trajectory(frames.numpy(), molecule.mdtraj_topology)
    good.save_dcd(str(path / "good.dcd"))
    good.save_xtc(str(path / "a.xtc"))
    (path / "B.XTC").write_bytes((path / "a.xtc").read_bytes())
    good.atom_slice(range(10)).save_dcd(str(path / "few.dcd"))
    good.atom_slice(range(10)).save_pdb(str(path / "few.pdb"))
    (path / "empty.dcd").touch()
    (path / "text.dcd").write_text("no trajectory\n" * 50)
    (path / "header.dcd").write_bytes((path / "good.dcd").read_bytes()[:276])
    (path / "a.npy").write_bytes(b"numbers")
    good[0].save_pdb(str(path / "order.pdb"))
    lines = (path / "order.pdb").read_text().splitlines(keepends=True)
    first, second, *rest = (line for line in lines if line.startswith(("ATOM", "HETATM")))
    (path / "order.pdb").write_text("".join([second, first, *rest, "END\n"]))
    wrong = mdtraj.Trajectory(10 * frames.numpy(), molecule.mdtraj_topology)
    wrong.save_dcd(str(path / "angstrom.dcd"))
    return path


TRAJECTORIES = [
    ("few.dcd", r"path: cannot read .*few\.dcd as a trajectory of 22 atoms"),
    ("few.pdb", r"path: expected the molecule's 22 atoms, got 10 in .*few\.pdb"),
    ("empty.dcd", r"path: expected frames, got the empty file .*empty\.dcd"),
    ("text.dcd", r"path: cannot read .*text\.dcd"),
    ("header.dcd", r"path: cannot read .*header\.dcd"),
    ("a.npy", r"path: expected a trajectory file \(.*\.dcd, .*\), got .*a\.npy"),
    ("a.xtc", r"path: .*a\.xtc is XTC, which rounds positions"),
    ("B.XTC", r"path: .*B\.XTC is XTC, which rounds positions"),
    ("order.pdb", r"in its order, got another in .*order\.pdb: atom 0 is ACE1-CH3, expected ACE1"),
    ("angstrom.dcd", r"positions: expected this molecule's bonds"),
]


@pytest.mark.parametrize(("name", "message"), TRAJECTORIES, ids=[name for name, _ in TRAJECTORIES])
def test_trajectories(molecule, folder, name, message, tmp_path, capsys):
    with refused(ValueError, message):
        MDDataset.load([folder / "good.dcd", folder / name], molecule, 600)
    command = ["train", "--output", tmp_path / "out", "--trajectory", folder / name]
    assert re.search(message, from_shell([*command, "--temperature", "600"], capsys))
    assert not (tmp_path / "out").exists()


@cases(
    ("path", "error", "message"),
    [
        ("none", [], ValueError, "at least one trajectory file, got none"),
        ("None", None, TypeError, "path: expected a trajectory file .* got None"),
        ("number", [3.5], TypeError, "path: expected a trajectory file"),
        ("missing", "no.dcd", FileNotFoundError, "path: no such trajectory no.dcd"),
        ("directory", ".", IsADirectoryError, "got the directory"),
    ],
)
def test_paths(molecule, path, error, message):
    with refused(error, message):
        MDDataset.load(path, molecule, 600)


def test_a_trajectory_needs_a_molecule(folder):
    with refused(TypeError, "molecule: expected a MolecularSystem, got NoneType"):
        MDDataset.load(folder / "good.dcd", None, 600)
    with refused(TypeError, "molecule: expected a MolecularSystem or None, got str"):
        MDDataset(torch.zeros(3, 2), 600, "molecule.pdb")


@pytest.fixture(scope="module")
def flow(molecule, frames):
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(100, 22, 3, generator=generator, dtype=torch.float64)
    dataset = MDDataset(frames.repeat(5, 1, 1) + noise, 600, molecule)
    return TemperatureSteerableFlow.from_dataset(dataset, n_blocks=2, hidden=(8, 8))


@pytest.fixture(scope="module")
def good(flow, tmp_path_factory):
    path = tmp_path_factory.mktemp("flows") / "flow.pt"
    flow.save(path)
    return path.read_bytes()


def with_flipped_bit(data):
    """Flip a bit in the middle of the largest record, the weights of a layer."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        start = data.index(archive.read(largest))
    middle = start + largest.file_size // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def other_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("flow/data.pkl", "no pickle")
    return buffer.getvalue()


@cases(
    ("damage", "message"),
    [
        ("half of it", lambda d: d[: len(d) // 2], "not a readable flow file"),
        ("without its last byte", lambda d: d[:-1], "not a readable flow file"),
        ("empty", lambda d: b"", "not a readable flow file"),
        ("text", lambda d: b"weights: 1 2 3\n", "not a readable flow file"),
        ("one bit", with_flipped_bit, "the checksum of .* is wrong"),
        ("another zip", lambda d: other_zip(), "not a readable flow file"),
        ("a tensor", lambda d: torch_bytes(torch.zeros(3)), "not a flow file"),
        ("a model", lambda d: torch_bytes({"w": torch.zeros(3)}), "not a flow file"),
        ("code", lambda d: torch_bytes(torch.nn.Linear(2, 2)), "not a readable flow file"),
    ],
)
def test_flow_files_as_bytes(good, damage, message, tmp_path, capsys):
    """Errors in Python and in the shell name the file."""
    path = tmp_path / "flow.pt"
    path.write_bytes(damage(good))
    with refused(ValueError, rf"flow\.pt: .*{message}"):
        load_flow(path)
    assert str(path) in from_shell(["sample", "--flow", path, "--output", tmp_path / "out"], capsys)
    assert not (tmp_path / "out").exists()


REMOVED = object()


def change(content, path, value):
    """Set a nested entry to a value, or to a function of the old one."""
    *outer, last = path
    for key in outer:
        content = content[key]
    if value is REMOVED:
        del content[last]
    else:
        content[last] = value(content[last]) if callable(value) else value


WEIGHT = "network.bijectors.1.net.0.weight"
CONTENTS = [
    ("a newer format", ["format"], 99, "written in format 99 by a newer version"),
    ("a format that is no number", ["format"], "1", "format: expected a number, got '1'"),
    ("an unknown kind", ["kind"], "glow", "unknown kind of flow 'glow'"),
    *((f"no {path[-1]}", path, REMOVED, f"{path[-1]}: expected an entry, got none") for path in (
        ["n_coordinates"], ["n_momenta"], ["sizes"], ["reference_temperature"], ["state_dict"],
        ["coordinates"], ["whitening"], ["sizes", "n_blocks"], ["coordinates", "zmatrix"],
        ["coordinates", "zmatrix", "rows"], ["whitening", "cholesky"])),
    ("no weights", ["state_dict", WEIGHT], REMOVED, f"expected {WEIGHT} .*got None"),
    ("blocks as text", ["sizes", "n_blocks"], "2", "n_blocks: expected int, got str"),
    ("widths as text", ["sizes", "hidden"], "8", "hidden: expected list, got str"),
    ("temperature as text", ["reference_temperature"], "600", "expected int | float, got str"),
    ("temperature below zero", ["reference_temperature"], -1.0, "positive temperature"),
    ("coordinates as text", ["coordinates"], "volume", "coordinates: expected dict"),
    ("a precision there is not", ["conditioner_dtype"], "float16", "conditioner_dtype: exp"),
    ("a dtype there is not", ["coordinates", "dtype"], "load", "dtype: expected one of"),
    ("a metric there is not", ["coordinates", "metric"], "plain", "metric: expected"),
    ("no blocks", ["sizes", "n_blocks"], 0, "n_blocks: expected an integer of at least 1"),
    ("10^9 blocks", ["sizes", "n_blocks"], 10**9, "sizes: expected a network of"),
    ("10^30 blocks", ["sizes", "n_blocks"], 10**30, "n_blocks: expected an integer of at mo"),
    ("wide layers", ["sizes", "hidden"], [10**9, 10**9], "sizes: expected a network of"),
    ("many layers", ["sizes", "hidden"], [8] * 1000, "sizes: expected a network of"),
    ("other layers", ["sizes", "hidden"], [9, 8], f"expected {WEIGHT} .* got"),
    ("many coordinates", ["n_coordinates"], 10**9, "sizes: expected a network of"),
    ("other coordinates", ["n_coordinates"], 59, "expected network"),
    ("many momenta", ["n_momenta"], 10**9, "sizes: expected a network of"),
    ("another shape", ["state_dict", WEIGHT], lambda w: w[:-1], f"expected {WEIGHT} .* got"),
    ("a list for a tensor", ["state_dict", WEIGHT], lambda w: w.tolist(), "named tensors"),
    ("a tensor too many", ["state_dict", "more"], torch.zeros(3), "flow only, got more"),
    ("NaN", ["state_dict", WEIGHT], lambda w: w * torch.nan, f"infinity in {WEIGHT}"),
    ("a repeated number", ["state_dict", WEIGHT], torch.zeros(1).expand(10**12), "bytes of"),
    ("an index twice", ["state_dict", "network.bijectors.1.transformed"], lambda w: 0 * w,
     "every feature once"),
    ("other rows", ["state_dict", "coordinates._rows"], lambda w: w + 1, "coordinates._rows"),
    ("rows of text", ["coordinates", "zmatrix", "rows"], [["a"] * 4] * 22, "rows: expected"),
    ("ragged rows", ["coordinates", "zmatrix", "rows", 5], [1, 2], "rows: expected numbers"),
    ("an atom twice", ["coordinates", "zmatrix", "rows", 5, 0], 0, "rows: expected each of"),
    ("an unknown partner", ["coordinates", "zmatrix", "rows", 5, 1], 99, "partners"),
    ("fewer names", ["coordinates", "zmatrix", "atom_names"], ["C"], "atom_names: expected"),
    ("other levels", ["coordinates", "zmatrix", "levels", 9], 7, "levels: expected"),
    ("handedness of two", ["coordinates", "handedness", 0], 2.0, "handedness: expected"),
    ("a centre of four", ["coordinates", "chirality", "atoms", 0], [0, 1, 2, 3], "atoms: expected"),
    ("an unknown centre", ["coordinates", "chirality", "atoms", 0], [99, 1, 2, 3, 4], "atoms: ex"),
    ("a NaN weight", ["coordinates", "chirality", "weights", 0, 0], float("nan"), "weights: exp"),
    ("no centres", ["coordinates", "chirality"], REMOVED, "chirality: expected an entry, got none"),
    ("a bond of no length", ["coordinates", "reference_bonds", 3], 0.0, "positive lengths"),
    ("a NaN cut", ["coordinates", "branch_cuts", 3], float("nan"), "branch_cuts: expected"),
    ("unknown hydrogens", ["coordinates", "equivalent"], [[0, 1, 99]], "equivalent: ex"),
    ("an unknown whitening", ["whitening", "mode"], "bleach", "mode: expected one of"),
    ("a scale of zero", ["whitening", "soft_scale", 0], 0.0, "positive scales"),
    ("fewer means", ["whitening", "stiff_mean"], [0.0], "stiff_mean: expected numbers"),
    ("fewer weights", ["whitening", "weights"], lambda w: w[:-1], "weights: expected a mult"),
]  # fmt: skip


@cases(("entry", "value", "message"), CONTENTS)
def test_flow_files_by_content(good, entry, value, message, tmp_path):
    content = torch.load(io.BytesIO(good), weights_only=True)
    change(content, entry, value)
    torch.save(content, tmp_path / "flow.pt")
    with refused(ValueError, rf"flow\.pt: .*{message}"):
        load_flow(tmp_path / "flow.pt")


def test_flows_of_another_molecule(good, flow, molecule, tmp_path, capsys):
    path = tmp_path / "flow.pt"
    path.write_bytes(good)
    other = alanine_dipeptide("ff96-obc1")
    with refused(ValueError, r"flow\.pt: this flow belongs to another molecule"):
        load_flow(path, other)
    with refused(ValueError, "flow: it was made for another System or Topology"):
        ParallelTempering(other, flow, [300, 600], 4)
    with refused(ValueError, r"flow\.pt: expected a realnvp flow, got tsf"):
        RealNVPFlow.load(path)
    with refused(FileNotFoundError, "no such flow file"):
        load_flow(tmp_path)
    assert load_flow(path, molecule).fingerprint == molecule.fingerprint


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_output_that_is_a_file(below, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    output = tmp_path / "taken" / "run" if below else tmp_path / "taken"
    assert str(output) in from_shell(["md", "--output", output, "--frames", "1"], capsys)
    assert (tmp_path / "taken").read_text() == "mine"
