"""Frames of a run: several files, how many are needed, other Systems and temperatures."""

import logging
from dataclasses import replace

import mdtraj
import numpy as np
import openmm
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.cli.main import main
from openmm_tsf.io.serialization import from_plain_data, to_plain_data
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_numbers import (
    check_enough_frames,
    check_enough_md,
    warn_of_few_frames,
)
from openmm_tsf.workflow.frames import FrameSource, load_trajectory
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import MDSettings
from tests.support.chain import chain_of
from tests.support.refusals import from_shell, refused
from tests.workflow.tiny import QUIET, SETTINGS


@pytest.fixture(scope="module")
def parts(molecule, tmp_path_factory):
    """Two halves of the shipped frames, in two formats."""
    folder = tmp_path_factory.mktemp("parts")
    x = MDDataset.shipped(molecule, stride=200).positions.numpy().astype(np.float32)
    paths = folder / "a.dcd", folder / "b.nc"
    for path, half in zip(paths, (x[:100], x[100:]), strict=True):
        mdtraj.Trajectory(half, molecule.mdtraj_topology).save(str(path))
    return paths


@pytest.fixture(scope="module")
def short_md(molecule, tmp_path_factory):
    """MD that is not equilibrated."""
    folder = tmp_path_factory.mktemp("md") / "md"
    settings = MDSettings(n_frames=200, steps_per_frame=1, n_equilibration_steps=10)
    run_md(molecule, folder, settings, options=QUIET)
    return folder


def test_several_files(molecule, parts, tmp_path):
    source = FrameSource(parts, 600.0, stride=2)
    dataset = source.load(molecule)
    assert len(dataset) == 100
    again = from_plain_data(FrameSource, to_plain_data(source), "config.json")
    assert again == source
    assert source.name == ", ".join(map(str, parts))
    assert FrameSource([parts[0]], 600.0) == FrameSource(parts[0], 600.0)
    assert len(load_trajectory(list(parts), molecule, 600.0)) == 200


def test_several_files_from_the_shell(parts, tmp_path, capsys):
    paths = [str(path) for path in parts]
    given = [
        "--temperature",
        "600",
        "--preset",
        "quick",
        "--steps",
        "2",
        "--stride",
        "1",
        "--quiet",
    ]
    output = tmp_path / "flow"
    command = ["train", "--output", str(output), "--trajectory", *paths, *given]
    assert main(command) == 0, capsys.readouterr().err
    missing = ["run", "--output", tmp_path / "run", "--trajectory", *paths, "c.dcd", *given]
    assert "no such file or directory" in from_shell(missing, capsys)


def test_several_paths_that_are_no_files(molecule, parts, short_md):
    for trajectory, error, message in (
        ((parts[0], short_md), ValueError, "expected files where several are given, got .*md"),
        ((), ValueError, "trajectory: expected a path, got none"),
        ((parts[0], 3), TypeError, "trajectory: expected a path, got 3"),
        (("", parts[0]), ValueError, "got an empty text"),
        (3.5, TypeError, "trajectory: expected a path or several, got 3.5"),
    ):
        with refused(error, message):
            FrameSource(trajectory, 600.0).load(molecule)


def test_number_of_frames_that_are_needed(molecule, tmp_path, capsys):
    """The number named is enough, and one less is not."""
    with refused(ValueError, r"frames: 100 with stride 3 are too few: \d+ of 34 .* of \d+ frames"):
        check_enough_md(100, 3, molecule)
    for n_atoms, small in ((22, molecule), (5, chain_of())):
        for stride in (1, 7):
            with refused(ValueError, "frames or more") as caught:
                check_enough_md(4, stride, small)
            assert f"expected at least {3 * n_atoms - 5};" in str(caught.value)
            needed = int(str(caught.value).split("run MD of ")[1].split()[0])
            check_enough_md(needed, stride, small)
            with refused(ValueError, f"run MD of {needed} frames"):
                check_enough_md(needed - 1, stride, small)
    frames = MDDataset.shipped(molecule, stride=200)
    for n, message in ((67, "too few to split 10 ways"), (72, "at least 61 .* got 60 of 72")):
        with refused(ValueError, f"{message}; 22 atoms need 81 frames or more"):
            check_enough_frames(frames[:n], molecule)
    check_enough_frames(frames[:81], molecule)
    command = ["run", "--md", "--frames", "60", "--stride", "1", "--output", tmp_path / "a"]
    assert "(n_frames, --frames), or use a smaller stride" in from_shell(command, capsys)
    command = ["run", "--stride", "2000", "--output", tmp_path / "a", "--quiet"]
    assert "or a smaller stride (--stride)" in from_shell(command, capsys)
    assert not (tmp_path / "a").exists()


def test_barely_enough_frames_are_a_warning(molecule, caplog):
    """With n frames of d coordinates widths are wrong by up to sqrt(d/n)."""
    check_enough_md(752, 1, molecule)
    warn_of_few_frames(MDDataset.shipped(molecule, stride=50), molecule)
    check_enough_md(2**31 - 1, 1, molecule)
    assert not caplog.records
    check_enough_md(2000, 4, molecule)
    warn_of_few_frames(MDDataset.shipped(molecule, stride=400), molecule)
    few, fewer = (record.getMessage() for record in caplog.records)
    assert few.startswith("400 frames to train on are few for 60 coordinates")
    assert "wrong by some 39%; 10 for each need 3,000 frames or more" in few
    assert fewer.startswith("80 frames to train on")


def test_widths_of_a_covariance_of_few_frames():
    """The statement of the warning, on exact normal samples: narrowest and widest of 300."""
    generator = torch.Generator().manual_seed(4)
    for ratio in (2, 10):
        x = torch.randn(300 * ratio, 300, generator=generator, dtype=torch.float64)
        widths = torch.linalg.eigvalsh(x.T.cov()).sqrt()
        assert abs(float(widths[0]) - (1 - ratio**-0.5)) < 0.03
        assert abs(float(widths[-1]) - (1 + ratio**-0.5)) < 0.03


def test_md_of_the_same_system_is_not_refused(molecule, short_md, caplog):
    """Its temperature is known: that it is not equilibrated is a warning."""
    with caplog.at_level(logging.WARNING):
        assert len(load_trajectory(short_md, molecule)) == 200
    assert "expected frames of 600 K" in caplog.records[0].getMessage()


def test_md_of_another_system_is_judged_by_its_forces(molecule, short_md):
    system = openmm.XmlSerializer.clone(molecule.system)
    system.setParticleMass(0, 14.0)
    other = tsf.MolecularSystem(system, molecule.topology, molecule.positions)
    with refused(ValueError, "expected frames of 600 K, but by this System's forces they are of"):
        load_trajectory(short_md, other)


def test_a_run_refuses_frames_before_work(parts, tmp_path):
    for kelvin in (300.0, 1200.0):
        with refused(ValueError, rf"temperature: expected frames of {kelvin:g} K"):
            run(tmp_path / "run", replace(SETTINGS, stride=1), frames=FrameSource(parts, kelvin),
                options=QUIET)  # fmt: skip
    assert not (tmp_path / "run").exists()
