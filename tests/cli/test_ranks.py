"""The program on several ranks: who prints and writes, and how all of them end."""

import csv
import shlex

import pytest

from openmm_tsf.cli.main import main
from openmm_tsf.io.files import read_json
from openmm_tsf.io.tensors import read_tensors
from tests.support.rank_jobs import run_program
from tests.support.ranks import returned, run_ranks

SHORT = "--preset quick --stride 40 --steps {} --platform Reference"


def program(command, *, size=2, stop_when=None):
    options = shlex.split(command), stop_when
    return returned(run_ranks(run_program, *options, size=size, timeout=None, seconds=900))


def n_steps(folder):
    return read_tensors(folder / "training.pt", "checkpoint")["step"]


@pytest.mark.slow
def test_ranks_train_together(tmp_path):
    first, second = program(f"train --output {tmp_path / 'one'} {SHORT.format(4)}")
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert "a flow with" in first[1]
    assert "training: kept step" in first[2]
    assert second[1:] == ("", "")
    assert read_json(tmp_path / "one" / "config.json")["choices"]["training_ranks"] == [2]
    assert n_steps(tmp_path / "one") == 4
    # The checkpoint of a stopped training is continued by one process.
    folder = tmp_path / "two"
    command = f"train --output {folder} --checkpoint-seconds 0 {SHORT.format(40)}"
    results = program(command, stop_when=folder / "training.pt")
    assert [status for status, _, _ in results] == [130, 130]
    assert f"interrupted; the results so far are in {folder}" in results[0][2]
    assert (folder / "flow.pt").is_file()
    done = n_steps(folder)
    assert 0 < done < 40
    ((status, _, errors),) = program(f"{command} --resume", size=1)
    assert status == 0, errors
    assert "begun on 2 ranks, continued on 1: valid" in errors
    assert n_steps(folder) == 40
    assert read_json(folder / "config.json")["choices"]["training_ranks"] == [2, 1]


def test_an_error_of_rank_0_ends_all(tmp_path):
    (tmp_path / "file").write_text("")
    results = program(f"train --output {tmp_path} {SHORT.format(4)}")
    assert [status for status, _, _ in results] == [2, 2]
    assert "openmm-tsf: error: " in results[0][2]
    assert "not empty" in results[0][2]
    assert "openmm-tsf: rank 1: error: rank 1 of 2: another rank ended" in results[1][2]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("md --output out", "md: expected one process, got 2 ranks (of torchrun or srun)"),
        ("run --output out --shard 3", "--shard: expected one process, got 2 ranks"),
        ("run --output out --device cuda:1", "device: expected 'cuda' with 2 ranks"),
    ],
)
def test_what_several_ranks_cannot_do(command, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    numbers = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**numbers, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(command.split()) == 2
    assert expected in capsys.readouterr().err
    monkeypatch.setenv("RANK", "2")
    assert main(command.split()) == 2
    assert "RANK: expected an integer from 0 to 1, got '2'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_several_ranks_needs_shards(tmp_path):
    results = program(f"run --output {tmp_path / 'run'} --shards 1")
    assert [status for status, _, _ in results] == [2, 2]
    expected = "shards: expected at least one for each of 2 ranks (--shards), got 1"
    assert expected in results[0][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_ranks_trains_and_samples(tmp_path):
    """Also after MD and in rounds; one process goes on."""
    folder = tmp_path / "run"
    sizes = "--walkers 6 --shards 2 --iterations 4 --tuning 2 --temperatures 500 600 --stride 1"
    command = f"run --output {folder} --rounds 1 --md --frames 90 {SHORT.format(4)} {sizes}"
    first, second = program(command)
    assert first[0] == second[0] == 0, (first[2], second[2])
    assert "MD is done by rank 0 of 2 alone, for which the others wait" in first[2]
    assert "report.html" in first[1]
    assert second[1] == ""
    config = read_json(folder / "config.json")
    assert config["choices"]["training_ranks"] == [2]
    assert read_json(folder / "summary.json")["n_iterations"] == 4
    with open(folder / "training.csv") as table:
        assert {row["round"] for row in csv.DictReader(table)} == {"0", "1"}
    again = program(f"{command} --resume".replace("--iterations 4", "--iterations 6"), size=1)
    assert again[0][0] == 0, again[0][2]
    assert read_json(folder / "summary.json")["n_iterations"] == 6
