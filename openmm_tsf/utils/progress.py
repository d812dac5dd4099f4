"""Progress of long loops: a bar in terminals and notebooks, plain lines in log files."""

import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from tqdm import tqdm as Bar
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from tqdm.notebook import tqdm as notebook_tqdm

#: Time in s between the lines of a log file.
LINE_SECONDS = 30.0
_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left{postfix}"


def progress_bar(
    title: str, total: int, *, unit: str = "iteration", initial: int = 0, show: bool = True
) -> "Bar[Any]":
    """Return a tqdm bar on standard error, which appears at once.

    Where standard error is not a terminal it writes a line every 30 s, without carriage returns;
    where it cannot be written to (closed, a broken pipe), nothing, and no error.
    """
    options: dict[str, Any] = {"desc": title, "total": total, "unit": unit, "initial": initial}
    if not show:
        return tqdm(**options, disable=True)
    if issubclass(tqdm, notebook_tqdm):  # in a notebook that shows widgets
        return tqdm(**options)
    stream = sys.stderr
    if stream is None or getattr(stream, "closed", False):
        return tqdm(**options, disable=True)
    if _is_terminal(stream):
        try:
            return tqdm(**options, file=_Stream(stream))
        except (OSError, ValueError):  # tqdm flushes both standard streams, and one cannot be
            return tqdm(**options, disable=True)
    seconds = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
    return tqdm(**options, **seconds, file=_Lines(stream), bar_format=_LINE)


def log_above_bars() -> AbstractContextManager[None]:
    """Let log messages go above the bars of a terminal while the ``with`` block runs."""
    if sys.stderr is None or not _is_terminal(sys.stderr):
        return nullcontext()
    return logging_redirect_tqdm()


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


class _Stream:
    """A stream that drops what cannot be written: a bar must not end the work that it shows."""

    def __init__(self, stream: Any) -> None:
        self._wrapped = stream  # the name by which tqdm compares its own wrappers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def __eq__(self, other: object) -> bool:
        """Equal to the stream itself: tqdm removes its bars while log messages are written."""
        return bool(self._wrapped == getattr(other, "_wrapped", other))

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._wrapped.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            getattr(self._wrapped, "flush", bool)()


class _Lines(_Stream):
    """A stream of lines: tqdm's carriage returns, blanks and repetitions are left out."""

    __eq__ = object.__eq__  # lines stay where they are while log messages are written
    _last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line not in ("", self._last):
            self._last = line
            super().write(f"{line}\n")
            self.flush()
