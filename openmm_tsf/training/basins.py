"""The basins that a training keeps apart: combinations of the wells of all slow torsions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.coordinates.measures import dihedrals_of
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.training.cells import count_by_cell
from openmm_tsf.utils.topology import Quartet
from openmm_tsf.utils.wells import Wells, count_angles, find_wells

#: At most this many combinations of wells are basins of their own, those with the most frames.
MAX_BASINS = 12
#: A basin has at least this many frames: fewer are a visit or two.
MIN_FRAMES = 20


class _Tables(NamedTuple):
    """Atoms [T, 4] of torsions, borders [n, T] of their wells, numbers [T] of wells, and basins."""

    quartets: Tensor
    borders: Tensor
    n_wells: Tensor
    combinations: Tensor


class BasinPartition:
    """A partition of configurations into K basins.

    A basin is one well of each slow torsion that has several; the wells are those of the training
    frames. Combinations with fewer than 20 frames, all those beyond the twelve most populated, and
    those without frames are together the last basin. Potentials on R^d have one basin.

    Parameters
    ----------
    torsions
        Atoms and wells of every torsion with several wells.
    combinations
        The wells of the torsions [K - 1, torsions] in each basin but the last, int64.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.training.basins import BasinPartition
    >>> dataset = tsf.MDDataset.shipped(tsf.systems.alanine_dipeptide(), stride=10)
    >>> basins = BasinPartition.find([dataset])
    >>> basins.n_basins
    5
    >>> basins.labels(dataset.positions[:3]).shape
    torch.Size([3])
    """

    def __init__(
        self, torsions: Mapping[str, tuple[Quartet, Wells]], combinations: np.ndarray
    ) -> None:
        self._quartets = {name: quartet for name, (quartet, _) in torsions.items()}
        self._wells = {name: wells for name, (_, wells) in torsions.items()}
        self._combinations = combinations
        self._on_device: dict[torch.device, _Tables] = {}
        self.n_basins = len(combinations) + 1 if torsions else 1

    @classmethod
    def find(cls, datasets: Sequence[MDDataset]) -> Self:
        """Return the basins of the frames of all datasets, which have the same molecule."""
        molecule = datasets[0].molecule
        if molecule is None:
            return cls({}, np.zeros((0, 0), dtype=np.int64))
        quartets = slow_torsions(molecule.topology)
        frames = np.concatenate([dataset.positions.detach().numpy() for dataset in datasets])
        angles = torsion_angles(frames, quartets)
        torsions = {}
        for name, values in angles.items():
            wells = find_wells(name, count_angles(values))
            if wells.names:
                torsions[name] = (quartets[name], wells)
        labels = [wells.labels(angles[name]) for name, (_, wells) in torsions.items()]
        if not labels:
            return cls({}, np.zeros((0, 0), dtype=np.int64))
        combinations, counts = np.unique(np.stack(labels, axis=1), axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:MAX_BASINS]
        return cls(torsions, combinations[order[counts[order] >= MIN_FRAMES]])

    def populations(self, x: Tensor) -> Tensor:
        """Return the fraction of x [B, *event] in each basin, float64 [K]."""
        return count_by_cell(self.labels(x), self.n_basins).double() / len(x)

    def labels(self, x: Tensor) -> Tensor:
        """Return the basin of each x [B, *event], int64 [B]; the last where x is not finite."""
        last = self.n_basins - 1
        labels = torch.full((len(x),), last, dtype=torch.int64, device=x.device)
        if last == 0:
            return labels
        tables = self._tables(x.device)
        angles = dihedrals_of(x.detach().double(), tables.quartets)
        degrees = torch.remainder(torch.rad2deg(angles) + 180, 360) - 180
        # The well after the last border that is not above the angle, cyclically.
        after = (degrees >= tables.borders[..., None]).sum(0)
        wells = torch.remainder(after - 1, tables.n_wells[:, None])
        for basin, combination in enumerate(tables.combinations):
            is_basin = (wells == combination[:, None]).all(0)
            labels = torch.where(is_basin, basin, labels)
        finite = torch.isfinite(x).flatten(1).all(1)
        return torch.where(finite, labels, last)

    def _tables(self, device: torch.device) -> "_Tables":
        """The torsions, their wells and the basins, as tensors on a device."""
        if device not in self._on_device:
            borders = [wells.borders for wells in self._wells.values()]
            most = max(map(len, borders))
            padded = [[*each, *[np.inf] * (most - len(each))] for each in borders]
            arrays = (
                np.array(list(self._quartets.values()), dtype=np.int64),
                np.array(padded, dtype=np.float64).T,
                np.array([len(each) for each in borders], dtype=np.int64),
                self._combinations,
            )
            self._on_device[device] = _Tables(*(torch.from_numpy(a).to(device) for a in arrays))
        return self._on_device[device]
