"""What a run directory holds, as numpy and mdtraj objects; estimates from it are in ``run``."""

from functools import cached_property
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.ramachandran import backbone_names
from openmm_tsf.io.dcd import read_dcd, read_dcd_layout
from openmm_tsf.io.files import check_regular_file
from openmm_tsf.io.run_config import read_run_config, trajectory_name
from openmm_tsf.io.segments import Segments
from openmm_tsf.units import as_temperature

Array = npt.NDArray[np.float64]

#: Two temperatures that differ by less are one.
TOLERANCE_K = 0.01


class RunFiles:
    """Frames and numbers of a run directory; `openmm_tsf.analysis.Run` says what they are."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_run_config(self.path)
        self.temperatures: Array = np.asarray(self.config["temperatures_K"], dtype=np.float64)
        self.n_walkers = int(self.config["n_walkers"])
        self.boltzmann_constant = float(self.config["boltzmann_constant"])
        self.dihedral_atoms: dict[str, list[int]] = dict(self.config["dihedrals"])
        self.segments = Segments(
            self.path / "segments", self.n_walkers, self.n_rungs, len(self.dihedral_atoms)
        )

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
        if abs(self.temperatures[nearest] - kelvin) > TOLERANCE_K:
            rungs = ", ".join(f"{t:.2f}" for t in self.temperatures)
            raise ValueError(f"temperature: this run has rungs at {rungs} K, got {kelvin:g} K")
        return nearest

    def _beta(self, temperature: Any) -> float:
        kelvin = as_temperature(temperature)
        low, high = self.temperatures[0] - TOLERANCE_K, self.temperatures[-1] + TOLERANCE_K
        if not low <= kelvin <= high:
            raise ValueError(
                f"temperature: expected one within {self.temperatures[0]:.2f} to "
                f"{self.temperatures[-1]:.2f} K, got {kelvin:g} K"
            )
        return 1.0 / (self.boltzmann_constant * kelvin)

    def _require_data(self) -> None:
        if self.n_iterations == 0:
            raise ValueError(f"{self.path / 'segments'}: no complete segment yet")

    # ---------------------------------------------------------------- frames

    @property
    def topology(self) -> mdtraj.Topology:
        """The molecule."""
        return self.structure.topology

    @cached_property
    def structure(self) -> mdtraj.Trajectory:
        """The molecule in its reference conformation."""
        path = self._file("topology.pdb", "PDB file")
        try:
            found = mdtraj.load_pdb(str(path))
        except Exception as error:  # mdtraj's reader raises many kinds
            raise ValueError(f"{path}: mdtraj cannot read it: {error!r}") from error
        if found.n_atoms == 0 or not np.isfinite(found.xyz).all():
            raise ValueError(f"{path}: expected atoms at finite positions, got {found}")
        return found

    def _file(self, name: str, what: str) -> Path:
        path = self.path / name
        if not (path.exists() or path.is_symlink()):
            raise FileNotFoundError(f"{path} is missing")
        return check_regular_file(path, what)

    def _dcd(self, rung: int) -> Path:
        return self._file(trajectory_name(self.temperatures[rung]), "DCD file")

    def _n_iterations_with_frames(self, rung: int) -> int:
        n_frames = read_dcd_layout(self._dcd(rung), self.topology.n_atoms).n_frames
        return min(self.n_iterations, n_frames // self.n_walkers)

    def trajectory(
        self, temperature: Any, walker: int | None = None, stride: int = 1
    ) -> mdtraj.Trajectory:
        """Frames of one rung, as far as both positions and numbers have been written.

        Parameters
        ----------
        temperature
            The rung's.
        walker
            One walker's frames only; all, with the walkers of an iteration following one another,
            when left out.
        stride
            Every so many-th saved iteration only: a frame takes 12 bytes an atom.

        Returns
        -------
        trajectory
            Its ``time`` is the sampler's iteration.

        Raises
        ------
        ValueError
            If the run has no such rung or walker, or `stride` is no positive integer.
        """
        rung = self.rung(temperature)
        if walker is not None:
            number = isinstance(walker, (int, np.integer)) and not isinstance(walker, bool)
            if not number or not 0 <= walker < self.n_walkers:
                raise ValueError(
                    f"walker: expected an integer of 0 to {self.n_walkers - 1}, got {walker!r}"
                )
        if not isinstance(stride, (int, np.integer)) or isinstance(stride, bool) or stride < 1:
            raise ValueError(f"stride: expected an integer of at least 1, got {stride!r}")
        n = self._n_iterations_with_frames(rung)
        return self._frames(rung, n, walker, int(stride))

    def _frames(
        self, rung: int, n: int, walker: int | None = None, stride: int = 1
    ) -> mdtraj.Trajectory:
        walkers = slice(None) if walker is None else slice(walker, walker + 1)
        xyz = read_dcd(self._dcd(rung), self.topology.n_atoms, (n, self.n_walkers), stride, walkers)
        time = self.segments.iteration[:n:stride]
        if walker is None:
            time = np.repeat(time, self.n_walkers)
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
        angles = self.segments.dihedrals[:, :, self.rung(temperature), names.index(name)]
        return angles.astype(np.float64)

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
