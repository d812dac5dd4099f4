"""Progress and messages where they are shown, and where they cannot be written."""

import io
import logging
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from openmm_tsf import ParallelTempering, TemperatureSteerableFlow, fit
from openmm_tsf.cli.main import main
from openmm_tsf.potentials import GaussianWell
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings
from openmm_tsf.utils import activity, progress
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.progress import progress_bar
from openmm_tsf.utils.terminal import log_handler, say
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.run import run
from tests.robustness.corpus import no_pictures
from tests.robustness.sandbox import isolated
from tests.workflow.tiny import SETTINGS


class OnlyWrite:
    """A stream with nothing but write, such as some GUIs set."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(Terminal):
    """A terminal that went away."""

    def write(self, text=""):
        raise OSError(5, "Input/output error")

    flush = write


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def do_small_work():
    """Tune, sample and train, with progress; return the numbers of iterations and of steps."""
    flow, well = TemperatureSteerableFlow(1, 2, 1, (4,)), DoubleWell(0.0, -1.0, 0.25)
    sampler = ParallelTempering(None, flow, [1.0, 2.0], n_walkers=4, potential=well, seed=1)
    sampler.set_positions(torch.zeros(4, 2, 1))
    sampler.tune(3, progress=True)
    x = sampler.run(3, collect=True, progress=True)
    potential = GaussianWell(torch.eye(2, dtype=torch.float64))
    frames = potential.sample(200, 1.0, torch.Generator().manual_seed(0))
    flow = TemperatureSteerableFlow(n_coordinates=2, n_momenta=2, n_blocks=1, hidden=(8,))
    settings = FitSettings(n_steps=2, batch_size=16, kl_batch_size=4, n_validation_draws=20)
    return len(x), fit(flow, MDDataset(frames, 1.0), potential, settings=settings).n_steps


@pytest.mark.parametrize("stream", [io.StringIO, OnlyWrite])
def test_log_files_get_plain_lines(monkeypatch, stream):
    stream = stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress_bar("relax", 40, unit="chain", initial=10) as bar:
        bar.set_postfix_str("two energies")
        for _ in range(30):
            bar.update()
    text = getattr(stream, "text", None) or stream.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    assert len(lines) == 32
    assert lines[0].startswith("relax: 10 of 40 chains in 00:00")
    assert lines[1].endswith("left, two energies")
    assert lines[-1].startswith("relax: 40 of 40 chains in 00:00, 00:00 left")


def test_lines_are_far_apart_in_time(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("sample", 100_000) as bar:
        for _ in range(100_000):
            bar.update()
    first, last = stream.getvalue().splitlines()
    assert first.startswith("sample: 0 of 100000 iterations")
    assert last.startswith("sample: 100000 of 100000")


def test_terminals_get_a_bar_and_messages_above_it(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    logger = logging.getLogger("test_progress")
    monkeypatch.setattr(logger, "handlers", [log_handler()])
    logger.warning("before")
    with progress_bar("tune", 5) as bar, progress.log_above_bars():
        bar.update()
    text = stream.getvalue()
    assert "before\n" in text
    assert "\rtune:  " in text
    assert "5 [" in text


@pytest.mark.parametrize("stream", [lambda: None, closed, Broken, OnlyWrite])
def test_what_cannot_be_written_ends_no_work(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(sys, "stdout", stream())
    assert do_small_work() == (3, 2)
    if not isinstance(sys.stdout, Broken):  # a disk that is full is an error of commands
        say("done")
        say("error", error=True)
    log_handler().handle(logging.LogRecord("x", logging.INFO, "", 0, "text", (), None))


def test_nothing_is_shown_without_progress(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("sample", 3, show=False) as bar:
        bar.update()
    assert stream.getvalue() == ""


def test_errors_never_go_to_standard_output(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["analyze", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out == ""


def test_a_reader_that_went_away(tmp_path):
    """As ``| head -1``: the command has done its work, and its status says so."""
    command = [sys.executable, "-c", "from openmm_tsf.cli.main import main; import sys; "
               "from openmm_tsf.utils.terminal import say; say('x'); say('y', error=True); "
               "sys.exit(0)"]  # fmt: skip
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(command, stdout=write, stderr=write, cwd=tmp_path)
    os.close(write)
    assert process.returncode == 0


def test_closed_standard_streams_get_no_file(tmp_path):
    """What is printed to the number of a closed stream must not end up in a file of results."""
    code = (
        "import os; from openmm_tsf.utils.terminal import open_standard_streams as o; o(); "
        "f = open('file', 'wb'); assert f.fileno() > 2; os.write(1, b'x'); os.write(2, b'y')"
    )
    command = f'{sys.executable} -c "{code}" <&- >&- 2>&-; echo $?'
    assert subprocess.check_output(command, shell=True, cwd=tmp_path).strip() == b"0"
    assert (tmp_path / "file").read_bytes() == b""


def test_md_with_standard_error_closed(tmp_path, monkeypatch):
    """As by ``2>&-``, with which Python has no sys.stderr."""
    monkeypatch.chdir(tmp_path)
    given = "--frames 3 --equilibration-steps 3 --steps-per-frame 1 --platform Reference"

    def work():
        os.close(2)
        sys.stderr = None
        return main(["md", "--output", "md", *given.split()])

    outcome = isolated(work, seconds=300.0)
    assert (outcome.status, outcome.stdout) == (0, "3 frames in md/md.dcd\n"), outcome


def test_long_work_without_steps_logs_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(activity, "LINE_SECONDS", 0.02)
    logger = logging.getLogger("openmm_tsf.test")
    caplog.set_level(logging.INFO, logger="openmm_tsf")
    with log_while(logger, "compiling"):
        time.sleep(0.3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "compiling"
    assert 2 <= len(lines) < 20
    assert all(re.fullmatch(r"compiling: \d+ s so far", line) for line in lines[1:])
    caplog.clear()
    monkeypatch.setattr(activity, "LINE_SECONDS", 100.0)
    with pytest.raises(ValueError, match="broken"), log_while(logger, "it", announce=False):
        raise ValueError("broken")
    assert not caplog.records
    assert not any(thread.name == "log_while" for thread in threading.enumerate())
    caplog.set_level(logging.WARNING, logger="openmm_tsf")
    with log_while(logger, "quietly"):
        assert not any(thread.name == "log_while" for thread in threading.enumerate())
    assert not caplog.records


def test_equilibration_of_md_shows_its_steps(monkeypatch, tmp_path):
    """No frame is written for long: the steps before the first are counted."""
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow import md_simulation
    from openmm_tsf.workflow.md import run_md
    from openmm_tsf.workflow.settings import MDSettings

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(md_simulation, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    settings = MDSettings(n_frames=2, steps_per_frame=5, n_equilibration_steps=2500)
    run_md(alanine_dipeptide(), tmp_path / "md", settings, options=RunOptions(platform="Reference"))
    text = stream.getvalue()
    assert "\r" not in text
    for steps in (2500, 1500, 500):
        assert f"{steps} steps before the first" in text
    assert text.rstrip().splitlines()[-1].startswith("MD at 600 K: 2 of 2 frames")


def test_a_log_file_of_a_run_has_lines_from_start_to_end(tmp_path, monkeypatch):
    """A whole small run in a process of its own: what it does, how long it takes, no returns."""

    def work():
        with (tmp_path / "log").open("w") as log:
            monkeypatch.setattr(sys, "stderr", log)
            run_with_messages(tmp_path / "run", log)
        return "done"

    outcome = isolated(work, seconds=300.0)
    text = (tmp_path / "log").read_bytes().decode()
    assert outcome.status == "done", (outcome, text)
    assert "\r" not in text
    lines = text.splitlines()
    parts = (
        "80 frames to train on are few for 60 coordinates", "plan: MD of 210 steps",
        "energies by OpenMM on Reference", "measuring a few steps of training",
        "measuring a few iterations of sampling", "expected on this machine",
        "minimising the energy of the start", "MD at 600 K: 0 of 100 frames",
        "MD at 600 K: 100 of 100 frames", "frames: ", "flow with", "training: 0 of 6 steps",
        "first validation", "training: 6 of 6 steps", "tune: 0 of 3", "sample: 0 of 12",
        "sample: 12 of 12", "analysis: ",
    )  # fmt: skip
    found = [next((k for k, line in enumerate(lines) if part in line), None) for part in parts]
    assert None not in found, dict(zip(parts, found, strict=True))
    assert found == sorted(found)
    expected = lines[found[5]]
    for what in ("MD ", "training ", "sampling ", " in all, and the analysis"):
        assert what in expected
    assert not any("roughly" in line for line in lines)  # the time of MD was told already


def run_with_messages(directory, stream):
    """Make the smallest run, measured before each stage, with its messages to a stream.

    Plots take seconds, and are tested elsewhere.
    """
    settings = replace(SETTINGS, md=replace(SETTINGS.md, n_frames=100), n_rounds=0)
    for stage in ("run", "md"):
        import_module(f"openmm_tsf.workflow.{stage}").WORTH_MEASURING = 0
    logger = logging.getLogger("openmm_tsf")
    logger.handlers, logger.level = [logging.StreamHandler(stream)], logging.INFO
    with no_pictures():
        source = FrameSource(simulate=True)
        run(directory, settings, frames=source, options=RunOptions(platform="Reference"))
