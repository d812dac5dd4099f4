"""Runs a function in a forked child with limits of time and memory."""

import contextlib
import io
import logging
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openmm_tsf.analysis.verdict import EXIT_STATUS

#: Exit statuses of commands that did their work: analyze ends with 3 or 4 where a run is not yet
#: converged, or wrong.
DONE = tuple(EXIT_STATUS.values())


@dataclass
class Outcome:
    """How a call ended."""

    status: Any = None  #: the returned value, or the exit status
    error: str | None = None  #: type of the exception, with its `message` and `trace`
    message: str = ""
    trace: str = ""
    stdout: str = ""
    stderr: str = ""
    killed: str | None = None  #: why the function did not return, if it did not


def isolated(function: Callable[[], Any], seconds: float = 20.0) -> Outcome:
    """Call a function in a child process with a limit of time and of 3 GiB of added memory."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child uses no threads
        pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(function, writing)
    os.close(writing)
    late = True
    try:
        data, late = _read(reading, seconds)
    finally:
        os.close(reading)
        if late:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if late:
        return Outcome(status, killed=f"no end after {seconds:g} seconds")
    if status < 0:
        return Outcome(status, killed=signal.Signals(-status).name)
    if not data:
        return Outcome(status, killed=f"exit status {status} without a result")
    result: Outcome = pickle.loads(data)  # of a child of this process
    return result


def _read(descriptor: int, seconds: float) -> tuple[bytes, bool]:
    """Return what was read, and whether the time ended first."""
    data, end = b"", time.monotonic() + seconds
    while select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
        part = os.read(descriptor, 2**16)
        if not part:
            return data, False
        data += part
    return data, True


def _child(function: Callable[[], Any], descriptor: int) -> None:
    outcome = Outcome()
    out, err = io.StringIO(), io.StringIO()
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            # Logged warnings are part of stderr, whatever the parent's logging is.
            logging.getLogger("openmm_tsf").addHandler(logging.StreamHandler(err))
            try:
                outcome.status = function()
            except SystemExit as error:
                outcome.status = error.code
            except BaseException as error:
                outcome.error, outcome.message = type(error).__name__, str(error)[:2000]
                outcome.trace = "".join(traceback.format_exception(error))[-6000:]
        outcome.stdout, outcome.stderr = out.getvalue()[-8000:], err.getvalue()[-8000:]
        data = pickle.dumps(outcome)
    except BaseException as error:
        data = pickle.dumps(Outcome(killed=f"the sandbox failed: {error!r}"))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    try:
        with os.fdopen(descriptor, "wb") as pipe:
            pipe.write(data)
    finally:
        os._exit(0)
