"""Directories of before some settings existed are read, resumed and lengthened."""

import json

import pytest

import openmm_tsf as tsf
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io.serialization import plain
from openmm_tsf.sampling.kernels.internal_walk import WhitenedCoordinates
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.workflow.record import with_later_fields
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import RunSettings, SamplingSettings

LATER = {
    "overlap", "estimator", "n_chains", "chain_share", "log_variance", "basin_balance",
    "n_independent", "n_walk", "swap", "local_interval", "optimizer", "weight_decay",
}  # fmt: skip


def without_later(content, keys=LATER):
    """What the earlier version would have written."""
    if isinstance(content, dict):
        return {k: without_later(v, keys) for k, v in content.items() if k not in keys}
    return [without_later(v, keys) for v in content] if isinstance(content, list) else content


@pytest.fixture
def frames(molecule):
    return MDDataset.shipped(molecule, stride=400)


def test_later_fields_are_filled_in():
    every = plain(RunSettings())
    assert without_later(every) != every
    assert with_later_fields(without_later(every)) == every
    assert with_later_fields(None) is None


def test_a_run_is_lengthened(tmp_path, molecule, frames):
    def settings(n):
        return SamplingSettings((300.0, 600.0), n_walkers=4, n_iterations=n, n_tuning=2)

    flow = TemperatureSteerableFlow.from_dataset(frames, n_blocks=1, hidden=(8,), seed=1)
    flow.save(tmp_path / "flow.pt")
    folder = tmp_path / "run"
    sample(
        tmp_path / "flow.pt", folder, settings(4), molecule=molecule, seed=1, start=frames,
        progress=False,
    )  # fmt: skip
    for name in ("settings.json", "config.json"):
        content = json.loads((folder / name).read_text())
        holder = content if name == "settings.json" else content["choices"]
        holder["settings"] = without_later(holder["settings"])
        (folder / name).write_text(json.dumps(content))
    sample(None, folder, settings(6), seed=1, resume=True, progress=False)
    assert tsf.load_run(folder).n_iterations == 6


def test_only_coordinates_without_overlap_are_whitened(molecule, frames):
    flow = TemperatureSteerableFlow.from_dataset(
        frames, n_blocks=1, hidden=(8,), seed=1, overlap=True
    )
    with pytest.raises(ValueError, match="coordinates: expected a layer whose copies do not over"):
        WhitenedCoordinates(flow.whitening, flow.coordinates, 600.0)
