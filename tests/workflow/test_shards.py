"""Production in shards: the same bits by any processes, faults of one shard, resuming."""

import json
import math
import shutil
import signal
from dataclasses import replace

import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.cli.main import main
from openmm_tsf.io.directory import DirectoryLock
from openmm_tsf.io.run_config import read_config
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.io.shards import read_shard, shard_directory
from openmm_tsf.sampling import ParallelTempering, recorder, run_writer
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.utils.distributed import Ranks
from openmm_tsf.utils.random import Purpose, derive_seed
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import FlowSettings, SamplingSettings
from openmm_tsf.workflow.shards import ShardSampling, ShardsFailedError, sample_shards
from tests.robustness.inspection import differences
from tests.support.rank_jobs import run_program
from tests.support.ranks import returned, run_ranks
from tests.workflow import tiny

S = 4
SAMPLING = SamplingSettings(
    (500.0, 600.0), n_walkers=2 * S, n_iterations=4, n_tuning=2, n_shards=S, n_walk=1
)  # fmt: skip
SETTINGS = replace(
    tiny.SETTINGS,
    flow=FlowSettings(n_blocks=1, hidden=(4,)),
    fit=replace(tiny.FIT, n_steps=2),
    n_rounds=0,
    sampling=SAMPLING,
    stride=100,
)
OPTIONS = replace(tiny.QUIET, seed=8, checkpoint_seconds=0.0)
RESUME = replace(OPTIONS, seed=None, resume=True)


class FirstOfTwo(Ranks):
    """Rank 0 of two that needs no other."""

    def broadcast(self, value=None):
        return value


class Killed(BaseException):
    """A kill: the program does not catch it, and writes nothing more."""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No plots; every checkpoint is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmm_tsf.workflow.run.analyze", lambda folder, **options: {"analysed": 1})
        patch.setattr("openmm_tsf.workflow.sample.analyze", lambda folder, **options: {})
        patch.setattr("openmm_tsf.workflow.sample.has_reference", lambda fingerprint: False)
        patch.setattr(recorder, "CHECKPOINT_SHARE", math.inf)
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "prepared"
    assert run(folder, SETTINGS, options=replace(OPTIONS, prepare=True)) == {}
    return folder


@pytest.fixture(scope="module")
def dataset(molecule):
    return MDDataset.shipped(molecule, stride=100)


@pytest.fixture(scope="module")
def sampling_of(molecule, dataset):
    """What samples shards in a directory; `run` does no more with a prepared one, but slower."""

    def make(folder, resume=True, **changes):
        settings = replace(SAMPLING, **changes)
        return ShardSampling(folder, molecule, settings, replace(RESUME, resume=resume), dataset)

    return make


@pytest.fixture(scope="module")
def whole(prepared):
    """All shards in one process, as `run` does them."""
    folder = prepared.with_name("whole")
    shutil.copytree(prepared, folder)
    assert run(folder, options=RESUME) == {"analysed": 1}
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "run")


def assert_same(folder, whole, numbers=range(S)):
    for number in numbers:
        assert differences(shard_directory(folder, number), shard_directory(whole, number)) == []


def test_preparing_and_sampling_is_what_one_process_does_alone(whole, folder):
    """The shards were not started in any order that matters."""
    assert json.loads((whole / "config.json").read_text())["n_shards"] == S
    for number in (2, 0):
        done = run(folder, options=replace(OPTIONS, seed=None, shard=number))
        assert done == {f"{number:04d}": 4}
    assert_same(folder, whole, (0, 2))
    assert not shard_directory(folder, 1).exists()
    assert run(whole, options=RESUME) == {"analysed": 1}  # nothing is left to do


def test_killed_in_one_shard_and_resumed(whole, folder, sampling_of, monkeypatch):
    """Before its first checkpoint, after it, and between two."""
    for name, at in (("create", 1), ("write_first_checkpoint", 2), ("write", 3), ("write", 6)):
        original, calls = getattr(RunWriter, name), []

        def killing(self, *given, original=original, calls=calls, at=at, **options):
            calls.append(0)
            if len(calls) == at:
                raise Killed
            return original(self, *given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(RunWriter, name, killing)
            with pytest.raises(Killed):
                sample_shards(sampling_of(folder), range(S))
    sample_shards(sampling_of(folder), range(S))
    assert_same(folder, whole)


def test_interrupted_shards_are_written_and_analysed(whole, folder, monkeypatch):
    """The samples so far, if there are any; and by one process only."""
    advance, analysed = ParallelTempering._advance, []
    monkeypatch.setattr(
        "openmm_tsf.workflow.run.analyze",
        lambda path, **_: analysed.append(load_run(path, start=0).shards.to_dict()) or {},
    )

    def run_interrupted(shard, iteration, **changes):
        def interrupted(self):
            seed = derive_seed(8, Purpose.SAMPLING, shard)
            if self.seed == seed and self.state.iteration == iteration:
                signal.raise_signal(signal.SIGINT)
            return advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(ParallelTempering, "_advance", interrupted)
            for name, value in changes.items():
                patch.setattr(f"openmm_tsf.workflow.run.{name}", value)
            with pytest.raises(KeyboardInterrupt):
                run(folder, options=RESUME)

    run_interrupted(0, 1)  # tuning
    assert analysed == []
    run_interrupted(1, 4)  # two of tuning; the iteration that was begun is completed
    (seen,) = analysed
    assert seen["used"] == ["0000", "0001"]
    assert seen["n_iterations"] == {"0000": 4, "0001": 3, "0002": 0, "0003": 0}
    run_interrupted(2, 4, current_ranks=lambda: FirstOfTwo(0, 2))
    assert len(analysed) == 1
    run(folder, options=RESUME)
    assert_same(folder, whole)


def full_disk(number, patch):
    """Let the disk be full where a shard writes a segment."""
    write = run_writer.write_arrays

    def full(path, content):
        if f"shards/{number:04d}/" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    patch.setattr(run_writer, "write_arrays", full)


def test_a_full_disk_on_one_shard_leaves_the_others(whole, folder, sampling_of, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(1, patch)
        with pytest.raises(ShardsFailedError, match=r"1 of 4 shards failed: 0001 .*No space left"):
            sample_shards(sampling_of(folder), range(S))
    assert_same(folder, whole, (0, 2, 3))
    sample_shards(sampling_of(folder), [1])
    assert_same(folder, whole)


@pytest.mark.slow
def test_the_exit_status_says_that_a_shard_failed(folder, monkeypatch, capsys):
    full_disk(3, monkeypatch)
    # The name of the shard, its file and the reason.
    status = main(["run", "--output", str(folder), "--shard", "3", "--platform", "Reference"])
    assert status == 2
    error = capsys.readouterr().err
    assert "1 of 4 shards failed: 0003" in error
    assert "No space left on device" in error


def test_two_jobs_for_one_shard(whole, folder, sampling_of):
    with (
        DirectoryLock(shutil.copytree(shard_directory(whole, 0), shard_directory(folder, 0))),
        pytest.raises(ShardsFailedError, match=r"0000: output: .*0000 is in use by process"),
    ):
        sample_shards(sampling_of(folder), [0, 1])
    assert_same(folder, whole, (0, 1))
    with pytest.raises(ShardsFailedError, match=r"0000 is not empty; .* --shard 0 --resume"):
        sample_shards(sampling_of(folder, resume=False), [0])


def test_a_job_whose_shard_was_taken_over_stops(whole, folder, sampling_of, monkeypatch):
    """On a file system whose locks are known to one node only."""
    write, note = RunWriter.write, shard_directory(folder, 0) / ".lock-owner.json"

    def overtaken(self, *given, **options):
        if self.n_segments == 2:
            owner = json.loads(note.read_text()) | {"host": "node7", "token": "1", "attempt": 2}
            note.write_text(json.dumps(owner))
        write(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", overtaken)
        with pytest.raises(ShardsFailedError, match=r"0000: .* taken over .* attempt 2, on node7"):
            sample_shards(sampling_of(folder), [0])
    assert len(list((note.parent / "segments").iterdir())) == 2
    sample_shards(sampling_of(folder), [0])  # the other job
    assert_same(folder, whole, [0])


def test_ranks_take_turns_and_their_number_may_change(whole, folder, sampling_of, monkeypatch):
    """Two ranks, of which the second is killed; then three."""
    sample_shards(sampling_of(folder), range(0, S, 2))
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            sample_shards(sampling_of(folder), range(1, S, 2))
    for rank in range(3):
        sample_shards(sampling_of(folder), range(rank, S, 3))
    assert_same(folder, whole)


@pytest.mark.slow
def test_two_processes_of_a_job_have_the_bits_of_one(whole, folder):
    command = ["run", "--output", str(folder), "--resume", "--platform", "Reference"]
    jobs = run_ranks(run_program, command, None, size=2, timeout=None, seconds=900)
    assert [status for status, _, _ in returned(jobs)] == [0, 0]
    for number in range(S):
        # These processes record that there is a reference.
        parts = (shard_directory(run, number) for run in (folder, whole))
        assert differences(*parts, ("config.json",)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, None), (signal.SIGTERM, 130)])
def test_a_rank_that_ends_in_production(whole, folder, sampling_of, number, status):
    """The other one finishes its shards, and says that a rank is missing; one process goes on."""
    command = ["run", "--output", str(folder), "--resume", "--platform", "Reference"]
    command += ["--checkpoint-seconds", "0"]
    when = shard_directory(folder, 1) / "checkpoint.pt"
    first, second = run_ranks(run_program, command, when, number, timeout=None, seconds=900)
    if status is None:
        assert second == (False, "")
    else:
        assert second[1][0] == status
    assert first[1][0] == 2
    assert "error: rank 0 of 2: another rank ended or did not come to a barrier" in first[1][2]
    assert not (folder / "summary.json").exists()
    finished = [read_shard(folder, k, read_config(folder)).state for k in range(S)]
    assert (finished[0], finished[2]) == ("finished", "finished")
    assert "finished" not in (finished[1], finished[3])
    sample_shards(sampling_of(folder), range(S))
    for k in range(S):  # these processes record that there is a reference
        parts = (shard_directory(run, k) for run in (folder, whole))
        assert differences(*parts, ("config.json",)) == []


@pytest.mark.slow
def test_a_damaged_shard_is_sampled_again_from_its_seed(whole, folder, sampling_of):
    shutil.copytree(shard_directory(whole, 1), shard_directory(folder, 1))
    next((shard_directory(folder, 1) / "segments").iterdir()).unlink()
    with pytest.raises(ShardsFailedError, match=r"0001: .*cannot be continued.* is missing"):
        sample_shards(sampling_of(folder), [1])
    shutil.rmtree(shard_directory(folder, 1))
    sample_shards(sampling_of(folder), [1])
    assert_same(folder, whole, [1])


@pytest.mark.slow
def test_a_longer_run(whole, folder, sampling_of):
    longer = replace(SETTINGS, sampling=replace(SAMPLING, n_iterations=6))
    with pytest.raises(ValueError, match="n_iterations: expected at most 4 of one shard"):
        run(folder, longer, options=replace(RESUME, shard=0))
    sample_shards(sampling_of(folder), [0])
    assert run(folder, longer, options=replace(RESUME, prepare=True)) == {}
    assert run(folder, options=replace(RESUME, shard=0)) == {"0000": 6}
    assert run(folder, options=replace(RESUME, shard=3)) == {"0003": 6}
    parts = [(d / "T500.00K.dcd").read_bytes()[276:] for d in
             (shard_directory(whole, 3), shard_directory(folder, 3))]  # fmt: skip
    assert parts[1].startswith(parts[0])


def test_what_does_not_fit_is_refused(prepared, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"shard: .* has no trained flow .* \.\.\. --shards S --p"):
        run(tmp_path / "none", SETTINGS, options=replace(OPTIONS, shard=0))
    with pytest.raises(ValueError, match="shard: expected 0 to 3, as the run has, got 4"):
        run(prepared, options=replace(OPTIONS, shard=4))
    changed = replace(SETTINGS, sampling=replace(SAMPLING, n_shards=2))
    with pytest.raises(ValueError, match=r"sampling\.n_shards: what is in .* with 4, got 2"):
        run(prepared, changed, options=replace(RESUME, shard=0))
    single = replace(SETTINGS, sampling=replace(SAMPLING, n_shards=1))
    with pytest.raises(ValueError, match="prepare: expected a run with n_shards of at least 2"):
        run(tmp_path / "one", single, options=replace(OPTIONS, prepare=True))
    thinned = replace(SETTINGS, sampling=replace(SAMPLING, save_interval=2))
    with pytest.raises(ValueError, match=r"save_interval: .* made with the default, got 2"):
        run(prepared, thinned, options=replace(RESUME, shard=0))
    with pytest.raises(ValueError, match="prepare: expected False with a shard, got True and 3"):
        replace(OPTIONS, prepare=True, shard=3)
    with pytest.raises(ValueError, match="n_shards: expected a divisor of n_walkers, 8, got 3"):
        replace(SAMPLING, n_shards=3)
    with pytest.raises(ValueError, match="until: expected none with n_shards=4"):
        replace(SAMPLING, until=("U < 1 kJ/mol",))
    with pytest.raises(ValueError, match="n_walkers: expected at least 3 in each shard"):
        replace(SETTINGS, n_rounds=1)
    with pytest.raises(ValueError, match="n_shards: expected 1, shards are of run, got 4"):
        sample(prepared, tmp_path / "sampled", SAMPLING)
    with pytest.raises(ValueError, match=r"of run, got 4; continue it with `openmm-tsf run --out"):
        sample(None, prepared, SAMPLING, options=RESUME)
    monkeypatch.setattr("openmm_tsf.utils.random.derive_seed", lambda *_: 3)
    with pytest.raises(ValueError, match="seed: two of 4 streams would be the same"):
        run(tmp_path / "same", SETTINGS, options=replace(OPTIONS, prepare=True))
    assert main(["run", "--output", str(tmp_path / "no"), "--shard", "1"]) == 2
    assert "--shards S --prepare`" in capsys.readouterr().err


def test_a_run_in_one_shard_records_what_it_did_before():
    single = to_plain_data(replace(SAMPLING, n_shards=1))
    assert "n_shards" not in single
    assert from_plain_data(SamplingSettings, single, "config.json").n_shards == 1
    assert to_plain_data(SAMPLING)["n_shards"] == S
