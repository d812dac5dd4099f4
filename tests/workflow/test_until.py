"""Production that stops where targets of precision are met."""

import json
import shutil
from dataclasses import replace
from itertools import islice, pairwise
from types import SimpleNamespace

import mdtraj
import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.basins import TrainingBasins
from openmm_tsf.analysis.convergence import count_pieces
from openmm_tsf.analysis.targets import Target
from openmm_tsf.flows.tsf import TemperatureSteerableFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.workflow import until
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.until import find_lost, is_look, looks, next_look
from tests.support.fabricate import two_state_chains, write_run
from tests.workflow.tiny import QUIET

SETTINGS = SamplingSettings(
    temperatures=(500.0, 600.0), n_walkers=8, n_iterations=60, n_tuning=3,
    until=("U < 1000 kJ/mol",),
)  # fmt: skip
OPTIONS = replace(QUIET, seed=3)
RESUME = replace(QUIET, resume=True)


def test_looks_grow(monkeypatch):
    monkeypatch.setattr(until, "FIRST_LOOK", 50)
    first = list(islice(looks(), 12))
    assert first[:4] == [50, 63, 79, 98]
    assert all(1.2 < b / a < 1.3 for a, b in pairwise(first))
    assert [next_look(n) for n in (0, 50, 51)] == [50, 63, 63]
    assert [is_look(n) for n in (0, 50, 51, 63)] == [False, True, False, True]


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    molecule = alanine_dipeptide()
    path = tmp_path_factory.mktemp("until") / "flow.pt"
    dataset = MDDataset.shipped(molecule, stride=40)
    TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,), seed=1).save(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No analysis; looks after 4, 5, 7, 8, 10, 13, ... iterations, where nothing is converged."""
    monkeypatch.setattr("openmm_tsf.workflow.sample.analyze", lambda folder, **options: {})
    monkeypatch.setattr(until, "FIRST_LOOK", 4)


@pytest.fixture
def met_from(monkeypatch):
    """Targets count as met from a number of iterations on."""
    assess = Target.assess

    def at(n_iterations):
        monkeypatch.setattr(
            Target,
            "assess",
            lambda self, run: replace(assess(self, run), is_met=run.n_iterations >= n_iterations),
        )

    return at


def stopped(folder):
    return json.loads((folder / "config.json").read_text())["choices"]["stopped"]


def test_it_stops_at_the_first_look_that_meets_the_target(flow, tmp_path, met_from):
    met_from(9)
    folder = tmp_path / "run"
    sample(flow, folder, SETTINGS, options=OPTIONS)
    assert load_run(folder).n_iterations == 10
    record = stopped(folder)
    assert (record["n_iterations"], record["is_met"]) == (10, True)
    (target,) = record["targets"]
    assert target["target"] == "U < 1000 kJ/mol"
    assert target["temperature_K"] == 500.0
    assert np.isclose(target["value"], load_run(folder).energies(500.0).mean())


def test_a_stopped_run_continues_to_the_same_end(flow, tmp_path, met_from, monkeypatch):
    """Interrupted between two looks and at one, and resumed: the same samples, the same end."""
    met_from(12)
    whole = tmp_path / "whole"
    sample(flow, whole, SETTINGS, options=OPTIONS)
    assert load_run(whole).n_iterations == 13
    for n in (6, 8):
        folder = tmp_path / f"stopped at {n}"
        sample(flow, folder, replace(SETTINGS, until=(), n_iterations=n), options=OPTIONS)
        settings = replace(SETTINGS, until=SETTINGS.until)
        sample(flow, folder, settings, options=RESUME)
        again = tmp_path / f"again from {n}"
        shutil.copytree(folder, again)
        for each in (folder, again):
            run = load_run(each)
            np.testing.assert_array_equal(run.segments.energy, load_run(whole).segments.energy)
        sample(None, again, options=RESUME)  # the target is recorded: nothing is left to do
        assert load_run(again).n_iterations == 13


def test_a_tighter_target_goes_on(flow, tmp_path, met_from):
    met_from(5)
    folder = tmp_path / "run"
    sample(flow, folder, SETTINGS, options=OPTIONS)
    assert load_run(folder).n_iterations == 5
    met_from(17)
    sample(None, folder, replace(SETTINGS, until=("U < 100 kJ/mol",)), options=RESUME)
    assert load_run(folder).n_iterations == 20
    assert stopped(folder)["targets"][0]["target"] == "U < 100 kJ/mol"


def test_without_a_target_it_goes_on(flow, tmp_path, met_from):
    met_from(5)
    folder = tmp_path / "run"
    sample(flow, folder, SETTINGS, options=OPTIONS)
    more = replace(SETTINGS, until=(), n_iterations=9)
    sample(None, folder, more, options=RESUME)
    assert load_run(folder).n_iterations == 9


def test_thinned_frames_change_neither_the_chain_nor_the_looks(flow, tmp_path, monkeypatch):
    """Targets of numbers and of frames are looked at from twice the interval of frames on."""
    seen, assess = [], Target.assess

    def noted(self, run):
        seen.append((run.n_iterations, run.n_framed))
        return assess(self, run)

    monkeypatch.setattr(Target, "assess", noted)
    options = replace(OPTIONS, observe={"d": "distance:1,18"})
    every = replace(SETTINGS, until=("d < 0.0001 nm", "U < 0.01 kJ/mol"), n_iterations=18)
    thinned = replace(every, save_interval=4, numbers_interval=2)
    sample(flow, tmp_path / "all", every, options=options)
    seen.clear()
    sample(flow, tmp_path / "thinned", replace(thinned, n_iterations=11), options=options)
    resumed = replace(RESUME, observe=options.observe)
    sample(None, tmp_path / "thinned", thinned, options=resumed)
    # Production begins after 3 iterations of tuning; looks at 8, 10, 11 (the end), 13, 16, 18.
    assert seen[::2] == [(4, 2), (5, 3), (6, 3), (7, 4), (8, 4), (9, 5)]
    whole, some = (load_run(tmp_path / name, start=0) for name in ("all", "thinned"))
    assert some.iteration.tolist() == list(range(4, 22, 2))
    assert some.segments.frame_iteration.tolist() == [4, 8, 12, 16, 20]
    np.testing.assert_array_equal(some.energy, whole.energy[::2])
    np.testing.assert_array_equal(some.trajectory(500.0).xyz, whole.trajectory(500.0).xyz.reshape(
        18, 8, 22, 3)[::4].reshape(-1, 22, 3))  # fmt: skip
    choices = json.loads((tmp_path / "thinned" / "config.json").read_text())["choices"]
    assert (choices["save_interval"], choices["numbers_interval"]) == (4, 2)
    choices = json.loads((tmp_path / "all" / "config.json").read_text())["choices"]
    assert "save_interval" not in choices["settings"]  # as before there was such a setting
    for changed, message in (
        ({"save_interval": 2}, r"save_interval: .* made with 4, got 2"),
        ({"save_interval": 10}, "save_interval: expected at most half of n_iterations, 18, got 10"),
        ({"numbers_interval": 3}, "numbers_interval: expected a divisor of save_interval, 4, "),
    ):
        with pytest.raises(ValueError, match=message):
            sample(None, tmp_path / "thinned", replace(thinned, **changed), options=resumed)


def test_the_most_iterations_end_it_with_a_warning(flow, tmp_path, caplog):
    folder = tmp_path / "run"
    sample(flow, folder, replace(SETTINGS, n_iterations=9), options=OPTIONS)
    assert load_run(folder).n_iterations == 9
    assert not stopped(folder)["is_met"]  # an error below 1000 kJ/mol, but nothing is converged
    assert "the targets are not met after 9 iterations, the most allowed" in caplog.text


def test_basins_that_were_never_visited_are_waited_for(
    flow, tmp_path, met_from, monkeypatch, caplog
):
    """The target is met after 5 iterations; the last basin is visited between 8 and 10."""
    met_from(4)
    lost = "all rungs: the basin phi > 0, psi beta was never visited"
    monkeypatch.setattr(until, "find_lost", lambda run: [lost] if run.n_iterations < 9 else [])
    folder = tmp_path / "run"
    sample(flow, folder, SETTINGS, options=OPTIONS)
    assert load_run(folder).n_iterations == 10
    assert (stopped(folder)["is_met"], stopped(folder)["lost_basins"]) == (True, [])
    folder = tmp_path / "too short"
    sample(flow, folder, replace(SETTINGS, n_iterations=7), options=OPTIONS)
    assert load_run(folder).n_iterations == 7
    assert (stopped(folder)["is_met"], stopped(folder)["lost_basins"]) == (False, [lost])
    assert stopped(folder)["targets"][0]["is_met"]
    said = "the targets are met, but a basin is missing after 7 iterations, the most allowed; "
    assert said + lost in caplog.text


def test_basins_of_the_training_frames_that_a_run_never_visited(tmp_path):
    rng, shape = np.random.default_rng(5), (100, 4, 2)

    def angles(shape, p):
        centre = np.where(rng.random(shape) < p, 1.0, -1.5)
        return {"phi": centre + 0.2 * rng.normal(size=shape)}

    def run(name, p, p_of_frames):
        frames = TrainingBasins.measure(angles((4000,), p_of_frames), 600.0).to_config()
        energy = rng.normal(size=shape)
        choices = {"basins": frames} if p_of_frames else {}
        temperatures = np.array([300.0, 600.0])
        return load_run(write_run(tmp_path / name, temperatures, energy, angles(shape, p),
                                  choices=choices))  # fmt: skip

    (words,) = find_lost(run("lost", 0.0, 0.05))
    assert "all rungs: the basin phi > 0 was never visited; it has 0.0" in words
    assert find_lost(run("visited", 0.05, 0.05)) == []
    assert find_lost(run("no frames", 0.0, 0.0)) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("dF(chi1) < 0.1 kT", r"until: expected slow torsions of the molecule \(phi, psi\)"),
        ("U < 1 kJ/mol at 300 K", r"until: expected a temperature of the ladder \(500, 600 K\)"),
    ],
)
def test_targets_that_the_run_cannot_have_are_refused_before_it(flow, tmp_path, target, message):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        sample(flow, folder, replace(SETTINGS, until=(target,)), options=OPTIONS)
    assert not folder.exists()
    with pytest.raises(ValueError, match="until: expected the unit kT"):
        replace(SETTINGS, until=("dF(phi) < 0.1",))


def test_a_target_of_an_observable_is_recorded_and_resumed(flow, tmp_path, met_from):
    met_from(5)
    folder = tmp_path / "run"
    targets = ("d < 1 nm", "P(d > 0.5, phi < 0) < 0.9")
    settings = replace(SETTINGS, until=targets)
    observe = {"d": "distance:ACE1:CH3,NME3:C", "n": lambda frames: frames.xyz[:, 0, 0]}
    with pytest.raises(ValueError, match=r"until: expected slow torsions .* got 'd'; others are"):
        sample(flow, folder, settings, options=OPTIONS)
    wrong = replace(OPTIONS, observe={"d": "distance:0,22"})
    with pytest.raises(ValueError, match="observe: d: expected an atom by its number"):
        sample(flow, folder, settings, options=wrong)
    assert not folder.exists()
    sample(flow, folder, settings, options=replace(OPTIONS, observe=observe))
    run = load_run(folder)
    assert run.n_iterations == 5
    assert list(run.observables) == ["d"]  # the function is known by its name only
    assert run.missing_observables["n"].startswith("the function tests.workflow.test_until:")
    (first, second) = stopped(folder)["targets"]
    assert first["value"] == run.observable("d", 500.0).mean()
    frames = run.trajectory(500.0)
    length = mdtraj.compute_distances(frames, [[1, 18]], periodic=False)[:, 0]
    phi = mdtraj.compute_phi(frames, periodic=False)[1][:, 0]
    assert second["value"] == ((length > 0.5) & (phi < 0)).mean()
    met_from(8)
    sample(None, folder, options=RESUME)  # the definition is recorded with the target
    assert load_run(folder).n_iterations == 8
    other = replace(settings, until=("n < 1",))
    with pytest.raises(ValueError, match=r"observables: d\), got 'n'"):
        sample(None, folder, other, options=RESUME)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"observe: d: .* with 'distance:1,18', got 'distance:1,4'"
    ):
        sample(None, folder, options=replace(RESUME, observe={"d": "distance:1,4"}))
    assert (folder / "config.json").read_bytes() == before
    met_from(10)
    sample(None, folder, other, options=replace(RESUME, observe={"n": observe["n"]}))
    assert load_run(folder).n_iterations == 10
    assert stopped(folder)["targets"][0]["target"] == "n < 1"


def test_stopping_does_not_bias_the_estimate(monkeypatch):
    """120 runs of a state with P = 0.1 that stop at an error of 10 %: value and interval."""
    monkeypatch.setattr(until, "FIRST_LOOK", 50)
    rng, target, p = np.random.default_rng(11), Target.parse("P(phi > 0) < 10 %"), 0.1
    most = next_look(700)
    values, held, lengths = [], [], []
    for _ in range(120):
        inside = two_state_chains(rng, (most, 16), p, 0.6)
        for n in looks():
            phi = np.where(inside[:n], 1.0, -1.0)
            run = SimpleNamespace(
                temperatures=np.array([300.0]),
                observables={},
                observable=lambda name, kelvin, phi=phi: phi,
                energies=lambda kelvin, phi=phi: phi,
                n_pieces=count_pieces(inside[:n]),
                burn_in=SimpleNamespace(is_equilibrated=True),
            )
            assessed = target.assess(run)
            if assessed.is_met or n >= most:
                break
        assert assessed.is_met
        values.append(assessed.assessment.value)
        held.append(assessed.assessment.low <= p <= assessed.assessment.high)
        lengths.append(n)
    assert len(set(lengths)) > 1  # the length is that of the rule, not of the test
    z = (np.mean(values) - p) / (np.std(values, ddof=1) / np.sqrt(len(values)))
    assert abs(z) < 4
    assert np.std(values, ddof=1) < 1.2 * 0.1 * p  # as precise as required
    assert np.mean(held) > 0.95 - 4 * np.sqrt(0.95 * 0.05 / len(held))
