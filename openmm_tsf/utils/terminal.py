"""Output to a terminal: names from untrusted files may contain control sequences."""

import logging
import sys
from typing import Any, TextIO


def printable(text: str) -> str:
    """Return the text with control characters replaced by ``?``; line breaks stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def say(*parts: Any, sep: str = " ", file: TextIO | None = None) -> None:
    """Print without control characters, and escape what the encoding cannot represent."""
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = printable(sep.join(map(str, parts)))
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=file)


class PrintableFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))
