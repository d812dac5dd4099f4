"""`Run.at` and `Run.curve` against quadrature, at rungs, between them, and outside."""

import copy

import mdtraj
import numpy as np
import openmm.unit as unit
import pytest

from openmm_tsf.analysis import WeightedTrajectory, load_run
from tests.support.analysis_runs import TEMPERATURES, WELL, assert_calibrated, phi_of
from tests.support.fabricate import chain_positions, write_run

KELVINS = [300.0, 350.0, 500.0]


def run_of_frames(rng, path, n=60, n_walkers=6, rho=0.3):
    """A run of exact samples of the double well with its frames."""
    energy, phi = WELL.draw(rng, (n, n_walkers), TEMPERATURES, rho)
    write_run(path, TEMPERATURES, energy, {"phi": phi}, positions=chain_positions(phi))
    return load_run(path, start=0)


@pytest.fixture
def run(tmp_path):
    return run_of_frames(np.random.default_rng(1), tmp_path / "run")


def mean_cosine(kelvin):
    return np.trapezoid(np.cos(WELL.grid) * WELL.density(kelvin), WELL.grid)


def features(frames):
    phi = phi_of(frames)
    return np.stack([phi > 0, np.cos(phi)], axis=1)


def test_curves_are_exact_and_their_errors_calibrated(tmp_path):
    """Of U, and of a function of the frames with two values each; correlated samples."""
    rng, repeats = np.random.default_rng(2), 40
    exact = np.empty((3, 3))
    for t, kelvin in enumerate(KELVINS):
        positive = WELL.probability(0.0, np.pi, kelvin)
        exact[t] = WELL.exact(kelvin)[0], positive, mean_cosine(kelvin)
    z = np.empty((repeats, 3, 3))
    for k in range(repeats):
        run = run_of_frames(rng, tmp_path / f"{k}", n=150, rho=0.5)
        energy, both = run.curve("energy", KELVINS), run.curve(features, KELVINS)
        assert both.value.shape == both.stderr.shape == (3, 2)
        values = np.column_stack([energy.value, both.value])
        z[k] = (values - exact) / np.column_stack([energy.stderr, both.stderr])
    assert_calibrated(z)


def test_frames_at_a_temperature_have_the_weights_of_the_curve(run):
    frames = run.at(350 * unit.kelvin)
    assert isinstance(frames, mdtraj.Trajectory)
    assert (frames.n_frames, frames.temperature) == (60 * 6 * 3, pytest.approx(350.0))
    assert frames.weights.sum() == pytest.approx(1.0)
    curve = run.curve(phi_of, [350.0, 600.0])
    assert np.average(phi_of(frames), weights=frames.weights) == pytest.approx(curve.value[0])
    assert frames.n_eff == pytest.approx(curve.n_eff[0])
    assert 100 < frames.n_eff < frames.n_frames
    # Sorted as `trajectory` rung by rung.
    np.testing.assert_array_equal(frames.xyz[360:720], run.trajectory(424.26).xyz)
    np.testing.assert_array_equal(frames.time[360:720], run.trajectory(424.26).time)
    every = run.at(350, stride=3)
    assert every.n_frames == 20 * 6 * 3
    kept = np.concatenate(
        [r * 360 + i * 6 + np.arange(6) for r in range(3) for i in range(0, 60, 3)]
    )
    np.testing.assert_allclose(every.weights, frames[kept].weights)
    np.testing.assert_array_equal(every.xyz, frames[kept].xyz)


def test_curve_equals_the_estimates_of_a_run(run):
    table, kelvins = run.thermodynamics([320, 600]), [320, 600]
    energy = run.curve("energy", kelvins)
    np.testing.assert_allclose(energy.value, table.energy)
    np.testing.assert_allclose(energy.stderr, table.energy_stderr)
    np.testing.assert_allclose(energy.n_eff, table.kish)
    positive = run.curve(run.dihedral_at_all_rungs("phi") > 0, kelvins)
    by_frames = run.curve(lambda frames: phi_of(frames) > 0, kelvins * unit.kelvin)
    np.testing.assert_allclose(positive.value, by_frames.value)
    np.testing.assert_allclose(positive.stderr, by_frames.stderr)
    delta_f = np.log((1 - positive.value) / positive.value)
    np.testing.assert_allclose(delta_f, table.delta_f)
    one = run.curve("energy", 320)
    assert one.value.shape == one.stderr.shape == (1,)


def test_outside_the_ladder(run):
    """A warning with the effective samples near it; an error where hardly any are left."""
    inside = run.curve("energy", 300).n_eff[0]

    def profile(kelvin):
        return run.phi_profile(kelvin, bins=4)

    for estimate in (run.at, lambda t: run.curve("energy", t), run.thermodynamics, profile):
        with pytest.warns(UserWarning, match="290 K is outside the ladder") as warned:
            estimate(290)
        assert 100 < float(str(warned[0].message).split(": ")[2].split()[0]) < inside
        with pytest.raises(ValueError, match=r"expected 300\.00 to 600\.00 K, got 100 K: only \d+"):
            estimate(100)
    run.at(600.005)  # a rung


@pytest.mark.parametrize(
    ("error", "words", "observable"),
    [
        (ValueError, "observable: expected one of phi.* got 'enthalpy'", "enthalpy"),
        (ValueError, "observable: expected 360 values, got shape", lambda t: phi_of(t)[1:]),
        (ValueError, "observable: expected 360 values, got shape", lambda t: 1.0),
        (ValueError, "observable: expected finite numbers", lambda t: phi_of(t) / 0.0),
        (TypeError, "observable: expected numbers, got complex", lambda t: phi_of(t) * 1j),
        (ValueError, r"observable: expected shape \(60, 6, 3\), got \(60, 6\)", np.ones((60, 6))),
        (ValueError, "observable: expected shape", np.ones((61, 6, 3))),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_observables_that_are_none(run, error, words, observable):
    with pytest.raises(error, match=words):
        run.curve(observable, 350)


def test_weights_stay_with_their_frames(run):
    frames = run.at(350)
    part = frames[10:50:2]
    expected = frames.weights[10:50:2] / frames.weights[10:50:2].sum()
    np.testing.assert_allclose(part.weights, expected)
    assert isinstance(part, WeightedTrajectory)
    assert part[3].weights.tolist() == [1.0]
    assert len(part[3]) == 1
    atoms = frames.atom_slice([0, 1])
    assert atoms.n_atoms == 2
    np.testing.assert_array_equal(atoms.weights, frames.weights)
    np.testing.assert_array_equal(copy.deepcopy(frames).weights, frames.weights)
    for plain in (part.join(part), part + part, part.stack(part), mdtraj.join([part, part])):
        assert not hasattr(plain, "weights")
    assert "weights" not in vars(frames.unweighted())
    in_place = run.at(350)
    in_place.atom_slice([0], inplace=True)
    assert in_place.n_atoms == 1
    for weights in (np.ones(3), -np.ones(20), np.zeros(20), np.full(20, np.nan)):
        with pytest.raises(ValueError, match="weights: expected"):
            WeightedTrajectory(part, weights, 350)


def test_resampled_frames_need_no_weights(run):
    frames = run.at(350)
    drawn = frames.resample(20_000, seed=3)
    assert type(drawn) is mdtraj.Trajectory
    np.testing.assert_array_equal(drawn.xyz, frames.resample(20_000, seed=3).xyz)
    assert not np.array_equal(drawn.xyz, frames.resample(20_000, seed=4).xyz)
    positive = np.average(phi_of(frames) > 0, weights=frames.weights)
    z = np.mean(phi_of(drawn) > 0) - positive
    assert abs(z) < 4 * np.sqrt(positive * (1 - positive) / 20_000)
    with pytest.raises(ValueError, match="n_frames: expected an integer of at least 1"):
        frames.resample(0, seed=1)


def test_frames_that_are_not_yet_written(tmp_path):
    """Numbers of 60 iterations, frames of 40: the first 40 count."""
    energy, phi = WELL.draw(np.random.default_rng(5), (60, 6), TEMPERATURES)
    positions = chain_positions(phi)[:40]
    write_run(tmp_path / "run", TEMPERATURES, energy, {"phi": phi}, positions=positions)
    run = load_run(tmp_path / "run", start=0)
    frames = run.at(350)
    assert frames.n_frames == 40 * 6 * 3
    value = np.average(phi_of(frames) > 0, weights=frames.weights)
    short = run.curve(run.dihedral_at_all_rungs("phi")[:40] > 0, 350)
    assert run.curve(lambda t: phi_of(t) > 0, 350).value == pytest.approx(short.value)
    assert value == pytest.approx(short.value[0])
