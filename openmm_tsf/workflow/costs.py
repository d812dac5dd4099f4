"""What a run costs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from openmm_tsf.potentials.base import Potential


@dataclass
class Costs:
    """Energy evaluations and wall seconds by stage: md, training, sampling.

    ``sampling`` has what came before production (rounds, tuning, the start); production itself is
    in the segments. ``compilation`` is a part of the others. None: not known.
    """

    evaluations: dict[str, int | None] = field(
        default_factory=lambda: {"md": None, "training": 0, "sampling": 0}
    )
    seconds: dict[str, float | None] = field(
        default_factory=lambda: {"md": None, "training": 0.0, "sampling": 0.0}
    )

    @contextmanager
    def counting(self, stage: str, potential: Potential) -> Iterator[None]:
        """Add what happens in the block to a stage."""
        before, start = potential.n_evaluations, time.monotonic()
        compiled = getattr(potential, "compile_seconds", 0.0)
        try:
            yield
        finally:
            evaluations, seconds = self.evaluations[stage] or 0, self.seconds[stage] or 0.0
            self.evaluations[stage] = evaluations + potential.n_evaluations - before
            self.seconds[stage] = round(seconds + time.monotonic() - start, 3)
            if (more := getattr(potential, "compile_seconds", 0.0) - compiled) > 0:
                so_far = self.seconds.get("compilation") or 0.0
                self.seconds["compilation"] = round(so_far + more, 3)

    def add(self, stage: str, evaluations: int, seconds: float) -> None:
        """Add what an earlier process did."""
        self.evaluations[stage] = (self.evaluations[stage] or 0) + evaluations
        self.seconds[stage] = round((self.seconds[stage] or 0.0) + seconds, 3)

    def restore(self, config: Any) -> None:
        """Take what `to_config` gave in an earlier process, where there is any."""
        if isinstance(config, dict):
            before = self.from_config(config)
            self.evaluations, self.seconds = before.evaluations, before.seconds

    def to_config(self) -> dict[str, Any]:
        """Entries of ``config.json``."""
        return {"energy_evaluations": dict(self.evaluations), "wall_seconds": dict(self.seconds)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Costs":
        """What an earlier stage wrote; what is no number is not known."""
        costs = cls()
        for stage, value in _numbers(config.get("energy_evaluations")):
            costs.evaluations[stage] = int(value)
        for stage, value in _numbers(config.get("wall_seconds")):
            costs.seconds[stage] = value
        return costs


def _numbers(entry: Any) -> list[tuple[str, float]]:
    if not isinstance(entry, dict):
        return []
    return [
        (str(name), value)
        for name, value in entry.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
