"""What is looked at before a flow is made from frames."""

import logging

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_ensemble import check_energies, check_ensemble
from openmm_tsf.systems.frame_numbers import check_enough_frames, warn_of_few_frames
from openmm_tsf.systems.torsion_visits import describe_rare_visits, describe_single_wells

logger = logging.getLogger(__name__)


def check_frames_to_train_on(dataset: MDDataset) -> None:
    """Refuse a molecule's frames that no flow can be made from, and warn of those that tell little.

    Frames without a name, that were not read from a file, are compared with the System's forces as
    those of a file are. What is refused there is a warning here: they may be made on purpose.
    """
    molecule = dataset.molecule
    assert molecule is not None
    parts = molecule.topology, molecule.positions
    InternalCoordinates.from_topology(*parts, **molecule.constraint_options)  # may have none
    check_enough_frames(dataset, molecule)
    if not dataset.name:
        try:
            check_ensemble(molecule, dataset.positions, dataset.temperature)
        except ValueError as error:
            logger.warning("%s", error)
    if dataset.energies is not None:
        check_energies(molecule, dataset.positions, dataset.energies)
    warn_of_few_frames(dataset, molecule)
    warn_of_rare_visits(dataset)


def warn_of_rare_visits(dataset: MDDataset) -> list[str]:
    """Log wells of slow torsions that the frames hardly visit; return these, in words.

    Torsions that have a single well are logged, too: the frames alone cannot tell whether that is
    all.
    """
    rare = describe_rare_visits(dataset)
    for message in (*rare, *describe_single_wells(dataset)):
        logger.warning("frames: %s", message)
    return rare
