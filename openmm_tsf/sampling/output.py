"""The run directory: numeric segments, one DCD per temperature, one atomic checkpoint.

Everything can be read while the run is writing; see ``openmm_tsf.analysis``. A segment, the DCD
frames that belong to it and the checkpoint are written together, in this order, so that the
checkpoint's counts tell which files and frames are complete. On resume everything after them is
cut off.
"""

import json
import os
import platform
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import openmm.app as app
import torch

from openmm_tsf.systems import MolecularSystem

RUN_FORMAT = 1
CHECKPOINT = "checkpoint.pt"
_IN_CHECKPOINT = {
    "state", "generator", "kernels", "seed", "n_frames_written", "n_segments"
}  # fmt: skip
_PACKAGES = ("openmm-tsf", "openmm", "torch", "numpy", "mdtraj")
_DCD_HEADER = 276  # bytes: three records of 84, 164 and 4, with their lengths


def versions() -> dict[str, str]:
    """Versions of Python and the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def dihedral_angles(x: np.ndarray, quartets: np.ndarray) -> np.ndarray:
    """Dihedral angles [..., D] in radians of positions [..., N, 3] for quartets [D, 4] (IUPAC)."""
    a, b, c, d = (x[..., quartets[:, k], :] for k in range(4))
    first, axis, last = b - a, c - b, d - c
    normal_1, normal_2 = np.cross(first, axis), np.cross(axis, last)
    sine = (first * normal_2).sum(-1) * np.linalg.norm(axis, axis=-1)
    return np.asarray(np.arctan2(sine, (normal_1 * normal_2).sum(-1)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


class _DCD:
    """A DCD file (CHARMM layout without a unit cell) that takes whole batches of frames.

    ``openmm.app.DCDFile`` writes the same bytes frame by frame, about 0.2 ms each in Python.
    """

    def __init__(self, path: Path, n_atoms: int) -> None:
        self.path, self.n_atoms = path, n_atoms
        size = 4 * n_atoms
        self._record = np.dtype(
            [(f"{part}_{axis}", kind, shape) for axis in "xyz" for part, kind, shape in
             (("head", "<i4", ()), ("value", "<f4", (n_atoms,)), ("tail", "<i4", ()))]
        )  # fmt: skip
        self._size = size

    def create(self) -> None:
        """Write a file without frames."""
        control = struct.pack("<4s9if10i", b"CORD", 0, 1, 1, 0, 0, 0, 0, 0, 0, 1.0, *(0,) * 9, 24)
        title = struct.pack("<i80s80s", 2, b"Created by openmm_tsf", b"frames: iteration, walker")
        with open(self.path, "xb") as file:
            for record in (control, title, struct.pack("<i", self.n_atoms)):
                file.write(struct.pack("<i", len(record)) + record + struct.pack("<i", len(record)))

    def append(self, x: np.ndarray, n_before: int) -> None:
        """Add frames x [n, N, 3] in nm after the first `n_before`; later ones are cut off."""
        frames = np.empty(len(x), dtype=self._record)
        for k, axis in enumerate("xyz"):
            frames[f"head_{axis}"] = frames[f"tail_{axis}"] = self._size
            frames[f"value_{axis}"] = 10.0 * x[:, :, k]
        with open(self.path, "r+b") as file:
            self._cut(file, n_before)
            file.seek(0, os.SEEK_END)
            file.write(frames.tobytes())
            file.flush()
            self._count(file, n_before + len(x))

    def cut_back(self, n_frames: int) -> None:
        """Keep the first frames only.

        Raises
        ------
        ValueError
            If the file has fewer.
        """
        with open(self.path, "r+b") as file:
            self._cut(file, n_frames)
            self._count(file, n_frames)

    def _cut(self, file: BinaryIO, n_frames: int) -> None:
        wanted = _DCD_HEADER + n_frames * self._record.itemsize
        if file.seek(0, os.SEEK_END) < wanted:
            raise ValueError(f"{self.path}: expected {n_frames} frames, the file is shorter")
        file.truncate(wanted)

    @staticmethod
    def _count(file: BinaryIO, n_frames: int) -> None:
        file.seek(8)
        file.write(struct.pack("<i", n_frames))
        file.seek(20)
        file.write(struct.pack("<i", n_frames))


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
        self._dihedrals = {} if molecule is None else molecule.dihedrals
        self._quartets = np.array(list(self._dihedrals.values()), dtype=int).reshape(-1, 4)
        self._dcds: list[_DCD] = []
        if molecule is not None:
            self._dcds = [
                _DCD(self.directory / f"T{kelvin:.2f}K.dcd", molecule.n_atoms)
                for kelvin in temperatures
            ]
            if len({dcd.path for dcd in self._dcds}) < len(temperatures):
                raise ValueError(
                    "temperatures: expected rungs that differ by more than 0.01 K, "
                    f"got {temperatures}"
                )

    def create(
        self,
        seed: int,
        boltzmann_constant: float,
        choices: Mapping[str, Any],
        allow_existing: bool = False,
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

        Raises
        ------
        FileExistsError
            If the directory is not empty.
        """
        found = sorted(p.name for p in self.directory.iterdir()) if self.directory.exists() else []
        own = {"config.json", CHECKPOINT, "segments", *(dcd.path.name for dcd in self._dcds)}
        if allow_existing:
            found = [name for name in found if name in own]
        if found:
            raise FileExistsError(
                f"output: expected an empty or new directory, but {self.directory} has {found[0]}"
                f"{' and more' if len(found) > 1 else ''}; continue a run with resume()"
            )
        (self.directory / "segments").mkdir(parents=True)
        if self.molecule is not None:
            with open(self.directory / "topology.pdb", "w", encoding="ascii") as file:
                app.PDBFile.writeFile(
                    self.molecule.topology, 10.0 * self.molecule.positions, file, keepIds=True
                )
        for dcd in self._dcds:
            dcd.create()
        config = {
            "format": RUN_FORMAT,
            "temperatures_K": list(self.temperatures),
            "n_walkers": self.n_walkers,
            "seed": seed,
            "dihedrals": {name: list(atoms) for name, atoms in self._dihedrals.items()},
            "boltzmann_constant": boltzmann_constant,
            "choices": dict(choices),
            "versions": versions(),
        }
        write_json(self.directory / "config.json", config)

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
        path = self._segment(self.n_segments)
        partial = path.with_suffix(".tmp")
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **content)
        os.replace(partial, path)
        counts = {
            "n_frames_written": self.n_frames + n_saved * self.n_walkers,
            "n_segments": self.n_segments + 1,
        }
        self._save_checkpoint({**checkpoint, **counts})
        self.n_frames, self.n_segments = counts["n_frames_written"], counts["n_segments"]

    def _segment(self, number: int) -> Path:
        return self.directory / "segments" / f"segment_{number:06d}.npz"

    def write_first_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Write a checkpoint without any segment: where the run starts."""
        self._save_checkpoint({**checkpoint, "n_frames_written": 0, "n_segments": 0})

    def _save_checkpoint(self, content: dict[str, Any]) -> None:
        partial = self.directory / f"{CHECKPOINT}.tmp"
        torch.save({**content, "format": RUN_FORMAT}, partial)
        os.replace(partial, self.directory / CHECKPOINT)

    def read_config(self) -> dict[str, Any]:
        """The directory's ``config.json``.

        Raises
        ------
        FileNotFoundError
            If the directory is no run directory.
        ValueError
            If it is damaged or was written in a newer format.
        """
        path = self.directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory}: no run directory, config.json is missing")
        try:
            config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON and Unicode errors are ValueErrors
            raise ValueError(f"{path}: no readable JSON file: {error}") from error
        if not {"format", "temperatures_K", "n_walkers", "choices"} <= config.keys():
            raise ValueError(f"{path}: no config.json of a sampling run")
        if config["format"] > RUN_FORMAT:
            raise ValueError(
                f"{path}: written in format {config['format']} by a newer version; this one "
                f"reads up to format {RUN_FORMAT}"
            )
        return config

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
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory}: no {CHECKPOINT} to resume from")
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch's reader raises many kinds
            raise ValueError(f"{path}: no readable checkpoint: {error}") from error
        missing = sorted(_IN_CHECKPOINT - content.keys())
        if missing:
            raise ValueError(f"{path}: no checkpoint of a run, {', '.join(missing)} missing")
        return content

    def cut_back(self, n_frames: int, n_segments: int) -> None:
        """Drop whatever was written after a checkpoint with these counts.

        Raises
        ------
        ValueError
            If a file holds less than the checkpoint says.
        """
        for number in range(n_segments):
            if not self._segment(number).is_file():
                raise ValueError(f"{self.directory}: segment {number} is missing")
        for dcd in self._dcds:
            if not dcd.path.is_file():
                raise ValueError(f"{dcd.path}: this trajectory of the run is missing")
        for path in sorted((self.directory / "segments").iterdir()):
            if path.suffix == ".tmp" or path.name >= self._segment(n_segments).name:
                path.unlink()
        for dcd in self._dcds:
            dcd.cut_back(n_frames)
        self.n_frames, self.n_segments = n_frames, n_segments
