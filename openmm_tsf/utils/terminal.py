"""Output of commands: names from untrusted files may contain control sequences."""

import logging
import os
import sys
from typing import Any, TextIO


def printable(text: str) -> str:
    """Return the text with control characters replaced by ``?``; line breaks stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say(*parts: Any, sep: str = " ", error: bool = False) -> None:
    """Print without control characters, and escape what the encoding cannot represent.

    On standard output or, with `error`, standard error. Nothing is printed where it was closed, or
    nobody reads any more (``| head``).
    """
    file = sys.stderr if error else sys.stdout
    if file is None or getattr(file, "closed", False):
        return
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = printable(sep.join(map(str, parts)))
    try:
        file.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        getattr(file, "flush", bool)()
    except BrokenPipeError:
        _discard(file)


def _discard(file: TextIO) -> None:
    """Let a stream write to nowhere, so that Python does not fail when it flushes it at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, file.fileno())
    os.close(null)


def open_standard_streams() -> None:
    """Open what is closed of the three standard streams as the null device.

    A file that is opened later would get the number of one, and what libraries print would be
    written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def log_handler(rank: int = 0) -> logging.Handler:
    """Return the handler of a command: lines on standard error, if there is one.

    Those of ranks other than 0 begin with their number.
    """
    if sys.stderr is None or getattr(sys.stderr, "closed", False):
        return logging.NullHandler()
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"rank {rank}: " if rank else ""
    handler.setFormatter(PrintableFormatter(f"{prefix}%(message)s"))
    return handler


class PrintableFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))
