"""A stage at work in its directory."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from openmm_tsf.io.directory import DirectoryLock
from openmm_tsf.io.files import write_json
from openmm_tsf.io.run_config import CONFIG, SAMPLING_ENTRIES, read_config
from openmm_tsf.potentials.base import Potential, describe_potential
from openmm_tsf.systems.files import write_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.devices import check_device
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.duration import in_words
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import reopen_potential
from openmm_tsf.workflow.record import (
    check_same_request,
    read_stage_config,
    sampling_part,
    warn_of_other_versions,
)

logger = logging.getLogger(__name__)

_Config = dict[str, Any]  # the content of config.json, or a part of it


class Stage:
    """A stage at work: its directory, ``config.json``, molecule, options and costs."""

    def __init__(
        self, lock: DirectoryLock, molecule: MolecularSystem, options: RunOptions, config: _Config
    ) -> None:
        self.lock, self.molecule, self.options, self.config = lock, molecule, options, config
        self.costs = Costs()
        self.is_new = False

    @classmethod
    def open(
        cls,
        lock: DirectoryLock,
        molecule: MolecularSystem,
        options: RunOptions,
        request: _Config,
        may_differ: Sequence[str] = (),
    ) -> Self:
        """Start a stage, or resume the one in the directory if its request was the same.

        `request` is from `new_config`; the choices in `may_differ` may differ.
        """
        config = read_stage_config(lock.directory, request["stage"]) if options.resume else None
        stage = cls(lock, molecule, options, request if config is None else config)
        if config is None:
            stage.is_new = True
            stage.save()  # the first file: it says what this directory is
        else:
            warn_of_other_versions(lock.directory, config.get("versions"))
            check_same_request(lock.directory, config["choices"], request["choices"], may_differ)
        write_molecule(molecule, lock.directory)
        return stage

    @property
    def directory(self) -> Path:
        """The directory."""
        return self.lock.directory

    @property
    def choices(self) -> _Config:
        """The settings and inputs of the stage, and what was measured since."""
        choices: _Config = self.config["choices"]
        return choices

    @property
    def device(self) -> torch.device:
        """The device of torch: the one requested, or that of an earlier start."""
        return check_device(self.options.choose_device(self.choices))

    def save(self) -> None:
        """Write ``config.json``."""
        write_json(self.directory / CONFIG, self.config)

    def reload(self) -> None:
        """Read ``config.json`` again, after the sampler has added its entries."""
        self.config = read_config(self.directory)

    def record(self, **choices: Any) -> None:
        """Add choices to ``config.json``."""
        if any(name not in self.choices or self.choices[name] != choices[name] for name in choices):
            self.choices.update(choices)
            self.save()

    def record_ranks(self) -> None:
        """Record how many ranks train, after those of earlier starts; nothing for one alone."""
        sizes = [*self.choices.get("training_ranks", []), current_ranks().size]
        if sizes != [1] and sizes[-2:-1] != sizes[-1:]:
            self.record(training_ranks=sizes)

    def tell_duration(
        self, *, md: float = 0.0, training: float = 0.0, sampling: float = 0.0
    ) -> None:
        """Log and keep the seconds that the stages are expected to take."""
        parts = {"MD": md, "training": training, "sampling": sampling}
        words = [f"{name} {in_words(seconds)}" for name, seconds in parts.items() if seconds]
        total = md + training + sampling
        if len(words) > 1:
            words.append(f"{in_words(total)} in all, and the analysis")
        logger.info("expected on this machine, within a factor of two: %s", ", ".join(words))
        self.costs.seconds["expected"] = round(total, 3)

    def record_costs(self, step: str) -> None:
        """Keep what the stage has cost up to a step, just before the file that completes it."""
        self.config["costs"] = self.config.get("costs", {}) | {step: self.costs.to_config()}
        self.save()

    def restore_costs(self, step: str) -> None:
        """Continue from the costs up to a step that an earlier process completed."""
        recorded = self.config.get("costs", {}).get(step)
        if isinstance(recorded, dict):
            self.costs = Costs.from_config(recorded)

    def record_target(self, n_iterations: int, until: Sequence[str] | None = None) -> None:
        """Keep a total number of iterations that has grown, for a continuation after a kill.

        And the targets of precision, where they are given.
        """
        settings = sampling_part(self.choices.get("settings"))
        if not isinstance(settings, dict):
            return
        before = dict(settings)
        if settings.get("n_iterations", n_iterations) < n_iterations:
            settings["n_iterations"] = n_iterations
        if until is not None:
            settings["until"] = list(until)
        if settings != before:
            self.save()

    def remove_sampling_entries(self) -> None:
        """Remove from ``config.json`` what a killed start of sampling has added."""
        kept = {name: v for name, v in self.config.items() if name not in SAMPLING_ENTRIES}
        if kept != self.config:
            self.config = kept
            self.save()

    def open_potential(self, n_planned: int = 0, batch: int = 0) -> Potential:
        """Open the potential that the stage has recorded, or choose one and record it."""
        potential = reopen_potential(
            self.molecule,
            self.choices.get("potential"),
            self.options.platform,
            n_planned,
            batch,
            self.device,
        )
        if self.choices.get("potential") is None:
            self.record(potential=describe_potential(potential))
        return potential
