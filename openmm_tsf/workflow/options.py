"""How a stage is run, apart from what it computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openmm_tsf.analysis.observables import Definition, check_definitions
from openmm_tsf.io.directory import CHECKPOINT_SECONDS
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.units import SECOND, in_unit
from openmm_tsf.utils.devices import check_device
from openmm_tsf.utils.distributed import current_ranks
from openmm_tsf.utils.validation import (
    check_bool,
    check_fields,
    check_int,
    check_seconds,
    check_seed,
    check_threads,
    optional,
)

DEFAULT_SEED = 1


@dataclass(frozen=True)
class RunOptions:
    """How a stage is run.

    Parameters
    ----------
    seed
        Seed of everything random; by default 1, or that of the stage that is resumed.
    platform
        OpenMM platform of energies and MD. By default energies of a long run are compiled by torch
        where it covers the System; otherwise, and for MD, the fastest platform is measured.
    device
        Device of torch for the flow, its training, the walkers and, where torch computes them, the
        energies: ``"cpu"`` (default, or that of the stage that is resumed), ``"cuda"``,
        ``"cuda:1"``, ... With several ranks ``"cuda"`` is that of each rank.
    threads
        Threads of MD on OpenMM's CPU platform (default 1). With more of them, frames differ in
        their last bits from run to run.
    resume
        Continue what is in the output directory, as if it had not stopped. Where nothing was
        started yet, start.
    checkpoint_seconds
        Time between checkpoints in s (or a Quantity).
    progress
        Show progress: bars in terminals and notebooks, lines in log files. Before a long stage,
        measure and log how long it will take; this changes no number.
    compile_flow
        Compile the maps of the flow for production
        (:func:`openmm_tsf.flows.compilation.compile_for_sampling`): by default as the stage that is
        resumed, otherwise not. It takes minutes the first time and is meant for GPUs, where
        launching kernels takes the time; on a CPU it is no faster. Samples are as exact, but not
        the same bit by bit as those without.
    observe
        Observables that reports and targets of precision are about, by name: a definition in words
        or a function (:func:`openmm_tsf.analysis.observables.define_observables`). Those in words
        are recorded with a run; functions are recorded by name, and given again to each stage. A
        run that is resumed keeps the definition of a name.
    shard
        Of a run in shards: sample only this one, from 0, with the flow and the step sizes that are
        there. Where it has not started it starts, and without `resume` it must not have.
    prepare
        Of a run in shards: MD, training and tuning only.

    Examples
    --------
    >>> from openmm_tsf.workflow.options import RunOptions
    >>> RunOptions(seed=3, resume=True).checkpoint_seconds
    30.0
    """

    seed: int | None = None
    platform: str | None = None
    threads: int | None = None
    resume: bool = False
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    progress: bool = True
    device: str | None = None
    compile_flow: bool | None = None
    observe: Mapping[str, Definition] = field(default_factory=dict)
    shard: int | None = None
    prepare: bool = False

    def __post_init__(self) -> None:
        if self.platform is not None:
            check_platform(self.platform)
        check_fields(
            self,
            seed=optional(check_seed),
            threads=optional(check_threads),
            checkpoint_seconds=lambda v, name: check_seconds(in_unit(v, SECOND, name), name),
            resume=check_bool,
            progress=check_bool,
            device=optional(_choose_device),
            compile_flow=optional(check_bool),
            observe=check_definitions,
            shard=optional(partial(check_int, least=0)),
            prepare=check_bool,
        )
        if self.prepare and self.shard is not None:
            raise ValueError(f"prepare: expected False with a shard, got True and {self.shard}")

    def choose_seed(self, recorded: Mapping[str, Any]) -> int:
        """Return the seed, by default that of the choices recorded at an earlier start."""
        seed: int = recorded.get("seed", DEFAULT_SEED) if self.seed is None else self.seed
        return seed

    def choose_device(self, recorded: Mapping[str, Any]) -> str:
        """Return the device, by default that of the choices recorded at an earlier start."""
        if self.device is not None:
            return self.device
        device: str = recorded.get("device", "cpu")
        # That of rank 0 is recorded.
        return device if current_ranks().size == 1 else _choose_device(device.partition(":")[0])

    def choose_compile_flow(self, recorded: Mapping[str, Any]) -> bool:
        """Return whether flows are compiled, by default as at an earlier start."""
        before = recorded.get("compile_flow", False) is True
        return before if self.compile_flow is None else self.compile_flow


def _choose_device(device: Any, name: str = "device") -> str:
    """The device of this rank, with its index."""
    ranks = current_ranks()
    if ranks.size > 1 and isinstance(device, str):
        device = ranks.choose_device(device)
    return str(check_device(device, name))
