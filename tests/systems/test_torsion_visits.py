"""Visits to wells of slow torsions: counted, and few of them told before training."""

import logging
import math

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.systems.torsion_visits import (
    ENOUGH_VISITS,
    count_torsion_visits,
    describe_rare_visits,
    describe_single_wells,
)
from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.settings import FlowSettings
from openmm_tsf.workflow.train import train
from tests.support.refusals import refused
from tests.support.zoo import hot_frames, specimen
from tests.workflow.tiny import QUIET


@pytest.fixture(scope="module")
def shipped(molecule):
    return MDDataset.shipped(molecule)


def two_state_torsion(rng, n, rates):
    """A torsion [n] of two wells, at -90 and 60 degrees, left at these rates for each frame."""
    states, state, n_entered = np.zeros(n, dtype=int), int(rng.random() < 0.2), 0
    chance = rng.random(n)
    for k in range(n):
        if chance[k] < rates[state]:
            state = 1 - state
            n_entered += state
        states[k] = state
    noise = 0.2 * rng.normal(size=n)
    return np.where(states == 1, math.pi / 3, -math.pi / 2) + noise, states, n_entered


def test_visits_tell_the_error_of_a_free_energy():
    """The spread of ln p/(1-p) over 200 exact chains is sqrt(2/n) for a mean of n visits."""
    rng = np.random.default_rng(5)
    logits, counts = [], []
    for _ in range(200):
        angles, states, n_entered = two_state_torsion(rng, 4000, (0.008, 0.032))
        visits = {v.well: v for v in count_torsion_visits({"phi": angles})}
        assert abs(visits["phi > 0"].n_visits - n_entered) <= 0.15 * n_entered + 2
        p = visits["phi > 0"].fraction
        assert p == pytest.approx(states.mean(), abs=0.01)
        logits.append(math.log(p / (1 - p)))
        counts.append(visits["phi > 0"].n_visits)
    expected = np.mean(np.sqrt(2 / np.array(counts)))
    # The standard error of a standard deviation; visits of a few frames blur it by a little.
    assert np.std(logits) == pytest.approx(expected, rel=4 / math.sqrt(2 * 200))


def test_recrossings_of_a_barrier_are_no_visits():
    rng = np.random.default_rng(6)
    well = -1.5 + 0.25 * rng.normal(size=3000)
    other = 1.0 + 0.25 * rng.normal(size=500)
    at_top = np.resize([-0.35, -0.15], 40)  # over the border and back, again and again
    angles = np.concatenate([well, at_top, other, at_top, well])
    found = {v.well: v.n_visits for v in count_torsion_visits({"phi": angles})}
    assert found == {"phi < 0": 2, "phi > 0": 1}


@pytest.mark.parametrize("angles", [[], [0.1, float("nan")], [[0.1, 0.2]], 0.1])
def test_visits_need_angles(angles):
    with refused(ValueError, r"angles: expected finite angles \[F\] of phi, got"):
        count_torsion_visits({"phi": angles})


def test_shipped_frames_are_not_warned_of(shipped):
    """Ten nanoseconds came 19 times to phi > 0."""
    for frames in (shipped, shipped[::4], shipped[::40]):
        assert describe_rare_visits(frames) == []
        assert describe_single_wells(frames) == []


def test_parts_of_the_shipped_frames(shipped):
    (two,) = describe_rare_visits(shipped[2000:4000])
    assert two.startswith("phi > 0 was visited 2 times only, in 0.15 of 2,000 frames, which leaves")
    assert "an error of about 1.0 kT" in two
    assert f"at this rate {ENOUGH_VISITS} visits (0.4 kT) need 5 times as many steps of MD" in two
    assert "a higher temperature" in two
    assert describe_single_wells(shipped[2000:4000]) == []
    (few,) = describe_rare_visits(shipped[::400])
    assert few.startswith("phi was in another well in only 9 of 100 frames, too few to tell")
    assert describe_rare_visits(shipped[:2000]) == []
    (never,) = describe_single_wells(shipped[:2000])
    assert never.startswith("phi never left one well in 2,000 frames, which cannot tell whether")
    assert "longer MD (--frames)" in never


def test_what_to_do_for_several_torsions_is_said_once(shipped):
    """Frames in which psi, too, leaves its well once."""
    x, few = shipped.positions, []
    psi = torsion_angles(x.numpy(), slow_torsions(shipped.molecule.topology))["psi"]
    for inside in (psi > 0.5, psi < -0.2):
        few.append(x[2000:4000][inside[2000:4000]])
    messages = describe_rare_visits(MDDataset(torch.cat(few), 600.0, shipped.molecule))
    assert [message.partition(" ")[0] for message in messages] == ["phi", "psi", "for"]
    assert messages[2].startswith("for phi, psi: run longer MD (--frames) or MD at a higher")
    assert [("run longer MD" in message) for message in messages] == [False, False, True]


def test_frames_of_chains_have_no_order(shipped):
    chains = torch.arange(2000, dtype=torch.int64) % 8
    some = shipped[2000:4000]
    mixed = MDDataset(some.positions, 600.0, some.molecule, chains=chains)
    assert describe_rare_visits(mixed) == describe_single_wells(mixed) == []
    assert describe_rare_visits(MDDataset(torch.zeros(50, 2), 1.0)) == []


def test_bonds_in_rings_are_not_said_to_be_stuck():
    """The phi of proline is left out; its psi is not."""
    proline = specimen("capped_PRO").molecule()
    dataset = MDDataset(hot_frames("capped_PRO")[:40], 600.0, proline)
    assert {"phi", "psi"} <= slow_torsions(proline.topology).keys()
    (message,) = describe_single_wells(dataset)
    assert message.startswith("psi never left one well in 40 frames")
    assert "phi" not in message


def test_a_training_says_it_first_and_records_it(shipped, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="openmm_tsf")
    settings = FlowSettings(n_blocks=1, hidden=(8,))
    fit = FitSettings(n_steps=1, batch_size=8, lambda_max=0.0, n_validation_draws=1)
    train(shipped[2000:4000], tmp_path / "flow", settings, fit, options=QUIET)
    lines = [record.getMessage() for record in caplog.records]
    (said,) = [k for k, line in enumerate(lines) if line.startswith("frames: phi > 0 was visited")]
    assert said < next(k for k, line in enumerate(lines) if line.startswith("training: kept"))
    config = (tmp_path / "flow" / "config.json").read_text()
    assert "phi > 0 was visited 2 times only" in config


def test_flows_made_in_python_are_checked_too(shipped, molecule, caplog):
    """As those of a run: the number of frames, what they hardly tell, and their ensemble."""
    sizes = {"n_blocks": 1, "hidden": (4,), "n_momenta": 2}
    with refused(ValueError, "expected at least 61 frames to train on, got 60 of 72; 22 atoms"):
        tsf.TemperatureSteerableFlow.from_dataset(shipped[:72], **sizes)
    tsf.TemperatureSteerableFlow.from_dataset(shipped[2000:2700:7], check=False, **sizes)
    assert not caplog.records
    tsf.TemperatureSteerableFlow.from_dataset(shipped[2000:2700:7], **sizes)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("80 frames to train on are few for 60 coordinates")
    assert "750 frames or more" in lines[0]
    assert all(line.startswith("frames: ") for line in lines[1:])
    caplog.clear()
    made = MDDataset(shipped[::200].positions, 300.0, molecule)
    tsf.TemperatureSteerableFlow.from_dataset(made, **sizes)
    assert "expected frames of 300 K, but by this System's forces" in caplog.messages[0]
    with refused(ValueError, "check: expected one of False, True, got 3"):
        tsf.TemperatureSteerableFlow.from_dataset(shipped, check=3, **sizes)
