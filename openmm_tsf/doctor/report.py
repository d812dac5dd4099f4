"""What a bug report needs: the machine, its packages, a directory, and a self-test."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm_tsf.doctor import probes as probes
from openmm_tsf.doctor.self_test import Check, self_test
from openmm_tsf.utils.terminal import printable

_WIDTH = 20


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found. ``str()`` is the text that the command prints.

    Attributes
    ----------
    sections
        From titles to named values.
    checks
        The self-test, line by line.
    seconds
        How long the self-test took.
    """

    sections: dict[str, dict[str, Any]]
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the self-test passed."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        content = {
            "ok": self.ok,
            **self.sections,
            "self-test": [check.to_dict() for check in self.checks],
            "self-test seconds": round(self.seconds, 2),
        }
        return dict(_tidy(content))

    def __str__(self) -> str:
        lines = []
        for title, content in self.sections.items():
            lines.append(title)
            for name, value in content.items() or [("none", "")]:
                shown = value if isinstance(value, list) else [value]
                for number, item in enumerate(shown or ["none"]):
                    lines.append(f"  {name if number == 0 else '':<{_WIDTH}} {item}".rstrip())
            lines.append("")
        lines.append("self-test")
        lines += [f"  {check}" for check in self.checks]
        good = sum(check.ok for check in self.checks)
        verdict = "ok" if self.ok else "FAILED"
        lines.append(
            f"self-test {verdict}: {good} of {len(self.checks)} checks passed, "
            f"in {self.seconds:.1f} s"
        )
        return str(_tidy("\n".join(lines)))


def examine(directory: str | os.PathLike[str] | None = None) -> Report:
    """Look at the machine, at a directory if given, and run a self-test of about five seconds.

    Parameters
    ----------
    directory
        Where a stage (md, train, sample, run) wrote its results; only names, sizes and JSON files
        are read.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        If it is no directory. Nothing else raises: what cannot be found out is reported.
    """
    folder = None if directory is None else Path(directory)
    if folder is not None and not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"directory: expected a directory, got the file {folder}")
        raise FileNotFoundError(f"directory: no such directory {folder}")
    platforms, running = probes.openmm_platforms()
    sections = {
        "versions": probes.versions(),
        "machine": probes.machine(),
        "OpenMM platforms": platforms,
        "torch": probes.torch_devices(),
        "environment": probes.environment(),
        "shipped data": probes.shipped_data(),
    }
    if folder is not None:
        sections["directory"] = probes.directory(folder)
    start = time.perf_counter()
    checks = tuple(self_test(running))
    return Report(sections, checks, time.perf_counter() - start)


def _tidy(content: Any) -> Any:
    """Fit to be pasted, at any depth: ``~`` for the home directory, no control characters."""
    if isinstance(content, dict):
        return {_tidy(key): _tidy(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_tidy(value) for value in content]
    if not isinstance(content, str):
        return content
    content = printable(content)
    home = os.path.expanduser("~").rstrip("/\\")
    if not home or home == "~":
        return content
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", content)
