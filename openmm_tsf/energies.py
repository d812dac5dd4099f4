"""Which potential a run uses, and whether compiling it pays."""

import logging
from typing import Any

from openmm_tsf.potentials.base import Potential
from openmm_tsf.presets import SamplingSettings
from openmm_tsf.systems import MolecularSystem
from openmm_tsf.training import FitSettings

logger = logging.getLogger(__name__)

#: Compiling takes up to a minute and saves some 50 microseconds an evaluation on small molecules.
COMPILE_FROM = 1_000_000


def planned_sampling(settings: SamplingSettings, n_iterations: int | None = None) -> int:
    """Evaluations that replica exchange by the default kernels takes, roughly."""
    iterations = settings.n_iterations if n_iterations is None else n_iterations
    per_iteration = 7 * settings.n_walkers * len(settings.temperatures)
    return (iterations + settings.n_tuning) * per_iteration


def planned_training(settings: FitSettings) -> int:
    """Evaluations of the training's energy term."""
    return settings.n_steps * settings.kl_batch_size if settings.lambda_max > 0 else 0


def open_potential(
    molecule: MolecularSystem, platform: str | None, planned: int, compiled: bool | None = None
) -> Potential:
    """The potential of a run.

    Parameters
    ----------
    molecule
        The molecule.
    platform
        An OpenMM platform, if the user asked for one: then OpenMM's Contexts.
    planned
        Evaluations that are to come, which decide about compiling, so that the same command makes
        the same choice again.
    compiled
        The choice made before, where a run is resumed.
    """
    if platform is not None:
        return molecule.potential(platform=platform)
    compiled = planned >= COMPILE_FROM if compiled is None else compiled
    return molecule.potential(compile=compiled)


def reopen_potential(
    molecule: MolecularSystem, written: dict[str, Any], platform: str | None
) -> Potential:
    """The potential of a run that is resumed, as ``config.json`` has it, on `platform` if given."""
    before = written["platform"]
    if platform is not None or before is not None:
        same = platform in (None, before)
        return molecule.potential(
            platform=platform or before, n_contexts=written["n_contexts"] if same else None
        )
    return open_potential(molecule, None, 0, compiled=bool(written.get("compiled")))
