"""Flows whose coordinates let the copies of equivalent hydrogens overlap."""

import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.sampling.kernels.internal_walk import WhitenedCoordinates
from openmm_tsf.systems.dataset import MDDataset


@pytest.fixture
def frames(molecule):
    return MDDataset.shipped(molecule, stride=400)


def test_only_overlapping_flows_have_the_new_format(tmp_path, molecule, frames):
    for overlap, number in ((False, 1), (True, 2)):
        flow = TemperatureSteerableFlow.from_dataset(
            frames, n_blocks=1, hidden=(8,), seed=1, overlap=overlap
        )
        flow.save(tmp_path / "flow.pt")
        assert read_tensors(tmp_path / "flow.pt", "flow file")["format"] == number
        assert load_flow(tmp_path / "flow.pt", molecule).overlap == overlap
    with pytest.raises(ValueError, match="coordinates: expected a layer whose copies do not over"):
        WhitenedCoordinates(flow.whitening, flow.coordinates, 600.0)


def test_draws_without_geometry_have_no_weight(molecule, frames):
    """Wide draws of an overlapping flow: log_prob is finite or +inf, never NaN."""
    flow = TemperatureSteerableFlow.from_dataset(
        frames, n_blocks=1, hidden=(8,), seed=1, overlap=True
    )
    drawn = flow.sample(2000, 60_000.0, torch.Generator().manual_seed(1))
    assert not bool(torch.isnan(drawn.log_prob).any())
    outside = ~torch.isfinite(drawn.log_prob)
    assert int(outside.sum()) > 0
    assert bool((drawn.log_prob[outside] == torch.inf).all())
