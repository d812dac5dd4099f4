"""A run that is killed in each of its stages and resumed: the same to the last bit."""

import json
import math
import shutil
from dataclasses import replace
from importlib import import_module
from itertools import count

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.io.directory import read_stage
from openmm_tsf.sampling import ParallelTempering, recorder
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.workflow import md_simulation
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.md_simulation import MDSimulation
from openmm_tsf.workflow.record import check_same_request
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import FlowSettings
from openmm_tsf.workflow.stage import Stage
from tests.workflow import tiny

SETTINGS = replace(
    tiny.SETTINGS,
    flow=FlowSettings(n_blocks=1, hidden=(8,)),
    n_rounds=2,
    round_iterations=6,
    refit=replace(tiny.SETTINGS.refit, n_steps=4),
    sampling=replace(tiny.SETTINGS.sampling, n_walkers=4, n_iterations=9),
)
OPTIONS = replace(tiny.QUIET, seed=8, checkpoint_seconds=0.0)
RESUME = replace(OPTIONS, seed=None, resume=True)
SIMULATED = FrameSource(simulate=True)


class Killed(BaseException):
    """A kill: the program does not catch it, and writes nothing more."""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """No plots, which take seconds and are tested elsewhere; short blocks, every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmm_tsf.workflow.sample.analyze", lambda folder, **options: {})
        patch.setitem(md_simulation.BLOCK_STEPS, "Reference", 40)
        patch.setattr(recorder, "CHECKPOINT_SHARE", math.inf)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(folder, SETTINGS, frames=SIMULATED, options=OPTIONS)
    return folder


def content(folder):
    """Frames, numbers, weights of a run; neither times nor the number of segments."""
    names = ("md/md.dcd", "training.csv", "topology.pdb", "system.xml")
    result = {n: (folder / n).read_bytes() for n in ("T500.00K.dcd", "T600.00K.dcd", *names)}
    for name, value in torch.load(folder / "flow.pt", weights_only=True)["state_dict"].items():
        result[name] = value.numpy().tobytes()
    parts = [dict(np.load(path)) for path in sorted((folder / "segments").iterdir())]
    for name in parts[0]:
        if name in ("energy", "replica", "iteration", "dihedrals"):
            result[name] = np.concatenate([part[name] for part in parts]).tobytes()
        elif name != "wall_seconds":
            result[name] = sum(part[name] for part in parts).tolist()
    config = json.loads((folder / "config.json").read_text())
    result["sigma"] = config["choices"]["sigma"]
    result["evaluations"] = config["energy_evaluations"]["md"]
    return result


def run_killed(kill, *given, **options):
    """Run, and die at the n-th call of a function: `kill` is (owner, name, n[, after])."""
    owner, name, n, *after = kill
    if isinstance(owner, str):
        owner = import_module(f"openmm_tsf.workflow.{owner}")
    original, calls = getattr(owner, name), count(1)

    def killing(*args, **options):
        is_last = next(calls) == n
        if is_last and not after:
            raise Killed
        result = original(*args, **options)
        if is_last:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killing)
        with pytest.raises(Killed):
            run(*given, **options)


SOME = [
    (MDSimulation, "save", 4), (Trainer, "train_step", 5), (Stage, "record_costs", 2),
    (RunWriter, "create", 1, "after"), (RunWriter, "write", 4),
]  # fmt: skip
MORE = [
    ("stage", "write_molecule", 1), ("stage", "write_molecule", 2), (MDSimulation, "save", 1),
    (MDSimulation, "write_frames", 3, "after"), (MDSimulation, "finish", 1, "after"),
    ("run", "build_flow", 1), (Trainer, "train_step", 2, "after"), (Trainer, "train_step", 8),
    (Stage, "record_costs", 1), (Stage, "record_costs", 5),
    (ParallelTempering, "tune", 2, "after"), (ParallelTempering, "tune", 3),
    (RunWriter, "create", 1), (RunWriter, "write_first_checkpoint", 1, "after"),
    ("run", "remove_training_files", 1), (RunWriter, "save_checkpoint", 5),
    ("sample", "analyze", 1),
]  # fmt: skip


@pytest.mark.parametrize("kill", SOME + [pytest.param(k, marks=pytest.mark.slow) for k in MORE])
def test_killed_anywhere_and_resumed(whole, tmp_path, kill):
    folder = tmp_path / "run"
    run_killed(kill, folder, SETTINGS, frames=SIMULATED, options=OPTIONS)
    assert read_stage(folder) == "run"
    run(folder, options=RESUME)
    assert content(folder) == content(whole)
    assert not list((folder / "training").glob("*.pt"))


def test_another_request_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = content(folder)
    run(folder, options=RESUME)  # nothing is left to do
    assert content(folder) == before
    longer = replace(SETTINGS, sampling=replace(SETTINGS.sampling, n_iterations=11))
    for settings, options, message in (
        (None, replace(RESUME, seed=9), "seed: what is in .* was made with 8, got 9"),
        (replace(SETTINGS, n_rounds=1), RESUME, r"settings\.n_rounds: what is in"),
        (replace(longer, stride=2), RESUME, r"settings\.stride: what is in"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, settings, options=options)
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="no such checkpoint, but there are samples"):
        sample(None, folder, options=RESUME)
    shutil.copy(whole / "checkpoint.pt", folder / "checkpoint.pt")
    assert content(folder) == before
    run(folder, longer, options=RESUME)
    assert len(np.load(sorted((folder / "segments").iterdir())[-1])["iteration"]) > 0
    grown = content(folder)
    assert grown["T500.00K.dcd"][276:].startswith(before["T500.00K.dcd"][276:])
    assert len(grown["energy"]) == len(before["energy"]) * 11 // 9


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ("cuda:3", "cuda:0", None),
        ("cuda:0", "cuda", None),
        (None, "cpu", None),
        ("cpu", "cuda:1", "started with device cpu, continued with cuda: valid"),
        (None, "cuda:1", "started with device cpu, continued with cuda: valid"),
    ],
)
def test_the_index_of_a_device_is_that_of_a_rank(before, now, told, tmp_path, caplog):
    recorded = {} if before is None else {"device": before}
    check_same_request(tmp_path, recorded, {"device": now}, ())
    assert [told in line for line in caplog.messages] == [True] * (told is not None)


def test_a_longer_total_is_kept_and_frames_may_be_missing(whole, tmp_path):
    frames, folder = tmp_path / "md", tmp_path / "run"
    shutil.copytree(whole / "md", frames)
    short = replace(SETTINGS, n_rounds=0)
    kill = (RunWriter, "write", 4)
    run_killed(kill, folder, short, frames=FrameSource(frames), options=OPTIONS)
    frames.rename(tmp_path / "elsewhere")  # production has started: nothing reads them
    longer = replace(short, sampling=replace(short.sampling, n_iterations=12))
    run_killed((RunWriter, "write", 2), folder, longer, options=RESUME)
    run(folder, options=RESUME)  # to the last target
    assert load_run(folder).n_iterations == 12
