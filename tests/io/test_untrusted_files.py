"""Reading, resuming or analysing an untrusted directory runs no code and writes only into it.

Each test changes a good directory and runs every command on it.
"""

import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import openmm_tsf
from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.cli.main import main
from openmm_tsf.io.files import refuse_links
from tests.robustness import corpus, readers
from tests.robustness.damage_basics import put_in_place
from tests.robustness.sandbox import DONE, isolated
from tests.support.marker import MARKER, WritesMarker

REFERENCE = ["--platform", "Reference", "--quiet"]
SHORT = "--walkers 2 --iterations 1 --tuning 0 --temperatures 500 600 --platform Reference --quiet"


@pytest.fixture
def box(good, tmp_path):
    """Copies of the good directories, with a secret file beside them."""
    MARKER.unlink(missing_ok=True)
    shutil.copytree(good, tmp_path / "box")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"s3cret " * 1000)
    yield tmp_path / "box"
    assert not MARKER.exists()
    assert (tmp_path / "secret" / "key").read_bytes() == b"s3cret " * 1000
    assert [path.name for path in (tmp_path / "secret").iterdir()] == ["key"]


#: The commands that a user may run on each directory, with its name and that of the box.
COMMANDS = {
    "sample": [
        "analyze {dir}",
        "doctor {dir}",
        "sample --output {dir} --resume --iterations 6 --platform Reference --quiet",
        f"sample --flow {{dir}} --output {{box}}/new1 {SHORT}",
    ],
    "train": [
        "doctor {dir}",
        f"sample --flow {{dir}} --output {{box}}/new2 {SHORT}",
        "train --output {dir} --resume --trajectory {box}/frames.dcd --temperature 600 "
        "--platform Reference --quiet",  # writes a new flow.pt
    ],
    "md": [
        "doctor {dir}",
        "md --output {dir} --resume --frames 31 --quiet",
        "train --trajectory {dir} --output {box}/new3 --platform Reference --quiet",
    ],
    "killed": ["doctor {dir}", "run --output {dir} --resume --platform Reference --quiet"],
}


def run_commands(box, folder, *, elsewhere=False):
    """Run the commands of a directory; return their names, exit statuses and standard errors.

    With `elsewhere`, run those too that read it and write to a new directory.
    """
    outcomes = []
    for line in COMMANDS[folder]:
        if "/new" in line and not elsewhere:
            continue
        arguments = [word.format(dir=box / folder, box=box) for word in line.split()]

        def call(arguments=arguments):
            with readers.cut_short():
                return corpus.main(arguments)

        outcome = isolated(call)
        assert outcome.killed is None, (arguments, outcome)
        assert outcome.status in (2, *DONE), (arguments, outcome)
        assert "unexpected" not in outcome.stderr, (arguments, outcome.stderr)
        text = outcome.stdout + outcome.stderr
        assert all(c.isprintable() or c in "\n\r\t" for c in text), (arguments, text)
        outcomes.append((arguments[0], outcome.status, outcome.stderr))
    return outcomes


def test_the_pickle_runs_code(tmp_path):
    """Otherwise the tests below would prove nothing."""
    torch.save({"x": WritesMarker()}, tmp_path / "code.pt")
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert MARKER.exists()
    MARKER.unlink()


@pytest.mark.parametrize(
    ("folder", "file"),
    [("sample", "flow.pt"), ("sample", "checkpoint.pt"), ("train", "flow.pt"),
     ("train", "training.pt"), ("killed", "training/round_00_flow.pt"),
     ("killed", "training/round_01.pt"), ("killed", "training/round_01_samples.pt")],
)  # fmt: skip
def test_pickles(box, folder, file):
    path = box / folder / file
    good = torch.load(path, weights_only=True)
    for key in ("state", "extra")[: 1 if folder == "sample" else 2]:
        torch.save({**good, key: WritesMarker()}, path)
        assert any(status == 2 for _, status, _ in run_commands(box, folder, elsewhere=True))


@pytest.mark.parametrize(
    ("folder", "file"),
    [("sample", "segments/segment_000000.npz"), ("sample", "positions.npz"),
     ("md", "checkpoint.npz"), ("md", "positions.npz")],
)  # fmt: skip
def test_arrays_of_objects(box, folder, file):
    path = box / folder / file
    with np.load(path) as data:
        arrays = dict(data)
    for name in sorted(arrays)[: 1 if file == "positions.npz" else 3]:
        changed = {**arrays, name: np.array([WritesMarker()], dtype=object)}
        np.savez(path, **changed, allow_pickle=True)
        outcomes = run_commands(box, folder)
        assert any(status == 2 and path.name in stderr for _, status, stderr in outcomes)


def test_python_forces(box):
    for folder in ("sample", "md", "killed", "train"):
        path = box / folder / "system.xml"
        text = path.read_text()
        force = '<Force type="PythonForce" forceGroup="0" name="x" version="1" pickled="gASV"/>'
        path.write_text(text.replace("<Forces>", f"<Forces>{force}"))
        outcomes = run_commands(box, folder, elsewhere=True)
        assert any("PythonForce" in stderr for _, _, stderr in outcomes)


NAMES = [
    "../../secret/key", "/etc/passwd", "ala2_reference.npz/../../x", "{0.__class__}", "%s%s%n",
    "\x1b]0;x\x07.npz", "ala2.pdb", 3, ["a"], "", "x" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_reference_data(box, name):
    change(box / "sample" / "config.json", lambda config: config.update(reference=name))
    command, status, stderr = run_commands(box, "sample")[0]
    assert (command, status) == ("analyze", 2)
    assert "reference" in stderr
    assert len(stderr) < 1000
    if isinstance(name, str) and not name.endswith(".npz"):
        with pytest.raises((FileNotFoundError, ValueError)):
            load_reference(name)


def change(path, function):
    content = json.loads(path.read_text())
    function(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "ladder",
    [[1e308, 2e308], [500.0, 500.001], ["../../secret/key", 600.0], [-1.0, 600.0], [], "500",
     [500.0, float("nan")], [500.0, 1e300], {"500": 600}, [[500.0, 600.0]], [True, 600.0]],
    ids=str,
)  # fmt: skip
def test_temperatures_that_make_unusual_file_names(box, ladder):
    change(box / "sample" / "config.json", lambda config: config.update(temperatures_K=ladder))
    outcomes = run_commands(box, "sample")
    assert [status for command, status, _ in outcomes if command != "doctor"][:2] == [2, 2]
    assert all("config.json" in stderr for command, _, stderr in outcomes[:1])


@pytest.mark.parametrize(
    "name",
    ["../phi", "\x1b[2J", "$\\frac{1}$", "a/b", "\u202ephi", "", "x" * 100, "a\nb"],
    ids=repr,
)
def test_names_of_dihedrals(box, name):
    """They appear in terminals, tables and figures."""

    def rename(config):
        atoms = config["dihedrals"].pop("phi")
        config["dihedrals"] = {name: atoms, **config["dihedrals"]}

    change(box / "sample" / "config.json", rename)
    command, status, stderr = run_commands(box, "sample")[0]
    assert (command, status) == ("analyze", 2)
    assert "config.json: damaged, dihedrals: expected names" in stderr


def test_names_of_kernels_and_atoms(box):
    """Control characters do not reach the terminal."""
    path = box / "sample" / "segments" / "segment_000000.npz"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries.items():
            archive.writestr(entry.replace("flow_walk", "\x1b[2Jwalk"), data)
    assert run_commands(box, "sample")[0][1] == 2
    path.write_bytes(whole)
    topology = box / "sample" / "topology.json"
    text = topology.read_text().replace('"CA"', r'"\u001b[2J"').replace('"ALA"', r'"\ud800\u0007"')
    topology.write_text(text)
    analyzed, other = (status for _, status, _ in run_commands(box, "sample")[:2])
    assert analyzed in DONE
    assert other == 0
    for folder in ("md", "train"):
        topology = box / folder / "topology.pdb"
        topology.write_text(topology.read_text().replace(" CA ", "\x1b[2J"))
        run_commands(box, folder)
    for name, value in (("\x1b[2J", "\x1b[2J"), ("stage", "\x1b[2J\x1b]0;a\x07")):
        change(box / "killed" / "config.json", lambda c, n=name, v=value: c.update({n: v}))
        run_commands(box, "killed")


NAMES_OF_FILES = {
    "sample": "T500.00K.dcd T600.00K.dcd config.json checkpoint.pt flow.pt topology.pdb system.xml "
    "positions.npz topology.json .lock .lock-owner.json summary.json report.html ramachandran.png "
    "diagnostics.png thermodynamics.csv thermodynamics.json thermodynamics.png certificate.json "
    "summary.json.tmp thermodynamics.json.tmp segments/segment_000000.npz "
    "segments/segment_000001.npz segments/segment_000002.npz",
    "md": "md.dcd checkpoint.npz config.json .lock .lock-owner.json topology.pdb system.xml "
    "positions.npz topology.json",
    "train": "training.pt training.csv flow.pt config.json .lock",
    "killed": "training.csv training/round_01.csv training/round_01.pt training/round_01_flow.pt "
    "T500.00K.dcd checkpoint.pt config.json .lock",
}
FILES = [(folder, name) for folder, names in NAMES_OF_FILES.items() for name in names.split()]
#: The other files are slow tests.
QUICK = {
    ("sample", "T500.00K.dcd"), ("sample", ".lock"), ("sample", "segments/segment_000001.npz"),
    ("sample", "summary.json"), ("md", "md.dcd"), ("train", "training.pt"),
    ("killed", "training/round_01.csv"),
}  # fmt: skip
MANY_FILES = pytest.mark.parametrize(
    ("folder", "file"),
    [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in FILES],
    ids=map("/".join, FILES),
)


@MANY_FILES
def test_links_are_not_followed(box, folder, file, tmp_path):
    """The target has the good content, so that only the link can be refused."""
    path, elsewhere = box / folder / file, tmp_path / "elsewhere"
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    elsewhere.write_bytes(content)
    path.symlink_to(elsewhere)
    run_commands(box, folder)
    assert elsewhere.read_bytes() == content


@pytest.mark.parametrize(
    ("folder", "file"),
    [("sample", "T500.00K.dcd"), ("sample", ".lock"), ("md", "md.dcd"), ("md", ".lock"),
     ("sample", "checkpoint.pt"), ("sample", "segments/segment_000001.npz"),
     ("md", "checkpoint.npz"), ("train", "flow.pt"), ("sample", "summary.json")],
    ids="/".join,
)  # fmt: skip
def test_hard_links_keep_their_content(box, folder, file, tmp_path):
    """Files that are changed in place are refused, others are replaced."""
    path, elsewhere = box / folder / file, tmp_path / "elsewhere"
    if file == ".lock":
        path.write_bytes(b"not a lock")
    os.link(path, elsewhere)
    before = elsewhere.read_bytes()
    outcomes = run_commands(box, folder)
    assert elsewhere.read_bytes() == before
    if file.endswith((".dcd", ".lock")):
        assert any("is a hard link" in stderr for _, _, stderr in outcomes)


@pytest.mark.parametrize("target", ["a directory elsewhere", "nothing", "itself", "a file"])
@pytest.mark.parametrize(
    ("folder", "name"),
    [("sample", "segments"), ("killed", "training"), ("killed", "segments"), ("killed", "md")],
    ids="/".join,
)
def test_folders_that_are_links(box, folder, name, target, tmp_path):
    path, elsewhere = box / folder / name, tmp_path / "elsewhere"
    elsewhere.mkdir()
    if path.exists():
        shutil.copytree(path, elsewhere, dirs_exist_ok=True)
        shutil.rmtree(path)
    before = {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    targets = {"a directory elsewhere": elsewhere, "nothing": tmp_path / "no", "itself": path}
    path.symlink_to(targets.get(target, tmp_path / "secret" / "key"))
    outcomes = run_commands(box, folder)
    assert any(status == 2 and name in stderr for _, status, stderr in outcomes)
    assert before == {file.name: file.read_bytes() for file in elsewhere.iterdir()}
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory", "link to /dev/zero", "link to nothing"])
@MANY_FILES
def test_what_is_no_file(box, folder, file, kind, tmp_path):
    """Reading a pipe or a device might never end; links to nothing create no files."""
    put_in_place(kind, box / folder / file, tmp_path / "nothing")
    run_commands(box, folder)
    assert not (tmp_path / "nothing").exists()


def test_the_output_path_of_the_user_may_be_a_link(box, tmp_path):
    (tmp_path / "run").symlink_to(box / "sample")
    (tmp_path / "new").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    arguments = ["sample", "--output", str(tmp_path / "run"), "--resume", "--iterations", "6"]
    with readers.cut_short():
        assert main([*arguments, *REFERENCE]) == 0
        assert main(["md", "--output", str(tmp_path / "new"), "--frames", "2", "--quiet"]) == 0
    assert (tmp_path / "target" / "md.dcd").is_file()


def test_foreign_files_in_a_run_stay(box):
    """Truncation to the checkpoint, or a restart, deletes only files that the run wrote."""
    foreign = [box / "sample" / "segments" / "thesis.txt", box / "sample" / "thesis.txt"]
    for path in foreign:
        path.write_text("mine")
    assert all(status in DONE for _, status, _ in run_commands(box, "sample"))
    assert [path.read_text() for path in foreign] == ["mine", "mine"]


@pytest.mark.parametrize("folder", ["foreign", "empty"])
def test_foreign_directories_are_unchanged(box, folder):
    """``foreign`` has a ``.lock`` and a ``config.json`` of another program."""
    (box / "empty").mkdir()
    (box / "empty" / "thesis.txt").write_text("mine")

    def content():
        return {path: path.is_file() and path.read_bytes() for path in (box / folder).rglob("*")}

    before = content()
    frames = ["--trajectory", str(box / "frames.dcd"), "--temperature", "600"]
    sample = ["sample", "--flow", str(box / "train")]
    for line in (["md"], ["train", *frames], sample, ["run", *frames]):
        for more in ([], ["--resume"]):
            assert main([*line, "--output", str(box / folder), *more, *REFERENCE]) == 2
    assert main(["analyze", str(box / folder)]) == 2
    assert content() == before


@pytest.mark.parametrize("folder", ["sample", "md"])
def test_without_a_checkpoint_no_samples_are_deleted(box, folder):
    """A restart would delete them."""
    for path in (box / folder).glob("checkpoint.*"):
        path.unlink()
    before = {path: path.read_bytes() for path in (box / folder).rglob("*.[dn][cp][dz]")}
    outcomes = [stderr for command, _, stderr in run_commands(box, folder) if command == folder]
    assert "no such checkpoint, but there are" in outcomes[0]
    assert before == {path: path.read_bytes() for path in before}


def test_refuse_links_names_the_file_type(tmp_path):
    (tmp_path / "md.dcd").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"output: .*md\.dcd is a link; expected regular files"):
        refuse_links(tmp_path, ["no", "md.dcd"])
    os.mkfifo(tmp_path / "flow.pt")
    with pytest.raises(ValueError, match=r"flow\.pt is a pipe or device"):
        refuse_links(tmp_path, ["flow.pt"])


def test_no_shell_and_no_code_from_files():
    """Functions that could run code from a file do not occur in the package."""
    package = Path(openmm_tsf.__file__).parent
    unsafe = re.compile(
        r"shell=True|os\.system|os\.popen|[^_.a-z]eval\(|[^_.a-z]exec\(|pickle\.load"
        r"|allow_pickle=True|weights_only=False|marshal|mktemp\("
    )
    uses = [path.name for path in package.rglob("*.py") if unsafe.search(path.read_text())]
    assert uses == []
    assert sys.flags.optimize == 0
