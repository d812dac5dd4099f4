"""The numbers of all shards of a run side by side, as those of one run directory."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.io.segments import Segments
from openmm_tsf.io.shards import DAMAGED, read_shards

logger = logging.getLogger(__name__)

#: Costs of a run before production that each shard adds to.
_COSTS = ("energy_evaluations", "wall_seconds")


class ShardedSegments:
    """The arrays of the shards of a run, joined walker by walker; see `Segments` for the rest.

    Used are the first n iterations of every shard that has as many, with the n that gives the most
    samples: shards may be incomplete. What is damaged, not started or shorter is left out, and
    named in `left_out` and in a warning. An array is read shard by shard, so that no more than one
    shard is in memory beside it.

    Attributes
    ----------
    used
        The shards whose samples are used, in their order.
    left_out
        The reasons for the others, by name.
    n_iterations
        The iterations n of each.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self.run, self._config = run, config
        self.shards = read_shards(run, config)
        self.n_iterations = most_samples([shard.n_iterations for shard in self.shards])
        self.left_out = {
            shard.name: shard.problem or f"only {shard.n_iterations} iterations"
            for shard in self.shards
            if shard.problem or shard.n_iterations < self.n_iterations
        }
        self.used = [shard for shard in self.shards if shard.name not in self.left_out]
        if not self.used and any(shard.state == DAMAGED for shard in self.shards):
            raise ValueError(f"{run}: no shard can be read: {_words(self.left_out)}")
        if self.left_out and self.used:
            logger.warning("%s: %s", run, self.describe())

    def describe(self) -> str:
        """Say which samples are used."""
        n, all_of_them = self.n_iterations, len(self.shards)
        text = f"the first {n:,} iterations of {len(self.used)} of {all_of_them} shards are used"
        if self.left_out:
            text += f"; left out: {_words(self.left_out)}"
        longer = [shard.name for shard in self.used if shard.n_iterations > n]
        if longer:
            text += f"; {', '.join(longer)} have more iterations, which wait for the others"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return what is used, json-able, for a summary."""
        return {
            "n_shards": len(self.shards),
            "used": [shard.name for shard in self.used],
            "left_out": dict(self.left_out),
            "n_iterations": {shard.name: shard.n_iterations for shard in self.shards},
        }

    def completed_config(self) -> dict[str, Any]:
        """Return the run's ``config.json`` with the costs of the shards before their samples."""
        config = dict(self._config)
        for name in _COSTS:
            costs = dict(config.get(name, {}))
            more = [shard.config.get(name, {}).get("sampling") or 0 for shard in self.used]
            costs["sampling"] = (costs.get("sampling") or 0) + sum(more)
            config[name] = costs
        return config

    @property
    def _n_rungs(self) -> int:
        return len(self._config["temperatures_K"])

    @property
    def walkers_per_shard(self) -> int:
        """The number of walkers w of a shard."""
        return int(self._config["n_walkers"]) // len(self.shards)

    @property
    def n_walkers(self) -> int:
        """The number of walkers W of all shards that are used."""
        return self.walkers_per_shard * len(self.used)

    @cached_property
    def iteration(self) -> npt.NDArray[np.int64]:
        """The iterations [n] as the samplers count them."""
        first: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        for number, shard in enumerate(self.used):
            own = shard.open_segments().iteration[: self.n_iterations]
            if number and not np.array_equal(own, first):
                raise ValueError(
                    f"{shard.directory}: expected the iterations {first[:3]}... of shard "
                    f"{self.used[0].name}, got {own[:3]}..."
                )
            first = own
        return first

    @cached_property
    def frame_iteration(self) -> npt.NDArray[np.int64]:
        """The iterations [m] whose frames were saved: all, or some of `iteration`."""
        if not self.used:
            return self.iteration
        framed = self.used[0].open_segments().frame_iteration
        return framed[np.isin(framed, self.iteration)]

    @cached_property
    def energy(self) -> npt.NDArray[np.float64]:
        """The energies [n, W, R] in kJ/mol."""
        return self._join("energy", np.float64)

    @cached_property
    def replica(self) -> npt.NDArray[np.int64]:
        """The replica [n, W, R] at each rung."""
        return self._join("replica", np.int64)

    @cached_property
    def dihedrals(self) -> npt.NDArray[np.float32]:
        """The dihedrals [n, W, R, D] in rad."""
        return self._join("dihedrals", np.float32, len(self._config["dihedrals"]))

    def _join(self, name: str, dtype: Any, *event: int) -> npt.NDArray[Any]:
        w = self.walkers_per_shard
        joined = np.empty((self.n_iterations, self.n_walkers, self._n_rungs, *event), dtype)
        for number, shard in enumerate(self.used):
            series = getattr(shard.open_segments(), name)  # opened anew: nothing of it is kept
            joined[:, number * w : (number + 1) * w] = series[: self.n_iterations]
        return joined

    @cached_property
    def _opened(self) -> list[Segments]:
        """The shards' counts, which are small."""
        return [shard.open_segments() for shard in self.used]

    def _add(self, tables: Sequence[dict[str, npt.NDArray[np.int64]]]) -> dict[str, Any]:
        names = dict.fromkeys(name for table in tables for name in table)
        return {name: sum(table[name] for table in tables if name in table) for name in names}

    @property
    def accepted(self) -> dict[str, npt.NDArray[np.int64]]:
        """Accepted proposals of each kernel, in all iterations of the shards that are used."""
        return self._add([each.accepted for each in self._opened])

    @property
    def proposed(self) -> dict[str, npt.NDArray[np.int64]]:
        """Proposals of each kernel, in the shapes of `accepted`."""
        return self._add([each.proposed for each in self._opened])

    @property
    def rejected_non_finite(self) -> int:
        """Proposals rejected because the energy is not finite or x is outside the flow's domain."""
        return sum(each.rejected_non_finite for each in self._opened)

    @property
    def mirror_images(self) -> int:
        """Proposals rejected because a chiral centre has the wrong handedness."""
        return sum(each.mirror_images for each in self._opened)

    @property
    def n_evaluations(self) -> int:
        """Energy evaluations of production."""
        return sum(each.n_evaluations for each in self._opened)

    @property
    def wall_seconds(self) -> float:
        """The durations of production in s, added: shards may have run side by side."""
        return sum(each.wall_seconds for each in self._opened)

    @property
    def outside_domain(self) -> int:
        """The number of proposals in `rejected_non_finite` that left the flow's domain."""
        return sum(each.outside_domain for each in self._opened)


def most_samples(lengths: Sequence[int]) -> int:
    """Return the number n of iterations for which n times the shards of at least n is largest.

    Examples
    --------
    >>> from openmm_tsf.io.sharded_segments import most_samples
    >>> most_samples([2000, 2000, 10]), most_samples([100, 90, 95]), most_samples([0, 0])
    (2000, 90, 0)
    """
    return max(lengths, key=lambda n: (n * sum(other >= n for other in lengths), n), default=0)


def _words(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
