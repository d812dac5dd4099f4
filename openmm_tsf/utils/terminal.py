"""What goes to a terminal: names from files of strangers may hold anything, terminals obey much."""

import logging
import sys
from typing import Any, TextIO


def printable(text: str) -> str:
    """Text without control characters, line breaks aside."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say(*parts: Any, sep: str = " ", file: TextIO | None = None) -> None:
    """As ``print``, for text that nothing is known of."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = printable(sep.join(map(str, parts)))
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


class PrintableFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        return printable(super().format(record))
