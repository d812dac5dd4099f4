"""The basins of a molecule: products of the wells of its slow torsions, residue by residue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from types import NoneType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import count_visits
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.utils.topology import residue_of
from openmm_tsf.utils.validation import check_positive, require_entry
from openmm_tsf.utils.wells import N_BINS, Wells, count_angles, find_wells, lacks_a_well

Angles = Mapping[str, npt.ArrayLike]

#: Torsions of a residue are combined as long as this many basins suffice.
MAX_BASINS = 36
_MAX_NAME = 60


@dataclass(frozen=True)
class Basins:
    """Basins of slow torsions.

    The torsions of a residue make a group, and a basin of the group is one well of each: four for
    alanine dipeptide, phi > 0 and < 0 with psi in alpha and in beta. Torsions with a single well
    make none. Where a residue would have more than 36 basins, its further torsions make a group of
    their own. In every group, each conformation is in one basin.

    Parameters
    ----------
    wells
        The wells of each torsion by name.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.basins import Basins
    >>> rng = np.random.default_rng(1)
    >>> phi = rng.normal(np.where(rng.random(4000) < 0.1, 1.0, -1.5), 0.3)
    >>> psi = rng.normal(np.where(rng.random(4000) < 0.4, -0.5, 2.5), 0.3)
    >>> basins = Basins.find({"phi": phi, "psi": psi})
    >>> sorted(basins.names)
    ['phi < 0, psi alpha', 'phi < 0, psi beta', 'phi > 0, psi alpha', 'phi > 0, psi beta']
    >>> labels = basins.labels({"phi": [-1.5, 1.0], "psi": [2.5, -0.5]})
    >>> [basins.names[label] for label in labels[:, 0]]
    ['phi < 0, psi beta', 'phi > 0, psi alpha']
    >>> basins.inside("phi > 0, psi alpha", {"phi": [-1.5, 1.0], "psi": [2.5, -0.5]})
    array([False,  True])
    """

    wells: Mapping[str, Wells]

    @classmethod
    def find(cls, angles: Angles) -> Self:
        """Return the basins of samples: angles in rad by torsion, in arrays of any shape."""
        return cls({name: find_wells(name, count_angles(value)) for name, value in angles.items()})

    @cached_property
    def torsions(self) -> tuple[str, ...]:
        """The torsions with several wells."""
        return tuple(name for group in self.groups for name in group)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The torsions of each group."""
        by_residue: dict[int | None, list[str]] = {}
        for name, wells in self.wells.items():
            if wells.names:
                by_residue.setdefault(residue_of(name), []).append(name)
        groups: list[list[str]] = []
        for names in by_residue.values():
            n_basins = MAX_BASINS + 1  # a residue starts a group
            for name in names:
                n_basins *= len(self.wells[name].names)
                if n_basins > MAX_BASINS:
                    groups.append([])
                    n_basins = len(self.wells[name].names)
                groups[-1].append(name)
        return tuple(map(tuple, groups))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all basins, those of a group after each other."""
        return tuple(name for names in self._names_by_group for name in names)

    @cached_property
    def _names_by_group(self) -> tuple[tuple[str, ...], ...]:
        return tuple(
            tuple(", ".join(names) for names in product(*(self.wells[t].names for t in group)))
            for group in self.groups
        )

    @cached_property
    def basins_of_group(self) -> tuple[range, ...]:
        """The indices in `names` of the basins of each group G."""
        ends = np.cumsum([0, *map(len, self._names_by_group)]).tolist()
        return tuple(range(a, b) for a, b in pairwise(ends))

    def labels(self, angles: Angles) -> npt.NDArray[np.int64]:
        """Return the basin [..., G] of each group, as indices in `names`, of angles [...] in rad.

        ValueError if `angles` lacks a torsion of the basins, or their shapes differ.
        """
        missing = sorted(set(self.torsions) - angles.keys())
        if missing:
            raise ValueError(f"angles: expected {', '.join(self.torsions)}, got no {missing[0]}")
        used = [np.asarray(angles[name]) for name in self.torsions or angles]
        shapes = {array.shape for array in used}
        if len(shapes) > 1:
            raise ValueError(f"angles: expected arrays of one shape, got {sorted(shapes)}")
        columns = []
        for group, basins in zip(self.groups, self.basins_of_group, strict=True):
            sizes = tuple(len(self.wells[name].names) for name in group)
            wells = tuple(self.wells[name].labels(angles[name]) for name in group)
            columns.append(basins.start + np.ravel_multi_index(wells, sizes))
        shape = shapes.pop() if shapes else ()
        return np.stack(columns, axis=-1) if columns else np.zeros((*shape, 0), dtype=np.int64)

    def inside(self, name: str, angles: Angles) -> npt.NDArray[np.bool_]:
        """Return whether each conformation is in a basin, [...]; see `labels`."""
        index = self.index(name)
        return np.asarray((self.labels(angles) == index).any(axis=-1))

    def index(self, name: str) -> int:
        """Return the index of a basin in `names`."""
        if name not in self.names:
            raise ValueError(f"basin: expected one of {list(self.names)}, got {name!r}")
        return self.names.index(name)

    def torsions_of(self, name: str) -> tuple[str, ...]:
        """Return the torsions of a basin."""
        index = self.index(name)
        found = zip(self.groups, self.basins_of_group, strict=True)
        return next(group for group, basins in found if index in basins)

    def has_borders_of(self, other: "Basins", name: str) -> bool:
        """Return whether a basin of these has the same borders in the others."""
        same = (self.wells[t].borders == other.wells[t].borders for t in self.torsions_of(name))
        return name in other.names and all(same)

    def completed(self, angles: Angles) -> "Basins":
        """Return these basins, and those that other samples [...] have where these have none.

        Torsions in which the samples have a well that the basins lack are divided again, by all
        samples together; the others keep their borders. Torsions without wells here are added.
        """
        wells = dict(self.wells)
        for name, value in angles.items():
            counts = count_angles(value)
            known = wells.get(name)
            if known is None:
                wells[name] = find_wells(name, counts)
            elif lacks_a_well(known, counts):
                wells[name] = find_wells(name, counts + np.asarray(known.counts))
        return Basins(wells)

    def to_config(self) -> dict[str, Any]:
        """Return the basins as the plain data of a ``config.json``."""
        return {
            name: {
                "borders_degrees": list(wells.borders),
                "names": list(wells.names),
                "counts": list(wells.counts),
            }
            for name, wells in self.wells.items()
        }

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Return the basins that `to_config` wrote; ValueError for other content."""
        if not isinstance(config, dict):
            raise ValueError(f"basins: expected an object, got {str(config)[:40]!r}")
        wells = {}
        for name, entry in config.items():
            try:
                wells[name] = _read_wells(entry)
            except ValueError as error:
                raise ValueError(f"basins: {name[:40]!r}: {error}") from error
        return cls(wells)


def _read_wells(entry: Any) -> Wells:
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {str(entry)[:40]!r}")
    borders, names, counts = (
        require_entry(entry, key, list) for key in ("borders_degrees", "names", "counts")
    )
    _check_numbers(borders, "borders_degrees", -180, 179)
    _check_numbers(counts, "counts", 0, 2**53)
    if sorted(set(borders)) != borders or len(borders) == 1:
        raise ValueError(f"borders_degrees: expected none, or 2 and more ascending, got {borders}")
    if len(counts) != N_BINS:
        raise ValueError(f"counts: expected {N_BINS} numbers, got {len(counts)}")
    if len(names) != len(borders) or len(set(map(str, names))) < len(names):
        raise ValueError(f"names: expected {len(borders)} different ones, got {len(names)}")
    if not all(isinstance(n, str) and n.isascii() and n.isprintable() for n in names):
        raise ValueError("names: expected printable text")
    if max(map(len, names), default=0) > _MAX_NAME:
        raise ValueError(f"names: expected at most {_MAX_NAME} letters")
    return Wells(tuple(borders), tuple(names), tuple(counts))


def _check_numbers(values: Sequence[Any], name: str, low: int, high: int) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}: expected whole numbers from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class TrainingBasins:
    """The basins of the frames that a flow was trained on, and how well these know them.

    Parameters
    ----------
    basins
        The basins found in the frames.
    temperature
        The temperature of the frames in K.
    populations
        For each basin, the fraction of the frames ``p`` in it with its ``stderr`` (None where it is
        not known), and the number of independent visits ``n_visits`` that it rests on.
    """

    basins: Basins
    temperature: float
    populations: Mapping[str, Mapping[str, float | None]]

    @classmethod
    def measure(cls, angles: Angles, temperature: float) -> Self:
        """Return the basins of frames [F] in order of time."""
        basins = Basins.find(angles)
        labels = basins.labels(angles)
        populations = {}
        for group, indices in enumerate(basins.basins_of_group):
            for index in indices:
                inside = labels[:, group] == index
                estimate = estimate_mean(inside[:, None])
                populations[basins.names[index]] = {
                    "p": estimate.value,
                    "stderr": estimate.stderr if np.isfinite(estimate.stderr) else None,
                    "n_visits": count_visits(inside[:, None], estimate.g),
                }
        return cls(basins, temperature, populations)

    def to_config(self) -> dict[str, Any]:
        """Return the plain data of a ``config.json``."""
        return {
            "torsions": self.basins.to_config(),
            "temperature_K": self.temperature,
            "populations": {name: dict(entry) for name, entry in self.populations.items()},
        }

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Return what `to_config` wrote; ValueError for other content."""
        basins = Basins.from_config(require_entry(config, "torsions", dict))
        populations = require_entry(config, "populations", dict)
        if populations.keys() != set(basins.names):
            raise ValueError(f"populations: expected those of {list(basins.names)}")
        for name, entry in populations.items():
            for key in ("p", "stderr", "n_visits"):
                value = require_entry(entry, key, float | int | NoneType)
                is_number = not isinstance(value, bool) and (key == "stderr" or value is not None)
                if not is_number or (value is not None and not 0 <= value < np.inf):
                    raise ValueError(f"populations: {name}: {key}: got {value!r}")
        temperature = check_positive(config.get("temperature_K"), "temperature_K")
        return cls(basins, temperature, populations)
