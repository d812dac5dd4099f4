"""The arguments of a run whose walkers are sampled in shards."""

import argparse


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
