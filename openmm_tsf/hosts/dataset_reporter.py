"""A reporter for ``openmm.app.Simulation`` that collects the frames a flow is trained on."""

import os
import time
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import openmm.app as app
import torch
from numpy.typing import NDArray

from openmm_tsf.hosts.constrained import check_rigid
from openmm_tsf.hosts.matching import compare_energies, positions_of
from openmm_tsf.io.directory import CHECKPOINT_SECONDS
from openmm_tsf.io.files import check_regular_file, write_arrays
from openmm_tsf.io.npz import UNREADABLE, read_array, read_array_names
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_ensemble import check_ensemble
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_bool, check_int, check_seconds

#: Frames whose energies are compared with the System's.
_N_COMPARED = 50
#: Writing takes at most this fraction of the time.
_WRITING_SHARE = 0.02


class TSFDatasetReporter:
    """Collects positions and energies of a Simulation in double precision, for an MDDataset.

    Add it to ``simulation.reporters`` after equilibration. With a file the frames survive the end
    of the process: they are written every `saveSeconds` (more rarely where that takes more than 2
    percent of the time), by :meth:`save`, and when Python exits; a killed process keeps what was
    written last. Another process reads them by ``TSFDatasetReporter(reportInterval, file,
    append=True).dataset(molecule)``. Bonds may be constrained: the dataset has their distances to
    rounding.

    Parameters
    ----------
    reportInterval
        Steps from one frame to the next.
    file, append
        An ``.npz`` file to write, or None. It must not exist, unless `append` is True: then its
        frames come first (a file that does not exist yet is begun), so that the same script
        continues after an interruption.
    temperature
        In K (or a Quantity); by default that of the integrator.
    saveSeconds
        Seconds between two writes of the file.

    Raises
    ------
    FileExistsError, FileNotFoundError
        If the file exists without `append`, or its folder does not.
    ValueError
        If the file cannot be continued: damaged, of other atoms, another temperature or System
        (the last three when the Simulation runs); if its System is not one for flows (a periodic
        box, a barostat, ...; before the first step); if the integrator's temperature is unknown or
        changes.

    Examples
    --------
    >>> import openmm
    >>> import openmm.app as app
    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> integrator = openmm.LangevinMiddleIntegrator(600, 1.0, 0.001)
    >>> integrator.setRandomNumberSeed(1)
    >>> platform = openmm.Platform.getPlatform("Reference")
    >>> simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
    >>> simulation.context.setPositions(molecule.positions)
    >>> simulation.step(500)
    >>> reporter = tsf.TSFDatasetReporter(10, "md.npz")
    >>> simulation.reporters.append(reporter)
    >>> simulation.step(200)
    >>> dataset = reporter.dataset(molecule)
    >>> len(dataset), dataset.temperature, dataset.n_evaluations
    (20, 600.0, 200)
    """

    def __init__(
        self,
        reportInterval: int,
        file: str | os.PathLike[str] | None = None,
        append: bool = False,
        *,
        temperature: Any = None,
        saveSeconds: Any = CHECKPOINT_SECONDS,
    ) -> None:
        interval = check_int(reportInterval, "reportInterval")
        kelvin = None if temperature is None else as_temperature(temperature)
        self._frames = _Frames(interval, kelvin, None if file is None else Path(file))
        if self._frames.path is not None:
            self._frames.open(check_bool(append, "append"))
        self._save_seconds = check_seconds(saveSeconds, "saveSeconds")
        self._saved, self._wait = time.monotonic(), self._save_seconds
        self._simulated: openmm.System | None = None
        self._molecule: MolecularSystem | None = None
        # Not a method of self, which would then never be freed.
        self._finalizer = weakref.finalize(self, self._frames.save)

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._frames.energies)

    def describeNextReport(self, simulation: app.Simulation) -> dict[str, Any]:
        """Return when the next frame is due and what it needs, for the Simulation."""
        if self._simulated is not simulation.system:
            self._check_simulation(simulation)
        interval = self._frames.interval
        steps = interval - simulation.currentStep % interval
        return {"steps": steps, "periodic": False, "include": ["positions", "energy"]}

    def report(self, simulation: app.Simulation, state: openmm.State) -> None:
        """Add a frame."""
        self._check_temperature(simulation.integrator)
        energy = float(state.getPotentialEnergy()._value)
        self._frames.add(positions_of(state), energy, simulation.currentStep)
        if self._frames.path is None or time.monotonic() - self._saved < self._wait:
            return
        began = time.monotonic()
        self._frames.save()
        self._saved = time.monotonic()
        self._wait = max(self._save_seconds, (self._saved - began) / _WRITING_SHARE)

    def save(self) -> None:
        """Write all frames to the file."""
        if self._frames.path is None:
            raise ValueError("file: expected the name of a file to save to, got None")
        self._frames.save()

    def dataset(self, molecule: MolecularSystem | None = None) -> MDDataset:
        """Return the frames as a dataset with their energies and temperature.

        Parameters
        ----------
        molecule
            The molecule; by default the Simulation's System and Topology, with its positions at
            the first step as the reference for handedness.

        Raises
        ------
        ValueError
            If there is no frame; if the energies are not those of the molecule's System (a biased
            Simulation, another force field); if frames are not conformations of the molecule, or
            its forces show them to be of another temperature, as in
            :meth:`openmm_tsf.MDDataset.load`.
        """
        frames = self._frames
        if not frames.energies or frames.temperature is None:
            raise ValueError("dataset: expected at least one frame, got none: run the Simulation")
        positions, energies = np.array(frames.positions), np.array(frames.energies)
        if molecule is None:
            if self._molecule is None:
                raise ValueError("molecule: expected one with frames of a file alone, got None")
            molecule = self._molecule
        check_rigid(molecule.measure, "molecule")
        if positions.shape[1] != molecule.n_atoms:
            raise ValueError(
                f"molecule: expected the frames' {positions.shape[1]} atoms, got {molecule.n_atoms}"
            )
        kelvin, n_evaluations = frames.temperature, frames.interval * len(energies)
        options: dict[str, Any] = {"n_evaluations": n_evaluations, "name": str(frames.path or "")}
        x, u = torch.from_numpy(positions), torch.from_numpy(energies)
        dataset = MDDataset(x, kelvin, molecule, u, **options)
        rows = np.unique(np.linspace(0, len(energies) - 1, _N_COMPARED).astype(int))
        source = "energies: those of the Simulation"
        with molecule.potential() as potential:
            compare_energies(potential, positions[rows], energies[rows], kelvin, source)
        check_ensemble(molecule, dataset.positions, kelvin)
        return dataset

    def _check_simulation(self, simulation: app.Simulation) -> None:
        """Refuse a Simulation of no molecule for flows, or whose file is of another."""
        system, frames = simulation.system, self._frames
        positions = positions_of(simulation.context.getState(positions=True))
        molecule = MolecularSystem(_without_thermostat(system), simulation.topology, positions)
        self._check_temperature(simulation.integrator)
        if frames.energies:
            n_atoms = len(frames.positions[-1])
            if n_atoms != system.getNumParticles():
                raise ValueError(
                    f"file: expected frames of the System's {system.getNumParticles()} atoms to "
                    f"append to, got {n_atoms} in {frames.path}"
                )
            expected = _reference_energy(system, frames.positions[-1])
            if not abs(frames.energies[-1] - expected) <= 0.1 + 1e-4 * abs(expected):
                raise ValueError(
                    f"file: expected frames of this System to append to, but the last of "
                    f"{frames.path} has the energy {frames.energies[-1]:.6g} kJ/mol, here "
                    f"{expected:.6g} kJ/mol"
                )
        self._simulated, self._molecule = system, molecule

    def _check_temperature(self, integrator: openmm.Integrator) -> None:
        """Note the integrator's temperature; refuse one that is unknown or changed."""
        frames, kelvin = self._frames, None
        if hasattr(integrator, "getTemperature"):
            kelvin = as_temperature(integrator.getTemperature())
        if frames.temperature is None:
            if kelvin is None:
                raise ValueError(
                    f"temperature: expected one, because {type(integrator).__name__} has no "
                    "getTemperature(), got None"
                )
            frames.temperature = kelvin
        if kelvin is not None and abs(kelvin - frames.temperature) > 1e-9 * kelvin:
            raise ValueError(
                f"temperature: expected frames of {frames.temperature:g} K, got an integrator at "
                f"{kelvin:g} K"
            )


class _Frames:
    """Frames in memory and their file."""

    def __init__(self, interval: int, temperature: float | None, path: Path | None) -> None:
        self.interval, self.temperature, self.path = interval, temperature, path
        self.positions: list[NDArray[np.float64]] = []
        self.energies: list[float] = []
        self._steps: list[int] = []
        self._n_saved = 0

    def add(self, positions: NDArray[np.float64], energy: float, step: int) -> None:
        """Add a frame, unless it is there: a Simulation may go on from an earlier checkpoint."""
        if self._steps and step <= self._steps[-1]:
            same = (i for i, other in enumerate(self._steps) if other == step)
            if any(np.array_equal(self.positions[i], positions) for i in same):
                return
        self.positions.append(np.array(positions, dtype=np.float64))
        self.energies.append(energy)
        self._steps.append(step)

    def open(self, append: bool) -> None:
        """Read the file if it is to be continued; refuse one that exists if not."""
        assert self.path is not None
        if self.path.exists() or self.path.is_symlink():
            if not append:
                raise FileExistsError(
                    f"file: {self.path} exists; append=True continues it, or choose another name"
                )
            self._read(check_regular_file(self.path, "file of frames"))
        elif not self.path.absolute().parent.is_dir():
            raise FileNotFoundError(f"file: {self.path.parent} is no folder")

    def save(self) -> None:
        """Write all frames, if any are new."""
        if self.path is None or len(self.energies) == self._n_saved:
            return
        arrays = {
            "positions": np.array(self.positions),
            "energies": np.array(self.energies),
            "steps": np.array(self._steps, dtype=np.int64),
            "temperature": np.array(self.temperature, dtype=np.float64),
            "interval": np.array(self.interval, dtype=np.int64),
        }
        write_arrays(self.path, arrays)
        self._n_saved = len(self.energies)

    def _read(self, path: Path) -> None:
        names = ("positions", "energies", "steps", "temperature", "interval")
        try:
            with zipfile.ZipFile(path) as archive:
                if read_array_names(archive) != set(names):
                    raise ValueError(f"expected the arrays {', '.join(names)}")
                x, energies, steps, kelvin, interval = (read_array(archive, n) for n in names)
            if x.ndim != 3 or x.shape[2] != 3 or x.dtype != np.float64 or not len(x):
                raise ValueError("positions: expected float64 of shape [F, N, 3]")
            if energies.shape != x.shape[:1] or steps.shape != x.shape[:1]:
                raise ValueError("energies, steps: expected one for each frame")
            if not (np.isfinite(x).all() and np.isfinite(energies).all()):
                raise ValueError("expected finite numbers")
            temperature, steps_between = as_temperature(kelvin), check_int(interval, "interval")
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{path}: not a readable file of frames ({reason})") from error
        if steps_between != self.interval:
            raise ValueError(
                f"reportInterval: expected {steps_between}, as the frames of {path}, got "
                f"{self.interval}"
            )
        if self.temperature is not None and self.temperature != temperature:
            raise ValueError(
                f"temperature: expected {temperature:g} K, as the frames of {path}, got "
                f"{self.temperature:g} K"
            )
        self.positions, self.energies = list(x), energies.astype(np.float64).tolist()
        self._steps, self.temperature = steps.astype(np.int64).tolist(), temperature
        self._n_saved = len(self.energies)


def _without_thermostat(system: openmm.System) -> openmm.System:
    """Return the System without Forces that are no energy but a thermostat."""
    forces = list(enumerate(system.getForces()))
    thermostats = [i for i, force in forces if isinstance(force, openmm.AndersenThermostat)]
    if not thermostats:
        return system
    system = openmm.XmlSerializer.clone(system)
    for index in reversed(thermostats):
        system.removeForce(index)
    return system


def _reference_energy(system: openmm.System, positions: NDArray[np.float64]) -> float:
    """Return the energy in kJ/mol of one conformation [N, 3] in nm."""
    platform = openmm.Platform.getPlatform("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions)
    return float(context.getState(energy=True).getPotentialEnergy()._value)
