"""What each command of the command line does with its arguments."""

import argparse
import json
from pathlib import Path
from typing import Any

from openmm_tsf.cli.arguments import SEED
from openmm_tsf.utils.terminal import say


def _run(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.presets import preset
    from openmm_tsf.workflow.settings import RunSettings

    molecule = _molecule(args)
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
    summary = workflow.run(
        args.output,
        settings,
        molecule=molecule,
        trajectory=args.trajectory,
        temperature=args.temperature,
        own_md=args.md,
        seed=args.seed,
        platform=args.platform,
        threads=args.threads,
        resume=args.resume,
        checkpoint_seconds=args.checkpoint_seconds,
        progress=not args.quiet,
    )
    _show(summary, args.output)


def _md(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.md import recorded_settings
    from openmm_tsf.workflow.settings import MDSettings

    before = recorded_settings(args.output) if args.resume else None
    settings = replace_given(
        MDSettings(seed=SEED) if before is None else before,
        seed=args.seed,
        temperature=args.temperature,
        n_frames=args.frames,
        steps_per_frame=args.steps_per_frame,
        n_equilibration_steps=args.equilibration_steps,
        timestep=args.timestep,
        friction=args.friction,
    )
    result = workflow.run_md(
        _molecule(args) or alanine_dipeptide(),
        args.output,
        settings,
        platform=args.platform,
        threads=args.threads,
        resume=args.resume,
        checkpoint_seconds=args.checkpoint_seconds,
        progress=not args.quiet,
    )
    say(f"{result.n_frames} frames in {result.trajectory}")
    if result.interrupted:
        raise KeyboardInterrupt


def _train(args: argparse.Namespace) -> None:
    from openmm_tsf.io.serialization import replace_given
    from openmm_tsf.systems.dataset import MDDataset
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.training import FitSettings
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.frames import load_trajectory
    from openmm_tsf.workflow.presets import preset
    from openmm_tsf.workflow.record import recorded_source
    from openmm_tsf.workflow.settings import FlowSettings

    _check_temperature(args)
    settings, molecule = preset(args.preset or "default"), _molecule(args) or alanine_dipeptide()
    given = {"trajectory": args.trajectory, "temperature": args.temperature, "stride": args.stride}
    before = recorded_source(args.output) if args.resume else {}
    source = {key: before.get(key) if value is None else value for key, value in given.items()}
    stride = source["stride"] = replace_given(settings, stride=source["stride"]).stride
    if source["trajectory"] is not None:
        source["trajectory"] = str(Path(source["trajectory"]).resolve())
        dataset = load_trajectory(source["trajectory"], molecule, source["temperature"], stride)
    elif args.pdb is not None:
        raise ValueError("--trajectory: expected frames of your molecule, got none")
    else:
        dataset = MDDataset.shipped(molecule, stride=stride)
    ladder = tuple(args.temperatures or settings.sampling.temperatures)
    fresh = replace_given(settings.fit, temperatures=ladder)
    flow = workflow.train(
        dataset,
        args.output,
        replace_given(
            _settings(args, FlowSettings, lambda: settings.flow, "flow"), kind=args.flow_kind
        ),
        replace_given(
            _settings(args, FitSettings, lambda: fresh, "fit"),
            n_steps=args.steps,
            temperatures=None if args.temperatures is None else ladder,
        ),
        seed=args.seed,
        platform=args.platform,
        resume=args.resume,
        checkpoint_seconds=args.checkpoint_seconds,
        source=source,
        progress=not args.quiet,
    )
    say(f"a flow with {flow.n_parameters} parameters in {args.output}/flow.pt")


def _sample(args: argparse.Namespace) -> None:
    from openmm_tsf.systems.library import alanine_dipeptide
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.frames import load_trajectory
    from openmm_tsf.workflow.settings import SamplingSettings

    _check_temperature(args)
    if args.flow is None and not args.resume:
        raise ValueError("--flow: expected flow.pt, or the folder of train or run, got none")
    molecule = _molecule(args)
    start = None
    if args.trajectory is not None:
        start = load_trajectory(args.trajectory, molecule or alanine_dipeptide(), args.temperature)
    settings = _settings(args, SamplingSettings, SamplingSettings)
    summary = workflow.sample(
        args.flow,
        args.output,
        _sampling_settings(args, settings),
        molecule=molecule,
        start=start,
        seed=args.seed,
        platform=args.platform,
        resume=args.resume,
        checkpoint_seconds=args.checkpoint_seconds,
        progress=not args.quiet,
    )
    _show(summary, args.output)


def _analyze(args: argparse.Namespace) -> None:
    from openmm_tsf.workflow import run as workflow

    _show(workflow.analyze(args.output), args.output)


def _settings(args: argparse.Namespace, cls: type, fresh: Any, part: str | None = None) -> Any:
    """Settings to change by arguments: those of what is resumed, or fresh ones."""
    from openmm_tsf.workflow.record import recorded_settings

    recorded = args.resume and getattr(args, "preset", None) is None
    before = recorded_settings(args.output, cls, part) if recorded else None
    return fresh() if before is None else before


def _doctor(args: argparse.Namespace) -> int:
    from openmm_tsf.doctor.report import examine

    report = examine(args.directory)
    say(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


def _check_temperature(args: argparse.Namespace) -> None:
    if args.temperature is not None and args.trajectory is None:
        raise ValueError("--temperature: it is the temperature of --trajectory, which is missing")


def _check_run_options(args: argparse.Namespace, molecule: Any) -> None:
    from openmm_tsf.systems.library import alanine_dipeptide

    _check_temperature(args)
    if args.frames is None or args.md or args.resume:
        return
    if args.trajectory is not None:
        raise ValueError("--frames: no MD is run where --trajectory is given")
    if molecule is None or molecule.fingerprint == alanine_dipeptide().fingerprint:
        raise ValueError("--frames: no MD is run where frames are shipped; add --md to run it")


def _molecule(args: argparse.Namespace) -> Any:
    """The molecule of the arguments; of the folder that is resumed; None for the default."""
    from openmm_tsf.systems.files import holds_molecule, load_molecule, read_molecule

    if args.pdb is not None or args.system is not None or args.forcefield is not None:
        return load_molecule(args.pdb, args.system, args.forcefield)
    if args.resume and holds_molecule(args.output):
        return read_molecule(args.output)
    return None


def _sampling_settings(args: argparse.Namespace, settings: Any) -> Any:
    from openmm_tsf.io.serialization import replace_given

    return replace_given(
        settings,
        temperatures=None if args.temperatures is None else tuple(args.temperatures),
        n_walkers=args.walkers,
        n_iterations=args.iterations,
        n_tuning=args.tuning,
    )


def _show(summary: dict[str, Any], output: str) -> None:
    from openmm_tsf.analysis.report import advice, concerns, describe, disagreements, unsampled

    say(describe(summary))
    for title, lines in (
        ("not converged", unsampled(summary)),
        (
            "not in agreement (reference, Boltzmann distribution)",
            disagreements(summary),
        ),
        ("to be looked at", concerns(summary)),
    ):
        if lines:
            say(f"\n{title}:", *lines, sep="\n  ")
    words = advice(summary)
    if words is not None:
        more = 2 * int(summary["n_iterations"])
        say(f"\n{words}; sample --output {output} --iterations {more} --resume lengthens this run")
    say(f"\nsummary.json and the plots are in {output}")


_COMMANDS = {
    "run": _run,
    "md": _md,
    "train": _train,
    "sample": _sample,
    "analyze": _analyze,
    "doctor": _doctor,
}
