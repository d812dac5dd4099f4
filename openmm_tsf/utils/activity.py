"""Log lines while something works that has no steps to count, so that no minute is silent."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Time in s between the lines.
LINE_SECONDS = 30.0


@contextmanager
def log_while(logger: logging.Logger, what: str, *, announce: bool = True) -> Iterator[None]:
    """Log what the ``with`` block does when it starts, and every 30 s for how long it has lasted.

    At level INFO, from a thread of its own. Without `announce` the first line is left out.

    Examples
    --------
    >>> import logging
    >>> from openmm_tsf.utils.activity import log_while
    >>> with log_while(logging.getLogger("openmm_tsf"), "counting to a million"):
    ...     sum(range(1_000_000))
    499999500000
    """
    if announce:
        logger.info("%s", what)
    if not logger.isEnabledFor(logging.INFO):
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def report() -> None:
        while not done.wait(LINE_SECONDS):
            logger.info("%s: %.0f s so far", what, time.monotonic() - start)

    thread = threading.Thread(target=report, name="log_while", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
