"""Runs in shards are read as one: complete, incomplete, damaged."""

import json
import logging
import re
import shutil

import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.report import describe, describe_verdict
from openmm_tsf.doctor.probes import describe_directory
from openmm_tsf.io.shards import shard_directory
from tests.support.analysis_runs import phi_of
from tests.support.fabricate import DoubleWell, chain_positions, write_run
from tests.support.sharded import join_walkers, write_shards

LADDER = (300.0, 450.0)
S, N, W = 3, 40, 2


@pytest.fixture(scope="module")
def numbers():
    rng = np.random.default_rng(3)
    energy, phi = DoubleWell().draw(rng, (S * N, W), LADDER)
    return energy.reshape(S, N, W, 2), phi.reshape(S, N, W, 2)


@pytest.fixture
def run_of(numbers, tmp_path):
    return lambda **options: write_shards(tmp_path / "run", LADDER, *numbers, **options)


def damage(path):
    """Change a byte in the middle of an array."""
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 200] ^= 255
    path.write_bytes(content)


def test_the_reader_of_shards_is_that_of_all_walkers_side_by_side(run_of, numbers, tmp_path):
    energy, phi = map(join_walkers, numbers)
    one = write_run(
        tmp_path / "one", LADDER, energy, {"phi": phi}, positions=chain_positions(phi)
    )  # fmt: skip
    whole, sharded = load_run(one, start=0), load_run(run_of(), start=0)
    assert (sharded.n_walkers, sharded.n_iterations) == (S * W, N)
    for name in ("energy", "dihedrals", "replica", "iteration"):
        np.testing.assert_array_equal(getattr(sharded, name), getattr(whole, name), err_msg=name)
    for arguments in ({}, {"walker": 4}, {"walker": 1, "stride": 7}, {"stride": 3}):
        a, b = (run.trajectory(450, **arguments) for run in (sharded, whole))
        np.testing.assert_array_equal(a.xyz, b.xyz)
        np.testing.assert_array_equal(a.time, b.time)
    a, b = (run.evaluate(lambda frames: phi_of(frames) > 0) for run in (sharded, whole))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, phi > 0)
    for name in ("mean_energy", "energies"):
        assert np.all(getattr(sharded, name)(300) == getattr(whole, name)(300))
    assert sharded.segments.accepted["local"].tolist() == [2 * N * S] * 2
    summary = sharded.summary()
    assert summary["energy_evaluations"]["sampling"] == 3 + S * (7 + 100 * N)
    assert summary["shards"]["used"] == ["0000", "0001", "0002"]
    assert "the first 40 iterations of 3 of 3 shards are used" in describe(summary)


def test_frames_are_evaluated_shard_by_shard(run_of):
    sizes = []
    load_run(run_of(), start=0).evaluate(lambda f: sizes.append(len(f)) or phi_of(f) > 0)
    assert sizes == [N * W] * S * len(LADDER)


@pytest.mark.parametrize(
    ("lengths", "n", "used", "left_out"),
    [
        ((40, 30, 35), 30, 3, {}),
        ((40, 40, 5), 40, 2, {"0002": "only 5 iterations"}),
        ((40, None, 40), 40, 2, {"0001": "not started"}),
        ((9, 40, 40), 40, 2, {"0000": "only 9 iterations"}),
    ],
)
def test_incomplete_shards_are_named(run_of, numbers, caplog, lengths, n, used, left_out):
    path = run_of(n_iterations=list(lengths))
    with caplog.at_level(logging.WARNING):
        run = load_run(path, start=0)
    assert (run.n_iterations, run.n_walkers) == (n, used * W)
    assert run.shards.left_out == left_out
    kept = [k for k in range(S) if f"{k:04d}" not in left_out]
    np.testing.assert_array_equal(run.energy, join_walkers(numbers[0][kept][:, :n]))
    assert len(run.trajectory(300)) == n * used * W
    for name, reason in left_out.items():
        assert f"{name} ({reason})" in caplog.text
        assert f"{name} ({reason})" in describe_verdict(run.summary())


def missing_last(shard):
    (shard / "segments" / "segment_000003.npz").unlink()


def missing_middle(shard):
    (shard / "segments" / "segment_000001.npz").unlink()


def corrupted(shard):
    damage(shard / "segments" / "segment_000001.npz")


def corrupted_last(shard):
    damage(shard / "segments" / "segment_000003.npz")


def no_checkpoint(shard):
    (shard / "checkpoint.pt").write_bytes(b"")


def removed_checkpoint(shard):
    (shard / "checkpoint.pt").unlink()


def other_interval(shard):
    config = json.loads((shard / "config.json").read_text())
    config["choices"]["save_interval"] = 2
    (shard / "config.json").write_text(json.dumps(config))


def a_file(shard):
    shutil.rmtree(shard)
    shard.write_text("")


def other_flow(shard):
    config = json.loads((shard / "config.json").read_text())
    config["choices"]["flow"]["sha256"] = "1"
    (shard / "config.json").write_text(json.dumps(config))


def copied(shard):
    shutil.rmtree(shard)
    shutil.copytree(shard.with_name("0000"), shard)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (missing_last, "expected 4 segments, as the checkpoint counts, got 3"),
        (missing_middle, r"segment_000001\.npz is missing"),
        (corrupted, r"segment_000001\.npz: (the checksum of|cannot be read)"),
        (corrupted_last, r"segment_000003\.npz: (the checksum of|cannot be read)"),
        (no_checkpoint, r"checkpoint\.pt: not a readable checkpoint"),
        (removed_checkpoint, r"checkpoint\.pt"),
        (other_interval, "save_interval: expected that of the run"),
        (a_file, "not a directory"),
        (other_flow, "flow: expected that of the run"),
        (copied, "sampler_seed: expected .* that of shard 1 .* it is a copy"),
    ],
)
def test_damaged_shards_are_left_out_and_named(run_of, harm, words):
    path = run_of()
    harm(shard_directory(path, 1))
    run = load_run(path, start=0)
    assert (run.n_walkers, list(run.shards.left_out)) == (2 * W, ["0001"])
    assert re.search(words, run.shards.left_out["0001"])
    lines = describe_directory(path)["shards"]
    assert lines[0] == "2 finished, 1 damaged, of 3"
    assert lines[2].startswith("0001: 0 of 40 iterations, damaged (")


def test_frames_that_are_cut_short_are_named(run_of, caplog):
    path = run_of()
    file = shard_directory(path, 2) / "T300.00K.dcd"
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert len(load_run(path, start=0).trajectory(300)) == (N - 1) * S * W
    assert f"{file}: has frames of only 39 iterations, of 40" in caplog.text


def test_a_run_without_any_shard(run_of):
    path = run_of(n_iterations=[40, None, None])
    shutil.rmtree(shard_directory(path, 0))
    assert load_run(path).n_iterations == 0
    shard_directory(path, 0).mkdir()
    (shard_directory(path, 0) / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no shard can be read: 0000"):
        load_run(path)


def test_doctor_lists_the_state_of_every_shard(run_of):
    path = run_of(n_iterations=[40, 20, 10])
    note = {"pid": 1, "host": "elsewhere", "since": "now", "job": "12", "attempt": 2, "token": "x"}
    (shard_directory(path, 1) / ".lock-owner.json").write_text(json.dumps(note))
    lines = describe_directory(path)["shards"]
    assert lines == [
        "1 finished, 1 running or killed, 1 interrupted, of 3",
        "0000: 40 of 40 iterations, finished",
        "0001: 20 of 40 iterations, running or killed (by process 1 of job 12, attempt 2, on "
        "elsewhere since now)",
        "0002: 10 of 40 iterations, interrupted",
    ]


def test_estimates_of_shards_agree_with_each_other_and_the_exact_ones(tmp_path):
    rng = np.random.default_rng(5)
    well, n_shards, n = DoubleWell(), 6, 150
    energy, phi = well.draw(rng, (n, n_shards * 4), LADDER)
    split = [np.stack(np.split(each, n_shards, axis=1)) for each in (energy, phi)]
    path = write_shards(tmp_path / "run", LADDER, *split, frames=False)
    exact = well.probability(0.0, np.pi, 300.0)
    whole = load_run(path).positive("phi", 300.0)
    assert abs(whole.value - exact) < 4 * whole.stderr
    each = [load_run(shard_directory(path, k)).positive("phi", 300.0) for k in range(n_shards)]
    assert max(abs(e.value - whole.value) / e.stderr for e in each) < 4
    assert np.isclose(np.mean([e.value for e in each]), whole.value)
