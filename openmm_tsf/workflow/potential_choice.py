"""Which potential a run uses, and whether compiling it pays."""

import logging
from typing import Any

import openmm
import torch

from openmm_tsf.potentials.base import Potential, is_potential_description
from openmm_tsf.potentials.blocks import bytes_per_conformation
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.torch_potential import TooLarge
from openmm_tsf.sampling.kernels.schedule import SequenceSettings
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training import FitSettings
from openmm_tsf.training.target import trains_in_single_precision
from openmm_tsf.utils.devices import CPU
from openmm_tsf.workflow.settings import SamplingSettings

logger = logging.getLogger(__name__)

#: Compiling takes a minute or two and saves some 50 microseconds per evaluation of small molecules.
COMPILE_FROM = 1_000_000
#: Smaller batches would fill a compiled block mostly with copies.
COMPILE_BATCH = 32

#: The fewest rows of a compiled block on a GPU. Batches of less than a quarter are not worth a
#: program, and in float32 it has twice as many: 384 serves the 192 rows of the default sampling in
#: both.
GPU_BLOCK = 384
#: The most: a block of float32 has twice as many, and the largest are of 16384.
_LARGEST_GPU_BLOCK = 8192

#: Bytes of a block: 8192 rows of up to 28 atoms, and fewer of larger molecules.
_MOST_GPU_MEMORY = 2**32
_ONE_BY_ONE = (
    "energies by OpenMM's Contexts, one conformation after the other, which is far slower than the "
    "GPU"
)

#: Forces of small molecules for which torch is faster than OpenMM without being compiled.
_SLOW_IN_OPENMM = (openmm.CustomGBForce, openmm.CustomNonbondedForce)


def planned_sampling(settings: SamplingSettings, n_iterations: int | None = None) -> int:
    """Return the number of evaluations that replica exchange takes, roughly, dynamics included."""
    iterations = settings.n_iterations if n_iterations is None else n_iterations
    per_walker = settings.n_independent + settings.n_crank_nicolson + settings.n_walk + 2.0
    if settings.local_interval:
        per_walker += (SequenceSettings().local_steps + 1) / settings.local_interval
    per_iteration = per_walker * settings.n_walkers * len(settings.temperatures)
    return round((iterations + settings.n_tuning) * per_iteration)


def batch_of(settings: SamplingSettings) -> int:
    """Return the number of conformations that the kernels evaluate in one call."""
    return settings.n_walkers * len(settings.temperatures)


def planned_training(settings: FitSettings) -> int:
    """Return the number of evaluations in the energy term of training."""
    return settings.n_steps * settings.kl_batch_size if settings.lambda_max > 0 else 0


def tell_precision(potential: Potential, settings: FitSettings) -> None:
    """Log where a training takes its forces in float32."""
    if settings.lambda_max > 0 and trains_in_single_precision(potential, settings.dtype):
        logger.info("forces for the training in float32, all other energies in float64")


def open_potential(
    molecule: MolecularSystem,
    platform: str | None,
    planned: int,
    batch: int,
    compiled: bool | None = None,
    device: torch.device = CPU,
) -> Potential:
    """Open the potential that is fastest for this much work, by rules that use no clock.

    It is compiled torch for a long run, torch where OpenMM is slow at a Force, and OpenMM's
    Contexts otherwise: on `platform` if the user chose one. `planned` is the number of evaluations,
    `batch` of how many at once; `compiled` is the earlier choice of a run on torch that is resumed.
    On a GPU energies are torch's unless a platform is given or a Force is not covered.
    """
    if platform is not None:
        logger.info("energies by OpenMM on %s, as was chosen", platform)
        if device.type != "cpu":
            logger.warning("%s: without --platform they are torch's", _ONE_BY_ONE)
        return molecule.potential(platform=platform)
    if device.type != "cpu":
        pays = planned >= COMPILE_FROM and batch >= COMPILE_BATCH
        return _open_on_gpu(molecule, device, pays if compiled is None else compiled, batch)
    if compiled is not None:
        return molecule.potential(compile=compiled)
    number = f"about {planned:,} energies are planned"
    if planned >= COMPILE_FROM and batch >= COMPILE_BATCH:
        logger.info("energies by torch, compiled where it can be: %s", number)
        return molecule.potential(compile=True)
    for force in molecule.system.getForces():
        if isinstance(force, _SLOW_IN_OPENMM):
            logger.info("energies by torch where it can: OpenMM is slow at %s", force.getName())
            return molecule.potential()
    logger.info("energies by OpenMM's Contexts: %s, too few to pay for compiling", number)
    return molecule.potential(kind="openmm")


def gpu_block_size(batch: int) -> int:
    """Return the rows of a compiled block on a GPU for batches of this size: equal parts of it."""
    n_blocks = -(-max(1, batch) // _LARGEST_GPU_BLOCK)
    return max(GPU_BLOCK, -(-batch // n_blocks))


def _open_on_gpu(
    molecule: MolecularSystem, device: torch.device, compiled: bool, batch: int
) -> Potential:
    options: dict[str, Any] = {"device": device, "compile": compiled}
    if compiled:
        each = bytes_per_conformation(molecule.n_atoms, torch.float64)
        options["memory"] = min(max(gpu_block_size(batch) * each, 2**20), _MOST_GPU_MEMORY)
    try:
        return molecule.potential(kind="torch", **options)
    except (NotCovered, TooLarge) as reason:
        logger.warning("%s: %s", _ONE_BY_ONE, reason)
        return molecule.potential(kind="openmm")


def reopen_potential(
    molecule: MolecularSystem,
    recorded: Any,
    platform: str | None,
    planned: int = 0,
    batch: int = 0,
    device: torch.device = CPU,
) -> Potential:
    """Open the potential that a stage has recorded, if it has, on `platform` if given.

    `recorded` is from :func:`openmm_tsf.potentials.base.describe_potential`.
    """
    if recorded is None:
        return open_potential(molecule, platform, planned, batch, device=device)
    if not is_potential_description(recorded):
        raise ValueError(f"potential: expected what a run records of it, got {recorded!r}")
    before = recorded["platform"]
    if platform is not None or before is not None:
        n_contexts = recorded["n_contexts"] if platform in (None, before) else None
        return molecule.potential(platform=platform or before, n_contexts=n_contexts)
    compiled = bool(recorded.get("compiled"))
    return open_potential(molecule, None, planned, batch, compiled, device)
