"""What a run costs."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openmm_tsf.potentials.base import Potential

logger = logging.getLogger(__name__)


@dataclass
class Costs:
    """Energy evaluations and wall seconds by stage: md, training, sampling.

    ``sampling`` is what came before production (rounds, tuning, the start); the costs of production
    are in its segments. ``compilation`` is a part of the others. None: not known.
    """

    evaluations: dict[str, int | None] = field(
        default_factory=lambda: {"md": None, "training": 0, "sampling": 0}
    )
    seconds: dict[str, float | None] = field(
        default_factory=lambda: {"md": None, "training": 0.0, "sampling": 0.0}
    )

    @contextmanager
    def counting(self, stage: str, potential: Potential) -> Iterator[None]:
        """Add the costs of the block to a stage."""
        before, start = potential.n_evaluations, time.monotonic()
        compiled = getattr(potential, "compile_seconds", 0.0)
        try:
            yield
        finally:
            self.add(stage, potential.n_evaluations - before, time.monotonic() - start)
            if (more := getattr(potential, "compile_seconds", 0.0) - compiled) > 0:
                before_it = self.seconds.get("compilation") or 0.0
                self.seconds["compilation"] = round(before_it + more, 3)

    @contextmanager
    def measuring(self, stage: str, potential: Potential) -> Iterator[None]:
        """Add the time of the block to a stage; its evaluations are not those of the stage.

        An error in the block ends it and is logged: the stage itself may get by without.
        """
        before = potential.n_evaluations
        with self.counting(stage, potential):
            try:
                yield
            except Exception as error:
                logger.info("the duration could not be measured: %s", error)
            finally:
                self.add(stage, before - potential.n_evaluations, 0.0)

    def add(self, stage: str, evaluations: int, seconds: float) -> None:
        """Add to a stage."""
        self.evaluations[stage] = (self.evaluations[stage] or 0) + evaluations
        self.seconds[stage] = round((self.seconds[stage] or 0.0) + seconds, 3)

    def to_config(self) -> dict[str, Any]:
        """Return the entries of ``config.json``."""
        return {"energy_evaluations": dict(self.evaluations), "wall_seconds": dict(self.seconds)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Costs":
        """Return the costs that an earlier stage recorded; other entries are left out."""
        costs = cls()
        for stage, value in _numbers(config.get("energy_evaluations")):
            costs.evaluations[stage] = int(value)
        for stage, value in _numbers(config.get("wall_seconds")):
            costs.seconds[stage] = value
        return costs


def _numbers(entry: Any) -> list[tuple[str, float]]:
    return [
        (str(name), value)
        for name, value in (entry.items() if isinstance(entry, dict) else ())
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
