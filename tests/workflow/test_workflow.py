"""A run from end to end, its stages one by one, interruption and continuation."""

import csv
import json
import re
import shutil
import signal
from dataclasses import replace
from functools import partial

import mdtraj
import numpy as np
import pytest
from openmmtools.testsystems import AlanineDipeptideVacuum

import openmm_tsf as tsf
from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.reference import has_reference
from openmm_tsf.cli.main import main
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.training.validation import Validator
from openmm_tsf.workflow.frames import FrameSource, load_trajectory
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.record import new_config
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import find_flow, sample
from openmm_tsf.workflow.settings import FlowSettings, RunSettings, SamplingSettings
from openmm_tsf.workflow.train import train
from tests.workflow.tiny import FIT, QUIET, RESUME, SETTINGS

TINY = replace(SETTINGS, stride=100)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take seconds, and are tested elsewhere."""
    module = "openmm_tsf.analysis.analyze"
    monkeypatch.setattr(tsf.Run, "plot", lambda self, path, reference=None: None)
    monkeypatch.setattr(f"{module}.plot_diagnostics", lambda run, path: None)
    monkeypatch.setattr(f"{module}.write_thermodynamics", lambda run, folder, reference: {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workflow") / "run"
    return run(folder, TINY, options=replace(QUIET, seed=5)), folder


def test_run_writes_everything(finished):
    summary, folder = finished
    written = {path.name for path in folder.iterdir()}
    assert written >= {
        "T500.00K.dcd", "T600.00K.dcd", "checkpoint.pt", "config.json", "diagnostics.png",
        "flow.pt", "ramachandran.png", "report.html", "segments", "summary.json", "system.xml",
        "thermodynamics.csv", "thermodynamics.json", "thermodynamics.png", "topology.pdb",
        "training.csv",
    }  # fmt: skip
    assert not any(name.endswith(".tmp") for name in written)
    assert {path.suffix for path in (folder / "training").iterdir()} == {".csv"}
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["temperatures_K"] == [500.0, 600.0]
    assert summary["n_samples_per_rung"] == 96
    assert set(summary["acceptance"]) >= {"flow_walk", "flow_independent", "local", "swap_plain"}
    frames = mdtraj.load(str(folder / "T500.00K.dcd"), top=str(folder / "topology.pdb"))
    assert len(frames) == 96


def test_run_counts_every_evaluation(finished):
    summary, _ = finished
    evaluations = summary["energy_evaluations"]
    assert evaluations["md"] == 10_020_000  # of the shipped frames
    # Rounds and tuning are counted, beside production: 15 + 3 + 3 against 12 iterations.
    assert evaluations["sampling"] > 2 * summary["production"]["energy_evaluations"]
    # Two trainings; each draws 8 at two temperatures three times, and makes KL draws.
    assert evaluations["training"] > 2 * 3 * 16
    assert summary["wall_seconds"]["training"] > 0
    assert summary["wall_seconds"]["sampling"] > 0


def test_run_records_every_choice_and_is_not_overwritten(finished):
    _, folder = finished
    with pytest.raises(FileExistsError, match="is not empty; choose another directory"):
        run(folder, TINY, options=QUIET)
    config = json.loads((folder / "config.json").read_text())
    choices = config["choices"]
    assert config["seed"] == choices["seed"] == 5
    assert choices["sampler_seed"] not in (5, None)
    assert config["stage"] == "run"
    assert choices["molecule"] == alanine_dipeptide().fingerprint
    complete = replace(TINY, md=TINY.md.completed_for(alanine_dipeptide()))
    assert choices["settings"] == to_plain_data(complete)
    assert choices["frames"] == {
        "source": "shipped", "n_frames": 400, "temperature_K": 600.0, "warnings": [],
    }  # fmt: skip
    frames = tsf.load_run(folder).training_basins
    assert frames.temperature == 600.0
    assert "phi > 0, psi beta" in frames.populations
    assert sum(entry["p"] for entry in frames.populations.values()) == pytest.approx(1.0)
    assert choices["potential"]["platform"] == "Reference"
    rows = list(csv.DictReader((folder / "training.csv").read_text().splitlines()))
    assert {row["round"] for row in rows} == {"0", "1"}
    # The second training was validated on the sampler's own samples of both temperatures, too.
    assert any(key.startswith("nll 500K") and row[key] for row in rows for key in row)


def test_the_quick_preset_scaled_down(tmp_path):
    quick = preset("quick")
    short = {"validate_interval": 4, "n_validation_draws": 8, "warmup_steps": 2}
    small = replace(
        quick,
        stride=200,
        fit=replace(quick.fit, n_steps=8, **short),
        refit=replace(quick.refit, n_steps=4, **short),
        round_iterations=1,
        sampling=replace(quick.sampling, n_walkers=3, n_iterations=2, n_tuning=2),
    )
    assert small.n_rounds == 1
    summary = run(tmp_path / "run", small, options=QUIET)
    assert summary["temperatures_K"] == [300.0, 424.26, 600.0]
    assert summary["n_samples_per_rung"] == 6


def test_run_from_md_and_from_a_trajectory(molecule, tmp_path):
    short = replace(TINY, stride=1, n_rounds=0)
    summary = run(tmp_path / "a", short, frames=FrameSource(simulate=True), options=QUIET)
    assert 310 < summary["energy_evaluations"]["md"] < 5000
    assert summary["wall_seconds"]["md"] > 0
    again = run(tmp_path / "b", short, frames=FrameSource(tmp_path / "a" / "md"), options=QUIET)
    assert again["energy_evaluations"]["md"] == summary["energy_evaluations"]["md"]
    bare = FrameSource(tmp_path / "a" / "md" / "md.dcd")
    with pytest.raises(ValueError, match="expected the temperature"):
        run(tmp_path / "c", short, frames=bare, options=QUIET)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="trajectory: expected none where MD is to be run"):
        FrameSource("md.dcd", simulate=True)


@pytest.fixture(scope="module")
def trained(molecule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workflow") / "flow"
    dataset = MDDataset.shipped(molecule, stride=100)
    return train(dataset, folder, TINY.flow, FIT, options=replace(QUIET, seed=2)), folder, dataset


def assert_same_flow(again, flow):
    for name, value in flow.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], value)


def test_train_alone(molecule, trained):
    flow, folder, dataset = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["energy_evaluations"]["training"] > 0
    assert config["energy_evaluations"]["md"] == dataset.n_evaluations
    again = tsf.TemperatureSteerableFlow.load(folder / "flow.pt", molecule)
    assert_same_flow(again, flow)
    assert len((folder / "training.csv").read_text().splitlines()) == 4
    with pytest.raises(FileExistsError, match="is not empty"):
        train(dataset, folder, TINY.flow, FIT, options=QUIET)
    before = {path: path.read_bytes() for path in folder.glob("[!.]*")}
    moved = replace(dataset, positions=dataset.positions.roll(1, 0))
    other = replace(dataset, molecule=alanine_dipeptide("ff96-obc1"))
    for frames, seed, message in (
        (dataset, 3, "seed: what is in .* was made with 2, got 3"),
        (moved, 2, "frames: those of the stage in .* are other ones"),
        (other, 2, "is of another molecule"),
    ):
        with pytest.raises(ValueError, match=message):
            train(frames, folder, TINY.flow, FIT, options=replace(RESUME, seed=seed))
    assert before == {path: path.read_bytes() for path in folder.glob("[!.]*")}
    thinned = {"source": FrameSource(stride=7), "options": replace(RESUME, seed=2)}
    assert_same_flow(train(dataset, folder, TINY.flow, FIT, **thinned), flow)  # the same frames
    (folder / "no").mkdir()
    (folder / "no" / "mine").touch()
    with pytest.raises(ValueError, match="holds nothing to resume"):
        train(dataset, folder / "no", TINY.flow, FIT, options=RESUME)


def test_training_resumes_exactly(trained, tmp_path, monkeypatch):
    flow, _, dataset = trained
    validate = Validator.validate

    def interrupted(self, network, step, *rest):
        if step == 6:
            raise KeyboardInterrupt
        return validate(self, network, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, tmp_path / "flow", TINY.flow, FIT, options=replace(QUIET, seed=2))
    assert (tmp_path / "flow" / "flow.pt").is_file()
    again = train(dataset, tmp_path / "flow", TINY.flow, FIT, options=replace(RESUME, seed=2))
    assert_same_flow(again, flow)


def test_sample_alone_and_resumed(trained, tmp_path):
    _, folder, dataset = trained
    settings = replace(TINY.sampling, n_iterations=4)
    summary = sample(folder, tmp_path / "run", settings, options=QUIET)
    assert summary["n_iterations"] == 4
    assert summary["energy_evaluations"]["training"] > 0  # known from the flow's directory
    known = json.loads((folder / "config.json").read_text())["choices"]["basins"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["choices"]["basins"] == known
    assert summary["basins"].keys() >= known["populations"].keys()
    again = sample(None, tmp_path / "run", options=RESUME)
    assert again["n_iterations"] == 4  # nothing is left to do
    more = replace(settings, n_iterations=8)
    assert sample(folder, tmp_path / "run", more, options=RESUME)["n_iterations"] == 8
    other_ladder = replace(more, temperatures=(400.0, 600.0))
    for given, start, options, message in (
        (other_ladder, None, RESUME, r"settings\.temperatures: what is in .* was made with"),
        (more, None, replace(RESUME, seed=3), r"seed: what is in .* was made with 1, got 3"),
        (more, dataset, RESUME, "start: these are not the frames"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(folder, tmp_path / "run", given, start=start, options=options)
    other = sample(folder / "flow.pt", tmp_path / "other", settings, start=dataset, options=QUIET)
    assert other["n_iterations"] == 4
    with pytest.raises(FileExistsError, match="is not empty"):
        sample(folder, tmp_path / "run", settings, options=QUIET)
    ff96 = alanine_dipeptide("ff96-obc1")
    with pytest.raises(ValueError, match="another molecule"):
        sample(folder, tmp_path / "x", settings, molecule=ff96, options=QUIET)
    with pytest.raises(FileNotFoundError, match="flow: no such flow file"):
        sample(tmp_path / "no", tmp_path / "x", settings, options=QUIET)
    assert not (tmp_path / "x").exists()


def interrupt_at(iteration, patch):
    """Let Ctrl-C come within an iteration, which is completed."""
    advance = ParallelTempering._advance

    def interrupted(self):
        if self.state.iteration == iteration:
            signal.raise_signal(signal.SIGINT)
        return advance(self)

    patch.setattr(ParallelTempering, "_advance", interrupted)


def test_interrupted_production_is_written_and_analysed(trained, tmp_path, monkeypatch):
    _, folder, _ = trained
    with monkeypatch.context() as patch:
        interrupt_at(9, patch)
        with pytest.raises(KeyboardInterrupt):
            sample(folder, tmp_path / "run", TINY.sampling, options=QUIET)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["n_iterations"] == 7  # of which three were tuning
    resumed = sample(folder, tmp_path / "run", options=RESUME)
    assert resumed["n_iterations"] == TINY.sampling.n_iterations


def test_interrupted_before_anything_is_saved(trained, tmp_path, monkeypatch):
    """There is nothing to analyse: it is interrupted, and no error."""
    _, folder, _ = trained
    settings = replace(TINY.sampling, save_interval=6)
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)  # the third of them was the last one of tuning
        with pytest.raises(KeyboardInterrupt):
            sample(folder, tmp_path / "run", settings, options=QUIET)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert sample(folder, tmp_path / "run", options=RESUME)["n_iterations"] == 2


def test_a_damaged_run_names_its_file(trained, tmp_path):
    _, folder, _ = trained
    run, settings = tmp_path / "run", replace(TINY.sampling, n_iterations=1, n_tuning=0)
    sample(folder, run, settings, options=replace(QUIET, seed=4))
    assert json.loads((run / "config.json").read_text())["seed"] == 4
    for name in ("checkpoint.pt", "config.json", "T500.00K.dcd"):
        good = (run / name).read_bytes()
        (run / name).write_bytes(good[: len(good) // 2])
        if name.endswith("dcd"):
            (run / name).unlink()
        with pytest.raises(ValueError, match=name):
            sample(folder, run, settings, options=RESUME)
        (run / name).write_bytes(good)
    more = replace(settings, n_iterations=2)
    assert sample(folder, run, more, options=RESUME)["n_iterations"] == 2


def test_a_folder_without_config_knows_its_molecule(trained, tmp_path):
    _, folder, _ = trained
    for name in ("flow.pt", "system.xml", "topology.pdb"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert find_flow(tmp_path) == (tmp_path, tmp_path / "flow.pt")
    (tmp_path / "system.xml").unlink()
    assert find_flow(tmp_path) == (None, tmp_path / "flow.pt")
    with pytest.raises(FileExistsError, match="its flow can be used: sample --flow"):
        run(tmp_path, TINY, options=QUIET)


def test_failed_starts_leave_nothing(trained, tmp_path, capsys):
    _, folder, dataset = trained
    output = tmp_path / "output"
    for command in (["run"], ["train"], ["sample", "--flow", str(folder)], ["md"]):
        assert main([*command, "--output", str(output), "--platform", "Abacus", "--quiet"]) == 2
        assert re.search(r"platform: expected one of .* got 'Abacus'", capsys.readouterr().err)
    with pytest.raises(ValueError, match="frames are too few to split"):
        train(dataset[:5], output, TINY.flow, FIT, options=QUIET)
    with pytest.raises(ValueError, match="at least 61 frames to train on, got 60 of 72"):
        train(dataset[:72], output, TINY.flow, FIT, options=QUIET)
    for frames, stride, number in (("200", "4", 50), ("288", "4", 60)):
        command = ["run", "--md", "--frames", frames, "--stride", stride]
        assert main([*command, "--output", str(output), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert f"frames: {frames} with stride 4 are too few" in error
        assert str(number) in error
    with pytest.raises(ValueError, match="temperature: expected none without a trajectory"):
        FrameSource(temperature=500.0)
    assert not output.exists()


def test_arguments_of_a_wrong_type_are_refused(molecule, trained, tmp_path):
    _, folder, dataset = trained
    output = tmp_path / "output"
    for function, given, expected in (
        (partial(run, output), {"settings": 3}, "settings: expected RunSettings, got int"),
        (partial(run, output), {"molecule": "a"}, "molecule: expected MolecularSystem, got str"),
        (partial(run, output), {"frames": "x.dcd"}, "frames: expected FrameSource, got str"),
        (partial(run, output), {"options": {}}, "options: expected RunOptions, got dict"),
        (partial(train, dataset, output), {"flow_settings": FIT}, "flow_settings: expected Flow"),
        (partial(train, dataset, output), {"fit_settings": 0}, "fit_settings: expected FitSett"),
        (partial(train, dataset, output), {"source": "x.dcd"}, "source: expected FrameSource"),
        (partial(train, None, output), {}, "dataset: expected MDDataset, got NoneType"),
        (partial(sample, folder, output), {"settings": 3}, "settings: expected SamplingSettings"),
        (partial(sample, folder, output), {"start": [1]}, "start: expected MDDataset, got list"),
        (partial(run_md, molecule, output), {"settings": TINY}, "settings: expected MDSettings"),
        (partial(run_md, None, output), {}, "molecule: expected MolecularSystem, got NoneType"),
    ):
        with pytest.raises(TypeError, match=expected):
            function(**given)
    assert not output.exists()


def test_directories_without_samples_are_refused(trained, tmp_path):
    _, folder, _ = trained
    with pytest.raises(ValueError, match="expected a directory with samples, got one of train"):
        tsf.load_run(folder)
    config = new_config("run", alanine_dipeptide(), settings=TINY, seed=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no samples, the run has not started sampling"):
        tsf.load_run(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match=r"config\.json: damaged, has no 'temperatures_K'"):
        tsf.load_run(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"expected a directory of the sample stage, .* 'run'"):
        sample(folder, tmp_path, TINY.sampling, options=RESUME)


def test_commands_refuse_to_resume_another_stage(trained, finished, tmp_path, capsys):
    flow, run = trained[1], finished[1]
    more = ["--iterations", str(TINY.sampling.n_iterations + 1)]
    for command, folder, other in (
        (["md"], flow, "train"),
        (["md", "--frames", "9"], run, "run"),
        (["train"], run, "run"),
        (["sample", "--flow", str(flow)], flow, "train"),
        (["run"], flow, "train"),
    ):
        assert main([*command, "--output", str(folder), "--resume", "--quiet"]) == 2
        message = f"expected a directory of the {command[0]} stage, {folder} is of '{other}'"
        assert message in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")  # sample continues production of a run
    assert main(["sample", "--output", str(tmp_path / "run"), *more, "--resume", "--quiet"]) == 0
    capsys.readouterr()


def test_analyze_alone(finished, tmp_path, monkeypatch):
    monkeypatch.undo()  # with plots
    summary, folder = finished
    (folder / "ramachandran.png").unlink()
    assert analyze(folder) == summary
    assert (folder / "ramachandran.png").is_file()
    with pytest.raises(FileNotFoundError):
        analyze(tmp_path / "no")


def test_another_system_has_no_reference(tmp_path):
    vacuum = AlanineDipeptideVacuum(constraints=None)
    molecule = tsf.MolecularSystem(vacuum.system, vacuum.topology, vacuum.positions)
    assert not has_reference(molecule.fingerprint)
    # No frames are shipped for it: MD is run.
    short = replace(TINY, stride=1, n_rounds=0)
    summary = run(tmp_path / "run", short, molecule=molecule, options=QUIET)
    assert "comparison" not in summary
    assert len(load_trajectory(tmp_path / "run" / "md", molecule)) == 150


def test_the_mirror_image_of_the_default_is_another_molecule(molecule, tmp_path):
    """D-alanine dipeptide gets neither the frames nor the reference of L."""
    mirrored = tsf.MolecularSystem(
        molecule.system, molecule.topology, molecule.positions * [1, 1, -1]
    )
    short = replace(TINY, stride=1, n_rounds=0)
    summary = run(tmp_path / "run", short, molecule=mirrored, options=QUIET)
    assert "comparison" not in summary
    assert summary["monitor"]["wrong_handedness"]["centres"] == []
    frames = load_trajectory(tmp_path / "run" / "md", mirrored)
    assert len(frames) == 150
    frames = replace(frames, molecule=molecule)
    with pytest.raises(ValueError, match="another handedness"):
        train(frames, tmp_path / "train", TINY.flow, FIT, options=QUIET)
    with pytest.raises(ValueError, match="another stereoisomer"):
        sample(tmp_path / "run", tmp_path / "sample", molecule=molecule, options=QUIET)


def test_invalid_settings_are_refused():
    assert preset("quick").sampling.n_walkers < preset("default").sampling.n_walkers
    few = SamplingSettings(n_walkers=2)
    RunSettings(n_rounds=0, sampling=few)
    for cls, wrong, message in (
        (preset, {"name": "best"}, "preset: expected one of quick, default"),
        (FlowSettings, {"kind": "nice"}, "kind: expected one of tsf, realnvp"),
        (RunSettings, {"n_rounds": 1, "sampling": few}, "at least 3 where .* got 2"),
        (RunOptions, {"resume": 1}, "resume: expected one of False, True, got 1"),
        (RunOptions, {"progress": 0}, "progress: expected one of False, True, got 0"),
        (FrameSource, {"trajectory": ""}, "trajectory: expected a path, got an empty text"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(**wrong)
    json.dumps(to_plain_data(preset("default")))


@pytest.mark.slow
def test_a_run_keeps_its_observables(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=r"until: expected slow torsions .* got 'd'"):
        run(folder, replace(TINY, sampling=replace(TINY.sampling, until=("d < 1 nm",))))
    with pytest.raises(ValueError, match="observe: d: expected 2 atoms"):
        run(folder, TINY, options=replace(QUIET, observe={"d": "distance:1"}))
    assert not folder.exists()
    observe = {"d": "distance:1,18", "n": lambda frames: frames.xyz[:, 0, 0]}
    summary = run(folder, TINY, options=replace(QUIET, observe=observe))
    assert {"mean d", "mean n"} <= summary["quantities"].keys()
    assert (
        json.loads((folder / "config.json").read_text())["choices"]["observables"]["d"]
        == "distance:1,18"
    )
    more = replace(TINY, sampling=replace(TINY.sampling, n_iterations=14))
    again = run(folder, more, options=RESUME)
    assert again["n_iterations"] == 14
    assert "mean d" in again["quantities"]
    assert "mean n" not in again["quantities"]
    assert any("the observable n is left out" in note for note in again["monitor"]["notes"])
