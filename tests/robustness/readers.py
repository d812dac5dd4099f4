"""Damage to every file that the program reads, and the functions and commands that read it."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from openmm_tsf import load_run
from openmm_tsf.doctor import report
from openmm_tsf.flows.load import load_flow
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.provenance import hash_of
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import load_molecule, read_molecule
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.workflow.frames import load_trajectory
from tests.robustness import corpus
from tests.robustness.damage import damages
from tests.robustness.damage_basics import Damage, put_in_place
from tests.robustness.sandbox import DONE, Outcome
from tests.support.marker import MARKER

ALLOWED = {
    "ValueError", "TypeError", "FileNotFoundError", "OSError", "RuntimeError", "NotADirectoryError",
    "IsADirectoryError", "FileExistsError", "PermissionError", "DirectoryInUse", "_WrongContent",
}  # fmt: skip


def _digest(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
    return digest.hexdigest()


def _load_run(folder: Path) -> Any:
    """Return the number of iterations of a run, and a digest of every number in it."""
    logging.getLogger("openmm_tsf").setLevel(logging.WARNING)  # segments left out are logged
    run = load_run(folder)
    digests = []
    for kelvin in run.temperatures:
        phi, psi = run.ramachandran(kelvin)
        digests.append(_digest(run.energies(kelvin), phi, psi, run.trajectory(kelvin).xyz))
    run.summary()
    return run.n_iterations, run.segments.replica.tobytes(), digests


def _load_frames(load: Callable[..., MDDataset], path: Path, *more: float) -> str:
    return _digest(load(path, corpus.molecule(), *more).positions.numpy())


FUNCTIONS: dict[str, Callable[[Path], Any]] = {
    "load_run": _load_run,
    "load_flow": lambda folder: hash_of(load_flow(folder / "flow.pt", corpus.molecule())),
    "read_molecule": lambda folder: read_molecule(folder).fingerprint,
    "load_molecule": lambda folder: (
        load_molecule(folder / "topology.pdb", folder / "system.xml").fingerprint
    ),
    "load_trajectory": lambda folder: _load_frames(load_trajectory, folder),
    "MDDataset.load": lambda folder: _load_frames(MDDataset.load, folder / "md.dcd", 600),
}
#: Command lines, by a name that begins with the command.
COMMANDS = {
    "analyze": "analyze {dir} --quiet",
    "doctor": "doctor {dir}",
    "sample --resume": "sample --output {dir} --resume --iterations 6 --platform Reference --quiet",
    "train --resume": "train --output {dir} --resume --trajectory {box}/frames.dcd "
    "--temperature 600 --platform Reference --quiet",
    "sample --flow": "sample --flow {dir} --output {box}/out --walkers 2 --iterations 1 --tuning 0 "
    "--temperatures 500 600 --platform Reference --quiet",
    "md --resume": "md --output {dir} --resume --frames 31 --quiet",
    "run --resume": "run --output {dir} --resume --platform Reference --quiet",
}


def read(reader: str, folder: Path) -> Any:
    """Return what a function of `FUNCTIONS` returns, or the exit status of a command line."""
    if reader in FUNCTIONS:
        return FUNCTIONS[reader](folder)
    words = COMMANDS[reader].split()
    return corpus.main([word.format(dir=folder, box=folder.parent) for word in words])


MOLECULE = "system.xml topology.pdb topology.json positions.npz"
#: Directories, files in them, and their readers.
READERS = (
    ("sample", "config.json segments/segment_000000.npz segments/segment_000001.npz T500.00K.dcd "
     "flow.pt topology.json positions.npz summary.json", ("load_run", "analyze")),
    ("sample", f"config.json checkpoint.pt flow.pt T600.00K.dcd segments/segment_000001.npz "
     f"{MOLECULE}", ("sample --resume",)),
    ("sample", "config.json summary.json", ("doctor",)),
    ("sample", "flow.pt", ("load_flow",)),
    ("sample", MOLECULE, ("read_molecule",)),
    ("sample", "system.xml topology.pdb", ("load_molecule",)),
    ("train", f"config.json training.pt training.csv flow.pt {MOLECULE}", ("train --resume",)),
    ("train", f"flow.pt config.json {MOLECULE}", ("sample --flow",)),
    ("md", f"config.json checkpoint.npz md.dcd {MOLECULE}", ("md --resume",)),
    ("md", "md.dcd config.json", ("load_trajectory",)),
    ("md", "md.dcd", ("MDDataset.load",)),
    ("md", "config.json", ("doctor",)),
    ("killed", "config.json training/round_00_flow.pt training/round_01.pt "
     "training/round_01_samples.pt training/round_00.csv training/round_01.csv flow.pt "
     f"{MOLECULE}", ("run --resume",)),
)  # fmt: skip
#: Directory, file and reader of every case.
ALL = [
    (folder, file, reader)
    for folder, files, readers in READERS
    for file, reader in product(files.split(), readers)
]
NAMES = tuple(dict.fromkeys(reader for _, _, reader in ALL))


@dataclass
class Case:
    """A damaged file in a directory, and its reader."""

    folder: str
    file: str
    reader: str
    damage: Damage

    def __repr__(self) -> str:
        size = self.damage.not_file or f"{len(self.damage.content)} bytes"
        return f"{self.reader} of {self.folder}/{self.file}, damage {self.damage.kind!r} ({size})"


class DamagedFiles:
    """Damages files in copies of the good directories, and lets them be read."""

    def __init__(self, home: Path, box: Path) -> None:
        self.home, self.box = home, box
        self._good: dict[tuple[str, str], Any] = {}
        self.files = {
            f"{folder}/{name}": (home / folder / name).read_bytes() for folder, name, _ in ALL
        }
        self.others = {
            name: self.files[name]
            for name in ("md/md.dcd", "sample/flow.pt", "sample/checkpoint.pt", "train/training.pt",
                         "sample/config.json", "md/config.json", "md/checkpoint.npz",
                         "sample/positions.npz", "sample/segments/segment_000000.npz",
                         "sample/topology.pdb", "sample/system.xml", "killed/config.json",
                         "killed/training/round_01_samples.pt")
        }  # fmt: skip

    def cases(self, reader: str | None = None) -> st.SearchStrategy[Case]:
        """Return a strategy for damage to any file of a reader, or of all."""
        known = [case for case in ALL if reader in (None, case[2])]

        @st.composite
        def strategy(draw: Any) -> Case:
            folder, file, name = draw(st.sampled_from(known))
            damage = draw(damages(file, self.files[f"{folder}/{file}"], self.others))
            return Case(folder, file, name, damage)

        return strategy()

    def prepared(self, case: Case) -> Path:
        """Return a copy of the directory with the damaged file."""
        shutil.rmtree(self.box, ignore_errors=True)
        self.box.mkdir(parents=True)
        folder = self.box / case.folder
        shutil.copytree(self.home / case.folder, folder)
        shutil.copy(self.home / "frames.dcd", self.box / "frames.dcd")
        target = folder / case.file
        if case.damage.not_file is None:
            target.write_bytes(case.damage.content)
        else:
            put_in_place(case.damage.not_file, target)
        return folder

    def run(self, case: Case) -> Callable[[], Any]:
        """Return the function to call in a child process."""
        folder = self.prepared(case)

        def call() -> Any:
            os.chdir(self.box)
            with cut_short():
                return read(case.reader, folder)

        return call

    def verdict(self, case: Case, outcome: Outcome) -> str:
        """Return ``worked``, ``refused``, or ``FAILED`` with the reason."""
        command = case.reader in COMMANDS
        verdict = judge(outcome, command, [str(self.box), case.file, case.folder])
        if MARKER.exists():
            MARKER.unlink()
            return "FAILED: code of the file was executed"
        if self.box.is_dir():
            for name in os.listdir(self.box):
                if name not in (case.folder, "frames.dcd", "out"):
                    return f"FAILED: wrote {name} outside"
        if verdict == "worked" and not command and case.damage.kind in _DETECTED:
            return self._compare(case, outcome)
        return verdict

    def _compare(self, case: Case, outcome: Outcome) -> str:
        """Compare the result with that of the good file: an archive has checksums."""
        if not case.file.endswith((".npz", ".pt")):
            return "worked"
        key = (case.folder, case.reader)
        if key not in self._good:
            self._good[key] = read(case.reader, self.home / case.folder)
        if outcome.status == self._good[key]:
            return "worked"
        if case.reader == "load_run" and outcome.status[0] < self._good[key][0]:
            return "worked" if "left out" in outcome.stderr else "FAILED: no warning"
        return "FAILED: damage that a checksum detects changed the result"


#: Damage of bytes that the checksums of an archive detect.
_DETECTED = ("flip", "cut", "insert", "delete", "zero", "repeat")
_NAMES = re.compile(
    r"(--)?(output|temperatures?|n_walkers|walkers|platform|threads|seed|flow|frames|n_frames|stride|"
    r"system|pdb|prmtop|inpcrd|top|gro|psf|crd|parameters|include_dir|implicit_solvent|constraints|"
    r"measure|observe|topology|positions|force_?field|trajectory|path|checkpoint[_-]seconds|directory|"
    r"timestep|friction|steps_per_frame|n_equilibration_steps|equilibration-steps|n_iterations|"
    r"iterations|tuning|n_tuning|rounds|n_rounds|steps|n_steps|md|molecule|start|kernels|dataset|"
    r"settings|choices|sampler_seed|stage|reference|dihedral|training|expected|source|versions|"
    r"requested_platform|frames_sha256|start_sha256|flow_sha256|costs|checkpoint|memory)[\w.]*: "
    r"|\b[\w.-]+\.(json|pt|npz|dcd|pdb|xml|csv)\b"
)


def _names_cause(message: str, names: list[str]) -> bool:
    return any(name in message for name in names) or _NAMES.search(message) is not None


def judge(outcome: Outcome, command: bool, names: list[str]) -> str:
    """Return ``worked``, ``refused`` if a message names the cause, or ``FAILED`` with the reason.

    The cause is one of `names`, of files or arguments; `command` tells a command line from a
    function.
    """
    if outcome.killed is not None:
        return f"FAILED: {outcome.killed}"
    if not command:
        if outcome.error is None:
            return "worked"
        if outcome.error not in ALLOWED:
            return f"FAILED: {outcome.error}: {outcome.message}\n{outcome.trace}"
        if not _names_cause(outcome.message, names):
            return f"FAILED: names no cause: {outcome.message}\n{outcome.trace}"
        return "refused"
    if outcome.error is not None:
        return f"FAILED: {outcome.error} got through: {outcome.message}\n{outcome.trace}"
    if outcome.status not in (1, 2, 130, *DONE):
        return f"FAILED: exit status {outcome.status!r}"
    text = outcome.stdout + outcome.stderr
    if any(not c.isprintable() and c not in "\n\r\t" for c in text):
        return f"FAILED: control characters printed: {text[-500:]!r}"
    if "Traceback" in text:
        return f"FAILED: a traceback: {text[-2000:]}"
    if outcome.status != 2:
        return "worked"
    lines = [line for line in outcome.stderr.splitlines() if ": error: " in line]
    if len(lines) != 1:
        return f"FAILED: {len(lines)} error lines: {outcome.stderr[-500:]}"
    message = lines[0].partition(": error: ")[2]
    if not message.strip() or message.startswith("unexpected "):
        return f"FAILED: {lines[0]}"
    if len(message) > 3000:
        return f"FAILED: a message of {len(message)} characters: {message[:200]}"
    if not _names_cause(message, names):
        return f"FAILED: names no cause: {lines[0]}"
    return "refused"


@contextmanager
def cut_short() -> Iterator[None]:
    """Read and check everything, but leave out steps, tuning, the self-test and figures."""

    def step(self: Any, *args: Any) -> None:
        self.step += 1

    def run(self: Any, n_iterations: int, output: Any = None, **options: Any) -> Any:
        return real_run(self, min(n_iterations, 1), output, **options)

    real_run = ParallelTempering.run
    with (
        mock.patch.object(Trainer, "train_step", step),
        mock.patch.object(ParallelTempering, "run", run),
        mock.patch.object(report, "self_test", return_value=[]),
        corpus.no_pictures(),
    ):
        yield
