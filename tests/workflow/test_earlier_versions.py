"""Directories of before some settings existed are read, resumed and lengthened."""

import json

import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials import GaussianWell
from openmm_tsf.sampling.kernels.internal_walk import WhitenedCoordinates
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings, fit
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
    every = to_plain_data(RunSettings())
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


@pytest.mark.parametrize(
    ("number", "estimator"), [(1, "direct"), (2, "direct"), (2, "path"), (3, "path")]
)
def test_a_training_is_resumed(number, estimator, tmp_path):
    """Of the older formats, without later settings; format 1: also no state of the objective."""
    path, potential = tmp_path / "training.pt", GaussianWell(torch.eye(2, dtype=torch.float64))
    data = MDDataset(potential.sample(500, 1.0, torch.Generator().manual_seed(1)), 1.0)
    settings = FitSettings(
        n_steps=20, batch_size=16, kl_batch_size=8, validate_interval=10, n_validation_draws=50,
        estimator=estimator, n_chains=8 if estimator == "path" else 0,
        temperatures=(0.5, 1.0) if estimator == "path" else None,
    )  # fmt: skip

    class Stop(Exception):
        pass

    class Stopping(GaussianWell):
        # Calls: some way into the training, and past where chains are brought to T = 0.5.
        left = 8 if estimator == "direct" else 72

        def energy(self, x):
            self.left -= 1
            if self.left < 0:
                raise Stop
            return super().energy(x)

    def trained(potential, path, **options):
        """All weights at the end, not the best ones, which may be the first."""
        flow = TemperatureSteerableFlow(2, 2, 1, (8,), seed=1)
        options = {"settings": settings, "seed": 3, "checkpoint_path": path, **options}
        fit(flow, data, potential, progress=False, **options)
        network = read_tensors(path, "training checkpoint")["network"]
        return torch.cat([tensor.flatten().double() for tensor in network.values()])

    with pytest.raises(Stop):
        trained(Stopping(torch.eye(2, dtype=torch.float64)), path, checkpoint_seconds=0)
    content = read_tensors(path, "training checkpoint")
    assert 2 < content["step"] < 18
    assert content["objective"].pop("relaxed", True)
    if number < 3:
        content["optimizer"] = content.pop("optimizers")["adam"]
    keys = LATER if number < 3 else set()
    if estimator == "path":  # of data in groups: a dataset and the chains of two temperatures
        content["objective"]["basin_shares"] = torch.full((3, 2), 0.5, dtype=torch.float64)
    if number == 1:
        del content["objective"]
    elif number == 2 and estimator == "path":  # running means by the data alone
        for name in ("population_ratios", "basins_met"):
            del content["objective"][name]
        content["objective"]["by_basin"] = torch.zeros(2, 2)
        keys = {"optimizer", "weight_decay"}
    settings_then = without_later(content["settings"], keys)
    content |= {"format": number, "settings": settings_then}
    write_tensors(path, content)
    whole = trained(potential, tmp_path / "whole.pt")
    # There is one basin here, so that its ratio is nothing.
    assert torch.equal(trained(potential, path, resume=True), whole)


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
