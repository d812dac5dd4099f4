"""Deferral of Ctrl-C and SIGTERM."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class DeferredInterrupt:
    """Turn the first Ctrl-C or SIGTERM into the flag `requested`.

    The running iteration can be completed and saved: batch systems send SIGTERM some seconds before
    SIGKILL. A second signal has its previous effect.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous = signal.getsignal(number)
                if previous is not None:  # None: set outside Python, cannot be restored
                    self._previous[number] = previous
                    signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
