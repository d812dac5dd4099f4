"""The run directory: numeric segments, one DCD per temperature, one atomic checkpoint.

All files can be read while the run is writing; see ``openmm_tsf.analysis``. The DCD frames of a
segment, the segment and the checkpoint are written together, in this order, so that the counts in
the checkpoint tell which files and frames are complete. On resume everything else is cut off.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.directory import list_contents
from openmm_tsf.io.files import refuse_links, remove_stale_temporaries, write_arrays, write_json
from openmm_tsf.io.run_config import (
    CONFIG,
    CONFIG_FORMAT,
    check_distinct_temperatures,
    trajectory_name,
)
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.systems.files import holds_molecule, write_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import dihedral_angles, slow_torsions
from openmm_tsf.utils.validation import check_int
from openmm_tsf.utils.versions import package_versions

CHECKPOINT = "checkpoint.pt"
_CHECKPOINT_FORMAT = 1
_COUNTS = ("n_frames_written", "n_segments", "seed")
_IN_CHECKPOINT = {"state", "generator", "kernels", *_COUNTS}
_SEGMENT = re.compile(r"segment_(\d{6,})\.npz")
#: Frames that are prepared for a file at a time, but all of an iteration.
_BATCH_FRAMES = 1024


class RunWriter:
    """Writes one run directory.

    Parameters
    ----------
    directory, temperatures, n_walkers
        The directory, the ladder in K and the number of walkers.
    molecule
        The molecule; None for a potential on R^d: its positions go to the segments, and there are
        no DCD files.

    Attributes
    ----------
    dihedrals
        The recorded torsions and their atoms: the slow ones, or those that a run to be continued
        has recorded.
    check_held
        Called before anything is written: it raises an error if another process has taken the
        directory over (:meth:`openmm_tsf.io.directory.DirectoryLock.check_held`).

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.sampling import RunWriter
    >>> writer = RunWriter("run", None, (1.0, 2.0), n_walkers=4)
    >>> writer.create(seed=1, boltzmann_constant=1.0, choices={})
    >>> writer.write({"energy": np.zeros((3, 4, 2))}, np.zeros((3, 4, 2, 1)), checkpoint={})
    >>> writer.n_saved
    3
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        molecule: MolecularSystem | None,
        temperatures: tuple[float, ...],
        n_walkers: int,
    ) -> None:
        self.directory = Path(directory)
        self.molecule, self.temperatures, self.n_walkers = molecule, temperatures, n_walkers
        self.n_frames = self.n_segments = 0
        self._checkpoint_seen: tuple[int, ...] | None = None
        self._writing = False  # also true after a write that failed
        self._stopped = False
        self.dihedrals: Mapping[str, Sequence[int]] = (
            {} if molecule is None else slow_torsions(molecule.topology)
        )
        self.check_held: Callable[[], None] = _check_nothing
        self.dcds: list[DCDWriter] = []
        if molecule is not None:
            check_distinct_temperatures(temperatures)
            paths = [self.directory / trajectory_name(kelvin) for kelvin in temperatures]
            self.dcds = [DCDWriter(path, molecule.n_atoms) for path in paths]

    @property
    def n_saved(self) -> int:
        """The number of iterations with frames in the checkpoint."""
        return self.n_frames // self.n_walkers

    def create(
        self,
        seed: int,
        boltzmann_constant: float,
        choices: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        """Start a new run directory.

        Parameters
        ----------
        seed, boltzmann_constant, choices
            The sampler's seed, k_B in the potential's energy unit per kelvin, and every choice.
        config
            ``config.json`` of the stage that has written to this directory before: its entries are
            kept, and its other files may be there.
        device
            What the walkers are on, as :func:`openmm_tsf.utils.devices.describe_device` says.

        """
        self.check_new(of_stage=config is not None)
        (self.directory / "segments").mkdir(parents=True)
        if self.molecule is not None and not holds_molecule(self.directory):
            write_molecule(self.molecule, self.directory)
        for dcd in self.dcds:
            dcd.create("frames: iteration, walker")
        content = {
            "format": CONFIG_FORMAT,
            "seed": seed,
            **(config or {}),
            "temperatures_K": list(self.temperatures),
            "n_walkers": self.n_walkers,
            "dihedrals": {name: list(atoms) for name, atoms in self.dihedrals.items()},
            "boltzmann_constant": boltzmann_constant,
            "device": device,
            "choices": {**(config or {}).get("choices", {}), **choices},
            "versions": package_versions(),
        }
        write_json(self.directory / CONFIG, content)

    def check_new(self, of_stage: bool = False) -> None:
        """Refuse a directory that is not empty, or with `of_stage` one with files of a run."""
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"output: {self.directory} is a file, expected a directory")
        names = list_contents(self.directory) if self.directory.exists() else []
        if of_stage:
            of_run = {CHECKPOINT, "segments", *(dcd.path.name for dcd in self.dcds)}
            names = [name for name in names if name in of_run]
        if names:
            raise FileExistsError(
                f"output: expected an empty or new directory, but {self.directory} has {names[0]}"
                f"{' and more' if len(names) > 1 else ''}; continue a run with resume()"
            )

    def remove(self) -> None:
        """Remove what `create` made, but for ``config.json``: no checkpoint was written yet."""
        refuse_links(self.directory, ["segments"])
        segments = self.directory / "segments"
        if segments.is_dir():
            remove_stale_temporaries(segments)
            for path in segments.iterdir():
                if not _SEGMENT.fullmatch(path.name):
                    raise ValueError(f"output: expected segments of the run only, got {path}")
                path.unlink()
            segments.rmdir()
        for dcd in self.dcds:
            dcd.path.unlink(missing_ok=True)

    def write(
        self,
        numbers: Mapping[str, np.ndarray],
        positions: Sequence[np.ndarray] | np.ndarray,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Write a segment, its frames and the checkpoint, to which the writer adds its counts.

        `numbers` are the arrays of n iterations, and totals; `positions` [n, W, R, *event] are
        those of the same iterations. If frames are of fewer iterations, `numbers` hold these as
        ``frame_iteration``, and the ``dihedrals`` of all n.
        """
        self._writing = True
        self._check_may_write()
        content = dict(numbers)
        if self.molecule is None:
            content["positions"] = np.asarray(positions)
            shape = (*content["energy"].shape, 0)
            content["dihedrals"] = np.zeros(shape, dtype=np.float32)
        elif "dihedrals" not in content:
            content["dihedrals"] = dihedrals_of(positions, list(self.dihedrals.values()))
        for rung, dcd in enumerate(self.dcds):
            self._check_may_write()
            dcd.append_batches(_frames_of_rung(positions, rung), self.n_frames)
        self._check_may_write()
        write_arrays(self._segment(self.n_segments), content)
        n_frames = self.n_frames + len(positions) * self.n_walkers
        counts = {"n_frames_written": n_frames, "n_segments": self.n_segments + 1}
        self._check_stop()
        self.save_checkpoint({**checkpoint, **counts})
        self.n_frames, self.n_segments = n_frames, self.n_segments + 1
        self._writing = False

    def stop(self) -> None:
        """Let a write in another thread end before its next file, as after a Ctrl-C in it."""
        self._stopped = True

    def note_loss(self) -> None:
        """Note that a segment will not be written: only `resume` can continue the run."""
        self._writing = True

    def _check_may_write(self) -> None:
        """Before each file: another owner may have taken over while the last one was written."""
        self._check_stop()
        self.check_held()

    def _check_stop(self) -> None:
        if self._stopped:
            raise KeyboardInterrupt

    def _segment(self, number: int) -> Path:
        return self.directory / "segments" / f"segment_{number:06d}.npz"

    def write_first_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint at the start of the run, without any segment."""
        self.save_checkpoint({**checkpoint, "n_frames_written": 0, "n_segments": 0})

    def save_checkpoint(self, content: dict[str, Any]) -> None:
        """Write the checkpoint, all or nothing."""
        self.check_held()
        path = self.directory / CHECKPOINT
        write_tensors(path, {**content, "format": _CHECKPOINT_FORMAT})
        self._checkpoint_seen = _identity(path)

    def check_untouched(self) -> None:
        """Raise RuntimeError if another sampler has continued the run, or iterations were lost."""
        if self._writing:
            raise RuntimeError(
                f"output: the last iterations could not be written to {self.directory}; resume() "
                "continues from its last checkpoint"
            )
        if _identity(self.directory / CHECKPOINT) != self._checkpoint_seen:
            raise RuntimeError(
                f"output: {self.directory} was continued by another sampler since this one wrote "
                "to it; resume() continues from there"
            )

    def read_checkpoint(self) -> dict[str, Any]:
        """Return the last checkpoint; ValueError if it is damaged."""
        path = self.directory / CHECKPOINT
        if not (path.exists() or path.is_symlink()):
            raise FileNotFoundError(f"{self.directory}: no {CHECKPOINT} to resume from")
        content = read_tensors(path, "checkpoint")
        missing = sorted(_IN_CHECKPOINT - content.keys())
        if missing:
            raise ValueError(f"{path}: not a checkpoint of a run, {', '.join(missing)} missing")
        for name in _COUNTS:
            try:
                check_int(content[name], name, least=0, most=2**64 - 1)
            except ValueError as error:
                raise ValueError(f"{path}: not a checkpoint of a run, {error}") from error
        self._checkpoint_seen = _identity(path)
        return content

    def cut_back(self, n_frames: int, n_segments: int) -> None:
        """Remove what was written after a checkpoint with these counts.

        ValueError, with nothing removed, if a file holds less than they say.
        """
        refuse_links(self.directory, ["segments", *(dcd.path.name for dcd in self.dcds)])
        for number in range(n_segments):
            if not self._segment(number).is_file():
                raise ValueError(f"{self.directory}: segment {number} is missing")
        for dcd in self.dcds:
            if not dcd.path.is_file():
                raise ValueError(f"{dcd.path}: this trajectory of the run is missing")
            if (n := dcd.n_frames) < n_frames:  # before anything is cut
                raise ValueError(f"{dcd.path}: expected {n_frames} frames, the file has {n}")
        remove_stale_temporaries(self.directory / "segments")
        # From the last one on: if this is interrupted, no segment is missing in between.
        for path in sorted((self.directory / "segments").iterdir(), reverse=True):
            match = _SEGMENT.fullmatch(path.name)
            if match and int(match[1]) >= n_segments:
                path.unlink()
        for dcd in self.dcds:
            dcd.cut_back(n_frames)
        self.n_frames, self.n_segments = n_frames, n_segments


def _check_nothing() -> None:
    """The check of a writer whose directory has no lock."""


def dihedrals_of(
    positions: Sequence[np.ndarray] | np.ndarray, quartets: Sequence[Sequence[int]]
) -> np.ndarray:
    """Return the dihedrals [n, W, R, D] in float32 of positions [n, W, R, N, 3]."""
    parts = [dihedral_angles(batch, quartets).astype(np.float32) for batch in _batches(positions)]
    return np.concatenate(parts)


def _frames_of_rung(
    positions: Sequence[np.ndarray] | np.ndarray, rung: int
) -> Iterator[np.ndarray]:
    """Yield the frames [F, N, 3] of a rung, iteration by iteration, the walkers in order."""
    if len(positions):
        for batch in _batches([x[:, rung] for x in positions]):
            yield batch.reshape(-1, *batch.shape[-2:])


def _batches(positions: Sequence[np.ndarray] | np.ndarray) -> Iterator[np.ndarray]:
    """Yield positions of some iterations at a time: copies of all would double the memory."""
    n_frames = math.prod(positions[0].shape[:-2]) if len(positions) else 1
    size = max(1, _BATCH_FRAMES // n_frames)
    for start in range(0, max(1, len(positions)), size):
        yield np.asarray(positions[start : start + size])


def _identity(path: Path) -> tuple[int, ...] | None:
    """What identifies a file, None if it does not exist; every checkpoint replaces it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
