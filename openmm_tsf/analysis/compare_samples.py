"""The samples of one side of a comparison: a run directory, reference data, or trajectories."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.certify_samples import Samples, evaluate, read_trajectories
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.load import load_run
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.summary import recorded_costs
from openmm_tsf.io.files import check_regular_file
from openmm_tsf.io.npz import UNREADABLE
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.files import holds_molecule, read_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles

#: Frames of a temperature that are read for TICA, for a flow's weights and for export.
MAX_FRAMES = 20_000


@dataclass(frozen=True)
class Ensemble:
    """Samples of one temperature: n of each of W walkers; some of them with positions."""

    temperature: float  # K
    energy: Array  # [n, W] in kJ/mol
    angles: Mapping[str, Array]  # torsions [n, W] in rad by name
    positions: npt.NDArray[np.float32] | None  # [f, V, N, 3] in nm; None where there are none
    frame_energy: Array | None  # [f, V] in kJ/mol; None where it is not known
    in_order: bool  # frames of a walker follow each other in time, equally spaced

    @property
    def n_samples(self) -> int:
        """n times W."""
        return int(self.energy.size)

    def evaluated(self, potential: Potential | None) -> "Ensemble":
        """Return the same with energies of the frames, evaluated where they are not known."""
        if self.positions is None or self.frame_energy is not None or potential is None:
            return self
        return replace(self, frame_energy=evaluate(potential, self.positions))

    @property
    def frames(self) -> Samples | None:
        """The frames with their energies; None without either."""
        if self.positions is None or self.frame_energy is None:
            return None
        return Samples(self.temperature, self.positions, self.frame_energy, ())


@dataclass(frozen=True)
class Costs:
    """What samples cost; None where it is not recorded."""

    evaluations: Mapping[str, Any] = field(default_factory=dict)  # by stage
    wall_seconds: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, with sums, and core-seconds as far as they are known."""
        stages = ("md", "training", "sampling")
        seconds = _sum(self.wall_seconds.get(stage) for stage in stages)
        on_cpu = self.device is None or self.device == "cpu"
        core_seconds = None
        if seconds is not None and self.threads is not None and on_cpu:
            core_seconds = seconds * self.threads
        return {
            "energy_evaluations": dict(self.evaluations)
            | {"all": _sum(self.evaluations.get(stage) for stage in stages)},
            "wall_seconds": {k: self.wall_seconds.get(k) for k in stages} | {"all": seconds},
            "threads": self.threads,
            "device": self.device,
            "core_seconds": core_seconds,
        }


def _sum(values: Any) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


class RunSamples:
    """The samples of a run directory from the start of equilibrated sampling on."""

    def __init__(self, run: RunEstimates) -> None:
        run.require_samples()
        self.run, self.source = run, str(run.path)
        self.temperatures: Array = run.temperatures
        choices = run.config.get("choices", {})
        fingerprint = choices.get("molecule")
        self.fingerprint = fingerprint if isinstance(fingerprint, str) else None
        self.torsions = tuple(run.dihedral_atoms)
        self.quartets = {name: tuple(atoms) for name, atoms in run.dihedral_atoms.items()}
        self.costs = Costs(
            recorded_costs(run, "energy_evaluations", run.segments.n_evaluations),
            recorded_costs(run, "wall_seconds", run.segments.wall_seconds),
            choices.get("threads"),
            choices.get("device"),
        )

    @cached_property
    def topology(self) -> mdtraj.Topology | None:
        """The Topology of the molecule, if the directory has it."""
        return self.run.topology if self.run.has_structure else None

    @cached_property
    def molecule(self) -> MolecularSystem | None:
        """The molecule, if the directory has it."""
        return read_molecule(self.run.path) if holds_molecule(self.run.path) else None

    @property
    def flow(self) -> Path | None:
        """The file of the flow, if there is one."""
        path = self.run.path / "flow.pt"
        return path if path.is_file() else None

    def at(self, kelvin: float) -> Ensemble:
        """Return the samples of a rung."""
        run = self.run
        angles = {name: run.dihedral(name, kelvin) for name in self.torsions}
        energy, positions, frame_energy = run.energies(kelvin), None, None
        if run.has_structure and run.has_frames(kelvin):
            index = run.frame_index(kelvin)
            stride = max(1, -(-len(index) * run.n_walkers // MAX_FRAMES))
            frames = run.trajectory(kelvin, stride=stride)
            shape = -1, run.n_walkers, frames.n_atoms, 3
            if len(frames):
                positions, frame_energy = frames.xyz.reshape(shape), energy[index[::stride]]
        return Ensemble(kelvin, energy, angles, positions, frame_energy, in_order=True)


class ReferenceSamples:
    """The samples of a file of ``data/make_reference.py export``.

    Positions are those of two of its temperatures, evenly spaced over time and walkers. The file
    does not tell its molecule.
    """

    topology = molecule = fingerprint = flow = None
    quartets: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, path: str | PathLike[str], name: str) -> None:
        self.source = str(path)
        check_regular_file(path, "file of reference data")
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {key: data[key] for key in data.files}
        except UNREADABLE as error:
            raise ValueError(f"{name}: {path} cannot be read as reference data: {error}") from error
        missing = sorted({"temperatures_K", "energy"} - arrays.keys())
        if missing:
            raise ValueError(f"{name}: {path}: expected reference data, got no {missing[0]!r}")
        where = f"{name}: {path}"
        self.temperatures: Array = _finite(arrays["temperatures_K"], f"{where}: temperatures_K")
        kelvins, shape = self.temperatures, arrays["energy"].shape
        if kelvins.ndim != 1 or len(np.unique(kelvins)) < kelvins.size or not (kelvins > 0).all():
            got = ", ".join(f"{t:g}" for t in kelvins.ravel())
            raise ValueError(f"{where}: expected positive temperatures in K, each once, got {got}")
        if len(shape) not in (2, 3) or shape[-1] != kelvins.size or 0 in shape:
            raise ValueError(
                f"{where}: expected energies [F, W, {kelvins.size}] of {kelvins.size} "
                f"temperatures, got shape {shape}"
            )
        for key, value in arrays.items():
            if value.shape == shape:
                _finite(value, f"{where}: {key}")
        self.torsions = tuple(
            key for key, value in arrays.items() if key != "energy" and value.shape == shape
        )
        self._arrays = arrays
        n_steps = arrays.get("n_md_steps")
        self.costs = Costs({"sampling": None if n_steps is None else int(n_steps)})

    def _series(self, key: str, rung: int) -> Array:
        values = self._arrays[key].astype(np.float64)[..., rung]
        return np.asarray(values.reshape(len(values), -1))

    def at(self, kelvin: float) -> Ensemble:
        """Return the samples of a temperature."""
        rung = nearest_rung(self.temperatures, kelvin)
        assert rung is not None
        angles = {name: self._series(name, rung) for name in self.torsions}
        positions = self._arrays.get(f"positions_{kelvin:.0f}K")
        if positions is not None:
            positions = positions[:, None].astype(np.float32)
        energy = self._series("energy", rung)
        return Ensemble(kelvin, energy, angles, positions, None, in_order=False)


def _finite(values: npt.NDArray[Any], what: str) -> Array:
    """Return numbers in double precision; refuse text, NaN and infinities."""
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ValueError(f"{what}: expected finite numbers")
    return np.asarray(values, dtype=np.float64)


class TrajectorySamples:
    """Trajectories of a molecule by temperature, whose energies are evaluated."""

    flow = None

    def __init__(
        self, trajectories: Mapping[Any, Any], molecule: MolecularSystem, walkers: int
    ) -> None:
        with molecule.potential() as potential:
            samples = read_trajectories(trajectories, molecule, potential, walkers)
        self._samples, self.molecule = samples, molecule
        self.topology, self.fingerprint = molecule.mdtraj_topology, molecule.fingerprint
        self.temperatures: Array = np.array([each.temperature for each in samples])
        self.source = ", ".join(dict.fromkeys(name for each in samples for name in each.source))
        self.quartets: Mapping[str, tuple[int, ...]] = slow_torsions(molecule.topology)
        self.torsions, self.costs = tuple(self.quartets), Costs()

    def at(self, kelvin: float) -> Ensemble:
        """Return the samples of a temperature."""
        rung = nearest_rung(self.temperatures, kelvin)
        assert rung is not None
        samples = self._samples[rung]
        angles = torsion_angles(samples.positions.astype(np.float64), self.quartets)
        stride = max(1, -(-samples.n_frames // MAX_FRAMES))
        return Ensemble(
            kelvin,
            samples.energy,
            angles,
            samples.positions[::stride],
            samples.energy[::stride],
            in_order=True,
        )


Side = RunSamples | ReferenceSamples | TrajectorySamples


def open_side(value: Any, name: str, molecule: MolecularSystem | None, walkers: int = 1) -> Side:
    """Open one side of a comparison; `molecule` is that of trajectories, of `walkers` each.

    Parameters
    ----------
    value
        A run directory or its `Run`; a file ``.npz`` of ``data/make_reference.py export``; or a
        mapping from temperatures (K) to trajectories (see `openmm_tsf.certify`).
    name
        The argument, for errors.
    """
    if isinstance(value, RunEstimates):
        return RunSamples(value)
    if isinstance(value, Mapping):
        if molecule is None:
            raise ValueError(
                f"molecule: expected the MolecularSystem of the trajectories in {name}, got none"
            )
        return TrajectorySamples(value, molecule, walkers)
    if not isinstance(value, str | PathLike):
        raise TypeError(
            f"{name}: expected a run directory, a file .npz of reference data, or temperatures "
            f"with their trajectories, got {type(value).__name__}"
        )
    path = Path(value)
    if path.is_dir():
        return RunSamples(load_run(path))
    if path.suffix != ".npz":
        what = "is no directory" if path.exists() else "does not exist"
        raise ValueError(
            f"{name}: expected a run directory or a file .npz of reference data, {path} {what} "
            "(trajectories are given with their temperature)"
        )
    return ReferenceSamples(path, name)
