"""A run that is killed in each of its stages and resumed: the same to the last bit."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.io.directory import read_stage
from openmm_tsf.sampling import ParallelTempering, recorder
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.training import FitSettings
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.workflow import md_simulation
from openmm_tsf.workflow import run as run_module
from openmm_tsf.workflow import sample as sample_module
from openmm_tsf.workflow import stage as stage_module
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings

FIT = FitSettings(
    n_steps=6, batch_size=32, kl_batch_size=4, validate_interval=3, n_validation_draws=8,
    warmup_steps=2, ramp=(0.2, 0.5),
)  # fmt: skip
SETTINGS = RunSettings(
    md=MDSettings(n_frames=150, steps_per_frame=2, n_equilibration_steps=10),
    flow=FlowSettings(n_blocks=1, hidden=(8,)),
    fit=FIT,
    n_rounds=2,
    round_iterations=6,
    round_stride=1,
    refit=replace(FIT, n_steps=4, ramp=(0.0, 0.0)),
    sampling=SamplingSettings(temperatures=(500.0, 600.0), n_walkers=4, n_iterations=9, n_tuning=3),
)
OPTIONS = RunOptions(seed=8, platform="Reference", progress=False, checkpoint_seconds=0.0)
RESUME = replace(OPTIONS, seed=None, resume=True)
SIMULATED = FrameSource(simulate=True)


class Killed(BaseException):
    """A kill: the program does not catch it, and writes nothing more."""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take seconds, and are tested elsewhere."""
    monkeypatch.setattr(sample_module, "analyze", lambda folder: {"analysed": str(folder)})
    monkeypatch.setitem(md_simulation.BLOCK_STEPS, "Reference", 40)
    monkeypatch.setattr(recorder, "CHECKPOINT_SHARE", math.inf)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_module, "analyze", lambda folder: {})
        patch.setitem(md_simulation.BLOCK_STEPS, "Reference", 40)
        folder = tmp_path_factory.mktemp("run") / "whole"
        run(folder, SETTINGS, frames=SIMULATED, options=OPTIONS)
    return folder


def content(folder):
    """Frames, numbers, weights of a run; neither times nor the number of segments."""
    values = {name: (folder / name).read_bytes() for name in ("T500.00K.dcd", "T600.00K.dcd",
             "md/md.dcd", "training.csv", "topology.pdb", "system.xml")}  # fmt: skip
    for name, value in torch.load(folder / "flow.pt", weights_only=True)["state_dict"].items():
        values[name] = value.numpy().tobytes()
    parts = [dict(np.load(path)) for path in sorted((folder / "segments").iterdir())]
    for name in parts[0]:
        if name in ("energy", "replica", "iteration", "dihedrals"):
            values[name] = np.concatenate([part[name] for part in parts]).tobytes()
        elif name != "wall_seconds":
            values[name] = sum(part[name] for part in parts).tolist()
    config = json.loads((folder / "config.json").read_text())
    values["sigma"] = config["choices"]["sigma"]
    values["evaluations"] = config["energy_evaluations"]["md"]
    return values


def nth(owner, name, n, after=False):
    """Return a patch that kills the process at the n-th call of a function."""

    def patch(monkeypatch):
        original, calls = getattr(owner, name), [0]

        def killing(*args, **options):
            calls[0] += 1
            if calls[0] == n and not after:
                raise Killed
            result = original(*args, **options)
            if calls[0] == n:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, killing)

    return patch


SOME = [
    nth(md_simulation.MDSimulation, "save", 4),
    nth(Trainer, "train_step", 5),
    nth(stage_module.Stage, "record_costs", 2),
    nth(RunWriter, "create", 1, after=True),
    nth(RunWriter, "write", 4),
]
MORE = [
    nth(stage_module, "write_molecule", 1),
    nth(stage_module, "write_molecule", 2),
    nth(md_simulation.MDSimulation, "save", 1),
    nth(md_simulation.MDSimulation, "write_frames", 3, after=True),
    nth(md_simulation.MDSimulation, "finish", 1, after=True),
    nth(run_module, "build_flow", 1),
    nth(Trainer, "train_step", 2, after=True),
    nth(Trainer, "train_step", 8),
    nth(stage_module.Stage, "record_costs", 1),
    nth(stage_module.Stage, "record_costs", 5),
    nth(ParallelTempering, "tune", 2, after=True),
    nth(ParallelTempering, "tune", 3),
    nth(RunWriter, "create", 1),
    nth(RunWriter, "write_first_checkpoint", 1, after=True),
    nth(run_module, "remove_training_files", 1),
    nth(RunWriter, "save_checkpoint", 5),
    nth(sample_module, "analyze", 1),
]


@pytest.mark.parametrize("kill", SOME + [pytest.param(k, marks=pytest.mark.slow) for k in MORE])
def test_killed_anywhere_and_resumed(whole, tmp_path, monkeypatch, kill):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            run(folder, SETTINGS, frames=SIMULATED, options=OPTIONS)
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
    for given, message in (
        ((None, replace(RESUME, seed=9)), "seed: what is in .* was made with 8, got 9"),
        ((replace(SETTINGS, n_rounds=1), RESUME), r"settings\.n_rounds: what is in"),
        ((replace(longer, stride=2), RESUME), r"settings\.stride: what is in"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder, given[0], options=given[1])
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


def test_a_longer_total_is_kept_and_frames_may_be_missing(whole, tmp_path, monkeypatch):
    frames, folder = tmp_path / "md", tmp_path / "run"
    shutil.copytree(whole / "md", frames)
    short = replace(SETTINGS, n_rounds=0)
    with monkeypatch.context() as patch:
        nth(RunWriter, "write", 4)(patch)
        with pytest.raises(Killed):
            run(folder, short, frames=FrameSource(frames), options=OPTIONS)
    frames.rename(tmp_path / "elsewhere")  # production has started: nothing reads them
    longer = replace(short, sampling=replace(short.sampling, n_iterations=12))
    with monkeypatch.context() as patch:
        nth(RunWriter, "write", 2)(patch)
        with pytest.raises(Killed):
            run(folder, longer, options=RESUME)
    run(folder, options=RESUME)  # to the last target
    assert load_run(folder).n_iterations == 12
