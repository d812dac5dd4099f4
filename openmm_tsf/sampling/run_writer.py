"""The run directory: numeric segments, one DCD per temperature, one atomic checkpoint.

Everything can be read while the run is writing; see ``openmm_tsf.analysis``. A segment, the DCD
frames that belong to it and the checkpoint are written together, in this order, so that the
checkpoint's counts tell which files and frames are complete. On resume everything after them is
cut off.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.directory import list_contents
from openmm_tsf.io.files import refuse_links, remove_stale_temporaries, write_arrays, write_json
from openmm_tsf.io.run_config import RUN_FORMAT, check_distinct, rung_file
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.systems.files import holds_molecule, write_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.validation import check_int
from openmm_tsf.utils.versions import package_versions

CHECKPOINT = "checkpoint.pt"
_IN_CHECKPOINT = {
    "state", "generator", "kernels", "seed", "n_frames_written", "n_segments"
}  # fmt: skip
_SEGMENT = re.compile(r"segment_(\d{6,})\.(npz|tmp)")  # the latter: of earlier versions


def dihedral_angles(x: np.ndarray, quartets: np.ndarray) -> np.ndarray:
    """Dihedral angles [..., D] in radians of positions [..., N, 3] for quartets [D, 4] (IUPAC)."""
    a, b, c, d = (x[..., quartets[:, k], :] for k in range(4))
    first, axis, last = b - a, c - b, d - c
    normal_1, normal_2 = np.cross(first, axis), np.cross(axis, last)
    sine = (first * normal_2).sum(-1) * np.linalg.norm(axis, axis=-1)
    return np.asarray(np.arctan2(sine, (normal_1 * normal_2).sum(-1)))


class RunWriter:
    """Writes one run directory.

    Parameters
    ----------
    directory
        Where to write.
    molecule
        None for a potential that is not a molecule: then positions go to the segments, and there
        are no DCD files.
    temperatures
        The ladder, K.
    n_walkers
        Number of walkers.
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
        self._writing = False  # a write that was begun and did not come to its end
        self._dihedrals = {} if molecule is None else molecule.dihedrals
        self._quartets = np.array(list(self._dihedrals.values()), dtype=int).reshape(-1, 4)
        self._dcds: list[DCDWriter] = []
        if molecule is not None:
            self._dcds = [
                DCDWriter(self.directory / rung_file(kelvin), molecule.n_atoms)
                for kelvin in temperatures
            ]
            check_distinct(temperatures)

    @property
    def n_saved(self) -> int:
        """Saved iterations that the checkpoint knows."""
        return self.n_frames // self.n_walkers

    def create(
        self,
        seed: int,
        boltzmann_constant: float,
        choices: Mapping[str, Any],
        allow_existing: bool = False,
        entries: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a new run directory.

        Parameters
        ----------
        seed
            The sampler's seed.
        boltzmann_constant
            k_B in the potential's energy unit per kelvin.
        choices
            Every choice made, json-able.
        allow_existing
            Let other files be in the directory (the stages before sampling write there too); files
            of an earlier run are refused in any case.
        entries
            Further entries of ``config.json``, or other values of the above.

        Raises
        ------
        FileExistsError
            If the directory is not empty.
        """
        self.check_new(allow_existing)
        (self.directory / "segments").mkdir(parents=True)
        if self.molecule is not None and not holds_molecule(self.directory):
            write_molecule(self.molecule, self.directory)
        for dcd in self._dcds:
            dcd.create("frames: iteration, walker")
        config = {
            "format": RUN_FORMAT,
            "temperatures_K": list(self.temperatures),
            "n_walkers": self.n_walkers,
            "seed": seed,
            "dihedrals": {name: list(atoms) for name, atoms in self._dihedrals.items()},
            "boltzmann_constant": boltzmann_constant,
            "choices": dict(choices),
            "versions": package_versions(),
            **(entries or {}),
        }
        write_json(self.directory / "config.json", config)

    def check_new(self, allow_existing: bool = False) -> None:
        """Refuse a directory that is not empty.

        Raises
        ------
        FileExistsError, NotADirectoryError
            As said; see `create`.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise NotADirectoryError(f"output: {self.directory} is a file, expected a directory")
        found = list_contents(self.directory) if self.directory.exists() else []
        own = {"config.json", CHECKPOINT, "segments", *(dcd.path.name for dcd in self._dcds)}
        if allow_existing:
            found = [name for name in found if name in own]
        if found:
            raise FileExistsError(
                f"output: expected an empty or new directory, but {self.directory} has {found[0]}"
                f"{' and more' if len(found) > 1 else ''}; continue a run with resume()"
            )

    def remove(self) -> None:
        """Remove what `create` made, where a run was killed before its first checkpoint."""
        refuse_links(self.directory, ["segments"])
        (self.directory / "config.json").unlink(missing_ok=True)  # it says that this is a run
        segments = self.directory / "segments"
        if segments.is_dir():
            remove_stale_temporaries(segments)
            for path in segments.iterdir():
                if not _SEGMENT.fullmatch(path.name):
                    raise ValueError(f"output: expected segments of the run only, got {path}")
                path.unlink()
            segments.rmdir()
        for dcd in self._dcds:
            dcd.path.unlink(missing_ok=True)

    def write(
        self,
        numbers: Mapping[str, np.ndarray],
        positions: np.ndarray,
        checkpoint: Mapping[str, Any],
    ) -> None:
        """Write a segment, its frames and the checkpoint.

        Parameters
        ----------
        numbers
            Arrays and totals of the segment, without the dihedrals.
        positions
            [n, W, R, *event], n saved iterations.
        checkpoint
            What to continue from; the writer adds its counts.
        """
        self._writing = True
        n_saved = len(positions)
        content = dict(numbers)
        if self.molecule is None:
            content["positions"] = positions
            content["dihedrals"] = np.zeros((*positions.shape[:3], 0), dtype=np.float32)
        else:
            angles = dihedral_angles(positions, self._quartets)
            content["dihedrals"] = angles.astype(np.float32)
        for rung, dcd in enumerate(self._dcds):
            frames = positions[:, :, rung].reshape(-1, *positions.shape[3:])
            dcd.append(frames, self.n_frames)
        write_arrays(self._segment(self.n_segments), content)
        counts = {
            "n_frames_written": self.n_frames + n_saved * self.n_walkers,
            "n_segments": self.n_segments + 1,
        }
        self._save_checkpoint({**checkpoint, **counts})
        self.n_frames, self.n_segments = counts["n_frames_written"], counts["n_segments"]
        self._writing = False

    def _segment(self, number: int) -> Path:
        return self.directory / "segments" / f"segment_{number:06d}.npz"

    def write_first_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint without any segment: where the run starts."""
        self._save_checkpoint({**checkpoint, "n_frames_written": 0, "n_segments": 0})

    def _save_checkpoint(self, content: dict[str, Any]) -> None:
        path = self.directory / CHECKPOINT
        write_tensors(path, {**content, "format": RUN_FORMAT})
        self._checkpoint_seen = _identity(path)

    def check_untouched(self) -> None:
        """Refuse to go on where somebody else has continued the run, or iterations were lost.

        Raises
        ------
        RuntimeError
            If the checkpoint is not the one that this writer wrote or read last, or it could not
            write the last one.
        """
        if self._writing:
            raise RuntimeError(
                f"output: the last iterations could not be written to {self.directory}; resume() "
                "takes it up from its last checkpoint"
            )
        if _identity(self.directory / CHECKPOINT) != self._checkpoint_seen:
            raise RuntimeError(
                f"output: {self.directory} was continued by another sampler since this one wrote "
                "to it; resume() takes it up from there"
            )

    def read_checkpoint(self) -> dict[str, Any]:
        """The last checkpoint.

        Raises
        ------
        FileNotFoundError
            If there is none.
        ValueError
            If it is damaged.
        """
        path = self.directory / CHECKPOINT
        if not (path.exists() or path.is_symlink()):
            raise FileNotFoundError(f"{self.directory}: no {CHECKPOINT} to resume from")
        content = read_tensors(path, "checkpoint")
        missing = sorted(_IN_CHECKPOINT - content.keys())
        if missing:
            raise ValueError(f"{path}: no checkpoint of a run, {', '.join(missing)} missing")
        for name in ("n_frames_written", "n_segments", "seed"):
            try:
                check_int(content[name], name, least=0, most=2**64 - 1)
            except ValueError as error:
                raise ValueError(f"{path}: no checkpoint of a run, {error}") from error
        self._checkpoint_seen = _identity(path)
        return content

    def cut_back(self, n_frames: int, n_segments: int) -> None:
        """Drop whatever was written after a checkpoint with these counts.

        Raises
        ------
        ValueError
            If a file holds less than the checkpoint says.
        """
        refuse_links(self.directory, ["segments", *(dcd.path.name for dcd in self._dcds)])
        for number in range(n_segments):
            if not self._segment(number).is_file():
                raise ValueError(f"{self.directory}: segment {number} is missing")
        for dcd in self._dcds:
            if not dcd.path.is_file():
                raise ValueError(f"{dcd.path}: this trajectory of the run is missing")
            if dcd.n_frames < n_frames:  # before anything is cut
                raise ValueError(
                    f"{dcd.path}: expected {n_frames} frames, the file has {dcd.n_frames}"
                )
        remove_stale_temporaries(self.directory / "segments")
        # From the last one on: segments that are left follow one another.
        for path in sorted((self.directory / "segments").iterdir(), reverse=True):
            found = _SEGMENT.fullmatch(path.name)
            if found and int(found[1]) >= n_segments:
                path.unlink()
        for dcd in self._dcds:
            dcd.cut_back(n_frames)
        self.n_frames, self.n_segments = n_frames, n_segments


def _identity(path: Path) -> tuple[int, ...] | None:
    """Which file this is: another one replaces it at every checkpoint."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
