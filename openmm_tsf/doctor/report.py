"""The report of the doctor: the machine, its packages, a directory, and a self-test."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmm_tsf.doctor import probes
from openmm_tsf.doctor.self_test import SelfTestResult, self_test
from openmm_tsf.utils.terminal import printable

_WIDTH = 20


@dataclass(frozen=True)
class Report:
    """The result of `examine`; ``str(report)`` is the text that ``openmm-tsf doctor`` prints.

    Attributes
    ----------
    sections
        Named values under their titles; what could not be determined is reported as such.
    results, seconds
        The results and the duration of the self-test.

    Examples
    --------
    >>> from openmm_tsf.doctor import Report
    >>> report = Report({"torch": {"threads": 2}}, results=(), seconds=0.0)
    >>> print(report)
    torch
      threads              2
    <BLANKLINE>
    self-test
    self-test ok: 0 of 0 checks passed, in 0.0 s
    >>> report.to_dict()["torch"]
    {'threads': 2}
    """

    sections: dict[str, dict[str, Any]]
    results: tuple[SelfTestResult, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the self-test passed."""
        return all(result.ok for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        content = {
            "ok": self.ok,
            **self.sections,
            "self-test": [result.to_dict() for result in self.results],
            "self-test seconds": round(self.seconds, 2),
        }
        return dict(_without_home(content))

    def __str__(self) -> str:
        lines = []
        for title, content in self.sections.items():
            lines.append(title)
            for name, value in content.items() or [("none", "")]:
                items = value if isinstance(value, list) else [value]
                for number, item in enumerate(items or ["none"]):
                    lines.append(f"  {name if number == 0 else '':<{_WIDTH}} {item}".rstrip())
            lines.append("")
        lines.append("self-test")
        lines += [f"  {result}" for result in self.results]
        n_passed = sum(result.ok for result in self.results)
        passed = f"{n_passed} of {len(self.results)} checks passed, in {self.seconds:.1f} s"
        lines.append(f"self-test {'ok' if self.ok else 'FAILED'}: {passed}")
        return str(_without_home("\n".join(lines)))


def examine(directory: str | os.PathLike[str] | None = None) -> Report:
    """Describe the machine and optionally a directory, and run a self-test of about five seconds.

    Parameters
    ----------
    directory
        The output directory of a stage (md, train, sample, run). Only its JSON files and the names
        and sizes of its files are read; of shards also their numbers, whose checksums are compared.
    """
    folder = None if directory is None else Path(directory)
    if folder is not None and not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"directory: expected a directory, got the file {folder}")
        raise FileNotFoundError(f"directory: no such directory {folder}")
    platforms, running = probes.openmm_platforms()
    sections = {
        "versions": probes.installed_versions(),
        "machine": probes.machine(),
        "OpenMM platforms": platforms,
        "torch": probes.torch_devices(),
        "environment": probes.environment(),
        "shipped data": probes.shipped_data(),
    }
    if folder is not None:
        sections["directory"] = probes.describe_directory(folder)
    start = time.perf_counter()
    results = tuple(self_test(running))
    return Report(sections, results, time.perf_counter() - start)


def _without_home(content: Any) -> Any:
    """Return content with ``~`` for the home directory and without control characters."""
    if isinstance(content, dict):
        return {_without_home(key): _without_home(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_home(value) for value in content]
    if not isinstance(content, str):
        return content
    content = printable(content)
    home = os.path.expanduser("~").rstrip("/\\")
    return re.sub(re.escape(home) + r"(?![\w.-])", "~", content) if home else content
