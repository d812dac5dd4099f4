"""Configurations at one temperature, with energies: what a flow learns from."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import as_file, files
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Self

import mdtraj
import numpy as np
import torch
from torch import Tensor

from openmm_tsf.systems.frame_checks import check_frames
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import NANOMETER, as_temperature, in_unit
from openmm_tsf.utils.validation import as_float_tensor, check_fields, check_int, check_positive

_RUNS_PICKLES = (".h5", ".hdf5", ".lh5")

#: Energy evaluations that made the shipped 600 K frames (data/make_training_frames.py).
SHIPPED_MD_EVALUATIONS = 10_020_000

#: Trajectories that name their own atoms.
_NAMES_ATOMS = (
    ".cif", ".cif.gz", ".gro", ".h5", ".hdf5", ".mmcif", ".mmcif.gz", ".pdb", ".pdb.gz", ".pdbx",
    ".pdbx.gz",
)  # fmt: skip


class Split(NamedTuple):
    """Train, validation and test parts of a dataset."""

    train: "MDDataset"
    validation: "MDDataset"
    test: "MDDataset"


@dataclass(frozen=True)
class MDDataset:
    """Frames of one temperature.

    Parameters
    ----------
    positions
        Configurations [F, *event] in the potential's length unit (nm), float64.
    temperature
        Their temperature in K (or a Quantity).
    molecule
        The molecule, or None for potentials on R^d.
    energies
        Potential energies [F], optional.
    n_evaluations
        Energy evaluations that it took to make the frames, for the accounts.
    weight
        Share of a training batch, relative to the other datasets'.
    chains
        Which Markov chain each frame comes from [F]; :meth:`split` then holds out whole chains,
        because a chain's samples repeat each other. None for one trajectory in time order.

    Raises
    ------
    TypeError, ValueError
        If shapes disagree, numbers are not finite, or frames are no conformations of the molecule
        (overlapping atoms, other bonds: another order of atoms or another unit).
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
        plain = in_unit(self.positions, NANOMETER, "positions")
        try:
            positions = torch.as_tensor(plain, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"positions: expected numbers [F, *event], got {type(plain).__name__}: {error}"
            ) from error
        object.__setattr__(self, "positions", positions)
        check_fields(
            self,
            temperature=as_temperature,
            n_evaluations=partial(check_int, least=0),
            weight=check_positive,
        )
        if positions.ndim < 2 or len(positions) == 0:
            raise ValueError(
                f"positions: expected shape [F, *event] with F >= 1, got {tuple(positions.shape)}"
            )
        if self.molecule is not None and tuple(positions.shape[1:]) != (self.molecule.n_atoms, 3):
            raise ValueError(
                f"positions: expected shape [F, {self.molecule.n_atoms}, 3], "
                f"got {tuple(positions.shape)}"
            )
        if self.chains is not None and self.chains.shape != (len(positions),):
            raise ValueError(
                f"chains: expected shape [{len(positions)}], got {tuple(self.chains.shape)}"
            )
        _check_finite(positions, "positions")
        if self.molecule is not None:
            check_frames(self.molecule, positions)
        if self.energies is not None:
            energies = as_float_tensor(self.energies, "energies")
            if energies.shape != (len(positions),):
                raise ValueError(
                    f"energies: expected shape [{len(positions)}], got {tuple(energies.shape)}"
                )
            _check_finite(energies, "energies")
            object.__setattr__(self, "energies", energies)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> "MDDataset":
        """A sub-dataset: any index that keeps the frame axis."""
        energies = None if self.energies is None else self.energies[index]
        chains = None if self.chains is None else self.chains[index]
        return replace(self, positions=self.positions[index], energies=energies, chains=chains)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        molecule: MolecularSystem,
        temperature: Any,
        *,
        stride: int = 1,
        skip: int = 0,
        n_evaluations: int = 0,
    ) -> Self:
        """Frames of a trajectory that mdtraj reads (DCD, NetCDF, ...).

        Parameters
        ----------
        path
            One trajectory file, or several in order.
        molecule
            The molecule; its Topology must match the file's atoms.
        temperature
            Temperature of the trajectory in K.
        stride
            Keep every `stride`-th frame.
        skip
            Leave out so many frames at the start (before the stride).
        n_evaluations
            Energy evaluations that the trajectory cost, for the accounts.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            If a file is missing, or a directory.
        TypeError
            If `path` is no path.
        ValueError
            If a file is XTC (its 0.001 nm rounding spoils energies), unreadable or empty, or its
            frames are not the molecule's: see :class:`MDDataset`. A file that names its atoms (PDB)
            must name them in the molecule's order.
        """
        if not isinstance(molecule, MolecularSystem):
            raise TypeError(f"molecule: expected a MolecularSystem, got {type(molecule).__name__}")
        stride, skip = check_int(stride, "stride"), check_int(skip, "skip", least=0)
        names = _trajectory_files(path)
        parts = [_read_frames(name, molecule) for name in names]
        positions = np.concatenate(parts)[skip::stride]
        if not len(positions):
            raise ValueError(f"path: no frames left in {', '.join(names)}")
        return cls(
            torch.from_numpy(positions),
            temperature,
            molecule,
            n_evaluations=n_evaluations,
            name=", ".join(names),
        )

    @classmethod
    def shipped(cls, molecule: MolecularSystem, *, stride: int = 1) -> Self:
        """The 600 K frames of alanine dipeptide that come with the package."""
        with as_file(files("openmm_tsf.data") / "ala2_600K.dcd") as path:
            return cls.load(
                path, molecule, 600.0, stride=stride, n_evaluations=SHIPPED_MD_EVALUATIONS
            )

    def with_energies(self, potential: Any) -> "MDDataset":
        """The same frames with energies from a potential.

        Raises
        ------
        ValueError
            If a frame's energy is not finite (overlapping atoms, another molecule's frames).
        """
        with torch.no_grad():
            energies = potential.energy(self.positions)
        bad = ~torch.isfinite(energies)
        if bool(bad.any()):
            raise ValueError(
                f"positions: {int(bad.sum())} of {len(self)} frames have no finite energy, the "
                f"first is frame {int(bad.nonzero()[0])}"
            )
        return replace(self, energies=energies)

    def split(
        self, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), n_blocks: int = 10
    ) -> Split:
        """Blocked train/validation/test split: each of n_blocks stretches of time gives its share.

        Neighbouring frames are correlated, so frames are not shuffled between the parts; many
        short blocks rather than three long ones, so that each part sees every slow basin. With
        :attr:`chains`, whole chains go to each part instead.

        Raises
        ------
        ValueError
            If the fractions do not sum to one, or there are too few frames or chains.
        """
        if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError(
                f"fractions: expected three positive numbers of sum 1, got {fractions}"
            )
        if self.chains is not None:
            return self._split_chains(self.chains, fractions)
        edges = np.linspace(0, len(self), n_blocks + 1).astype(int)
        parts: list[list[np.ndarray]] = [[], [], []]
        for start, stop in pairwise(edges):
            size = stop - start
            first = start + round(fractions[0] * size)
            second = start + round((fractions[0] + fractions[1]) * size)
            for part, (low, high) in zip(
                parts, ((start, first), (first, second), (second, stop)), strict=True
            ):
                part.append(np.arange(low, high))
        indices = [torch.from_numpy(np.concatenate(part)) for part in parts]
        if min(len(part) for part in indices) == 0:
            raise ValueError(f"dataset: {len(self)} frames are too few to split {n_blocks} ways")
        return Split(*(self[part] for part in indices))

    def _split_chains(self, chains: Tensor, fractions: tuple[float, float, float]) -> Split:
        names = chains.unique()
        sizes = [max(1, round(fraction * len(names))) for fraction in fractions[1:]]
        n_train = len(names) - sum(sizes)
        if n_train < 1:
            raise ValueError(f"chains: expected at least 3 to split, got {len(names)}")
        parts = names.split([n_train, *sizes])
        return Split(*(self[torch.isin(chains, part).nonzero()[:, 0]] for part in parts))


def _trajectory_files(path: Any) -> list[str]:
    """Names of one or several trajectory files, checked before the first is read."""
    try:
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        names = [os.fsdecode(item) for item in paths]
    except TypeError as error:
        raise TypeError(f"path: expected a trajectory file or several, got {path!r}") from error
    if not names:
        raise ValueError("path: expected at least one trajectory file, got none")
    readable = tuple(ending for ending in mdtraj.FormatRegistry.loaders if ending != ".xtc")
    for name in names:
        if Path(name).is_dir():
            raise IsADirectoryError(f"path: expected a trajectory file, got the directory {name}")
        if not Path(name).is_file():
            raise FileNotFoundError(f"path: no such trajectory {name}")
        if name.lower().endswith(".xtc"):
            raise ValueError(
                f"path: {name} is XTC, which rounds positions to 0.001 nm and spoils energies; use "
                "DCD or NetCDF"
            )
        if name.lower().endswith(_RUNS_PICKLES):
            raise ValueError(
                f"path: {name} is HDF5, whose reader (PyTables) runs pickled code in a file; use "
                "DCD or NetCDF, or load a file that you trust with mdtraj and pass its positions"
            )
        if not name.endswith(readable):
            raise ValueError(
                f"path: expected a trajectory that mdtraj reads ({', '.join(sorted(readable))}), "
                f"got {name}"
            )
        if Path(name).stat().st_size == 0:
            raise ValueError(f"path: expected frames, got the empty file {name}")
    return names


def _read_frames(name: str, molecule: MolecularSystem) -> np.ndarray:
    """All frames [F, N, 3] of a trajectory file in nm."""
    top = {} if name.endswith(_NAMES_ATOMS) else {"top": molecule.mdtraj_topology}
    try:
        with _silent_stdout():
            frames = mdtraj.load(name, **top)
    except Exception as error:
        raise ValueError(
            f"path: mdtraj cannot read {name} as a trajectory of {molecule.n_atoms} atoms: {error}"
        ) from error
    if frames.n_atoms != molecule.n_atoms:
        raise ValueError(
            f"path: expected the molecule's {molecule.n_atoms} atoms, got {frames.n_atoms} in "
            f"{name}"
        )
    _check_order(name, list(frames.topology.atoms), list(molecule.mdtraj_topology.atoms))
    return np.asarray(frames.xyz, dtype=np.float64)


def _check_order(name: str, found: list[Any], expected: list[Any]) -> None:
    """Refuse the same elements, or the same names, in another order.

    Programs name atoms, and guess elements, in their own ways: that alone is no other molecule.
    """
    for what in ("element.symbol", "name"):
        of = attrgetter(what)
        theirs, ours = list(map(of, found)), list(map(of, expected))
        if theirs != ours and sorted(theirs) == sorted(ours):
            first = next(
                i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]
            )
            raise ValueError(
                f"path: expected the molecule's atoms in its order, got another in {name}: atom "
                f"{first} is {found[first]}, expected {expected[first]}"
            )


def _check_finite(values: Tensor, name: str) -> None:
    bad = ~torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None]).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: expected finite numbers, got NaN or infinity in {int(bad.sum())} "
            f"frames, the first is frame {int(bad.nonzero()[0])}"
        )


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what C code prints: mdtraj's DCD plugin announces itself on the process's stdout."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
