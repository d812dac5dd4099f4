"""Frames saved less often than numbers: the chain and the numbers are the same, bit by bit."""

import json

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.sampling.recorder import TorsionAtoms
from openmm_tsf.systems.slow_torsions import dihedral_angles
from tests.sampling.conftest import assert_same_run, run_numbers

THINNED = {"save_interval": 6, "numbers_interval": 2, "progress": False}


@pytest.fixture
def runs(make, tmp_path):
    """Run directories of the same chain: everything saved, and thinned."""
    paths = tmp_path / "all", tmp_path / "thinned"
    for path, options in zip(paths, ({"progress": False}, THINNED), strict=True):
        sampler = make()
        sampler.tune(3)
        sampler.run(20, output=path, checkpoint_interval=4, **options)
    return paths


def test_numbers_and_frames_are_those_of_the_whole_run(runs):
    whole, thinned = map(run_numbers, runs)
    of_numbers = whole["iteration"] % 2 == 0
    for name in ("energy", "replica", "iteration", "dihedrals"):
        np.testing.assert_array_equal(thinned[name], whole[name][of_numbers], err_msg=name)
    for name in whole:
        if name.startswith(("accepted", "proposed", "n_evaluations", "rejected")):
            np.testing.assert_array_equal(thinned[name], whole[name], err_msg=name)
    every, some = load_run(runs[0], start=0), load_run(runs[1], start=0)
    of_frames = every.iteration % 6 == 0
    for kelvin in every.temperatures:
        x = every.trajectory(kelvin).xyz.reshape(len(every.iteration), -1, 7, 3)[of_frames]
        np.testing.assert_array_equal(some.trajectory(kelvin).xyz, x.reshape(-1, 7, 3))
    assert some.segments.frame_iteration.tolist() == [6, 12, 18]
    assert some.iteration[some.frame_index()].tolist() == [6, 12, 18]
    assert some.trajectory(300.0, walker=1).time.tolist() == [6, 12, 18]
    choices = json.loads((runs[1] / "config.json").read_text())["choices"]
    assert (choices["save_interval"], choices["numbers_interval"]) == (6, 2)


def test_a_thinned_run_resumes_bit_by_bit(make, runs, tmp_path):
    path, sampler = tmp_path / "resumed", make()
    sampler.tune(3)
    sampler.run(9, output=path, **THINNED)
    again = make(seed=99).resume(path)
    assert (again.n_done, again.n_written) == (9, 2)
    again.run(11, output=path, checkpoint_interval=5, **THINNED)
    assert again.n_done == 20
    assert_same_run(path, runs[1])
    for changed, message in (
        ({"save_interval": 4}, "save_interval: this run was started with 6, got 4"),
        ({"numbers_interval": 3}, "numbers_interval: this run was started with 2, got 3"),
        ({"numbers_interval": 4}, "numbers_interval: expected a divisor of save_interval, 6, "),
        ({"numbers_interval": 0}, "numbers_interval: expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            again.run(1, output=path, **(THINNED | changed))


def test_a_run_without_an_interval_of_numbers_is_as_before(make, tmp_path):
    sampler = make()
    sampler.run(6, output=tmp_path / "run", save_interval=3, progress=False)
    run = load_run(tmp_path / "run", start=0)
    assert run.iteration.tolist() == [3, 6]
    assert run.frame_index().tolist() == [0, 1]
    with np.load(next((tmp_path / "run" / "segments").iterdir())) as data:
        assert "frame_iteration" not in data
    choices = json.loads((tmp_path / "run" / "config.json").read_text())["choices"]
    assert "numbers_interval" not in choices


def test_positions_of_torsions_suffice_for_their_angles():
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 2, 30, 3)))
    quartets = [(4, 6, 8, 14), (8, 14, 16, 18), (29, 0, 4, 8)]
    torsions = TorsionAtoms(quartets)
    angles = dihedral_angles(torsions.select(x).numpy(), torsions.quartets)
    np.testing.assert_array_equal(angles, dihedral_angles(x.numpy(), quartets))


def test_components_give_the_bits_of_vectors():
    """The angles are recorded: they must not change with the way in which they are computed."""
    x = np.random.default_rng(2).normal(size=(3000, 9, 3))
    quartets = np.array([[0, 1, 2, 3], [8, 3, 5, 1], [4, 2, 7, 6]])
    a, b, c, d = (x[:, quartets[:, k]] for k in range(4))
    first, axis, last = b - a, c - b, d - c
    normals = np.cross(first, axis), np.cross(axis, last)
    sine = (first * normals[1]).sum(-1) * np.linalg.norm(axis, axis=-1)
    expected = np.arctan2(sine, (normals[0] * normals[1]).sum(-1))
    np.testing.assert_array_equal(dihedral_angles(x, quartets), expected)
