"""Command line: argument parsing and progress, nothing else."""

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

logger = logging.getLogger("openmm_tsf")

INTERRUPTED = 130  # what a shell expects of a program ended by Ctrl-C
_SEED = 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``openmm-tsf``."""
    parser = argparse.ArgumentParser(
        prog="openmm-tsf",
        description="Boltzmann ensembles of a molecule at several temperatures, sampled by replica "
        "exchange with a temperature-steerable flow.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('openmm-tsf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    everything = _command(commands, "run", _run, "MD or given frames, training, sampling, analysis")
    md = _command(commands, "md", _md, "molecular dynamics with OpenMM, to make training frames")
    train = _command(commands, "train", _train, "train a flow on frames of one temperature")
    sample = _command(commands, "sample", _sample, "replica exchange with a trained flow")
    analyze = _command(commands, "analyze", _analyze, "tables and plots of a run directory")

    for command in (everything, md, train, sample):
        command.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
        _molecule_arguments(command)
        command.add_argument("--seed", type=int, help=f"seed of everything (default: {_SEED})")
        command.add_argument(
            "--platform",
            help="OpenMM platform (default: energies of long runs by torch, where it covers the "
            "System; otherwise, and for MD, the fastest platform, measured)",
        )
        command.add_argument(
            "--threads",
            type=int,
            default=1,
            help="threads of torch and of OpenMM's CPU platform (default: 1; networks of this size "
            "are slower on more, and MD on more is not the same bit by bit)",
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="continue what is in the output folder, the same as if it had not stopped; begin "
            "if there is nothing yet",
        )
        command.add_argument(
            "--checkpoint-seconds",
            type=float,
            default=30.0,
            metavar="S",
            help="time between checkpoints (default: 30)",
        )
    for command in (everything, train):
        _training_arguments(command)
    for command in (everything, sample):
        _sampling_arguments(command)

    everything.add_argument(
        "--md", action="store_true", help="run MD also where frames are shipped"
    )
    everything.add_argument(
        "--rounds", type=int, help="rounds of sampling and retraining before the flow is frozen"
    )
    for command in (everything, md):
        command.add_argument(
            "--frames", type=int, help="frames of MD (default: 40000; quick: 2000)"
        )
    md.add_argument("--temperature", type=float, help="K (default: 600)")
    md.add_argument("--steps-per-frame", type=int, help="time steps between frames (default: 250)")
    md.add_argument(
        "--equilibration-steps", type=int, help="time steps before the first frame (default: 20000)"
    )
    md.add_argument("--timestep", type=float, help="ps (default: 0.001)")
    md.add_argument("--friction", type=float, help="1/ps (default: 1)")
    train.add_argument("--flow-kind", choices=("tsf", "realnvp"), help="which flow (default: tsf)")
    sample.add_argument(
        "--flow",
        metavar="PATH",
        help="flow.pt, or the folder of train or run (with --resume: by default the run's own)",
    )
    sample.add_argument(
        "--trajectory", metavar="PATH", help="start from these frames (default: from the flow)"
    )
    sample.add_argument("--temperature", type=float, help="temperature of --trajectory in K")
    analyze.add_argument("output", metavar="DIR", help="run directory, finished or still growing")
    return parser


def _command(commands: Any, name: str, function: Any, description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=description, description=description[0].upper() + description[1:] + "."
    )
    command.set_defaults(function=function)
    command.add_argument("--quiet", action="store_true", help="no progress, warnings only")
    command.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    return command


def _molecule_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("molecule (default: alanine dipeptide)")
    group.add_argument("--pdb", metavar="FILE", help="PDB file with all atoms")
    group.add_argument("--system", metavar="FILE", help="serialized OpenMM System (XML)")
    group.add_argument(
        "--forcefield", nargs="+", metavar="XML", help="OpenMM force field files, instead"
    )


def _training_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", choices=("quick", "default"), help="sizes and lengths (default: default)"
    )
    command.add_argument(
        "--trajectory", metavar="PATH", help="frames: a file that mdtraj reads, or a folder of md"
    )
    command.add_argument("--temperature", type=float, help="temperature of --trajectory in K")
    command.add_argument("--stride", type=int, help="use every so many-th frame")
    command.add_argument("--steps", type=int, help="steps of the first training")
    if command.prog.endswith("train"):
        command.add_argument(
            "--temperatures", type=float, nargs="+", metavar="K", help="where the flow will be used"
        )


def _sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--temperatures", type=float, nargs="+", metavar="K", help="ladder in K, ascending"
    )
    command.add_argument("--walkers", type=int, help="independent ladders side by side")
    command.add_argument("--iterations", type=int, help="iterations of production, in all")
    command.add_argument("--tuning", type=int, help="iterations of tuning before production")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status is 0, 2 after an error, 130 after Ctrl-C or SIGTERM."""
    args = build_parser().parse_args(arguments)
    level = logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(level)
    try:
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm(), _sigterm_like_ctrl_c(), _threads(args):
            args.function(args)
    except KeyboardInterrupt:
        where = f"; what was done is in {args.output}"
        print(f"openmm-tsf: interrupted{where}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        print(f"openmm-tsf: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _threads(args: argparse.Namespace) -> Iterator[None]:
    """Torch on so many threads as were asked for."""
    wanted = getattr(args, "threads", None)
    if wanted is None:
        yield
        return
    import torch

    if wanted < 1:
        raise ValueError(f"--threads: expected at least 1, got {wanted}")
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    if isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


def _run(args: argparse.Namespace) -> None:
    from openmm_tsf import workflow
    from openmm_tsf.presets import RunSettings, changed, preset

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
    from openmm_tsf import workflow
    from openmm_tsf.md import MDSettings, recorded_settings
    from openmm_tsf.presets import changed
    from openmm_tsf.systems import alanine_dipeptide

    before = recorded_settings(args.output) if args.resume else None
    settings = changed(
        MDSettings(seed=_SEED) if before is None else before,
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
    print(f"{result.n_frames} frames in {result.trajectory}")
    if result.interrupted:
        raise KeyboardInterrupt


def _train(args: argparse.Namespace) -> None:
    from openmm_tsf import workflow
    from openmm_tsf.dataset import MDDataset
    from openmm_tsf.inputs import load_trajectory
    from openmm_tsf.presets import FlowSettings, changed, preset
    from openmm_tsf.systems import alanine_dipeptide
    from openmm_tsf.training import FitSettings

    _check_temperature(args)
    settings = changed(preset(args.preset or "default"), stride=args.stride)
    molecule, stride = _molecule(args) or alanine_dipeptide(), settings.stride
    if args.trajectory is not None:
        dataset = load_trajectory(args.trajectory, molecule, args.temperature, stride)
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
        progress=not args.quiet,
    )
    print(f"a flow with {flow.n_parameters} parameters in {args.output}/flow.pt")


def _sample(args: argparse.Namespace) -> None:
    from openmm_tsf import workflow
    from openmm_tsf.inputs import load_trajectory
    from openmm_tsf.presets import SamplingSettings
    from openmm_tsf.systems import alanine_dipeptide

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
    from openmm_tsf import workflow

    _show(workflow.analyze(args.output), args.output)


def _settings(args: argparse.Namespace, cls: type, fresh: Any, part: str | None = None) -> Any:
    """Settings to change by arguments: those of what is resumed, or fresh ones."""
    from openmm_tsf.records import recorded_settings

    before = recorded_settings(args.output, cls, part) if args.resume else None
    return fresh() if before is None else before


def _check_temperature(args: argparse.Namespace) -> None:
    if args.temperature is not None and args.trajectory is None:
        raise ValueError("--temperature: it is the temperature of --trajectory, which is missing")


def _check_run_options(args: argparse.Namespace, molecule: Any) -> None:
    from openmm_tsf.systems import alanine_dipeptide

    _check_temperature(args)
    if args.frames is None or args.md or args.resume:
        return
    if args.trajectory is not None:
        raise ValueError("--frames: no MD is run where --trajectory is given")
    if molecule is None or molecule.fingerprint == alanine_dipeptide().fingerprint:
        raise ValueError("--frames: no MD is run where frames are shipped; add --md to run it")


def _molecule(args: argparse.Namespace) -> Any:
    """The molecule of the arguments; of the folder that is resumed; None for the default."""
    from openmm_tsf.inputs import holds_molecule, load_molecule, read_molecule

    if args.pdb is not None or args.system is not None or args.forcefield is not None:
        return load_molecule(args.pdb, args.system, args.forcefield)
    if args.resume and holds_molecule(args.output):
        return read_molecule(args.output)
    return None


def _sampling_settings(args: argparse.Namespace, settings: Any) -> Any:
    from openmm_tsf.presets import changed

    return changed(
        settings,
        temperatures=None if args.temperatures is None else tuple(args.temperatures),
        n_walkers=args.walkers,
        n_iterations=args.iterations,
        n_tuning=args.tuning,
    )


def _show(summary: dict[str, Any], output: str) -> None:
    from openmm_tsf.report import advice, concerns, describe, disagreements, unsampled

    print(describe(summary))
    for title, lines in (
        ("not converged", unsampled(summary)),
        (
            "not in agreement (reference, Boltzmann distribution)",
            disagreements(summary),
        ),
        ("to be looked at", concerns(summary)),
    ):
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")
    words = advice(summary)
    if words is not None:
        more = 2 * int(summary["n_iterations"])
        print(
            f"\n{words}; sample --output {output} --iterations {more} --resume lengthens this run"
        )
    print(f"\nsummary.json and the plots are in {output}")
