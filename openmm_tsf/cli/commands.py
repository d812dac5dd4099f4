"""The commands of the command line."""

import argparse
import json
from pathlib import Path
from shlex import quote
from typing import Any

from openmm_tsf.cli.compare_arguments import run_compare
from openmm_tsf.cli.molecules import given_molecule, molecule_of, names_molecule, read_other_system
from openmm_tsf.utils.terminal import say

#: How often the iterations of a preset are allowed with --until, where --iterations is not given.
_MOST_WITH_TARGET = 20


def _run(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.workflow.frames import FrameSource
    from openmm_tsf.workflow.presets import preset
    from openmm_tsf.workflow.run import run
    from openmm_tsf.workflow.settings import RunSettings

    molecule = molecule_of(args)
    _check_run_options(args, molecule)
    settings = _settings(args, RunSettings, lambda: preset(args.preset or "default"))
    settings = replace_given(
        settings,
        stride=args.stride,
        n_rounds=args.rounds,
        md=replace_given(settings.md, n_frames=args.frames),
        fit=replace_given(settings.fit, n_steps=args.steps),
        sampling=_sampling_settings(args, settings.sampling),
    )
    summary = run(
        args.output,
        settings,
        molecule=molecule,
        frames=FrameSource(args.trajectory, args.temperature, simulate=args.md),
        options=_options(args),
    )
    if "verdict" in summary:
        _show(summary, args.output)
    elif args.shard is not None:
        done = ", ".join(f"shard {name} has {n:,} iterations" for name, n in summary.items())
        say(f"{done}; `openmm-tsf analyze {quote(args.output)}` analyses all shards")
    elif args.prepare:
        say(f"flow and step sizes are in {args.output}; --shard K --resume samples a shard")


def _md(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow.md import run_md
    from openmm_tsf.workflow.settings import MDSettings

    settings = replace_given(
        _settings(args, MDSettings, MDSettings),
        temperature=args.temperature,
        n_frames=args.frames,
        steps_per_frame=args.steps_per_frame,
        n_equilibration_steps=args.equilibration_steps,
        timestep=args.timestep,
        friction=args.friction,
    )
    molecule = molecule_of(args) or alanine_dipeptide()
    result = run_md(molecule, args.output, settings, options=_options(args))
    say(f"{result.n_frames} frames in {result.trajectory}")
    if result.interrupted:
        raise KeyboardInterrupt


def _train(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import from_plain_data, replace_given
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.training import FitSettings
    from openmm_tsf.workflow.frames import FrameSource
    from openmm_tsf.workflow.presets import preset
    from openmm_tsf.workflow.record import recorded_choices
    from openmm_tsf.workflow.settings import FlowSettings
    from openmm_tsf.workflow.train import train

    _check_temperature(args)
    _check_device(args)
    settings, molecule = (
        preset(args.preset or "default"),
        molecule_of(args) or alanine_dipeptide(),
    )
    source = FrameSource(args.trajectory, args.temperature)
    recorded = recorded_choices(args.output, "train").get("source") if args.resume else None
    stride = settings.stride
    if recorded is not None:
        earlier = from_plain_data(FrameSource, recorded, f"{args.output}/config.json")
        source, stride = source.completed_from(earlier), earlier.stride
    source = replace_given(source, stride=stride if args.stride is None else args.stride)
    if source.trajectory is None and names_molecule(args):
        raise ValueError("--trajectory: expected frames of your molecule, got none")
    ladder = tuple(args.temperatures or settings.sampling.temperatures)
    fresh = replace_given(settings.fit, temperatures=ladder)
    flow = train(
        source.load(molecule),
        args.output,
        replace_given(
            _settings(args, FlowSettings, lambda: settings.flow, "flow"), kind=args.flow_kind
        ),
        replace_given(
            _settings(args, FitSettings, lambda: fresh, "fit"),
            n_steps=args.steps,
            temperatures=None if args.temperatures is None else ladder,
        ),
        source=source,
        options=_options(args),
    )
    say(f"a flow with {flow.n_parameters} parameters in {args.output}/flow.pt")


def _sample(args: argparse.Namespace) -> None:
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow.frames import load_trajectory
    from openmm_tsf.workflow.sample import sample
    from openmm_tsf.workflow.settings import SamplingSettings

    _check_temperature(args)
    if args.flow is None and not args.resume:
        raise ValueError("--flow: expected flow.pt, or the folder of train or run, got none")
    molecule = molecule_of(args)
    start = None
    if args.trajectory is not None:
        start = load_trajectory(args.trajectory, molecule or alanine_dipeptide(), args.temperature)
    summary = sample(
        args.flow,
        args.output,
        _sampling_settings(args, _settings(args, SamplingSettings, SamplingSettings)),
        molecule=molecule,
        start=start,
        options=_options(args),
    )
    _show(summary, args.output)


def _analyze(args: argparse.Namespace) -> int:
    from openmm_tsf.analysis.analyze import analyze
    from openmm_tsf.analysis.verdict import EXIT_STATUS

    summary = analyze(args.run, output=args.output, observe=_observed(args))
    _show(summary, args.run, args.output)
    return EXIT_STATUS[summary["verdict"]["status"]]


def _at(args: argparse.Namespace) -> None:
    from openmm_tsf.analysis.report import describe_samples
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.workflow.at import sample_at
    from openmm_tsf.workflow.options import RunOptions

    options = replace_given(
        RunOptions(progress=not args.quiet),
        seed=args.seed,
        platform=args.platform,
        device=args.device,
        observe=_observed(args),
    )
    given = {} if args.frames is None else {"n_frames": args.frames}
    samples = sample_at(args.run, args.temperature, args.output, options=options, **given)
    say(describe_samples(samples.record))
    say(f"\nthe frames are in {args.output}, their topology in {args.run}/topology.pdb")


def _retarget(args: argparse.Namespace) -> int:
    from openmm_tsf.analysis.report import describe_retarget
    from openmm_tsf.analysis.verdict import EXIT_STATUS
    from openmm_tsf.io.files import read_json
    from openmm_tsf.workflow.retarget import RETARGET, retarget, retarget_settings
    from openmm_tsf.workflow.settings import SamplingSettings

    molecule = read_other_system(args)
    settings = _settings(args, SamplingSettings, lambda: retarget_settings(args.run))
    summary = retarget(
        args.run,
        molecule,
        args.output,
        _sampling_settings(args, settings, molecule),
        options=_options(args),
    )
    _show(summary, args.output)
    say(f"\n{describe_retarget(read_json(Path(args.output) / RETARGET))}")
    status: int = EXIT_STATUS[summary["verdict"]["status"]]
    return status


def _certify(args: argparse.Namespace) -> int:
    from openmm_tsf.analysis.certify import certify
    from openmm_tsf.analysis.certify_report import describe_certificate
    from openmm_tsf.analysis.verdict import EXIT_STATUS
    from openmm_tsf.systems.files import load_molecule

    trajectories, temperatures = args.trajectory or [], args.temperature or []
    if (args.run is None) == (not trajectories):
        got = "none" if args.run is None else "both"
        raise ValueError(f"RUN, --trajectory: expected one of the two, got {got}")
    if len(temperatures) != len(trajectories) or len(set(temperatures)) != len(temperatures):
        got = ", ".join(f"{kelvin:g}" for kelvin in temperatures) or "none"
        raise ValueError(
            f"--temperature: expected one for each --trajectory ({len(trajectories)}), all "
            f"different, got {got}; walkers of one temperature follow one --trajectory"
        )
    if args.run is None and args.output is None:
        raise ValueError("--output: expected a folder for the certificate, got none")
    molecule = given_molecule(args)
    certificate = certify(
        args.run if args.run is not None else dict(zip(temperatures, trajectories, strict=True)),
        load_molecule() if molecule is None and args.run is None else molecule,
        flow=args.flow,
        walkers=args.walkers,
        monte_carlo=args.monte_carlo,
        observe=_observed(args),
        output=args.output,
    )
    say(describe_certificate(certificate))
    say(f"\ncertificate.json and certificate.png are in {args.output or args.run}")
    return EXIT_STATUS[certificate["verdict"]["status"]]


def _options(args: argparse.Namespace) -> Any:
    """The RunOptions of the arguments."""
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.workflow.options import RunOptions

    return replace_given(
        RunOptions(resume=getattr(args, "resume", False), progress=not args.quiet),
        seed=args.seed,
        platform=args.platform,
        threads=args.threads,
        checkpoint_seconds=getattr(args, "checkpoint_seconds", None),
        device=getattr(args, "device", None),
        compile_flow=getattr(args, "compile_flow", None),
        observe=_observed(args),
        shard=getattr(args, "shard", None),
        prepare=getattr(args, "prepare", None) or None,
    )


def _observed(args: argparse.Namespace) -> dict[str, str]:
    """The definitions of the observables of the arguments, by name."""
    from openmm_tsf.analysis.observables import split_definitions

    return split_definitions(getattr(args, "observe", None) or ())


def _settings(args: argparse.Namespace, cls: type, fresh: Any, part: str | None = None) -> Any:
    """The settings that arguments change: those of what is resumed, or else fresh ones."""
    from openmm_tsf.workflow.record import recorded_settings

    is_resumed = args.resume or getattr(args, "shard", None) is not None
    use_recorded = is_resumed and getattr(args, "preset", None) is None
    stage = "sample" if args.command == "retarget" else args.command
    recorded = recorded_settings(args.output, stage, cls, part) if use_recorded else None
    return fresh() if recorded is None else recorded


def _doctor(args: argparse.Namespace) -> int:
    from openmm_tsf.doctor.report import examine

    report = examine(args.directory)
    say(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


def _check_temperature(args: argparse.Namespace) -> None:
    if args.temperature is not None and args.trajectory is None:
        raise ValueError("--temperature: it is the temperature of --trajectory, which is missing")


def _check_device(args: argparse.Namespace) -> None:
    """Refuse the preset of a GPU without one, which would take days."""
    if args.preset == "gpu" and args.device is None:
        raise ValueError("--device: expected a GPU such as cuda with --preset gpu, got none")


def _check_run_options(args: argparse.Namespace, molecule: Any) -> None:
    from openmm_tsf.systems.library import alanine_dipeptide

    _check_temperature(args)
    _check_device(args)
    if args.frames is None or args.md or args.resume:
        return
    if args.trajectory is not None:
        raise ValueError("--frames: no MD is run where --trajectory is given")
    if molecule is None or molecule.fingerprint == alanine_dipeptide().fingerprint:
        raise ValueError("--frames: no MD is run where frames are shipped; add --md to run it")


def _sampling_settings(args: argparse.Namespace, settings: Any, molecule: Any = None) -> Any:
    from openmm_tsf.io.serialization import replace_given

    n_iterations = args.iterations
    if n_iterations is None and args.until and not settings.until:
        n_iterations = _MOST_WITH_TARGET * settings.n_iterations
    return replace_given(
        settings,
        temperatures=_ladder(args, settings.temperatures, molecule),
        n_walkers=args.walkers,
        n_iterations=n_iterations,
        n_tuning=args.tuning,
        until=None if args.until is None else tuple(args.until),
        n_shards=getattr(args, "shards", None),
        save_interval=args.save_interval,
        numbers_interval=args.numbers_interval,
    )


def _ladder(
    args: argparse.Namespace, recorded: tuple[float, ...], molecule: Any = None
) -> tuple[float, ...] | None:
    """The temperatures of the arguments; those that were chosen at the start of what is resumed."""
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow.record import recorded_choices
    from openmm_tsf.workflow.temperatures import choose_temperatures

    given = args.temperatures
    if given is None or "auto" not in given:
        return None if given is None else tuple(given)
    ends = tuple(given[1:])
    if given[0] != "auto" or len(ends) != 2 or "auto" in ends or not ends[0] < ends[1]:
        got = " ".join(map(str, given))
        raise ValueError(f"--temperatures: expected 'auto' and the two ends in K, got {got}")
    if getattr(args, "resume", False) and recorded_choices(args.output):
        if (recorded[0], recorded[-1]) != ends:
            raise ValueError(
                f"--temperatures: what is resumed has a ladder from {recorded[0]:g} to "
                f"{recorded[-1]:g} K, got {ends[0]:g} and {ends[1]:g}"
            )
        return None
    options = _options(args)
    molecule = molecule or molecule_of(args) or alanine_dipeptide()
    return choose_temperatures(molecule, ends, options=options)


def _plan(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from openmm_tsf.analysis.targets import Target
    from openmm_tsf.io.files import check_new_file, write_json
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.workflow.plan import plan
    from openmm_tsf.workflow.presets import preset

    output = None if args.output is None else check_new_file(args.output)
    settings = preset(args.preset or "default")
    Target.parse(args.target, "target")  # before the ladder is measured
    ladder = _ladder(args, settings.sampling.temperatures)
    settings = replace(settings, sampling=replace_given(settings.sampling, temperatures=ladder))
    result = plan(
        args.target, molecule_of(args), settings, seconds=args.seconds, options=_options(args)
    )
    say(result)
    if output is not None:
        write_json(output, result.to_dict())


def _show(summary: dict[str, Any], run: str, output: str | None = None) -> None:
    """Print the verdict first and last, its reasons and the tables between."""
    from openmm_tsf.analysis.report import describe, describe_verdict
    from openmm_tsf.workflow.record import recorded_settings
    from openmm_tsf.workflow.settings import SamplingSettings

    sentence = summary["verdict"]["sentence"]
    say(sentence)
    say(f"\n{describe(summary)}")
    say(f"\n{describe_verdict(summary)}")
    more = summary["verdict"]["predicted"].get("n_iterations")
    if more is not None and summary["verdict"]["status"] == "not yet":
        settings = recorded_settings(run, "sample", SamplingSettings)
        until = " --until" if settings is not None and settings.until else ""  # met already
        stage = "run" if "shards" in summary else "sample"
        command = f"openmm-tsf {stage} --output {quote(run)} --iterations {more}{until} --resume"
        say(f"{command} lengthens this run")
    say(f"\nreport.html, summary.json and the plots are in {output or run}")
    say(sentence)


COMMANDS = {
    "run": _run,
    "md": _md,
    "train": _train,
    "sample": _sample,
    "analyze": _analyze,
    "at": _at,
    "retarget": _retarget,
    "certify": _certify,
    "compare": run_compare,
    "plan": _plan,
    "doctor": _doctor,
}
