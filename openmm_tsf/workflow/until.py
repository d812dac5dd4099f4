"""Production until a target of precision is met.

The samples are looked at after fixed numbers of iterations, each a quarter larger than the one
before, whatever the clock says: a run that was stopped and resumed ends at the same iteration.

Does stopping bias the estimate? A rule that looks at an error until it is small prefers moments at
which the error is underestimated. It is asymptotically harmless (Chow and Robbins, Ann. Math.
Statist. 36, 457 (1965); Glynn and Whitt, Ann. Appl. Probab. 2, 180 (1992)) where the error is
consistent and the first look is late. So a target counts as met only where its assessment has
nothing missing (100 effective samples, 50 visits, agreement of the walkers, no drift) and the run
is equilibrated, and looks are few. `tests/workflow/test_until.py` stops 120 runs of a rare state in
this way: their mean is not biased, and their intervals hold as often as they say.

No error knows of what a run never saw. So production goes on, too, while a basin that has a
thousandth of the training frames was not visited at any temperature.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import mdtraj

from openmm_tsf.analysis.load import Run, load_run
from openmm_tsf.analysis.observables import (
    Definition,
    Observable,
    check_functions,
    define_observables,
    is_function,
)
from openmm_tsf.analysis.targets import Target, TargetAssessment
from openmm_tsf.analysis.training_checks import check_lost
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.provenance import recorded_intervals
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import slow_torsions
from openmm_tsf.workflow.stage import Stage

logger = logging.getLogger(__name__)

#: Iterations before the first look, and the ratio of each look to the one before.
FIRST_LOOK, GROWTH = 50, 1.25


def looks() -> Iterator[int]:
    """Yield the iterations after which targets are assessed: 50, 63, 79, 98, ..."""
    return (math.ceil(FIRST_LOOK * GROWTH**k) for k in count())


def next_look(n_iterations: int) -> int:
    """Return the first look after so many iterations."""
    return next(look for look in looks() if look > n_iterations)


def is_look(n_iterations: int) -> bool:
    """Return whether targets are assessed after so many iterations."""
    return next(look for look in looks() if look >= n_iterations) == n_iterations


def check_targets(
    until: Sequence[str],
    temperatures: Sequence[float],
    molecule: MolecularSystem,
    observe: Mapping[str, Definition],
) -> None:
    """Refuse targets whose torsion, observable or temperature the run will not have.

    And observables that the molecule does not have, or whose function fails.
    """
    observables = observables_of(molecule, observe)
    torsions = list(slow_torsions(molecule.topology))
    for text in until:
        Target.parse(text).check_for(torsions, temperatures, observables=observables)


def observables_of(
    molecule: MolecularSystem, observe: Mapping[str, Definition]
) -> dict[str, Observable]:
    """Return the observables of a molecule by name; functions are tried on its conformation."""
    if not observe:
        return {}
    topology = molecule.mdtraj_topology
    observables = define_observables(observe, topology, slow_torsions(molecule.topology))
    check_functions(observables, mdtraj.Trajectory(molecule.positions[None], topology))
    return observables


def known_observables(
    choices: Mapping[str, Any], given: Mapping[str, Definition]
) -> dict[str, Definition]:
    """Return recorded definitions with those given; functions are not imported from records."""
    recorded: Mapping[str, str] = choices.get("observables", {})
    return {**{k: text for k, text in recorded.items() if not is_function(text)}, **given}


def record_observables(stage: Stage) -> None:
    """Add the observables of the options to ``config.json``, functions by name only."""
    given = observables_of(stage.molecule, stage.options.observe)
    if given:
        texts = {name: each.definition for name, each in given.items()}
        stage.record(observables=stage.choices.get("observables", {}) | texts)


def sample_until(
    stage: Stage, sampler: ParallelTempering, n_iterations: int, until: Sequence[str]
) -> None:
    """Sample until all targets are met, or to `n_iterations` in all; without targets to the latter.

    Basins of the training frames that were never visited are waited for. What was reached is logged
    and recorded as ``stopped`` among the choices in ``config.json``.
    """
    targets = [Target.parse(text) for text in until]
    done, intervals = sampler.n_done, recorded_intervals(stage.choices)
    while True:
        # Twice, so that the second half has frames.
        can_look = done >= 2 * intervals.frames
        if targets and can_look and (is_look(done) or done >= n_iterations):
            run = load_run(stage.directory)
            run.observe(stage.options.observe)
            assessed, lost = [target.assess(run) for target in targets], find_lost(run)
            logger.info("after %d iterations: %s", done, "; ".join([*map(str, assessed), *lost]))
            if done >= n_iterations or (not lost and all(each.is_met for each in assessed)):
                _record(stage, done, assessed, lost)
                return
        if done >= n_iterations:
            return
        end = min(n_iterations, next_look(done)) if targets else n_iterations
        sampler.run(
            end - done,
            stage.directory,
            save_interval=intervals.frames,
            numbers_interval=intervals.numbers,
            checkpoint_seconds=stage.options.checkpoint_seconds,
            progress=stage.options.progress,
        )
        done = end


def find_lost(run: Run) -> list[str]:
    """Return, in words, the basins of the training frames that a run never visited."""
    frames = run.training_basins
    if frames is None:
        return []
    return list(check_lost(frames, (n for n in run.basins.names if not run.in_basin(n).any())))


def _record(
    stage: Stage, done: int, assessed: Sequence[TargetAssessment], lost: Sequence[str]
) -> None:
    """Record and log at which iteration production stopped, and whether the targets are met."""
    is_met = not lost and all(each.is_met for each in assessed)
    stage.record(
        stopped={
            "n_iterations": done,
            "is_met": is_met,
            "lost_basins": list(lost),
            "targets": [
                {
                    "target": str(each.target),
                    "temperature_K": each.temperature,
                    "value": _finite(each.assessment.value),
                    "stderr": _finite(each.assessment.stderr),
                    "is_met": each.is_met,
                }
                for each in assessed
            ],
        }
    )
    if is_met:
        logger.info("production stops after %d iterations: every target is met", done)
        return
    n_used = load_run(stage.directory).n_used
    needed = [each.n_iterations_needed(n_used) for each in assessed if not each.is_met]
    more = ""
    if needed and all(map(math.isfinite, needed)):
        in_all = max(needed) * recorded_intervals(stage.choices).numbers
        more = f"; some {in_all:,.0f} are needed"
    what = "the targets are not met" if needed else "the targets are met, but a basin is missing"
    words = "".join(f"; {each}" for each in lost)
    logger.warning("%s after %d iterations, the most allowed%s%s", what, done, more, words)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
