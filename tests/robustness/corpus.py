"""Tiny directories of every stage, finished and interrupted."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mdtraj
import torch

from openmm_tsf.analysis import Run, analyze
from openmm_tsf.cli import main as command_line
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training import FitSettings
from openmm_tsf.training.fit import _Fit
from openmm_tsf.workflow import run as workflow
from openmm_tsf.workflow.frames import load_trajectory
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings

FIT = FitSettings(
    n_steps=2, batch_size=8, kl_batch_size=2, validate_interval=2, n_validation_draws=4,
    warmup_steps=1, ramp=(0.2, 0.5),
)  # fmt: skip
TINY = RunSettings(
    md=MDSettings(n_frames=30, steps_per_frame=2, n_equilibration_steps=4),
    flow=FlowSettings(n_blocks=1, hidden=(4,)),
    fit=FIT,
    n_rounds=1,
    round_iterations=4,
    round_stride=1,
    refit=replace(FIT, ramp=(0.0, 0.0)),
    sampling=SamplingSettings(temperatures=(500.0, 600.0), n_walkers=5, n_iterations=4, n_tuning=0),
)
QUIET = {"platform": "Reference", "progress": False}

_molecule: MolecularSystem | None = None
_frames: MDDataset | None = None


def molecule() -> MolecularSystem:
    """Return alanine dipeptide, built once."""
    global _molecule
    if _molecule is None:
        _molecule = alanine_dipeptide()
        _ = _molecule.fingerprint, _molecule.dihedrals
    return _molecule


def frames() -> MDDataset:
    """Return a hundred of the shipped frames, read once."""
    global _frames
    if _frames is None:
        _frames = MDDataset.shipped(molecule(), stride=400)
    return _frames


class Killed(BaseException):
    """A simulated kill: no handler of the program catches it."""


def build(folder: Path) -> Path:
    """Write ``run``, ``killed`` (in its second training), ``train``, ``sample`` and ``md``.

    ``foreign`` holds files that are not of this program.
    """
    logging.getLogger("openmm_tsf").setLevel(logging.ERROR)
    folder.mkdir(parents=True, exist_ok=True)
    data = frames()
    trajectory = mdtraj.Trajectory(data.positions.numpy(), molecule().mdtraj_topology)
    trajectory.save_dcd(str(folder / "frames.dcd"))
    with no_pictures():
        workflow.run_md(molecule(), folder / "md", TINY.md, **QUIET)
        run = {"trajectory": folder / "frames.dcd", "temperature": 600.0, **QUIET}
        workflow.run(folder / "run", TINY, seed=5, **run)
        step, calls = _Fit.train_step, []

        def killed(self: Any) -> None:
            calls.append(self)
            if len(calls) == 4:  # in the last step of the second training
                self.save(folder / "killed" / "training" / "round_01.pt")
                raise Killed
            step(self)

        with mock.patch.object(_Fit, "train_step", killed), suppress(Killed):
            workflow.run(folder / "killed", TINY, seed=5, **run)
        workflow.train(
            load_trajectory(folder / "frames.dcd", molecule(), 600.0),
            folder / "train",
            TINY.flow,
            FIT,
            seed=2,
            **QUIET,
        )
        sampling = replace(TINY.sampling, n_iterations=3)
        workflow.sample(folder / "train", folder / "sample", sampling, seed=3, **QUIET)
        more = replace(sampling, n_iterations=5)
        workflow.sample(folder / "train", folder / "sample", more, resume=True, **QUIET)
    (folder / "foreign" / "deeper").mkdir(parents=True)
    (folder / "foreign" / "thesis.txt").write_text("mine\n")
    (folder / "foreign" / "deeper" / "data.bin").write_bytes(bytes(range(256)))
    (folder / "foreign" / "config.json").write_text(json.dumps({"theme": "dark"}))
    (folder / "foreign" / ".lock").write_text("of another program\n")
    return folder


@contextmanager
def no_pictures() -> Iterator[None]:
    """Leave out figures, which take seconds."""
    with (
        mock.patch.multiple(
            analyze,
            plot_diagnostics=lambda run, path: None,
            write_thermodynamics=lambda run, folder, reference: {},
        ),
        mock.patch.object(Run, "plot"),
    ):
        yield


def main(arguments: list[str]) -> int:
    """Run a command line."""
    torch.set_num_threads(1)
    return command_line.main(arguments)
