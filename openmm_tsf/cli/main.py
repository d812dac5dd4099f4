"""The program ``openmm-tsf``: logging, signals, exit status."""

import argparse
import io
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from openmm_tsf.cli.arguments import build_parser
from openmm_tsf.cli.commands import COMMANDS
from openmm_tsf.utils.distributed import Ranks, connect_ranks, current_ranks, read_ranks
from openmm_tsf.utils.terminal import log_handler, open_standard_streams, say

logger = logging.getLogger("openmm_tsf")

_LONGEST_MESSAGE = 2000
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended
_OF_RANKS = ("run", "train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    It is 0, 1 if the self-test of doctor failed, 2 after an error, 130 after Ctrl-C or SIGTERM; of
    commands that judge a run 0 if it is converged, 3 if it is not yet, 4 if it is wrong.

    Started by ``torchrun`` or ``srun`` as several ranks, rank 0 shows the progress and the results,
    the others warnings and errors, with their number.
    """
    open_standard_streams()
    args = build_parser().parse_args(arguments)
    ranks, name = Ranks(), "openmm-tsf"
    try:
        ranks = read_ranks()
    except ValueError as error:
        say(f"{name}: error: {error_line(error)}", error=True)
        return 2
    if not ranks.is_first:
        name, args.quiet = f"{name}: rank {ranks.rank}", True
    level = logging.DEBUG if args.debug else logging.WARNING if args.quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, handlers=[log_handler(ranks.rank)])
    logger.setLevel(level)
    try:
        from openmm_tsf.utils.progress import log_above_bars

        with log_above_bars(), _sigterm_like_ctrl_c(), _connected(args, ranks), _threads(args):
            status = COMMANDS[args.command](args)
    except KeyboardInterrupt:
        if not ranks.is_first:
            return INTERRUPTED
        where = f"; the results so far are in {args.output}" if "resume" in args else ""
        say(f"openmm-tsf: interrupted{where}", error=True)
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            raise
        say(f"{name}: error: {error_line(error)}", error=True)
        return 2
    return int(status or 0)


@contextmanager
def _connected(args: argparse.Namespace, ranks: Ranks) -> Iterator[None]:
    """Connect the ranks, each with its own device; the first prints what the command prints."""
    if ranks.size == 1:
        yield
        return
    if args.command not in _OF_RANKS or getattr(args, "shard", None) is not None:
        what = args.command if args.command not in _OF_RANKS else "--shard"
        raise ValueError(
            f"{what}: expected one process, got {ranks.size} ranks (of torchrun or srun); several "
            "share a run with --shards, or train"
        )
    device = getattr(args, "device", None)
    if device is not None:
        args.device = device = ranks.choose_device(device)
    with connect_ranks(ranks, device):
        if ranks.is_first:
            yield
            return
        with redirect_stdout(io.StringIO()):
            yield


@contextmanager
def _threads(args: argparse.Namespace) -> Iterator[None]:
    """Set torch's threads: as given, else as when the stage was started, else the default."""
    if "threads" not in args:
        yield
        return
    from openmm_tsf.potentials.platforms import available_cores
    from openmm_tsf.utils.threads import torch_threads
    from openmm_tsf.utils.validation import max_threads
    from openmm_tsf.workflow.record import recorded_threads

    most = max_threads()
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {args.threads}")
    if args.threads is not None and args.threads > most:
        raise ValueError(f"--threads: expected at most {most} on this machine, got {args.threads}")
    is_resumed = getattr(args, "resume", False) or getattr(args, "shard", None) is not None
    recorded = recorded_threads(args.output) if is_resumed else None
    default = 1
    if args.command in ("run", "train", "plan") and current_ranks().size == 1:
        from openmm_tsf.workflow.presets import preset

        # Path gradients use two threads; everything else is faster on one.
        if preset(args.preset or "default").fit.estimator == "path":
            default = min(2, available_cores())
    with torch_threads(args.threads or recorded or default):
        yield


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM, from batch systems and shutdowns, end a stage as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def error_line(error: Exception) -> str:
    """Return the message in one line, with the type of errors that are not meant for users."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_MESSAGE:  # values from a file
        text = f"{text[:_LONGEST_MESSAGE]}... (--debug shows all)"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"memory: expected what fits, try fewer walkers, temperatures or frames: {text}"
    if isinstance(error, (ValueError, TypeError, RuntimeError, ArithmeticError, OSError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
