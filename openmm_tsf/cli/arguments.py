"""The arguments of the command line."""

import argparse
import textwrap
from importlib.metadata import version
from typing import Any

from openmm_tsf.cli.compare_arguments import add_compare_arguments
from openmm_tsf.cli.machine_arguments import (
    add_compile_argument,
    add_device_argument,
    add_shard_arguments,
)
from openmm_tsf.cli.molecules import add_measure_argument, add_molecule_arguments

_STATUS = (
    "The exit status is 0 if {} converged, 3 if not yet, 4 if wrong; 2 after an error, 130 after "
    "Ctrl-C."
)

_OTHER_SYSTEM = "the other System (default with --resume: that in --output)"
_LADDER = (
    "ladder in K, ascending; or 'auto' and its two ends, for as few as exchange well in a pilot "
    "of some ten seconds"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``openmm-tsf``."""
    parser = argparse.ArgumentParser(
        prog="openmm-tsf",
        description="Boltzmann ensembles of a molecule at several temperatures, sampled by replica "
        "exchange with a temperature-steerable flow.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('openmm-tsf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    everything = _command(
        commands,
        "run",
        "MD or given frames, training, sampling, analysis",
        "For example\n\n  openmm-tsf run --output run/ --pdb my.pdb --forcefield amber14-all.xml "
        "implicit/obc2.xml\n\n"
        "The exit status is 0 once the run is complete, whatever its verdict (analyze returns "
        "that); 2 after an error, 130 after Ctrl-C.",
    )
    md = _command(commands, "md", "molecular dynamics with OpenMM, to make training frames")
    train = _command(commands, "train", "train a flow on frames of one temperature")
    sample = _command(commands, "sample", "replica exchange with a trained flow")
    analyze = _command(
        commands,
        "analyze",
        "verdict, tables and plots of a run directory",
        _STATUS.format("the run is"),
    )
    at = _command(
        commands,
        "at",
        "frames at any temperature, drawn with the flow of a run",
        "For example\n\n  openmm-tsf at run/ --temperature 350 --output 350K.dcd\n\n"
        "The frames have equal weights: the moves of the run, proposals of its flow among them, "
        "are made at that very temperature, and accepted or rejected there. With the same seed, "
        "and the run as it is, they are the same.",
    )
    retarget = _command(
        commands,
        "retarget",
        "another System of the same molecule, sampled with the flow of a run",
        "For example\n\n  openmm-tsf retarget run/ --output gbn2/ --forcefield "
        "amber14-all.xml implicit/gbn2.xml\n\n"
        "The flow is not trained again: it proposes, and each proposal is accepted or rejected "
        "with the energy of the other System. OUTPUT becomes a run directory, with retarget.json: "
        "the free-energy difference of the two Systems and their populations. Atoms and "
        "coordinates are those of RUN where --system or --forcefield comes alone.\n\n"
        + _STATUS.format("the new run is"),
    )
    certify = _command(
        commands,
        "certify",
        "are a run, or trajectories of any origin, of the Boltzmann ensemble",
        "Give a run directory; or for each temperature its files after --trajectory, and "
        "--temperature, with the molecule and an --output: for example\n\n"
        "  openmm-tsf certify --pdb my.pdb --system system.xml --output certificate \\\n"
        "    --trajectory cold_1.dcd cold_2.dcd --temperature 300 \\\n"
        "    --trajectory hot_1.dcd hot_2.dcd --temperature 330\n\n"
        "Two temperatures whose energies overlap are tested best. Without a flow nothing is known "
        "of what was never visited.\n\n" + _STATUS.format("the samples are"),
    )
    compare = _command(
        commands,
        "compare",
        "a run beside a reference: distances with their floors, populations, flow, costs",
        "For example\n\n  openmm-tsf compare run/ reference.npz\n\n"
        "Each distance stands beside what two independent halves of the reference give with as "
        "many samples.\n\nThe exit status is 0 if run and reference agree, 3 if one of them is "
        "too short to tell, 4 if they differ; 2 after an error, 130 after Ctrl-C.",
    )
    plan = _command(
        commands,
        "plan",
        "what a target of precision will cost, and whether a flow pays",
        "A pilot of a minute predicts evaluations and time by plain replica exchange of dynamics, "
        "and by a run with a flow: for example\n\n"
        "  openmm-tsf plan 'dF(phi) < 0.05 kT' --temperatures 300 424.26 600",
    )
    doctor = _command(commands, "doctor", "self-test, and the facts for a bug report")

    retarget.add_argument("run", metavar="RUN", help="run directory with its flow; it is only read")
    for command in (everything, md, train, sample, retarget):
        command.add_argument("--output", required=True, metavar="DIR", help="new or empty folder")
        add_molecule_arguments(command, *([_OTHER_SYSTEM] if command is retarget else []))
        command.add_argument("--seed", type=int, help="seed of everything (default: 1)")
        command.add_argument(
            "--platform",
            help="OpenMM platform (default: torch for energies of long runs, if it covers the "
            "System; otherwise, and for MD, the fastest platform, measured)",
        )
        command.add_argument(
            "--threads",
            type=int,
            help="threads of torch, and of OpenMM's CPU platform (default: 1; 2 for torch where a "
            "flow is trained by path gradients, as in the presets default and thorough; more are "
            "slower for networks of this size, and make MD differ in its last bits)",
        )
        command.add_argument(
            "--resume",
            action="store_true",
            help="continue what is in the output folder, as if it had not stopped; start if it is "
            "empty or new",
        )
        command.add_argument(
            "--checkpoint-seconds",
            type=float,
            metavar="S",
            help="time between checkpoints (default: 30)",
        )
    for command in (everything, train, sample, at, retarget):
        add_device_argument(command)
    for command in (everything, sample):
        add_compile_argument(command)
    for command in (everything, md, train, sample, certify, plan, compare):
        add_measure_argument(command)
    _plan_arguments(plan)
    for command in (everything, sample, analyze, at, certify, plan, retarget):
        _observe_argument(command)
    for command in (everything, train):
        _training_arguments(command)
    for command in (everything, sample, retarget):
        _sampling_arguments(command)

    add_shard_arguments(everything)
    everything.add_argument("--md", action="store_true", help="MD even where frames are shipped")
    everything.add_argument("--rounds", type=int, help="rounds of sampling and retraining")
    for command in (everything, md):
        command.add_argument("--frames", type=int, help="frames of MD (default: 40000, quick 2000)")
    md.add_argument("--temperature", type=float, help="K (default: 600)")
    md.add_argument("--steps-per-frame", type=int, help="time steps between frames (default: 250)")
    md.add_argument(
        "--equilibration-steps", type=int, help="time steps before the first frame (default: 20000)"
    )
    md.add_argument(
        "--timestep",
        type=float,
        help="ps (default: 0.001; 0.002 where bonds to hydrogen are constrained)",
    )
    md.add_argument("--friction", type=float, help="1/ps (default: 1)")
    train.add_argument("--flow-kind", choices=("tsf", "realnvp"), help="which flow (default: tsf)")
    sample.add_argument(
        "--flow",
        metavar="PATH",
        help="flow.pt, or the folder of train or run (default with --resume: that of the run)",
    )
    sample.add_argument(
        "--trajectory",
        nargs="+",
        metavar="PATH",
        help="frames to start from (default: draws of the flow)",
    )
    sample.add_argument("--temperature", type=float, help="temperature of --trajectory in K")
    analyze.add_argument("run", metavar="RUN", help="run directory, complete or not")
    analyze.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the tables and plots (default: RUN, which is only read otherwise)",
    )
    at.add_argument("run", metavar="RUN", help="run directory, which is only read")
    at.add_argument("--temperature", type=float, required=True, metavar="K", help="in K")
    at.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="DCD file, new; the numbers of the samples go to the .json file of the same name",
    )
    at.add_argument("--frames", type=int, help="frames to draw (default: 10000)")
    at.add_argument("--seed", type=int, help="seed of everything (default: 1)")
    at.add_argument("--platform", help="OpenMM platform (default: the fastest, or torch)")
    _certify_arguments(certify)
    add_compare_arguments(compare)
    add_molecule_arguments(compare, "molecule of trajectories (default: that of a run directory)")
    doctor.add_argument(
        "directory", nargs="?", metavar="DIR", help="directory of a stage to examine"
    )
    doctor.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def _command(
    commands: Any, name: str, description: str, more: str | None = None
) -> argparse.ArgumentParser:
    """Add a command; `more` follows its arguments, line by line."""
    lines = (
        None
        if more is None
        else [textwrap.fill(x, 79) if x[:1] != " " else x for x in more.split("\n")]
    )
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=description[0].upper() + description[1:] + ".",
        epilog=None if lines is None else "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--quiet", action="store_true", help="no progress, warnings only")
    command.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")
    return command


def _observe_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--observe",
        action="append",
        metavar="NAME=WHAT",
        help="an observable for reports and targets: chi1=dihedral:A,B,C,D, d=distance:A,B, "
        "theta=angle:A,B,C with atoms by number (from 0) or as ALA2:CA, a torsion of the molecule "
        "by its name, or a function of an mdtraj trajectory that returns a number for each frame, "
        "rg=file.py:function or rg=module:function. Once for each; run and sample record them, "
        "functions by name only",
    )


def _certify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "run", nargs="?", metavar="RUN", help="run directory (or --trajectory and --temperature)"
    )
    add_molecule_arguments(command)
    command.add_argument(
        "--trajectory",
        nargs="+",
        action="append",
        metavar="PATH",
        help="files of one temperature that mdtraj can read, not rounded as most XTC is, each an "
        "independent walker; once for each temperature",
    )
    command.add_argument(
        "--temperature",
        type=float,
        action="append",
        metavar="K",
        help="temperature of each --trajectory, in the same order",
    )
    command.add_argument(
        "--walkers", type=int, default=1, help="walkers in each file, frame by frame (default: 1)"
    )
    command.add_argument(
        "--monte-carlo",
        action="store_true",
        help="frames may repeat the one before: moves were rejected",
    )
    command.add_argument(
        "--flow",
        metavar="PATH",
        help="flow.pt, or the folder of train or run, to bound what was never visited (default: "
        "that of RUN)",
    )
    command.add_argument(
        "--output",
        metavar="DIR",
        help="folder for certificate.json and certificate.png: new, empty or of earlier results "
        "(default: RUN)",
    )


def _plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "target",
        metavar="TARGET",
        help="'dF(phi) < 0.05 kT', 'P(phi > 0) < 10 %%', 'U < 0.1 kJ/mol', ...: a standard error "
        "at the lowest temperature",
    )
    add_molecule_arguments(command)
    command.add_argument(
        "--preset", choices=("quick", "default", "thorough"), help="the run with a flow"
    )
    command.add_argument("--temperatures", type=_temperature, nargs="+", metavar="K", help=_LADDER)
    command.add_argument(
        "--seconds", type=float, default=60.0, help="time of the pilot (default: 60)"
    )
    command.add_argument("--seed", type=int, help="seed of the pilot (default: 1)")
    command.add_argument("--platform", help="OpenMM platform (default: as in run)")
    command.add_argument("--threads", type=int, help="threads of torch (default: as in run)")
    command.add_argument("--output", metavar="FILE", help="JSON file for the plan, new")


def _temperature(text: str) -> float | str:
    """Return a number or ``"auto"``."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or 'auto', got {text!r}") from None


def _training_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset",
        choices=("quick", "default", "thorough", "gpu"),
        help="sizes and lengths (default: default). On two free cores they take alanine dipeptide "
        "0.5, 5.5 and some 10 minutes, larger molecules longer: each run says so when it starts. "
        "gpu: draws and walkers that fill one, with --device cuda",
    )
    command.add_argument(
        "--trajectory",
        nargs="+",
        metavar="PATH",
        help="frames: files that mdtraj can read, in order, or a folder of md",
    )
    command.add_argument("--temperature", type=float, help="temperature of --trajectory in K")
    command.add_argument(
        "--stride", type=int, help="use every STRIDE-th frame (default: 1; quick: 4)"
    )
    command.add_argument("--steps", type=int, help="steps of the first training")
    if command.prog.endswith("train"):
        command.add_argument(
            "--temperatures", type=float, nargs="+", metavar="K", help="where the flow is used"
        )


def _sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--temperatures", type=_temperature, nargs="+", metavar="K", help=_LADDER)
    command.add_argument("--walkers", type=int, help="independent ladders side by side")
    command.add_argument("--iterations", type=int, help="iterations of production, in all")
    command.add_argument(
        "--until",
        nargs="*",
        metavar="TARGET",
        help="stop once all targets are met, such as 'dF(phi) < 0.05 kT', 'P(phi > 0) < 10 %%', "
        "'U < 0.1 kJ/mol at 424.26 K': standard errors of converged estimates, looked at after 50, "
        "63, 79, ... iterations, and every basin of the training frames visited. --iterations is "
        "then the most (default: 20 times the preset's). Without a target after it, what is "
        "resumed goes on to --iterations",
    )
    command.add_argument("--tuning", type=int, help="iterations of tuning before production")
    command.add_argument(
        "--save-interval",
        type=int,
        metavar="N",
        help="save frames every N-th iteration (default: 1), and the numbers too, unless:",
    )
    command.add_argument(
        "--numbers-interval",
        type=int,
        metavar="N",
        help="save energies, replicas and torsions every N-th iteration, a divisor of "
        "--save-interval (default: --save-interval)",
    )
