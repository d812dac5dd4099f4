"""What is said before a run: its plan, and its duration, measured on a few steps."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import openmm
import pytest

from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.workflow import duration
from openmm_tsf.workflow.duration import in_words
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import MDSettings
from tests.workflow.tiny import QUIET, SETTINGS

SHOWN = replace(QUIET, progress=True)


@pytest.fixture
def measured(monkeypatch, caplog):
    """Every stage is measured; no analysis."""
    for module in ("run", "md"):
        monkeypatch.setattr(f"openmm_tsf.workflow.{module}.WORTH_MEASURING", 0)
    monkeypatch.setattr("openmm_tsf.workflow.sample.analyze", lambda folder, **options: {})
    caplog.set_level(logging.INFO, logger="openmm_tsf")
    return caplog


@pytest.mark.parametrize("estimator", ["direct", pytest.param("path", marks=pytest.mark.slow)])
def test_measuring_changes_nothing_but_the_time(measured, tmp_path, estimator):
    path = {"estimator": "path", "n_chains": 8, "kl_batch_size": 4}
    more = path if estimator == "path" else {}
    settings = replace(
        SETTINGS,
        stride=400,
        fit=replace(SETTINGS.fit, **more),
        refit=replace(SETTINGS.refit, **more),
    )
    contents = []
    for name, options in (("quiet", QUIET), ("shown", SHOWN)):
        run(tmp_path / name, settings, options=options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        with np.load(tmp_path / name / "segments" / "segment_000000.npz") as arrays:
            contents.append((config, arrays["energy"]))
    (quiet, energy), (shown, same_energy) = contents
    np.testing.assert_array_equal(energy, same_energy)
    assert (tmp_path / "quiet" / "flow.pt").read_bytes() == (
        (tmp_path / "shown" / "flow.pt").read_bytes()
    )
    assert quiet["energy_evaluations"] == shown["energy_evaluations"]
    assert "expected" not in quiet["wall_seconds"]
    expected = shown["wall_seconds"]["expected"]
    assert expected > 0
    lines = [record.getMessage() for record in measured.records]
    plan = (
        "plan: training of 6 steps, then 1 x (3 + 15 iterations of sampling, training of 6 steps), "
        "then 3 + 12 iterations of 8 walkers at 2 temperatures; analysis"
    )
    assert lines.count(plan) == 2
    (line,) = [line for line in lines if line.startswith("expected on this machine")]
    assert "training" in line
    assert "sampling" in line


def test_a_measurement_that_fails_ends_no_run(measured, tmp_path, monkeypatch):
    def fail(*arguments):
        raise FloatingPointError("no finite gradient")

    def fail_in_openmm(*arguments):
        raise openmm.OpenMMException("Particle coordinate is NaN")

    monkeypatch.setattr("openmm_tsf.workflow.estimate.training_seconds", fail)
    summary = run(tmp_path / "run", replace(SETTINGS, n_rounds=0, stride=40), options=SHOWN)
    assert summary == {}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "expected" not in config["wall_seconds"]
    lines = [record.getMessage() for record in measured.records]
    assert "the duration could not be measured: no finite gradient" in lines
    monkeypatch.setattr("openmm_tsf.workflow.md.seconds_per_step", fail_in_openmm)
    settings = MDSettings(n_frames=2, steps_per_frame=30, n_equilibration_steps=20)
    assert run_md(alanine_dipeptide(), tmp_path / "md", settings, options=SHOWN).n_frames == 2


def test_md_says_how_long_it_takes(measured, tmp_path):
    settings = MDSettings(n_frames=2, steps_per_frame=30, n_equilibration_steps=20)
    run_md(alanine_dipeptide(), tmp_path / "md", settings, options=SHOWN)
    lines = [record.getMessage() for record in measured.records]
    assert any(line.startswith("MD: 80 steps, roughly ") for line in lines)


def test_steps_that_take_longer_are_expected_to_take_longer(monkeypatch):
    """The first step, with what it prepares, is told from the others."""

    class Slow:
        def train_step(self):
            clock[0] += 5.0 if not calls else 2.0
            potential.n_evaluations += 40 if not calls else 30
            calls.append(self.step)

    clock, calls, potential = [0.0], [], SimpleNamespace(n_evaluations=0)
    monkeypatch.setattr(duration.time, "perf_counter", lambda: clock[0])
    first, each = duration.step_costs(Slow(), 7, duration.CostMeter(potential))
    assert (first.tolist(), each.tolist()) == ([5.0, 40.0], [2.0, 30.0])
    assert calls == [7, 7, 7]


def test_iterations_are_measured_over_whole_cycles_once_everything_is_compiled():
    """Dynamics every fourth iteration counts a fourth; the first call, which compiles, nothing."""

    class Sampler:
        potential = SimpleNamespace(n_evaluations=0)
        iteration = 0

        def run(self, n, progress):
            for _ in range(n):
                clock[0] += 100.0 * (self.iteration == 0) + 1.0 + 8.0 * (self.iteration % 4 == 0)
                self.potential.n_evaluations += 2 + 100 * (self.iteration % 4 == 0)
                self.iteration += 1

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duration.time, "perf_counter", lambda: clock[0])
        settings = replace(SETTINGS.sampling, local_interval=4)
        assert duration.iteration_costs(Sampler(), settings) == (3.0, 27.0)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (37.0, "40 s"), (89.0, "90 s"), (125.0, "2 minutes"), (3000.0, "50 minutes"),
     (9000.0, "2 hours"), (400_000.0, "111 hours")],
)  # fmt: skip
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
