"""The content of a run directory as numpy and mdtraj objects."""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.basins import Basins, TrainingBasins
from openmm_tsf.analysis.burn_in import BurnIn, RecordedSeries, find_start
from openmm_tsf.analysis.ramachandran import backbone_names
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.io.files import check_regular_file
from openmm_tsf.io.frame_files import FrameFiles
from openmm_tsf.io.run_config import CONFIG, read_run_config
from openmm_tsf.io.segments import Segments
from openmm_tsf.io.sharded_segments import ShardedSegments
from openmm_tsf.io.shards import count_shards
from openmm_tsf.io.topology import PDB, TOPOLOGY, read_pdb, read_structure
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.terminal import printable
from openmm_tsf.utils.validation import check_int

#: Two temperatures that differ by less are one.
TOLERANCE_K = 0.01
_LONGEST_WARNING = 500


def nearest_rung(temperatures: Array, kelvin: float) -> int | None:
    """Return the index of the rung at a temperature within 0.01 K; None without one."""
    nearest = int(np.argmin(np.abs(temperatures - kelvin)))
    return nearest if abs(temperatures[nearest] - kelvin) <= TOLERANCE_K else None


class RunData:
    """Frames and numbers of a run directory; see `openmm_tsf.analysis.Run` for the attributes."""

    def __init__(self, path: str | Path, start: int | None = None) -> None:
        self.path = Path(path)
        self.config = read_run_config(self.path)
        self.temperatures: Array = np.asarray(self.config["temperatures_K"], dtype=np.float64)
        self.n_walkers = int(self.config["n_walkers"])
        self.boltzmann_constant = float(self.config["boltzmann_constant"])
        self.dihedral_atoms: dict[str, list[int]] = dict(self.config["dihedrals"])
        self.shards: ShardedSegments | None = None
        self.segments: Segments | ShardedSegments
        directories, walkers_each = [self.path], self.n_walkers  # of the frames
        if count_shards(self.config) > 1:
            self.shards = self.segments = ShardedSegments(self.path, self.config)
            self.config, self.n_walkers = self.shards.completed_config(), self.shards.n_walkers
            directories = [shard.directory for shard in self.shards.used]
            walkers_each = self.shards.walkers_per_shard
        else:
            shape = self.n_walkers, self.n_rungs, len(self.dihedral_atoms)
            self.segments = Segments(self.path / "segments", *shape)
        self._files = FrameFiles(directories, self.temperatures.tolist(), walkers_each)
        self._given_start = None if start is None else self._check_start(start)

    def _check_start(self, start: int) -> int:
        if self.n_iterations == 0 and start == 0:
            return 0
        return check_int(start, "start", 0, self.n_iterations - 1)

    @property
    def n_rungs(self) -> int:
        """The number of rungs R."""
        return len(self.temperatures)

    @property
    def n_iterations(self) -> int:
        """The number of iterations saved so far, with those before the start."""
        return len(self.segments.iteration)

    @cached_property
    def burn_in(self) -> BurnIn:
        """What `find_start` says of all series that the run recorded (see `drifting_series`)."""
        if self.n_iterations == 0:
            return BurnIn(0, 0)
        return find_start(RecordedSeries(self.segments.energy, self.segments.dihedrals))

    @cached_property
    def start(self) -> int:
        """The first saved iteration that estimates use: the one given, or that of `burn_in`."""
        return self.burn_in.start if self._given_start is None else self._given_start

    @property
    def start_was_given(self) -> bool:
        """Whether the start was given to `load_run`, rather than found from the data."""
        return self._given_start is not None

    @property
    def drifting_series(self) -> str | None:
        """The series whose start differs most from the second half: ``"U at 300.00 K"``."""
        drift = self.burn_in.drift
        if drift is None:
            return None
        rung, k = divmod(drift.series, 1 + 2 * len(self.dihedral_atoms))
        names = ["U", *(f"{f} {name}" for name in self.dihedral_atoms for f in ("cos", "sin"))]
        return f"{names[k]} at {self.temperatures[rung]:.2f} K"

    @property
    def n_used(self) -> int:
        """The number n of saved iterations that estimates use: all from the start on."""
        return self.n_iterations - self.start

    @property
    def iteration(self) -> npt.NDArray[np.int64]:
        """The iterations [n] from the start on, as the sampler counts them."""
        return self.segments.iteration[self.start :]

    @property
    def energy(self) -> Array:
        """The potential energies [n, W, R] from the start on, in kJ/mol."""
        return self.segments.energy[self.start :]

    @property
    def replica(self) -> npt.NDArray[np.int64]:
        """The replica [n, W, R] at each rung from the start on."""
        return self.segments.replica[self.start :]

    @property
    def dihedrals(self) -> npt.NDArray[np.float32]:
        """The recorded dihedrals [n, W, R, D] from the start on, in rad."""
        return self.segments.dihedrals[self.start :]

    @property
    def betas(self) -> Array:
        """1/(k_B T) [R] of the rungs in mol/kJ."""
        return 1.0 / (self.boltzmann_constant * self.temperatures)

    def rung(self, temperature: Any) -> int:
        """Return the index of the rung at a temperature (K, or a Quantity), within 0.01 K."""
        kelvin = as_temperature(temperature)
        nearest = nearest_rung(self.temperatures, kelvin)
        if nearest is None:
            rungs = ", ".join(f"{t:.2f}" for t in self.temperatures)
            raise ValueError(f"temperature: this run has rungs at {rungs} K, got {kelvin:g} K")
        return nearest

    def beta(self, temperature: Any) -> float:
        """Return 1/(k_B T) in mol/kJ at a temperature from the lowest to the highest rung."""
        kelvin = as_temperature(temperature)
        low, high = self.temperatures[0] - TOLERANCE_K, self.temperatures[-1] + TOLERANCE_K
        if not low <= kelvin <= high:
            raise ValueError(
                f"temperature: expected {self.temperatures[0]:.2f} to "
                f"{self.temperatures[-1]:.2f} K, got {kelvin:g} K"
            )
        return 1.0 / (self.boltzmann_constant * kelvin)

    def require_samples(self) -> None:
        """Raise a ValueError if no iteration has been saved yet."""
        if self.n_iterations == 0:
            raise ValueError(f"{self.path / 'segments'}: no complete segment yet")

    @property
    def topology(self) -> mdtraj.Topology:
        """The Topology of the molecule, with the bonds of the one that the sampler was given."""
        return self.structure.topology

    @property
    def has_structure(self) -> bool:
        """Whether the directory has the structure of a molecule; runs on R^d have none."""
        return self._has(TOPOLOGY) or self._has(PDB)

    @cached_property
    def structure(self) -> mdtraj.Trajectory:
        """The molecule in its reference conformation: one frame.

        Read from ``topology.json`` and ``positions.npz``; where the former is missing, from
        ``topology.pdb``, with the bonds that mdtraj infers from names and CONECT records.
        """
        if self._has(TOPOLOGY):
            topology, positions = read_structure(self.path)
            structure = mdtraj.Trajectory(positions[None], mdtraj.Topology.from_openmm(topology))
        else:
            structure = read_pdb(self._file(PDB, "PDB file"))
        if structure.n_atoms == 0 or not np.isfinite(structure.xyz).all():
            raise ValueError(f"{self.path}: expected atoms at finite positions, got {structure}")
        return structure

    def _has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def _file(self, name: str, what: str) -> Path:
        if not self._has(name):
            raise FileNotFoundError(f"{self.path / name} is missing")
        return check_regular_file(self.path / name, what)

    def has_frames(self, temperature: float) -> bool:
        """Return whether the trajectory of a rung is there, in all shards; it may be removed."""
        return self._files.has(self.rung(temperature))

    @cached_property
    def _all_framed(self) -> npt.NDArray[np.int64]:
        """The indices among all saved iterations of those with frames, in the order of these."""
        segments = self.segments
        return np.searchsorted(segments.iteration, segments.frame_iteration)

    @property
    def _first_frame(self) -> int:
        """The number of iterations with frames before the start."""
        return int(np.searchsorted(self._all_framed, self.start))

    def _n_iterations_with_frames(self, rung: int) -> int:
        """The number of iterations from the start on with both numbers and positions."""
        self._files.paths(rung)  # that one is missing is told first
        n = self._files.count(rung, self.topology.n_atoms, len(self._all_framed))
        return max(0, n - self._first_frame)

    @property
    def n_iterations_with_frames(self) -> int:
        """The number of iterations from the start on that have frames at all rungs; not 0."""
        n = min(self._n_iterations_with_frames(rung) for rung in range(self.n_rungs))
        if n == 0:
            raise ValueError(f"{self.path}: the trajectories have no complete iteration yet")
        return n

    def trajectory(
        self, temperature: Any, walker: int | None = None, stride: int = 1
    ) -> mdtraj.Trajectory:
        """Return the frames of one rung, as far as both positions and numbers have been written.

        They begin at the start of equilibrated sampling (`start`).

        Of one walker, or of all, iteration by iteration, the walkers of an iteration in order. Only
        every `stride`-th iteration with frames is read: a frame takes 12 bytes per atom. The
        ``time`` of the trajectory is the iteration of the sampler; `frame_index` says where these
        iterations are in arrays of numbers.
        """
        rung = self.rung(temperature)
        if walker is not None:
            walker = check_int(walker, "walker", 0, self.n_walkers - 1)
        stride = check_int(stride, "stride")
        return self._frames(rung, self._n_iterations_with_frames(rung), walker, stride)

    def _frames(
        self, rung: int, n: int, walker: int | None = None, stride: int = 1
    ) -> mdtraj.Trajectory:
        """Frames of one rung; of all walkers, those of an iteration are in order."""
        first = self._first_frame
        iterations = slice(first, first + n if n else 0, stride)
        xyz = self._files.read(rung, self.topology.n_atoms, iterations, walker)
        return self._as_trajectory(xyz, n, stride)

    def _as_trajectory(
        self, xyz: npt.NDArray[np.float32], n: int, stride: int = 1
    ) -> mdtraj.Trajectory:
        """Return positions [m, w, N, 3] of n iterations from the start on as F = m w frames."""
        time = self.segments.frame_iteration[self._first_frame :][:n:stride]
        time = np.repeat(time, xyz.shape[1])
        return mdtraj.Trajectory(xyz.reshape(-1, *xyz.shape[2:]), self.topology, time=time)

    def evaluate(
        self, indicator: Callable[[mdtraj.Trajectory], npt.ArrayLike]
    ) -> npt.NDArray[np.bool_]:
        """Return the values [m, W, R] of an indicator, a map from F frames to F truth values.

        Of the m iterations with frames, see `frame_index`.
        """
        inside = self.evaluate_frames(indicator, "indicator")
        if inside.dtype != np.bool_:
            raise TypeError(f"indicator: expected truth values, got {inside.dtype}")
        if inside[0, 0, 0].size != 1:
            raise ValueError(f"indicator: expected a value per frame, got shape {inside.shape[3:]}")
        return inside.reshape(inside.shape[:3])

    def evaluate_frames(
        self, function: Callable[[mdtraj.Trajectory], npt.ArrayLike], name: str = "function"
    ) -> npt.NDArray[Any]:
        """Return the values [m, W, R, ...] of a map from F frames to F values or arrays [F, ...].

        Of the m iterations with frames, see `frame_index`. It is called once per rung, of shards
        once per rung and shard, and called `name` in errors.
        """
        n, first, n_atoms = self.n_iterations_with_frames, self._first_frame, self.topology.n_atoms
        parts: list[list[npt.NDArray[Any]]] = []
        for part in self._files.split():
            parts.append([])
            for rung in range(self.n_rungs):
                frames = self._as_trajectory(part.read(rung, n_atoms, slice(first, first + n)), n)
                values = np.asarray(function(frames))
                if values.ndim == 0 or len(values) != len(frames):
                    raise ValueError(
                        f"{name}: expected {len(frames)} values, got shape {values.shape}"
                    )
                parts[-1].append(values.reshape(n, -1, *values.shape[1:]))
        return np.concatenate([np.stack(rungs, axis=2) for rungs in parts], axis=1)

    def energies(self, temperature: Any) -> Array:
        """Return the potential energies [n, W] of one rung in kJ/mol."""
        return self.energy[:, :, self.rung(temperature)]

    def u_kn(self) -> tuple[Array, npt.NDArray[np.int64]]:
        """Return the reduced energies U_i / (k_B T_k) [R, R n W] and the samples of each rung [R].

        As pymbar's MBAR takes them: the samples are sorted by their own rung, then by iteration,
        then by walker (the order of `trajectory`, if every iteration has frames).
        """
        flat = np.moveaxis(self.energy, 2, 0).ravel()
        n_each = self.n_used * self.n_walkers
        return np.outer(self.betas, flat), np.full(self.n_rungs, n_each, dtype=np.int64)

    def dihedral(self, name: str, temperature: Any) -> Array:
        """Return one named dihedral [n, W] at one rung, in rad."""
        return self._dihedral(name)[:, :, self.rung(temperature)].astype(np.float64)

    def dihedral_at_all_rungs(self, name: str) -> Array:
        """Return one named dihedral [n, W, R] at all rungs, in rad."""
        return self._dihedral(name).astype(np.float64)

    def _dihedral(self, name: str) -> npt.NDArray[np.float32]:
        names = list(self.dihedral_atoms)
        if name not in names:
            raise ValueError(f"dihedral: this run recorded {names}, got {name!r}")
        return self.dihedrals[..., names.index(name)]

    def angles(self) -> dict[str, Array]:
        """Return all recorded torsions [n, W, R] in rad by name."""
        return {name: self.dihedral_at_all_rungs(name) for name in self.dihedral_atoms}

    @cached_property
    def training_basins(self) -> TrainingBasins | None:
        """The basins of the frames that the flow was trained on; None if none are recorded."""
        recorded = self.config.get("choices", {}).get("basins")
        try:
            return None if recorded is None else TrainingBasins.from_config(recorded)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / CONFIG}: damaged, basins: {error}") from error

    @property
    def frame_warnings(self) -> list[str]:
        """What was said of the frames when the flow was trained: wells with few visits."""
        frames = self.config.get("choices", {}).get("frames") or {}
        warnings = frames.get("warnings", []) if isinstance(frames, dict) else None
        if not isinstance(warnings, list) or not all(isinstance(each, str) for each in warnings):
            raise ValueError(f"{self.path / CONFIG}: damaged, frames: expected a list of warnings")
        return [printable(each)[:_LONGEST_WARNING] for each in warnings]

    @cached_property
    def basins(self) -> Basins:
        """The basins of the frames that the flow was trained on, and those that the run found.

        From the run alone where ``config.json`` records none of frames.
        """
        frames = self.training_basins
        wells = {} if frames is None else frames.basins.wells
        known = Basins({name: w for name, w in wells.items() if name in self.dihedral_atoms})
        return known.completed(self.angles()) if self.n_used else known

    def in_basin(self, name: str) -> npt.NDArray[np.bool_]:
        """Return whether each sample [n, W, R] is in a basin, one of ``basins.names``."""
        return np.asarray((self._basin_labels == self.basins.index(name)).any(axis=-1))

    @cached_property
    def _basin_labels(self) -> npt.NDArray[np.int64]:
        return self.basins.labels(self.angles())

    def backbone(self, residue: int | None = None) -> tuple[str, str]:
        """Return the names of the recorded φ and ψ of one residue, by default the first with both.

        The number is that in the Topology, counted from 1, as in the names of the dihedrals. Runs
        of a single pair name it ``phi`` and ``psi``, without a number: omit the residue.
        """
        return backbone_names(list(self.dihedral_atoms), residue)

    @property
    def has_backbone(self) -> bool:
        """Whether φ and ψ of a residue were recorded, see `backbone`."""
        try:
            self.backbone()
        except ValueError:
            return False
        return True

    def ramachandran(self, temperature: Any, residue: int | None = None) -> tuple[Array, Array]:
        """Return φ and ψ [n W] of one residue (see `backbone`) at one rung in rad.

        They are in the order of `trajectory`.
        """
        phi, psi = self.backbone(residue)
        return self.dihedral(phi, temperature).ravel(), self.dihedral(psi, temperature).ravel()
