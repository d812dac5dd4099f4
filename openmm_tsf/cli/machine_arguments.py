"""The arguments on devices, and on a run whose walkers are sampled in shards."""

import argparse


def add_device_argument(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    command.add_argument(
        "--device",
        help="device of torch for flow, walkers, training and energies: cpu (default), cuda, "
        "cuda:1, ...",
    )


def add_compile_argument(command: argparse.ArgumentParser) -> None:
    """Add --compile-flow."""
    command.add_argument(
        "--compile-flow",
        action=argparse.BooleanOptionalAction,
        help="compile the flow for production, on a GPU: minutes the first time (default: no, or "
        "as in what is resumed)",
    )


def add_shard_arguments(command: argparse.ArgumentParser) -> None:
    """Add --shards, --shard and --prepare."""
    command.add_argument(
        "--shards",
        type=int,
        metavar="S",
        help="parts of the walkers, each in a folder of its own under OUTPUT/shards, that as many "
        "processes can sample; the same numbers by any (default: 1)",
    )
    command.add_argument(
        "--shard",
        type=int,
        metavar="K",
        help="sample only this shard, from 0, with what --prepare has made",
    )
    command.add_argument(
        "--prepare",
        action="store_true",
        help="MD, training and tuning only; then one process for each --shard can sample",
    )
