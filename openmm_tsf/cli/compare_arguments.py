"""The arguments of ``compare``, and the command."""

import argparse
from typing import Any

from openmm_tsf.cli.molecules import given_molecule
from openmm_tsf.utils.terminal import say


def add_compare_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare`` beside those of the molecule."""
    side = (
        "run directory, file .npz of make_reference.py export, or a trajectory with --temperature"
    )
    command.add_argument("run", metavar="RUN", help=side)
    command.add_argument("reference", metavar="REFERENCE", help="the same, without a flow at best")
    command.add_argument(
        "--temperature",
        type=float,
        metavar="K",
        help="temperature of each side that is a trajectory (of the molecule below, or of that of "
        "the run directory on the other side)",
    )
    command.add_argument(
        "--walkers",
        type=int,
        default=1,
        help="walkers in each trajectory file, frame by frame (default: 1)",
    )
    command.add_argument(
        "--samples",
        type=int,
        help="points of each Wasserstein distance (default: 1000; published ones have 10000, for "
        "which minutes are needed each)",
    )
    command.add_argument(
        "--splits", type=int, help="divisions of the reference into halves (default: 4)"
    )
    command.add_argument(
        "--tica",
        action=argparse.BooleanOptionalAction,
        help="TICA-W2, by deeptime (default: if it is installed)",
    )
    command.add_argument(
        "--flow", metavar="PATH", help="flow.pt, or its folder (default: that of RUN)"
    )
    command.add_argument("--seed", type=int, help="seed of the samples drawn (default: 1)")
    command.add_argument("--output", metavar="FILE", help="JSON file for the comparison, new")
    command.add_argument(
        "--export",
        metavar="DIR",
        help="new or empty folder for the frames of both sides as .npy files (float32, nm) with "
        "U and -U/kT, named as boltzkit's evaluation takes them",
    )


def run_compare(args: argparse.Namespace) -> int:
    """Compare, print the page and return the exit status."""
    from openmm_tsf.analysis.compare_ensembles import compare
    from openmm_tsf.analysis.compare_report import describe_comparison
    from openmm_tsf.analysis.verdict import EXIT_STATUS
    from openmm_tsf.io.files import check_new_file, write_json

    output = None if args.output is None else check_new_file(args.output)
    sides = [_side(each, args.temperature) for each in (args.run, args.reference)]
    if args.temperature is not None and not any(isinstance(side, dict) for side in sides):
        raise ValueError("--temperature: it is that of trajectories, got directories or .npz files")
    given = {"n_samples": args.samples, "n_splits": args.splits, "seed": args.seed}
    content = compare(
        *sides,
        molecule=given_molecule(args),
        walkers=args.walkers,
        flow=args.flow,
        tica=args.tica,
        export=args.export,
        **{name: value for name, value in given.items() if value is not None},
    )
    say(describe_comparison(content))
    if output is not None:
        write_json(output, content)
        say(f"\nthe numbers are in {args.output}")
    status: int = EXIT_STATUS[content["verdict"]["status"]]
    return status


def _side(path: str, kelvin: float | None) -> Any:
    """The path of a directory or .npz file, or a trajectory by its temperature."""
    from pathlib import Path

    if kelvin is None or Path(path).is_dir() or Path(path).suffix == ".npz":
        return path
    return {kelvin: path}
