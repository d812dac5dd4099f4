"""The fixed layers of a molecule's flow, fitted on frames: coordinates and standardisation."""

import torch

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens


def fit_layers(
    dataset: MDDataset, metric: str, fold_methyls: bool, overlap: bool
) -> tuple[InternalCoordinates, Whitening]:
    """Return the layers that :meth:`AugmentedFlow.from_dataset` fits to a dataset of a molecule."""
    molecule = dataset.molecule
    assert molecule is not None
    layer = InternalCoordinates.from_topology(
        molecule.topology,
        molecule.positions,
        metric=metric,
        equivalent=equivalent_hydrogens(molecule) if fold_methyls else (),
        overlap=overlap,
        **molecule.constraint_options,
    )
    layer.fit_branch_cuts(layer.bonds_angles_torsions(dataset.positions)[2])
    u, log_det = layer.inverse_and_log_det(dataset.positions)
    outside = int((~torch.isfinite(log_det)).sum())
    if outside:
        other = "another handedness than the molecule's reference positions"
        raise ValueError(f"dataset: {outside} of {len(u)} frames have {other}")
    train, _ = layer.inverse_and_log_det(dataset.split().train.positions)
    return layer, Whitening.fit(train, layer.kinds)
