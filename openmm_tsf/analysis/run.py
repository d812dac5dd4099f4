"""A run directory, finished or still growing, as numpy, mdtraj and pymbar objects."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.errors import MeanEstimate, estimate_mean
from openmm_tsf.analysis.free_energy import solve_mbar, state_free_energy
from openmm_tsf.analysis.ramachandran import backbone_names
from openmm_tsf.analysis.segments import Segments, read_segments
from openmm_tsf.analysis.trajectory import dcd_layout, read_dcd
from openmm_tsf.statistics import mixing_matrix, round_trips
from openmm_tsf.units import as_temperature

if TYPE_CHECKING:
    from openmm_tsf.analysis.reference import Reference

Array = npt.NDArray[np.float64]

_FORMAT = 1
_TOLERANCE_K = 0.01


def load_run(path: str | Path) -> "Run":
    """Read a run directory as it is at this moment; call again to see what has come since.

    Runs of the command line whose System is that of the shipped reference name it in their
    ``config.json`` (``reference``), and are compared with it. Runs made with the Python sampler
    name none: give one to `Run.summary`, `Run.plot` or `write_summary`, as in
    ``run.summary(reference=load_reference())``. It is for alanine dipeptide in the default force
    field only; this module does not know the System and cannot check that.

    Raises
    ------
    FileNotFoundError
        If the directory, its ``config.json`` or a segment is missing.
    ValueError
        If one of its files cannot be understood (the message names it).
    """
    return Run(path)


class Run:
    """What `load_run` returns.

    Saved iterations, walkers and rungs are the axes [n, W, R] of everything; temperatures in K,
    energies in kJ/mol, angles in rad, lengths in nm.

    Attributes
    ----------
    path
        The directory.
    config
        Its ``config.json``.
    temperatures
        [R] in K, ascending.
    n_walkers
        W.
    boltzmann_constant
        In kJ/(mol K), or 1 for toy systems.
    dihedral_atoms
        Named dihedrals and their atoms.
    segments
        The numbers written so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = _read_config(self.path)
        self.temperatures: Array = np.asarray(self.config["temperatures_K"], dtype=np.float64)
        self.n_walkers = int(self.config["n_walkers"])
        self.boltzmann_constant = float(self.config["boltzmann_constant"])
        self.dihedral_atoms: dict[str, list[int]] = dict(self.config["dihedrals"])
        self.segments: Segments = read_segments(
            self.path / "segments", self.n_walkers, self.n_rungs, len(self.dihedral_atoms)
        )
        self._estimates: dict[tuple[str, int], MeanEstimate] = {}
        self._mbar: dict[int, Array] = {}

    @property
    def n_rungs(self) -> int:
        """R."""
        return len(self.temperatures)

    @property
    def n_iterations(self) -> int:
        """Saved iterations so far, n."""
        return len(self.segments.iteration)

    @property
    def betas(self) -> Array:
        """1/(k_B T) [R] in mol/kJ."""
        return 1.0 / (self.boltzmann_constant * self.temperatures)

    def rung(self, temperature: Any) -> int:
        """Index of the rung at a temperature (K, or a Quantity), within 0.01 K.

        Raises
        ------
        ValueError
            If the run has no such rung.
        """
        kelvin = as_temperature(temperature)
        nearest = int(np.argmin(np.abs(self.temperatures - kelvin)))
        if abs(self.temperatures[nearest] - kelvin) > _TOLERANCE_K:
            rungs = ", ".join(f"{t:.2f}" for t in self.temperatures)
            raise ValueError(f"temperature: this run has rungs at {rungs} K, got {kelvin:g} K")
        return nearest

    def _require_data(self) -> None:
        if self.n_iterations == 0:
            raise ValueError(f"{self.path / 'segments'}: no complete segment yet")

    # ---------------------------------------------------------------- frames

    @cached_property
    def topology(self) -> mdtraj.Topology:
        """The molecule."""
        path = self.path / "topology.pdb"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing")
        return mdtraj.load_topology(str(path))

    def _dcd(self, rung: int) -> Path:
        path = self.path / f"T{self.temperatures[rung]:.2f}K.dcd"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing")
        return path

    def _n_iterations_with_frames(self, rung: int) -> int:
        n_frames = dcd_layout(self._dcd(rung), self.topology.n_atoms).n_frames
        return min(self.n_iterations, n_frames // self.n_walkers)

    def trajectory(self, temperature: Any, walker: int | None = None) -> mdtraj.Trajectory:
        """Frames of one rung, as far as both positions and numbers have been written.

        Parameters
        ----------
        temperature
            The rung's.
        walker
            One walker's frames only; all, with the walkers of an iteration following one another,
            when left out.

        Returns
        -------
        trajectory
            Its ``time`` is the sampler's iteration.
        """
        rung = self.rung(temperature)
        if walker is not None and not 0 <= walker < self.n_walkers:
            raise ValueError(f"walker: expected 0 to {self.n_walkers - 1}, got {walker}")
        n = self._n_iterations_with_frames(rung)
        return self._frames(rung, n, walker)

    def _frames(self, rung: int, n: int, walker: int | None = None) -> mdtraj.Trajectory:
        start, stride = (0, 1) if walker is None else (walker, self.n_walkers)
        xyz = read_dcd(
            self._dcd(rung), self.topology.n_atoms, n * self.n_walkers, start=start, stride=stride
        )
        time = np.repeat(self.segments.iteration[:n], self.n_walkers)[start::stride]
        return mdtraj.Trajectory(xyz, self.topology, time=time)

    # --------------------------------------------------------------- numbers

    def energies(self, temperature: Any) -> Array:
        """Potential energies [n, W] of one rung in kJ/mol."""
        return self.segments.energy[:, :, self.rung(temperature)]

    def u_kn(self) -> tuple[Array, npt.NDArray[np.int64]]:
        """Reduced energies as pymbar's MBAR takes them.

        Returns
        -------
        u_kn
            [R, R n W]: u[k, i] = U_i / (k_B T_k), the samples sorted by their own rung, then by
            iteration, then by walker (the order of `trajectory`).
        N_k
            [R], samples of each rung.
        """
        flat = np.moveaxis(self.segments.energy, 2, 0).ravel()
        n_each = self.n_iterations * self.n_walkers
        return np.outer(self.betas, flat), np.full(self.n_rungs, n_each, dtype=np.int64)

    def dihedral(self, name: str, temperature: Any) -> Array:
        """One named dihedral [n, W] at one rung, in rad.

        Raises
        ------
        ValueError
            If the run did not record it.
        """
        names = list(self.dihedral_atoms)
        if name not in names:
            raise ValueError(f"dihedral: this run recorded {names}, got {name!r}")
        return self.segments.dihedrals[:, :, self.rung(temperature), names.index(name)]

    def backbone(self, residue: int | None = None) -> tuple[str, str]:
        """Names of the recorded φ and ψ of one residue.

        Parameters
        ----------
        residue
            Its number in the Topology, counted from 1, as the dihedrals' names carry it; the first
            that has both when left out. Runs of a single pair name it ``phi`` and ``psi``, without
            a number: leave it out.

        Raises
        ------
        ValueError
            If the run recorded no such pair.
        """
        return backbone_names(list(self.dihedral_atoms), residue)

    def ramachandran(self, temperature: Any, residue: int | None = None) -> tuple[Array, Array]:
        """φ and ψ [n W] of one residue at one rung in rad, in the order of `trajectory`.

        Parameters
        ----------
        temperature
            The rung's.
        residue
            As in `backbone`.

        Raises
        ------
        ValueError
            If the run recorded no such pair, or has no such rung.
        """
        phi, psi = self.backbone(residue)
        return self.dihedral(phi, temperature).ravel(), self.dihedral(psi, temperature).ravel()

    # ------------------------------------------------------------- estimates

    def mean_energy(self, temperature: Any) -> MeanEstimate:
        """⟨U⟩ at one rung in kJ/mol."""
        return self._estimate("energy", temperature, lambda: self.energies(temperature))

    def positive(self, name: str, temperature: Any) -> MeanEstimate:
        """P(dihedral > 0) at one rung, from that rung's own samples."""
        return self._estimate(name, temperature, lambda: self.dihedral(name, temperature) > 0)

    def _estimate(
        self, name: str, temperature: Any, series: Callable[[], npt.ArrayLike]
    ) -> MeanEstimate:
        self._require_data()
        key = (name, self.rung(temperature))
        if key not in self._estimates:
            self._estimates[key] = estimate_mean(series())
        return self._estimates[key]

    def free_energy_difference(
        self, indicator: Callable[[mdtraj.Trajectory], npt.ArrayLike], temperature: Any
    ) -> tuple[float, float]:
        """-ln[P(true)/P(false)] in kT by MBAR over all rungs, and its standard error.

        Parameters
        ----------
        indicator
            Maps a trajectory of F frames to F truth values. It is called once per rung.
        temperature
            Any between the lowest and the highest rung, in K.

        Returns
        -------
        value, stderr
            (±inf, NaN) when one of the two states was never seen.

        Raises
        ------
        TypeError
            If the indicator returns something other than truth values.
        ValueError
            If it returns another number of them, or the temperature is outside the ladder.
        """
        self._require_data()
        beta = self._beta(temperature)
        n = min(self._n_iterations_with_frames(rung) for rung in range(self.n_rungs))
        if n == 0:
            raise ValueError(f"{self.path}: the trajectories have no complete iteration yet")
        inside = np.empty((n, self.n_walkers, self.n_rungs), dtype=bool)
        for rung in range(self.n_rungs):
            answer = np.asarray(indicator(self._frames(rung, n)))
            if answer.dtype != np.bool_:
                raise TypeError(f"indicator: expected truth values, got {answer.dtype}")
            if answer.size != n * self.n_walkers:
                raise ValueError(
                    f"indicator: expected {n * self.n_walkers} values, got shape {answer.shape}"
                )
            inside[:, :, rung] = answer.reshape(n, self.n_walkers)
        return self._state_free_energy(inside, beta)

    def free_energy_positive(self, name: str, temperature: Any) -> tuple[float, float]:
        """-ln[P(dihedral > 0)/P(dihedral < 0)] in kT by MBAR over all rungs, and its error.

        As `free_energy_difference`, from the recorded dihedrals: no trajectory is read.
        """
        self._require_data()
        names = list(self.dihedral_atoms)
        self.dihedral(name, self.temperatures[0])
        inside = self.segments.dihedrals[..., names.index(name)] > 0
        return self._state_free_energy(inside, self._beta(temperature))

    def _state_free_energy(self, inside: npt.NDArray[np.bool_], beta: float) -> tuple[float, float]:
        n = len(inside)
        energy = self.segments.energy[:n]
        if n not in self._mbar:  # the same for every state and temperature
            self._mbar[n] = solve_mbar(energy, self.betas)
        return state_free_energy(inside, energy, self.betas, self._mbar[n], beta)

    def _beta(self, temperature: Any) -> float:
        kelvin = as_temperature(temperature)
        low, high = self.temperatures[0] - _TOLERANCE_K, self.temperatures[-1] + _TOLERANCE_K
        if not low <= kelvin <= high:
            raise ValueError(
                f"temperature: expected one within {self.temperatures[0]:.2f} to "
                f"{self.temperatures[-1]:.2f} K, got {kelvin:g} K"
            )
        return 1.0 / (self.boltzmann_constant * kelvin)

    # ------------------------------------------------------------- exchanges

    def acceptance(self) -> dict[str, Array]:
        """Accepted over proposed moves per kernel: [R], [R-1] (swaps of neighbours) or [R, R].

        NaN where a move was never proposed.
        """
        table = {}
        for name, proposed in self.segments.proposed.items():
            accepted = self.segments.accepted[name].astype(np.float64)
            table[name] = np.divide(
                accepted, proposed, out=np.full(proposed.shape, np.nan), where=proposed > 0
            )
        return table

    def round_trips(self) -> npt.NDArray[np.int64]:
        """Trips lowest → highest → lowest rung of each replica [W, R]."""
        return round_trips(self.segments.replica)

    def mixing_matrix(self) -> Array:
        """Probability [R, R] that the replica at rung i sits at rung j one saved iteration on."""
        return mixing_matrix(self.segments.replica)

    # --------------------------------------------------------------- reports

    def reference(self) -> "Reference | None":
        """The shipped reference data that the configuration names, if any."""
        from openmm_tsf.analysis.reference import load_reference

        name = self.config.get("reference")
        return None if name is None else load_reference(name)

    def summary(self, reference: "Reference | None" = None) -> dict[str, Any]:
        """The figures of the run as plain numbers; see `openmm_tsf.analysis.summary`.

        They are compared with `reference`, or with the one that the configuration names.
        """
        from openmm_tsf.analysis.summary import summarize

        return summarize(self, reference or self.reference())

    def plot(
        self,
        path: str | Path,
        reference: "Reference | None" = None,
        residue: int | None = None,
    ) -> None:
        """Ramachandran plots, φ and energy histograms of every rung as a PNG (or PDF, SVG).

        They are drawn beside `reference`, or beside the one that the configuration names, and are
        of the given residue (see `backbone`).
        """
        from openmm_tsf.analysis.plots import plot_ramachandran

        plot_ramachandran(self, path, reference or self.reference(), residue)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such run directory")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a run directory")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if config.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected format {_FORMAT}, got {config.get('format')!r}")
    for key in ("temperatures_K", "n_walkers", "seed", "dihedrals", "boltzmann_constant"):
        if key not in config:
            raise ValueError(f"{path}: has no {key!r}")
    return dict(config)
