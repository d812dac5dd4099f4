"""Command line: argument parsing and progress, nothing else."""

import argparse
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmm_tsf.cli.arguments import SEED, build_parser
from openmm_tsf.utils.terminal import PrintableFormatter, say

logger = logging.getLogger("openmm_tsf")

_LONGEST_MESSAGE = 2000
INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    The exit status is 0, 1 if doctor's self-test failed, 2 after an error, 130 after Ctrl-C or
    SIGTERM.
    """
    args = build_parser().parse_args(arguments)
    level = logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logger.setLevel(level)
    try:
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm(), _sigterm_like_ctrl_c(), _threads(args):
            status = _COMMANDS[args.command](args)
    except KeyboardInterrupt:
        where = f"; what was done is in {args.output}" if "output" in args else ""
        say(f"openmm-tsf: interrupted{where}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        say(f"openmm-tsf: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return int(status or 0)


@contextmanager
def _threads(args: argparse.Namespace) -> Iterator[None]:
    """Torch on so many threads as were asked for, or what is resumed began with, or the usual."""
    if "threads" not in args:
        yield
        return
    from openmm_tsf.potentials.platforms import available_cores
    from openmm_tsf.utils.threads import torch_threads
    from openmm_tsf.utils.validation import most_threads
    from openmm_tsf.workflow.record import recorded_threads

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.threads is not None and args.threads > (most := most_threads()):
        raise ValueError(f"--threads: expected at most {most} on this machine, got {args.threads}")
    recorded = recorded_threads(args.output) if args.resume else None
    usual = 1
    if args.command in ("run", "train"):
        from openmm_tsf.workflow.settings import preset

        # Path gradients keep two threads busy; everything else is quicker on one.
        if preset(args.preset or "default").fit.estimator == "path":
            usual = min(2, available_cores())
    with torch_threads(args.threads or recorded or usual):
        yield


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let batch systems and shutdowns end a stage as Ctrl-C does, with everything written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _one_line(error: Exception) -> str:
    """The message alone where it was written for users, else the kind of error with it."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_MESSAGE:  # values from a stranger's file
        text = f"{text[:_LONGEST_MESSAGE]}... (--debug shows all)"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"memory: expected what fits, try fewer walkers, temperatures or frames: {text}"
    if isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


def _run(args: argparse.Namespace) -> None:
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.settings import RunSettings, changed, preset

    molecule = _molecule(args)
    _check_run_options(args, molecule)
    settings = _settings(args, RunSettings, lambda: preset(args.preset or "default"))
    settings = changed(
        settings,
        stride=args.stride,
        n_rounds=args.rounds,
        md=changed(settings.md, n_frames=args.frames),
        fit=changed(settings.fit, n_steps=args.steps),
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
    from openmm_tsf.systems.molecule import alanine_dipeptide
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.md import MDSettings, recorded_settings
    from openmm_tsf.workflow.settings import changed

    before = recorded_settings(args.output) if args.resume else None
    settings = changed(
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
    from openmm_tsf.systems.dataset import MDDataset
    from openmm_tsf.systems.files import load_trajectory
    from openmm_tsf.systems.molecule import alanine_dipeptide
    from openmm_tsf.training import FitSettings
    from openmm_tsf.workflow import run as workflow
    from openmm_tsf.workflow.record import recorded_source
    from openmm_tsf.workflow.settings import FlowSettings, changed, preset

    _check_temperature(args)
    settings, molecule = preset(args.preset or "default"), _molecule(args) or alanine_dipeptide()
    given = {"trajectory": args.trajectory, "temperature": args.temperature, "stride": args.stride}
    before = recorded_source(args.output) if args.resume else {}
    source = {key: before.get(key) if value is None else value for key, value in given.items()}
    stride = source["stride"] = changed(settings, stride=source["stride"]).stride
    if source["trajectory"] is not None:
        source["trajectory"] = str(Path(source["trajectory"]).resolve())
        dataset = load_trajectory(source["trajectory"], molecule, source["temperature"], stride)
    elif args.pdb is not None:
        raise ValueError("--trajectory: expected frames of your molecule, got none")
    else:
        dataset = MDDataset.shipped(molecule, stride=stride)
    ladder = tuple(args.temperatures or settings.sampling.temperatures)
    fresh = changed(settings.fit, temperatures=ladder)
    flow = workflow.train(
        dataset,
        args.output,
        changed(_settings(args, FlowSettings, lambda: settings.flow, "flow"), kind=args.flow_kind),
        changed(
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
    from openmm_tsf.systems.files import load_trajectory
    from openmm_tsf.systems.molecule import alanine_dipeptide
    from openmm_tsf.workflow import run as workflow
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
    from openmm_tsf.systems.molecule import alanine_dipeptide

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
    from openmm_tsf.workflow.settings import changed

    return changed(
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
