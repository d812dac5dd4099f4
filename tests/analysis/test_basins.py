"""Wells of torsions and their products: found from samples, kept in config.json, completed."""

import json

import numpy as np
import pytest

import openmm_tsf as tsf
from openmm_tsf.analysis import load_reference, load_run
from openmm_tsf.analysis.basins import MAX_BASINS, Basins, TrainingBasins
from openmm_tsf.analysis.convergence import count_visits
from openmm_tsf.systems.slow_torsions import slow_torsions, torsion_angles
from openmm_tsf.utils.wells import MIN_SAMPLES, count_angles, find_wells
from tests.support.analysis_runs import TEMPERATURES
from tests.support.fabricate import write_run

FOUR = ("phi < 0, psi alpha", "phi < 0, psi beta", "phi > 0, psi alpha", "phi > 0, psi beta")


def in_wells(rng, shape, **wells):
    """Angles in rad by torsion: independent, Gaussian in wells {centre in degrees: weight}."""
    angles = {}
    for name, weights in wells.items():
        centres = rng.choice(list(weights), size=shape, p=list(weights.values()))
        values = np.radians(centres) + 0.25 * rng.normal(size=shape)
        angles[name] = np.remainder(values + np.pi, 2 * np.pi) - np.pi
    return angles


def of_alanine(rng, shape, p=0.05, alpha=0.4):
    return in_wells(rng, shape, phi={60: p, -80: 1 - p}, psi={-15: alpha, 155: 1 - alpha})


@pytest.mark.parametrize("kelvin", [300.0, 600.0])
def test_alanine_dipeptide_has_four_basins(kelvin):
    """In the reference: the rare one is one of them, and C5 beyond 180 degrees is not in it."""
    reference = load_reference()
    rung = reference.rung(kelvin)
    angles = {"phi": reference.phi[..., rung], "psi": reference.psi[..., rung]}
    basins = Basins.find(angles)
    assert sorted(basins.names) == list(FOUR)
    assert basins.groups == (("phi", "psi"),)
    low, high = basins.wells["phi"].borders
    assert -12 <= low <= 12
    assert 115 <= high <= 150
    alpha, beta = basins.wells["psi"].borders
    assert -125 <= alpha <= -90
    assert 70 <= beta <= 95
    rare = basins.inside("phi > 0, psi beta", angles)
    of_issue = (angles["phi"] > 0) & (np.abs(angles["psi"]) > np.radians(120))
    c5 = angles["phi"] > np.radians(150)
    assert not rare[c5].any()
    assert rare[of_issue & ~c5].all()
    assert {300.0: 0.0008, 600.0: 0.010}[kelvin] < rare.mean() < {300.0: 0.002, 600.0: 0.02}[kelvin]


def test_borders_hardly_depend_on_the_frames():
    """Of every fourth and every 40th of the shipped frames."""
    molecule = tsf.systems.alanine_dipeptide()
    dataset = tsf.MDDataset.shipped(molecule, stride=4)
    angles = torsion_angles(dataset.positions.numpy(), slow_torsions(molecule.topology))
    all_frames = Basins.find(angles)
    few = Basins.find({name: values[::10] for name, values in angles.items()})
    assert sorted(all_frames.names) == sorted(few.names) == list(FOUR)
    for name in ("phi", "psi"):
        difference = np.subtract(all_frames.wells[name].borders, few.wells[name].borders)
        assert np.abs(difference).max() <= 15


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("phi", {60: 0.02, -80: 0.98}, ["phi > 0", "phi < 0"]),
        ("phi2", {60: 0.3, -80: 0.4, 180: 0.3}, ["phi2 60", "phi2 180", "phi2 -90"]),
        ("phi", {-80: 1.0}, []),  # proline
        ("psi3", {-15: 0.2, 155: 0.8}, ["psi3 alpha", "psi3 beta"]),
        ("chi1", {62: 0.2, 175: 0.3, -65: 0.5}, ["chi1 g+", "chi1 t", "chi1 g-"]),
        ("chi1_7", {-178: 0.5, -65: 0.3, 62: 0.2}, ["chi1_7 g+", "chi1_7 t", "chi1_7 g-"]),
        ("chi1", {58: 0.5, -65: 0.5}, ["chi1 g+", "chi1 g-"]),
        ("chi2", {95: 0.5, -95: 0.5}, ["chi2 90", "chi2 -90"]),
        ("C3-C4", {62: 0.2, 175: 0.3, -65: 0.5}, ["C3-C4 60", "C3-C4 180", "C3-C4 -60"]),
    ],
)
def test_wells_and_their_names(name, weights, expected):
    angles = in_wells(np.random.default_rng(3), 6000, **{name: weights})
    wells = find_wells(name, count_angles(angles[name]))
    assert sorted(wells.names) == sorted(expected)
    assert len(wells.borders) == len(wells.names)
    for centre in weights:
        label = int(wells.labels(np.radians(centre)))
        if expected:
            inside = wells.labels(angles[name]) == label
            assert inside.mean() == pytest.approx(weights[centre], abs=0.02)
    assert json.loads(json.dumps(wells.names)) == list(wells.names)
    assert all(each.isascii() for each in wells.names)


def test_no_wells_without_a_barrier_or_with_few_samples():
    rng = np.random.default_rng(4)
    for n in (30, 300, 30_000):
        flat = rng.uniform(-np.pi, np.pi, n)
        assert find_wells("chi1", count_angles(flat)).names == (), n
    # exp(-cos 2x / 2): the barriers are 1 kT; of a quarter of that there are no wells.
    x = rng.uniform(-np.pi, np.pi, 100_000)
    shallow = x[rng.random(x.size) < np.exp(0.125 * (np.cos(2 * x) - 1))]
    assert find_wells("chi1", count_angles(shallow)).names == ()
    deep = x[rng.random(x.size) < np.exp(np.cos(2 * x) - 1)]
    assert len(find_wells("chi1", count_angles(deep)).names) == 2
    main = np.radians(-80) + 0.2 * rng.normal(size=500)
    for n, expected in ((MIN_SAMPLES - 1, 0), (MIN_SAMPLES, 2)):
        few = np.radians(60) + 0.1 * rng.normal(size=n)
        assert len(find_wells("phi", count_angles([*main, *few])).names) == expected


def test_every_conformation_is_in_one_basin_of_each_residue():
    rng = np.random.default_rng(5)
    angles = {}
    for residue in (2, 3):
        for name, values in of_alanine(rng, (200, 5, 3)).items():
            angles[f"{name}{residue}"] = values
    angles |= in_wells(rng, (200, 5, 3), chi1_3={60: 0.3, 180: 0.3, -60: 0.4})
    basins = Basins.find(angles)
    assert basins.groups == (("phi2", "psi2"), ("phi3", "psi3", "chi1_3"))
    assert len(basins.names) == len(set(basins.names)) == 4 + 12
    labels = basins.labels(angles)
    assert labels.shape == (200, 5, 3, 2)
    for group, indices in enumerate(basins.basins_of_group):
        assert set(np.unique(labels[..., group])) <= set(indices)
    total = sum(basins.inside(name, angles).astype(int) for name in basins.names)
    assert (total == 2).all()
    inside = basins.inside("phi3 > 0, psi3 beta, chi1_3 g+", angles)
    signs = (angles["phi3"] > 0) & (np.abs(angles["chi1_3"] - np.radians(60)) < 1)
    assert (inside & ~signs).mean() < 0.001


def test_long_side_chains_make_groups_of_their_own():
    rng = np.random.default_rng(6)
    staggered = {60: 0.3, 180: 0.3, -60: 0.4}
    chi = {f"chi{k}": staggered for k in (1, 2, 3, 4)}
    angles = of_alanine(rng, 3000) | in_wells(rng, 3000, **chi)
    basins = Basins.find(angles)
    assert basins.groups == (("phi", "psi", "chi1", "chi2"), ("chi3", "chi4"))
    assert [len(indices) for indices in basins.basins_of_group] == [36, 9]
    assert MAX_BASINS == 36
    assert basins.torsions_of("chi3 g+, chi4 t") == ("chi3", "chi4")


def test_a_molecule_without_slow_torsions_has_no_basins():
    basins = Basins.find({})
    assert (basins.names, basins.groups, basins.torsions) == ((), (), ())
    assert basins.labels({}).shape == (0,)
    one_well = Basins.find(in_wells(np.random.default_rng(1), (50, 2), phi={-70: 1.0}))
    assert one_well.names == ()
    assert one_well.labels({"phi": np.zeros((50, 2))}).shape == (50, 2, 0)


def test_a_well_that_the_frames_lack_is_added():
    rng = np.random.default_rng(7)
    frames = Basins.find(of_alanine(rng, 2000, p=0.0))
    assert frames.names == ("psi alpha", "psi beta")
    run = of_alanine(rng, (200, 4, 3), p=0.1)
    both = frames.completed(run)
    assert sorted(both.names) == list(FOUR)
    assert both.wells["psi"] == frames.wells["psi"]
    assert both.inside("phi > 0, psi beta", run).mean() == pytest.approx(0.06, abs=0.02)
    # Samples of the same wells change nothing, nor do those that visit fewer.
    known = Basins.find(of_alanine(rng, 2000))
    assert known.completed(of_alanine(rng, 5000)) == known
    assert known.completed(of_alanine(rng, 500, p=0.0)) == known
    assert Basins({}).completed(run) == Basins.find(run)


def test_kept_in_a_configuration():
    rng = np.random.default_rng(8)
    measured = TrainingBasins.measure(of_alanine(rng, 2000), 600.0)
    content = json.loads(json.dumps(measured.to_config(), allow_nan=False))
    assert TrainingBasins.from_config(content) == measured
    entry = measured.populations["phi > 0, psi alpha"]
    assert abs(entry["p"] - 0.02) < 4 * entry["stderr"]
    inside = measured.basins.inside(
        "phi > 0, psi alpha", of_alanine(np.random.default_rng(8), 2000)
    )
    assert entry["n_visits"] == count_visits(inside[:, None], 1.0)
    never = TrainingBasins.measure({"phi": np.array([-1.0]), "psi": np.array([2.0])}, 300.0)
    assert json.loads(json.dumps(never.to_config(), allow_nan=False))["populations"] == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("torsions"), "torsions: expected an entry"),
        (lambda c: c["torsions"].update(phi=3), "basins: 'phi': expected an object, got '3'"),
        (lambda c: c["torsions"]["phi"].update(borders_degrees=[0]), "2 and more ascending"),
        (lambda c: c["torsions"]["phi"].update(borders_degrees=[9, 0]), "2 and more ascending"),
        (lambda c: c["torsions"]["phi"].update(borders_degrees=[0, 180]), "from -180 to 179"),
        (lambda c: c["torsions"]["phi"].update(borders_degrees=[0.5, 9]), "whole numbers"),
        (lambda c: c["torsions"]["phi"].update(counts=[1]), "counts: expected 120 numbers"),
        (lambda c: c["torsions"]["phi"].update(names=["a"]), "names: expected 2 different"),
        (lambda c: c["torsions"]["phi"].update(names=["a", "\n"]), "expected printable text"),
        (lambda c: c["torsions"]["phi"].update(names=["a", "b" * 61]), "at most 60 letters"),
        (lambda c: c["populations"].popitem(), "populations: expected those of"),
        (lambda c: c["populations"][FOUR[0]].update(p=None), "populations: phi < 0, psi alpha: p"),
        (lambda c: c["populations"][FOUR[0]].update(p=-1), "populations: phi < 0, psi alpha: p"),
        (lambda c: c.update(temperature_K=0), "temperature_K"),
    ],
)
def test_damaged_configurations_are_refused(tmp_path, change, message):
    rng = np.random.default_rng(9)
    content = TrainingBasins.measure(of_alanine(rng, 2000), 600.0).to_config()
    change(content)
    with pytest.raises((TypeError, ValueError), match=message):
        TrainingBasins.from_config(content)
    run = fabricated(tmp_path / "run", of_alanine(rng, (20, 2, 3)), content)
    with pytest.raises(ValueError, match=r"config.json: damaged, basins: "):
        _ = run.basins


def fabricated(path, angles, basins=None):
    """A run with these torsions [n, W, R], and what is recorded of the training frames."""
    shape = next(iter(angles.values())).shape
    energy = np.random.default_rng(10).normal(TEMPERATURES / 10, 8.0, shape)
    return load_run(write_run(path, TEMPERATURES, energy, angles, choices={"basins": basins}))


def test_basins_of_a_run(tmp_path):
    rng = np.random.default_rng(11)
    angles = of_alanine(rng, (300, 4, 3), p=0.1)
    alone = fabricated(tmp_path / "alone", angles)
    assert alone.training_basins is None
    assert sorted(alone.basins.names) == list(FOUR)
    for name in FOUR:
        inside = alone.in_basin(name)
        assert inside.shape == (300, 4, 3)
        np.testing.assert_array_equal(inside, alone.basins.inside(name, angles))
    with pytest.raises(ValueError, match="basin: expected one of"):
        alone.in_basin("phi > 0")
    frames = TrainingBasins.measure(of_alanine(rng, 3000, p=0.0), 600.0)
    known = fabricated(tmp_path / "known", angles, frames.to_config())
    assert known.training_basins == frames
    assert sorted(known.basins.names) == list(FOUR)
    assert known.basins.wells["psi"].borders == frames.basins.wells["psi"].borders


def test_wrong_arguments():
    basins = Basins.find(of_alanine(np.random.default_rng(12), 2000))
    with pytest.raises(ValueError, match="angles: expected phi, psi, got no psi"):
        basins.labels({"phi": [1.0]})
    with pytest.raises(ValueError, match="angles: expected arrays of one shape"):
        basins.labels({"phi": [1.0], "psi": [1.0, 2.0]})
    with pytest.raises(ValueError, match="basin: expected one of"):
        basins.inside("psi beta", {"phi": [1.0], "psi": [1.0]})
