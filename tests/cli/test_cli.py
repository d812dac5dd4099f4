"""The command line: what it accepts, what it prints, how it ends."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch

from openmm_tsf.cli.main import main
from openmm_tsf.io.files import write_json
from openmm_tsf.io.run_config import CONFIG_FORMAT
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.presets import preset
from tests.support.summaries import changed, good_summary, never_visited, with_verdict

#: A run with a quantity that is not yet converged.
UNFINISHED = with_verdict(changed(("quantities/phi_positive/600.00", never_visited())))


@pytest.fixture
def called(monkeypatch):
    """Calls of the workflow's functions, which do nothing."""
    calls = []

    def record(name, *args, **options):
        calls.append((name, args, options))
        return UNFINISHED

    for module in ("workflow.run", "workflow.sample", "analysis.analyze"):
        name = module.partition(".")[2]
        monkeypatch.setattr(f"openmm_tsf.{module}.{name}", partial(record, name))
    return calls


@pytest.mark.parametrize(
    "command", ["", "run", "md", "train", "sample", "analyze", "at", "compare", "plan"]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "usage: openmm-tsf" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["analyze", "certify"])
def test_help_of_commands_that_judge_tells_the_exit_status(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "converged, 3 if not yet, 4 if wrong" in " ".join(capsys.readouterr().out.split())


def test_module_is_the_same_program(tmp_path):
    def python(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.check_output(command, cwd=tmp_path, text=True).strip()

    assert python("-m", "openmm_tsf", "--version") == f"openmm-tsf {version('openmm-tsf')}"
    # Help and version must not wait for torch and OpenMM.
    code = "import sys; from openmm_tsf.cli.main import build_parser; build_parser(); "
    assert python("-c", code + "print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(("command", "default"), [("run", True), ("retarget", False)])
def test_help_says_which_molecule_is_the_default(capsys, command, default):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ("default: alanine dipeptide" in text) == default
    long = [line for line in text.splitlines() if len(line) > 80]
    assert all(line.startswith("  openmm-tsf") for line in long)  # examples, to be copied


def test_run_passes_what_it_was_given(called, capsys):
    given = (
        "run --output out --preset quick --seed 7 --temperatures 300 424 600 --walkers 8 "
        "--iterations 50 --rounds 2 --tuning 5 --steps 30 --stride 9 "
        "--trajectory x.dcd --temperature 600 --platform Reference --quiet"
    )
    assert main(given.split()) == 0
    ((name, (output, settings), options),) = called
    assert (name, output) == ("run", "out")
    sampling = settings.sampling
    assert sampling.temperatures == (300.0, 424.0, 600.0)
    assert (sampling.n_walkers, sampling.n_iterations, sampling.n_tuning) == (8, 50, 5)
    assert (settings.n_rounds, settings.stride, settings.fit.n_steps) == (2, 9, 30)
    assert settings.flow == preset("quick").flow
    assert options["frames"] == FrameSource("x.dcd", 600.0)
    given = options["options"]
    assert (given.seed, given.platform, given.progress) == (7, "Reference", False)
    assert options["molecule"] is None  # the default, or that of a folder which is resumed
    printed = capsys.readouterr().out
    sentence = "not yet converged: 600.00 K: P(phi > 0): the state was never visited"
    lines = printed.splitlines()
    assert (lines[0], lines[-1]) == (sentence, sentence)
    assert "at least 2,000 iterations of production in all would be enough" in printed
    assert "sample --output out --iterations 2000 --resume lengthens this run" in printed
    assert main(["run", "--output", "my run"]) == 0  # the command can be copied
    assert "openmm-tsf sample --output 'my run' --iterations 2000" in capsys.readouterr().out


def test_the_preset_of_a_gpu_needs_one_and_the_flow_is_compiled_if_asked(called, capsys):
    for command in ("run", "train"):
        assert main([command, "--output", "out", "--preset", "gpu"]) == 2
        assert "--device: expected a GPU such as cuda with --preset gpu" in capsys.readouterr().err
    assert main(["run", "--output", "out"]) == 0
    given = ["--preset", "gpu", "--device", "cpu", "--compile-flow"]
    assert main(["run", "--output", "out", *given]) == 0
    assert main(["run", "--output", "out", "--no-compile-flow"]) == 0
    (_, _, plain), (_, (_, settings), options), (_, _, eager) = called
    assert plain["options"].compile_flow is None  # as in what is resumed
    assert eager["options"].compile_flow is False
    assert options["options"].compile_flow is True
    assert settings == preset("gpu")


def test_run_without_options_is_the_default_and_with_md(called):
    assert main(["run", "--output", "out"]) == 0
    assert main(["run", "--output", "out", "--md", "--frames", "100"]) == 0
    (_, (_, settings), options), (_, (_, other_settings), other_options) = called
    assert settings == preset("default")
    assert options["options"].seed is None  # 1, or that of what is resumed
    assert options["frames"] == FrameSource()
    assert other_settings.md.n_frames == 100
    assert other_options["frames"] == FrameSource(simulate=True)


def test_sample_and_analyze(called):
    given = ["--flow", "f", "--output", "out", "--quiet"]
    assert main(["sample", *given, "--walkers", "3", "--seed", "0"]) == 0
    assert main(["sample", *given, "--resume", "--iterations", "7"]) == 0
    assert main(["analyze", "out"]) == 3  # not yet converged
    (_, (flow, output, settings), options), resumed, (_, (analysed,), _) = called
    assert (flow, output, analysed) == ("f", "out", "out")
    assert (settings.n_walkers, options["options"].seed) == (3, 0)
    assert (options["options"].resume, resumed[2]["options"].resume) == (False, True)
    assert resumed[1][2].n_iterations == 7
    assert (settings.save_interval, settings.numbers_interval) == (1, None)
    called.clear()
    thinned = ["--save-interval", "20", "--numbers-interval", "4"]
    assert main(["sample", *given, *thinned]) == 0
    assert main(["run", "--output", "out", "--quiet", *thinned]) == 0
    (_, (_, _, of_sample), _), (_, (_, of_run), _) = called
    for settings in (of_sample, of_run.sampling):
        assert (settings.save_interval, settings.numbers_interval) == (20, 4)
    assert main(["sample", *given, "--save-interval", "20", "--numbers-interval", "3"]) == 2
    assert options["molecule"] is None  # recorded in the flow's directory


def test_observables_are_passed_on(called, capsys):
    given = ["--observe", "d=distance:1,18", "--observe", "psi"]
    expected = {"d": "distance:1,18", "psi": "psi"}
    assert main(["run", "--output", "out", *given]) == 0
    assert main(["sample", "--flow", "f", "--output", "out", *given]) == 0
    assert main(["analyze", *given, "out"]) == 3
    assert main(["analyze", "out"]) == 3
    (_, _, first), (_, _, second), (_, _, third), (_, _, fourth) = called
    assert first["options"].observe == second["options"].observe == third["observe"] == expected
    assert fourth["observe"] == {}
    assert main(["analyze", "out", "--observe", "d=phi", "--observe", "d=psi"]) == 2
    assert "observe: expected different names, got 'd' twice" in capsys.readouterr().err


def test_targets_allow_more_iterations_unless_their_number_is_given(called):
    given = ["run", "--output", "out", "--until", "dF(phi)<0.05 kT", "U < 0.1 kJ/mol"]
    assert main(given) == 0
    assert main([*given, "--iterations", "300"]) == 0
    (first, second) = (settings.sampling for _, (_, settings), _ in called)
    assert first.until == ("dF(phi > 0) < 0.05 kT", "U < 0.1 kJ/mol")
    assert first.n_iterations == 20 * preset("default").sampling.n_iterations
    assert (second.until, second.n_iterations) == (first.until, 300)


def test_a_ladder_is_chosen_between_two_ends(called, monkeypatch):
    asked = []

    def choose(molecule, ends, *, options):
        asked.append((molecule.n_atoms, ends, options.seed))
        return (310.0, 400.0, 520.0)

    monkeypatch.setattr("openmm_tsf.workflow.temperatures.choose_temperatures", choose)
    command = ["run", "--output", "out", "--seed", "4", "--temperatures", "auto", "310", "520"]
    assert main(command) == 0
    assert asked == [(22, (310.0, 520.0), 4)]
    ((_, (_, settings), _),) = called
    assert settings.sampling.temperatures == (310.0, 400.0, 520.0)


def test_a_resumed_run_keeps_the_ladder_that_was_chosen(called, monkeypatch, tmp_path, capsys):
    chosen = replace(preset("default").sampling, temperatures=(310.0, 400.0, 520.0))
    settings = replace(preset("default"), sampling=chosen)
    config = {"stage": "run", "format": CONFIG_FORMAT}
    write_json(
        tmp_path / "config.json", config | {"choices": {"settings": to_plain_data(settings)}}
    )

    def choose(*arguments, **options):
        raise AssertionError("a second pilot")

    monkeypatch.setattr("openmm_tsf.workflow.temperatures.choose_temperatures", choose)
    command = ["run", "--output", str(tmp_path), "--resume", "--temperatures", "auto"]
    assert main([*command, "310", "520"]) == 0
    assert called[0][1][1].sampling.temperatures == (310.0, 400.0, 520.0)
    assert main([*command, "300", "520"]) == 2
    assert "has a ladder from 310 to 520 K, got 300 and 520" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --output {tmp} --pdb no.pdb --system x.xml", "pdb: no such file no.pdb"),
        ("run --output {tmp} --system x.xml", "expected a PDB file"),
        ("md --output {tmp}/.. --resume", "holds nothing to resume"),
        ("train --output {tmp} --trajectory no.dcd --temperature 600", "no such file or directory"),
        ("sample --output {tmp} --flow no.pt", "flow: no such flow file no.pt"),
        ("analyze {tmp}/no", "no such run directory"),
        ("run --output {tmp} --temperature 500", "--temperature: it is the temperature of"),
        ("train --output {tmp} --temperature 500", "--temperature: it is the temperature of"),
        ("run --output {tmp} --frames 50", "--frames: no MD is run where frames are shipped"),
        ("run --output {tmp} --frames 50 --trajectory x", "--frames: no MD is run where --traj"),
        ("run --output {tmp} --stride 0", "stride: expected an integer of at least 1, got 0"),
        ("run --output {tmp} --walkers 2 --rounds 1", "n_walkers: expected at least 3 where"),
        ("sample --output {tmp}", "--flow: expected flow.pt, or the folder of train or run"),
        ("sample --output {tmp} --resume", "flow: expected a flow file"),
        ("run --output {tmp} --until U<1", "until: expected the unit kJ/mol of U, got 'U<1'"),
        ("run --output {tmp} --temperatures auto 600 300", "expected 'auto' and the two ends in K"),
        ("run --output {tmp} --temperatures auto 300", "expected 'auto' and the two ends in K"),
        ("plan U<1", "target: expected the unit kJ/mol of U, got 'U<1'"),
        ("plan U<1kJ/mol --output {tmp}/no/plan.json", "no is no folder"),
        ("plan U<1kJ/mol --output {tmp}", "exists; choose another name, or remove it"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert main([part.replace("{tmp}", str(tmp_path)) for part in arguments.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("openmm-tsf: error: ")
    assert message in lines[0]


def test_temperatures_that_are_none_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "U < 1 kJ/mol", "--temperatures", "warm"])
    assert "expected a number or 'auto', got 'warm'" in capsys.readouterr().err


def test_unexpected_errors_say_so(called, monkeypatch, capsys):
    monkeypatch.setattr("openmm_tsf.analysis.analyze.analyze", lambda path, **options: {}["key"])
    assert main(["analyze", "out"]) == 2
    assert "unexpected KeyError: 'key' (--debug shows where)" in capsys.readouterr().err
    with pytest.raises(KeyError):
        main(["analyze", "out", "--debug"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_status_130(monkeypatch, capsys, number):
    monkeypatch.setattr("openmm_tsf.workflow.run.run", lambda *_, **__: signal.raise_signal(number))
    assert main(["run", "--output", "out"]) == 130
    assert "interrupted; the results so far are in out" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_stages_from_the_shell(tmp_path, capsys):
    """MD, then training on its folder, with real files; sampling is in test_workflow."""
    md, flow = tmp_path / "md", tmp_path / "flow"
    here = ["--platform", "Reference", "--quiet"]
    given = ["--frames", "200", "--steps-per-frame", "1", "--equilibration-steps", "10", *here]
    assert main(["md", "--output", str(md), *given]) == 0
    assert main(["md", "--output", str(md), *given]) == 2
    assert "is not empty; choose another directory" in capsys.readouterr().err
    given[1] = "202"
    assert main(["md", "--output", str(md), "--resume", *given]) == 0
    assert "202 frames in" in capsys.readouterr().out
    pdb = ["--pdb", str(md / "topology.pdb"), "--system", str(md / "system.xml")]
    given = ["--steps", "2", "--stride", "1", "--preset", "quick", *here]
    assert main(["train", "--output", str(flow), *pdb, *given]) == 2
    assert "expected frames of your molecule" in capsys.readouterr().err
    given += ["--trajectory", str(md)]
    assert main(["train", "--output", str(flow), *pdb, *given]) == 0
    assert (flow / "flow.pt").is_file()
    config = json.loads((flow / "config.json").read_text())
    assert config["choices"]["settings"]["fit"]["n_steps"] == 2
    frames = config["choices"]["frames"]
    assert (frames["n_frames"], frames["temperature_K"]) == (202, 600.0)
    again = ["train", "--output", str(flow), "--trajectory", str(md), "--stride", "1", "--resume"]
    assert main([*again, *here]) == 0  # nothing is left to do
    assert main([*again, *here, "--steps", "3"]) == 2
    assert "settings.fit.n_steps: what is in" in capsys.readouterr().err
    again[again.index("--stride") + 1] = "2"
    assert main([*again, *here]) == 2
    assert "source.stride: what is in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        (None, 0, "converged, in agreement with the reference and with Boltzmann"),
        (("quantities/phi_positive/600.00", never_visited()), 3, "not yet converged: 600.00 K: "),
        (("comparison/energy_kJ_mol/z/300.00", 6.0), 4, "wrong: 300.00 K: <U> differs from the "),
    ],
)
def test_analyze_ends_with_the_verdict(change, status, sentence, monkeypatch, capsys):
    summary = with_verdict(good_summary() if change is None else changed(change))
    for function in ("analysis.analyze.analyze", "workflow.run.run", "workflow.sample.sample"):
        monkeypatch.setattr(f"openmm_tsf.{function}", lambda *_, **__: summary)
    assert main(["analyze", "out"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1]
    assert lines[0].startswith(sentence)
    # The others did what was asked.
    assert main(["run", "--output", "out"]) == 0
    assert main(["sample", "--flow", "f", "--output", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    assert ("--resume lengthens this run" in "".join(lines)) == (status == 3)


def test_threads_are_set_and_restored(tmp_path, capsys):
    before = torch.get_num_threads()
    args = ["sample", "--flow", str(tmp_path / "none.pt"), "--output", str(tmp_path / "run")]
    assert main([*args, "--threads", "0"]) == 2
    assert "--threads: expected at least 1, got 0" in capsys.readouterr().err
    assert main([*args, "--threads", "2"]) == 2
    assert "no such flow file" in capsys.readouterr().err
    assert torch.get_num_threads() == before


def test_a_peptide_is_named_by_its_sequence(tmp_path, called):
    given = ["run", "--output", str(tmp_path / "out"), "--preset", "quick"]
    assert main([*given, "--peptide", "AG", "--constraints", "hbonds"]) == 0
    molecule = called[-1][2]["molecule"]
    assert [r.name for r in molecule.topology.residues()] == ["ACE", "ALA", "GLY", "NME"]
    assert molecule.constraints is not None
    assert main([*given, "--peptide", "ELIL", "--forcefield", "amber14-all.xml"]) == 0
    assert called[-1][2]["molecule"].n_atoms == 75
    assert main([*given, "--peptide", "AZ"]) == 2
    assert main([*given, "--peptide", "A", "--pdb", "some.pdb"]) == 2
