"""A disk that fails at a chosen operation.

All operations that change a directory are counted: creating, writing, truncating, flushing to the
disk, renaming and removing files. A failing write has written half of its bytes.
"""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What happens at the chosen operation: the process ends, the disk is full from then on, or a
#: second Ctrl-C comes, which is not deferred.
FAULTS = ("die", "full", "interrupt")
KILLED = 9


class FaultyDisk:
    """Counts the operations under a directory, and lets operation `at`, from 1, fail."""

    def __init__(self, directory: Path, fault: str = "die", at: int | None = None) -> None:
        self.directory, self.fault, self.at = str(directory), fault, at
        self.count = 0
        self._interrupted = False
        self._descriptors: set[int] = set()
        self._open, self._os_open = builtins.open, os.open

    def install(self) -> None:
        """Replace the functions of this process; they are not restored."""
        builtins.open = self._opened  # type: ignore[assignment]
        os.open = self._os_opened  # type: ignore[assignment]
        for name in ("replace", "rename", "mkdir", "rmdir", "unlink", "remove", "truncate"):
            setattr(os, name, self._wrapped(getattr(os, name), name))
        os.fsync = self._on_descriptor(os.fsync)  # type: ignore[assignment]

    def _inside(self, path: Any) -> bool:
        if isinstance(path, int):
            return path in self._descriptors
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(
            self.directory
        )

    def step(
        self, half: Callable[[], Any] | None = None, frees: bool = False, path: Any = None
    ) -> None:
        """Begin an operation; `half` does half of it, `frees` says that it needs no space."""
        self.count += 1
        if self.at is None or self.count < self.at:
            return
        if self.count == self.at and half is not None:
            half()
        if self.fault == "die":
            os._exit(KILLED)
        if self.fault == "interrupt" and not self._interrupted:
            self._interrupted = True
            raise KeyboardInterrupt
        if self.fault == "full" and not frees:
            name = () if path is None else (str(path),)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *name)

    def _wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside(path):
                self.step(frees=name != "mkdir", path=path)
            return function(path, *args, **kwargs)

        return call

    def _on_descriptor(self, function: Callable[[int], Any]) -> Callable[[int], Any]:
        def call(descriptor: int) -> Any:
            if descriptor in self._descriptors:
                self.step()
            return function(descriptor)

        return call

    def _os_opened(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        inside = self._inside(path)
        if inside and flags & os.O_CREAT:
            self.step(path=path)
        descriptor = self._os_open(path, flags, *args, **kwargs)
        (self._descriptors.add if inside else self._descriptors.discard)(descriptor)
        return descriptor

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writing = any(letter in mode for letter in "wxa+")
        if not writing or not self._inside(file):
            return self._open(file, mode, *args, **kwargs)
        if not isinstance(file, int) and "r" not in mode:
            self.step(path=file)
        raw = _CutFile(file, mode.replace("b", "").replace("t", ""), disk=self)
        self._descriptors.add(raw.fileno())
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, kwargs.get("encoding"), newline=kwargs.get("newline"))


class _CutFile(io.FileIO):
    """A file whose failing write has written half."""

    def __init__(self, file: Any, mode: str, disk: FaultyDisk) -> None:
        super().__init__(file, mode)
        self._disk = disk

    def write(self, content: Any) -> int:
        whole = memoryview(content).cast("B")
        # A number in a header is written completely or not at all: it is in one page of memory.
        half = whole[: len(whole) // 2 if len(whole) > 16 else 0]
        disk = self._disk
        if disk.fault == "interrupt" and disk.count + 1 == disk.at and len(half):
            disk.count += 1  # as the system does: half was written, then the signal comes
            return super().write(half)
        disk.step(half=lambda: super(_CutFile, self).write(half))
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        self._disk.step(frees=True)
        return super().truncate(size)
