"""Runs whose frames were saved less often than their numbers: nothing is paired wrongly."""

import json

import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.certify_samples import read_run
from openmm_tsf.analysis.report import describe
from openmm_tsf.analysis.targets import Target
from openmm_tsf.doctor.probes import describe_directory
from tests.support.analysis_runs import TEMPERATURES, phi_of, small_run, two_state_run
from tests.support.fabricate import chain_positions, write_run

EVERY, N = 5, 60
CHOICES = {"choices": {"save_interval": EVERY, "numbers_interval": 1}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A thinned run, and one that has only what the former has frames of."""
    folder = tmp_path_factory.mktemp("thinned")
    rng = np.random.default_rng(4)
    energy, states = two_state_run(rng, n=N, n_walkers=6)
    phi = np.where(states, 1.0, -1.0) + 0.2 * rng.normal(size=states.shape)
    x = chain_positions(phi)
    given = {"per_segment": 23, "frame_interval": EVERY}
    write_run(folder / "a", TEMPERATURES, energy, {"phi": phi}, positions=x, **given, **CHOICES)
    some = slice(None, None, EVERY)
    write_run(folder / "b", TEMPERATURES, energy[some], {"phi": phi[some]}, positions=x[some])
    return [load_run(folder / name, start=0) for name in "ab"], energy, phi


def test_frames_are_matched_with_their_numbers(runs):
    (run, _), energy, phi = runs
    assert (run.n_used, run.n_framed) == (N, N // EVERY)
    np.testing.assert_array_equal(run.frame_index(), np.arange(0, N, EVERY))
    np.testing.assert_array_equal(run.iteration[run.frame_index(300.0)], np.arange(0, N, EVERY))
    for rung, kelvin in enumerate(TEMPERATURES):
        frames = run.trajectory(kelvin)
        expected = phi[::EVERY, :, rung]
        np.testing.assert_allclose(phi_of(frames).reshape(expected.shape), expected, atol=1e-5)
        assert frames.time.tolist() == np.repeat(np.arange(0, N, EVERY), 6).tolist()
        samples = read_run(run)[rung]
        np.testing.assert_array_equal(samples.energy, energy[::EVERY, :, rung])
        assert samples.positions.shape[:2] == samples.energy.shape
    every_second = run.trajectory(300.0, walker=2, stride=2)
    np.testing.assert_allclose(phi_of(every_second), phi[:: 2 * EVERY, 2, 0], atol=1e-5)


def test_the_start_counts_numbers(runs):
    (run, _), _, _ = runs
    later = load_run(run.path, start=7)
    assert (later.n_used, later.n_framed) == (N - 7, 10)
    assert later.frame_index()[:2].tolist() == [3, 8]
    assert later.trajectory(300.0, walker=0).time.tolist() == list(range(10, N, EVERY))
    np.testing.assert_allclose(
        later.observable("angle:0,1,2").shape, (10, later.n_walkers, later.n_rungs)
    )
    turn = phi_of(later.trajectory(600.0)).reshape(10, -1)
    np.testing.assert_allclose(turn, later.dihedral("phi", 600.0)[later.frame_index()], atol=1e-5)


def test_estimates_of_frames_are_those_of_their_iterations(runs):
    (run, of_frames), _, _ = runs

    def positive(frames):
        return phi_of(frames) > 0

    for kelvin in (300.0, 350.0):
        expected = of_frames.free_energy_difference(positive, kelvin)
        assert run.free_energy_difference(positive, kelvin) == expected
        np.testing.assert_array_equal(run.at(kelvin).weights, of_frames.at(kelvin).weights)
        np.testing.assert_array_equal(run.at(kelvin, 3).xyz, of_frames.at(kelvin, 3).xyz)
    for values in (
        lambda r: phi_of,
        lambda r: r.observable("distance:0,3"),
        lambda r: "distance:0,3",
    ):
        mine, other = (r.curve(values(r), [300.0, 400.0]) for r in (run, of_frames))
        np.testing.assert_array_equal(mine.value, other.value)
        np.testing.assert_array_equal(mine.stderr, other.stderr)
    for length in (N - 1, N // EVERY - 1, N // EVERY + 1):
        with pytest.raises(ValueError, match="observable: expected values of 60 iterations, or"):
            run.curve(run.energy[:length], 300.0)
        with pytest.raises(ValueError, match="values: expected those of 60 or, with frames, 12"):
            run.match_frames(run.energy, length)


def test_what_is_needed_is_counted_in_saved_iterations(runs):
    """Of 12 frames, 5 saved iterations apart: five times as many iterations as frames."""
    (run, of_frames), _, _ = runs
    both = []
    for each in (run, of_frames):
        each.observe({"d": "distance:0,3"})
        both.append(Target.parse("d < 0.0001 nm").assess(each).assessment)
    mine, other = both
    assert (mine.value, mine.stderr, mine.n_eff) == (other.value, other.stderr, other.n_eff)
    assert other.n_iterations_needed is not None
    assert mine.n_iterations_needed == EVERY * other.n_iterations_needed
    mixed = [Target.parse("P(phi > 0, d > 0.2) < 0.01 %").assess(r) for r in (run, of_frames)]
    assert mixed[0].assessment.value == mixed[1].assessment.value
    summary, subset = (each.summary() for each in (run, of_frames))
    for kelvin, entry in summary["quantities"]["mean d"].items():
        expected = subset["quantities"]["mean d"][kelvin]
        assert entry["stderr"] == expected["stderr"]
        assert entry["n_iterations_needed"] == EVERY * expected["n_iterations_needed"]
    run.observe({"turn": "dihedral:3,2,1,0"})  # a dihedral of frames, which is not recorded
    assert "turn_positive" in run.summary()["quantities"]


def test_summary_report_and_doctor_say_which_is_which(runs, tmp_path):
    (run, of_frames), _, _ = runs
    summary = run.summary()
    assert (summary["save_interval"], summary["numbers_interval"]) == (EVERY, 1)
    assert (summary["n_iterations"], summary["n_iterations_with_frames"]) == (N, N // EVERY)
    assert summary["n_frames_per_rung"] == 6 * N // EVERY
    assert summary["monitor"]["frames_checked"]["300.00"] == 6 * N // EVERY
    text = describe(summary)
    assert "numbers (energies, torsions) of every 1st iteration; frames of every 5th, 72" in text
    assert "numbers_interval" not in of_frames.summary()
    assert "of every" not in describe(of_frames.summary())
    assert "numbers_interval: 1" in describe_directory(run.path)["choices"]
    run.plot(tmp_path / "plot.png")
    run.observe({"d": "distance:0,3"})
    run.plot(tmp_path / "observables.png")


def test_a_run_without_frames_yet(tmp_path):
    energy, phi, _ = small_run(tmp_path / "other", n=12)
    path = tmp_path / "run"
    write_run(
        path, TEMPERATURES, energy, {"phi": phi}, positions=chain_positions(phi)[:1],
        frame_interval=100, choices=CHOICES["choices"] | {"observables": {"d": "distance:0,3"}},
    )  # fmt: skip
    run = load_run(path, start=2)
    assert (run.n_used, run.n_framed) == (10, 0)
    assert run.missing_observables == {"d": "no frame has been saved yet"}
    assert run.summary()["n_frames_per_rung"] == 0
    assert run.trajectory(300.0).n_frames == 0
    with pytest.raises(ValueError, match="the trajectories have no complete iteration yet"):
        run.observable("distance:0,3")


@pytest.mark.parametrize("framed", [[0, 4, 61], [4, 0], [[0], [5]], [0.0, 5.0]])
def test_frames_of_other_iterations_are_refused(tmp_path, framed):
    small_run(tmp_path / "run", n=25)
    file = tmp_path / "run" / "segments" / "segment_000000.npz"
    np.savez(file, **(dict(np.load(file)) | {"frame_iteration": np.array(framed)}))
    with pytest.raises(ValueError, match="frame_iteration: expected some of its iterations"):
        load_run(tmp_path / "run")


def test_intervals_in_a_damaged_configuration_are_refused(tmp_path):
    small_run(tmp_path / "run", n=25)
    config = tmp_path / "run" / "config.json"
    content = json.loads(config.read_text()) | {"choices": {"numbers_interval": 0}}
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"choices\.numbers_interval: expected an integer"):
        load_run(tmp_path / "run")
