"""How a stage is run, apart from what it computes."""

from dataclasses import dataclass
from functools import partial

from openmm_tsf.io.directory import CHECKPOINT_SECONDS
from openmm_tsf.potentials.platforms import check_platform
from openmm_tsf.utils.validation import (
    check_choice,
    check_fields,
    check_seconds,
    check_seed,
    check_threads,
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
        where it covers the System (:func:`openmm_tsf.workflow.potential_choice.open_potential`);
        otherwise, and for MD, the fastest platform is measured.
    threads
        Threads of MD on OpenMM's CPU platform (default 1). With more of them OpenMM's sums depend
        on the order in which the threads end, and frames differ in their last bits from run to run.
    resume
        Continue what is in the output directory, as if it had not stopped. Where nothing was
        started yet, start.
    checkpoint_seconds
        Time between checkpoints.
    progress
        Show progress bars.

    Raises
    ------
    TypeError, ValueError
        If a value is not valid on this machine.

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

    def __post_init__(self) -> None:
        if self.platform is not None:
            check_platform(self.platform)
        if self.seed is not None:
            check_fields(self, seed=check_seed)
        if self.threads is not None:
            check_fields(self, threads=check_threads)
        is_bool = partial(check_choice, allowed=(False, True))
        check_fields(self, checkpoint_seconds=check_seconds, resume=is_bool, progress=is_bool)
