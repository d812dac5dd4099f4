"""The ladder of a run, chosen by a short pilot."""

import logging
from collections.abc import Sequence

from openmm_tsf.analysis.ladder import choose_ladder, ladder_rejections
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.activity import log_while
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.pilot import run_pilot
from openmm_tsf.workflow.potential_choice import open_potential
from openmm_tsf.workflow.sample import sampling_threads

logger = logging.getLogger(__name__)

#: Swaps between neighbours that may be rejected. With a flow most exchanges are steered swaps,
#: which are rejected less: this makes the ladder of the presets for alanine dipeptide.
MOST_REJECTED = 0.82
#: 0.1 ps each: ten seconds of alanine dipeptide.
_LADDER_ITERATIONS = 100


def choose_temperatures(
    molecule: MolecularSystem,
    ends: Sequence[float],
    *,
    most_rejected: float = MOST_REJECTED,
    options: RunOptions | None = None,
) -> tuple[float, ...]:
    """Return the shortest ladder between two temperatures in K on which replicas are exchanged.

    Equal rejections of plain swaps, measured by a pilot of ten seconds or so of dynamics on a
    provisional ladder; the result depends on the seed and the machine alone.

    Parameters
    ----------
    molecule
        The molecule.
    ends
        The lowest and the highest temperature in K (or Quantities).
    most_rejected
        Of the swaps of neighbours. The default is for a run with a flow, whose steered swaps are
        accepted more often; plain replica exchange is fastest with half of the swaps rejected.
    options
        Seed and platform.
    """
    options = options or RunOptions()
    ladder = as_temperatures(ends)
    if len(ladder) != 2:
        raise ValueError(f"temperatures: expected the lowest and the highest, got {ladder}")
    low, high = ladder
    seed, length = options.choose_seed({}), _LADDER_ITERATIONS
    with (
        sampling_threads(),
        open_potential(molecule, options.platform, 0, 0) as potential,
        log_while(logger, "choosing the temperatures by a pilot"),
    ):
        pilot = run_pilot(molecule, potential, low, high, n_iterations=length, seed=seed)
    rejection = pilot.rejection()
    chosen = choose_ladder(rejection, low, high, most_rejected)
    rejected = ladder_rejections(rejection, chosen)
    logger.info(
        "ladder of %s K: %.0f to %.0f %% of plain swaps are rejected",
        ", ".join(f"{kelvin:g}" for kelvin in chosen), 100 * rejected.min(), 100 * rejected.max(),
    )  # fmt: skip
    return chosen
