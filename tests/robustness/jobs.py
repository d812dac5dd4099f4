"""Processes of the program that can be killed."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from openmm_tsf.cli.main import INTERRUPTED, main

PATIENCE = 300.0


class Job:
    """A process of the program in a new session: a `real` interpreter, or a fork of this one.

    `limits` are those of ``resource.setrlimit``.
    """

    def __init__(
        self, arguments: Sequence[str], real: bool, limits: dict[int, int] | None = None
    ) -> None:
        limits = limits or {}
        self.started = time.time()
        self.status: int | None = None
        read, write = os.pipe()
        if real:
            self.pid = self._spawn(arguments, write, limits)
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "this process has threads"
            # A signal in the child before its exception handler would run this script's cleanup.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            self.pid = os.fork()
            if self.pid == 0:
                os.close(read)
                self._run_forked(arguments, write, limits)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        os.close(write)
        self._pipe = open(read, "rb")  # noqa: SIM115
        os.set_blocking(read, False)
        self.stderr = ""

    def _spawn(self, arguments: Sequence[str], write: int, limits: dict[int, int]) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openmm_tsf", *arguments],
            stdout=subprocess.DEVNULL, stderr=write, start_new_session=True,
            preexec_fn=lambda: [resource.setrlimit(k, (v, v)) for k, v in limits.items()],
        )  # fmt: skip
        self._process.returncode = 0  # this class waits for it
        return self._process.pid

    def _run_forked(self, arguments: Sequence[str], write: int, limits: dict[int, int]) -> None:
        status = 1
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            os.setsid()
            os.dup2(write, 2)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", 1, closefd=False)  # noqa: SIM115
            for which, limit in limits.items():
                resource.setrlimit(which, (limit, limit))
            status = main(arguments)
        except KeyboardInterrupt:
            status = INTERRUPTED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.status is None:
            self._read_stderr()
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(code)
                self.ended = time.time()
                self._read_stderr()
                self._pipe.close()
        return self.status

    def _read_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError, TypeError):
            self.stderr += (self._pipe.read() or b"").decode(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Return the exit status; None if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return self.status

    def send(self, number: int) -> None:
        """Send a signal if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def resident(self) -> int:
        """Return the resident memory in bytes."""
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0
        return pages * resource.getpagesize()
