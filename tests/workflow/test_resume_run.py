"""The whole run, stopped dead in each of its stages and resumed: the same to the last bit."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.io.directory import read_stage
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling import recorder as recording
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.training import FitSettings
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.workflow import md_simulation as md_dynamics
from openmm_tsf.workflow import rounds
from openmm_tsf.workflow import run as workflow
from openmm_tsf.workflow import sample as production
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
QUIET = {"platform": "Reference", "progress": False, "checkpoint_seconds": 0.0}


class Killed(BaseException):
    """Nothing that the program catches, as nothing is written after kill -9."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures take seconds, and are looked at elsewhere."""
    monkeypatch.setattr(production, "analyze", lambda folder: {"analysed": str(folder)})
    monkeypatch.setitem(md_dynamics._BLOCK_STEPS, "Reference", 40)
    monkeypatch.setattr(recording, "_CHECKPOINT_SHARE", math.inf)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(production, "analyze", lambda folder: {})
        patch.setitem(md_dynamics._BLOCK_STEPS, "Reference", 40)
        folder = tmp_path_factory.mktemp("run") / "whole"
        workflow.run(folder, SETTINGS, own_md=True, seed=8, **QUIET)
    return folder


def content(folder):
    """All that a run is: frames, numbers, weights; not when, nor in how many segments."""
    found = {name: (folder / name).read_bytes() for name in ("T500.00K.dcd", "T600.00K.dcd",
             "md/md.dcd", "training.csv", "topology.pdb", "system.xml")}  # fmt: skip
    for name, value in torch.load(folder / "flow.pt", weights_only=True)["state_dict"].items():
        found[name] = value.numpy().tobytes()
    parts = [dict(np.load(path)) for path in sorted((folder / "segments").iterdir())]
    for name in parts[0]:
        if name in ("energy", "replica", "iteration", "dihedrals"):
            found[name] = np.concatenate([part[name] for part in parts]).tobytes()
        elif name != "wall_seconds":
            found[name] = sum(part[name] for part in parts).tolist()
    config = json.loads((folder / "config.json").read_text())
    found["sigma"] = config["choices"]["sigma"]
    found["evaluations"] = config["energy_evaluations"]["md"]
    return found


def nth(owner, name, n, after=False):
    """Patch a function so that its n-th call is where the process is killed."""

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
    nth(md_dynamics.Dynamics, "save", 4),
    nth(Trainer, "train_step", 5),
    nth(rounds.Rounds, "_note_costs", 2),
    nth(RunWriter, "create", 1, after=True),
    nth(RunWriter, "write", 4),
]
MORE = [
    nth(workflow, "write_molecule", 1),
    nth(md_dynamics, "write_molecule", 1),
    nth(md_dynamics.Dynamics, "save", 1),
    nth(md_dynamics.Dynamics, "_write_frames", 3, after=True),
    nth(md_dynamics.Dynamics, "finish", 1, after=True),
    nth(workflow, "build_flow", 1),
    nth(Trainer, "train_step", 2, after=True),
    nth(Trainer, "train_step", 8),
    nth(rounds.Rounds, "_note_costs", 1),
    nth(rounds.Rounds, "_note_costs", 5),
    nth(ParallelTempering, "tune", 2, after=True),
    nth(ParallelTempering, "tune", 3),
    nth(RunWriter, "create", 1),
    nth(RunWriter, "write_first_checkpoint", 1, after=True),
    nth(rounds.Rounds, "tidy", 1),
    nth(RunWriter, "_save_checkpoint", 5),
    nth(production, "analyze", 1),
]


@pytest.mark.parametrize("kill", SOME + [pytest.param(k, marks=pytest.mark.slow) for k in MORE])
def test_killed_anywhere_and_resumed(whole, tmp_path, monkeypatch, kill):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            workflow.run(folder, SETTINGS, own_md=True, seed=8, **QUIET)
    assert read_stage(folder) == "run"
    workflow.run(folder, resume=True, **QUIET)
    assert content(folder) == content(whole)
    assert not list((folder / "training").glob("*.pt"))


def test_another_question_is_refused(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    before = content(folder)
    workflow.run(folder, resume=True, **QUIET)  # nothing is left to do
    assert content(folder) == before
    longer = replace(SETTINGS, sampling=replace(SETTINGS.sampling, n_iterations=11))
    for options, message in (
        ({"seed": 9}, "seed: what is in .* was made with 8, got 9"),
        ({"settings": replace(SETTINGS, n_rounds=1)}, r"settings\.n_rounds: what is in"),
        ({"settings": replace(longer, stride=2)}, r"settings\.stride: what is in"),
    ):
        with pytest.raises(ValueError, match=message):
            workflow.run(folder, resume=True, **options, **QUIET)
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="no such checkpoint, but there are samples"):
        production.sample(None, folder, resume=True, **QUIET)
    shutil.copy(whole / "checkpoint.pt", folder / "checkpoint.pt")
    assert content(folder) == before
    workflow.run(folder, longer, resume=True, **QUIET)
    assert len(np.load(sorted((folder / "segments").iterdir())[-1])["iteration"]) > 0
    grown = content(folder)
    assert grown["T500.00K.dcd"][276:].startswith(before["T500.00K.dcd"][276:])
    assert len(grown["energy"]) == len(before["energy"]) * 11 // 9


def test_a_longer_total_is_kept_and_frames_may_go(whole, tmp_path, monkeypatch):
    frames, folder = tmp_path / "md", tmp_path / "run"
    shutil.copytree(whole / "md", frames)
    short = replace(SETTINGS, n_rounds=0)
    with monkeypatch.context() as patch:
        nth(RunWriter, "write", 4)(patch)
        with pytest.raises(Killed):
            workflow.run(folder, short, trajectory=frames, seed=8, **QUIET)
    frames.rename(tmp_path / "elsewhere")  # production has begun: nothing reads them
    longer = replace(short, sampling=replace(short.sampling, n_iterations=12))
    with monkeypatch.context() as patch:
        nth(RunWriter, "write", 2)(patch)
        with pytest.raises(Killed):
            workflow.run(folder, longer, resume=True, **QUIET)
    workflow.run(folder, resume=True, **QUIET)  # to the total that was asked for last
    assert load_run(folder).n_iterations == 12
