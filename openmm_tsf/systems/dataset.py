"""Configurations at one temperature, with energies: the data that a flow is trained on."""

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import as_file, files
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.systems.constrained import project_frames
from openmm_tsf.systems.frame_checks import check_frames
from openmm_tsf.systems.frame_ensemble import check_ensemble
from openmm_tsf.systems.frame_variation import check_variation
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.md_folder import is_folder, read_md_record
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.trajectories import load_frames
from openmm_tsf.units import DIMENSIONLESS, KJ_PER_MOLE, NANOMETER, as_array, as_temperature
from openmm_tsf.utils.validation import check_fields, check_int, check_positive

logger = logging.getLogger(__name__)

#: Energy evaluations that made the shipped 600 K frames (data/make_training_frames.py).
SHIPPED_MD_EVALUATIONS = 10_020_000


class Split(NamedTuple):
    """Train, validation and test parts of a dataset."""

    train: "MDDataset"
    validation: "MDDataset"
    test: "MDDataset"


@dataclass(frozen=True)
class MDDataset:
    """Frames at one temperature.

    Parameters
    ----------
    positions, temperature
        Configurations [F, *event] in the potential's length unit (nm), float64, and their
        temperature in K. Quantities and lists of them (``[state.getPositions(), ...]``) are
        accepted.
    molecule, energies
        The molecule, or None for potentials on R^d; potential energies [F] in kJ/mol (or a
        Quantity, or a list of them), optional.
    n_evaluations
        Energy evaluations that were spent on the frames, for the costs of a run.
    weight
        Weight of the dataset in a training batch, relative to other datasets.
    chains
        The Markov chain of each frame [F]; :meth:`split` then holds out whole chains, because a
        chain's samples are correlated. None for one trajectory in time order.

    Raises
    ------
    ValueError
        If frames are not conformations of the molecule (overlapping atoms; other bonds, hence
        another order of atoms or another unit), are of dynamics with other constraints than the
        molecule's, or are rounded to 0.001 nm. Distances that are constrained are set to their
        values, from which they may differ by 1e-4 of them.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> dataset = tsf.MDDataset.shipped(molecule, stride=100)
    >>> dataset.positions.shape, dataset.temperature
    (torch.Size([400, 22, 3]), 600.0)
    >>> train, validation, test = dataset.split()
    >>> len(train), len(validation), len(test)
    (320, 40, 40)
    """

    positions: Tensor
    temperature: float
    molecule: MolecularSystem | None = None
    energies: Tensor | None = None
    n_evaluations: int = 0
    weight: float = 1.0
    chains: Tensor | None = None
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.molecule, MolecularSystem | None):
            raise TypeError(
                f"molecule: expected a MolecularSystem or None, got {type(self.molecule).__name__}"
            )
        positions = torch.from_numpy(as_array(self.positions, NANOMETER, "positions"))
        object.__setattr__(self, "positions", positions)
        check_fields(
            self,
            temperature=as_temperature,
            n_evaluations=partial(check_int, least=0),
            weight=check_positive,
        )
        shape, molecule = tuple(positions.shape), self.molecule
        if len(shape) < 2 or shape[0] == 0:
            raise ValueError(f"positions: expected shape [F, *event] with F >= 1, got {shape}")
        if molecule is not None and shape[1:] != (molecule.n_atoms, 3):
            raise ValueError(f"positions: expected shape [F, {molecule.n_atoms}, 3], got {shape}")
        if self.chains is not None:
            chains = torch.from_numpy(as_array(self.chains, DIMENSIONLESS, "chains")).long()
            _check_length(chains, "chains", len(positions))
            object.__setattr__(self, "chains", chains)
        _check_finite(positions, "positions")
        if molecule is not None:
            check_frames(molecule, positions, self.temperature)
            if molecule.constraints is not None:
                positions = project_frames(molecule.constraints, molecule.topology, positions)
                object.__setattr__(self, "positions", positions)
            check_variation(molecule, positions, self.temperature)
        if self.energies is not None:
            energies = torch.from_numpy(as_array(self.energies, KJ_PER_MOLE, "energies")).clone()
            _check_length(energies, "energies", len(positions))
            _check_finite(energies, "energies")
            object.__setattr__(self, "energies", energies)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> "MDDataset":
        """Return a sub-dataset, by any index that keeps the frame axis."""
        energies = None if self.energies is None else self.energies[index]
        chains = None if self.chains is None else self.chains[index]
        return replace(self, positions=self.positions[index], energies=energies, chains=chains)

    @classmethod
    def load(
        cls,
        path: Any,
        molecule: MolecularSystem,
        temperature: Any = None,
        *,
        stride: int = 1,
        skip: int = 0,
        n_evaluations: int = 0,
    ) -> Self:
        """Load the frames of trajectories, or of a folder of ``openmm-tsf md``.

        Parameters
        ----------
        path
            One trajectory file that mdtraj can read (DCD, NetCDF, TRR, HDF5, ...), or several in
            order; a folder of the md stage; or an ``mdtraj.Trajectory``. Files keep single
            precision, PDB 0.0001 nm. XTC is read if it is as precise (``compressed-x-precision`` of
            10000 or more), which GROMACS's default is not: 0.001 nm is 3 kJ/mol and more.
        molecule, temperature, n_evaluations
            As in :class:`MDDataset`; the molecule's Topology must match the file's atoms. A folder
            has recorded temperature and evaluations.
        stride, skip
            Keep every `stride`-th frame, after leaving out `skip` frames at the start.

        Raises
        ------
        ValueError
            If a file is another kind of file than its ending says, rounds positions, is unreadable
            or empty, or its frames are not the molecule's: see :class:`MDDataset`. A file that
            names its atoms (PDB, HDF5) must name them in the molecule's order. If the frames are of
            another handedness than the molecule, or the System's forces show them to be of another
            temperature
            (:func:`~openmm_tsf.systems.configurational_temperature.measure_temperature`).
        """
        if not isinstance(molecule, MolecularSystem):
            raise TypeError(f"molecule: expected a MolecularSystem, got {type(molecule).__name__}")
        stride, skip = check_int(stride, "stride"), check_int(skip, "skip", least=0)
        record = read_md_record(path) if is_folder(path) else None
        if record is not None:
            path = record.trajectory
            n_evaluations = n_evaluations or record.n_evaluations
            kelvin = record.temperature if temperature is None else as_temperature(temperature)
            if abs(kelvin - record.temperature) > 1e-6:
                ran = f"{record.folder} was run at {record.temperature} K"
                raise ValueError(f"temperature: {ran}, got {kelvin:g} K")
            temperature = kelvin
        if temperature is None:
            raise ValueError(f"temperature: expected the temperature of {path} in K, got none")
        positions, name = load_frames(path, molecule, stride, skip)
        options: dict[str, Any] = {"n_evaluations": n_evaluations, "name": name}
        dataset = cls(torch.from_numpy(positions), temperature, molecule, **options)
        try:
            check_ensemble(molecule, dataset.positions, dataset.temperature)
        except ValueError as error:
            if record is None or record.fingerprint != molecule.fingerprint:
                raise
            # The System is this one: the dynamics were too short, or their time step too long.
            logger.warning("%s: %s", record.folder, error)
        return dataset

    @classmethod
    def shipped(cls, molecule: MolecularSystem, *, stride: int = 1) -> Self:
        """Load the 600 K frames of alanine dipeptide that come with the package."""
        stride = check_int(stride, "stride")
        with as_file(files("openmm_tsf.data") / "ala2_600K.dcd") as path:
            positions, name = load_frames(path, molecule, stride)
        options: dict[str, Any] = {"n_evaluations": SHIPPED_MD_EVALUATIONS, "name": name}
        dataset = cls(torch.from_numpy(positions), 600.0, molecule, **options)
        if molecule.fingerprint != alanine_dipeptide().fingerprint:  # another force field, ...
            check_ensemble(molecule, dataset.positions, dataset.temperature)
        return dataset

    def with_energies(self, potential: Any) -> "MDDataset":
        """Return the same frames with energies from a potential, which must be finite."""
        device = getattr(potential, "device", self.positions.device)
        with torch.no_grad():
            energies = potential.energy(self.positions.to(device)).cpu()
        bad = (~torch.isfinite(energies)).nonzero().flatten()
        if len(bad):
            got = f"{len(bad)} of {len(self)} frames have no finite energy"
            raise ValueError(f"positions: {got}, the first is frame {int(bad[0])}")
        return replace(self, energies=energies)

    def split(
        self, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), n_blocks: int = 10
    ) -> Split:
        """Split every one of `n_blocks` blocks of time into train, validation and test frames.

        Neighbouring frames are correlated, so frames are not shuffled between the parts; with many
        short blocks instead of three long ones each part sees every slow basin. With
        :attr:`chains`, whole chains go to each part instead.
        """
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            expected = "three positive numbers of sum 1"
            raise ValueError(f"fractions: expected {expected}, got {fractions}")
        if self.chains is not None:
            return self._split_chains(self.chains, fractions)
        n_blocks = check_int(n_blocks, "n_blocks")
        edges = np.linspace(0, len(self), n_blocks + 1).astype(int)
        parts: list[list[np.ndarray]] = [[], [], []]
        for start, stop in pairwise(edges):
            cuts = [round(sum(fractions[:n]) * (stop - start)) for n in (1, 2)]
            for part, frames in zip(parts, np.split(np.arange(start, stop), cuts), strict=True):
                part.append(frames)
        indices = [torch.from_numpy(np.concatenate(part)) for part in parts]
        if min(len(part) for part in indices) == 0:
            raise ValueError(f"dataset: {len(self)} frames are too few to split {n_blocks} ways")
        return Split(*(self[part] for part in indices))

    def _split_chains(self, chains: Tensor, fractions: tuple[float, float, float]) -> Split:
        distinct = chains.unique()
        sizes = [max(1, round(fraction * len(distinct))) for fraction in fractions[1:]]
        n_train = len(distinct) - sum(sizes)
        if n_train < 1:
            raise ValueError(f"chains: expected at least 3 to split, got {len(distinct)}")
        parts = distinct.split([n_train, *sizes])
        return Split(*(self[torch.isin(chains, part).nonzero()[:, 0]] for part in parts))


def _check_length(values: Tensor, name: str, n_frames: int) -> None:
    if values.shape != (n_frames,):
        raise ValueError(f"{name}: expected shape [{n_frames}], got {tuple(values.shape)}")


def _check_finite(values: Tensor, name: str) -> None:
    bad = (~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)).nonzero().flatten()
    if len(bad):
        got = f"NaN or infinity in {len(bad)} frames, the first is frame {int(bad[0])}"
        raise ValueError(f"{name}: expected finite numbers, got {got}")
