"""Constrained bonds of a molecule: which of them a flow can leave out, and frames with them."""

import logging

import openmm.app as app
from torch import Tensor

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.systems.consistency import pair_label
from openmm_tsf.utils.topology import bonds_of

logger = logging.getLogger(__name__)

#: Largest deviation of a constrained distance in frames, relative to it: OpenMM's tolerance is
#: 1e-5, that of other programs up to 1e-4.
LARGEST_DEVIATION = 1e-4
#: Deviations of frames that were projected before, in nm.
_ROUNDING = 1e-12
_WAYS_OUT = (
    "build the System with forcefield.createSystem(topology, nonbondedMethod=NoCutoff, "
    "constraints={}, rigidWater=False)"
)


def check_constraints(constraints: Constraints, topology: app.Topology) -> None:
    """Refuse (ValueError) constraints of anything but bonds, and rings of constrained bonds.

    Flows leave out constrained bonds. Without a constrained angle (``HAngles``, rigid water), and
    without a ring, that is all that constraints do.
    """
    bonds = {frozenset(pair) for pair in bonds_of(topology).tolist()}
    pairs = constraints.pairs.tolist()
    others = [pair for pair in pairs if frozenset(pair) not in bonds]
    if others:
        raise ValueError(
            f"system: expected constraints of bonds only, but {len(others)} of {len(pairs)} are of "
            f"atoms that are not bonded, the first of {pair_label(topology, others[0])}: "
            f"constrained angles are not supported; {_WAYS_OUT.format('HBonds or None')}"
        )
    part = list(range(constraints.n_atoms))
    for first, second in pairs:
        if part[first] == part[second]:
            raise ValueError(
                "system: rings of constrained bonds are not supported, got one that contains "
                f"{pair_label(topology, (first, second))}; {_WAYS_OUT.format('HBonds or None')}"
            )
        part = [part[second] if other == part[first] else other for other in part]


def project_frames(
    constraints: Constraints, topology: app.Topology, positions: Tensor, name: str = "positions"
) -> Tensor:
    """Return frames [F, N, 3] (nm) with distances that are constrained to rounding.

    Frames of constrained dynamics are, to the tolerance of the program and the precision of the
    file. Others are a ValueError.
    """
    deviations = constraints.deviations(positions).abs()
    relative = deviations / constraints.lengths
    largest = float(relative.max())
    if not largest <= LARGEST_DEVIATION:
        wrong = int((relative > LARGEST_DEVIATION).any(dim=1).sum())
        frame, pair = divmod(int(relative.argmax()), constraints.n_constraints)
        first, second = constraints.pairs[pair].tolist()
        got = float((positions[frame, first] - positions[frame, second]).norm())
        raise ValueError(
            f"{name}: expected the {constraints.n_constraints} constrained distances of the "
            f"System, to {LARGEST_DEVIATION:g} of them, but {wrong} of {len(positions)} frames "
            f"have others: {pair_label(topology, (first, second))} are at {got:.5g} nm in frame "
            f"{frame}, constrained to {float(constraints.lengths[pair]):.5g} nm. They are of "
            "dynamics without these constraints (use a System that has none) or were rounded (PDB, "
            "GRO and XTC files; write DCD or NetCDF)"
        )
    if float(deviations.max()) > _ROUNDING:
        logger.info(
            "%d frames: constrained distances deviate by %.1e nm at most (%.1e of their length) "
            "and are set to their values",
            len(positions), float(deviations.max()), largest,
        )  # fmt: skip
    return constraints.project(positions)
