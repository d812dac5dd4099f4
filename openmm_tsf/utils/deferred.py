"""Checks of numbers on a GPU, made together: each of them alone would wait for the device."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


class DeferredChecks:
    """Checks whose outcome is still on the device.

    Attributes
    ----------
    flags : list of Tensor
        Of each check, a bool without dimensions: whether it failed.
    """

    def __init__(self) -> None:
        self.flags: list[Tensor] = []
        self._errors: list[Callable[[], None]] = []

    def add(self, failed: Tensor, raise_error: Callable[[], None]) -> None:
        """Add a check, with the function that raises its error."""
        self.flags.append(failed)
        self._errors.append(raise_error)

    def wrap_errors(self, start: int, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Let the errors of all checks from number `start` on be raised within a context."""
        for number in range(start, len(self._errors)):
            self._errors[number] = _within(context, self._errors[number])

    def raise_first(self, failed: list[bool]) -> None:
        """Raise the error of the first check that failed, by their flags on the host."""
        for has_failed, raise_error in zip(failed, self._errors, strict=True):
            if has_failed:
                raise_error()


def _within(
    context: Callable[[], AbstractContextManager[None]], raise_error: Callable[[], None]
) -> Callable[[], None]:
    def raise_within() -> None:
        with context():
            raise_error()

    return raise_within


_collected: ContextVar[DeferredChecks | None] = ContextVar("deferred_checks", default=None)


@contextmanager
def defer_checks() -> Iterator[DeferredChecks]:
    """Collect the checks of numbers on a GPU in this block; who collects them reads the flags."""
    checks = DeferredChecks()
    token = _collected.set(checks)
    try:
        yield checks
    finally:
        _collected.reset(token)


def check_flag(failed: Tensor, raise_error: Callable[[], None]) -> None:
    """Call `raise_error` if `failed`, a bool without dimensions, is true.

    At once on the CPU; on a GPU at the end of the innermost :func:`defer_checks`, if within one.
    """
    checks = _collected.get()
    if checks is None or failed.device.type == "cpu":
        if bool(failed):
            raise_error()
    else:
        checks.add(failed, raise_error)


def as_count(number: Tensor) -> int | Tensor:
    """Return a count without dimensions as an int on the CPU, and as it is on a GPU."""
    return int(number) if number.device.type == "cpu" else number.to(torch.int64)
