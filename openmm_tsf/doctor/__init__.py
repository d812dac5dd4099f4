"""A description of this machine and of a run directory, with a self-test.

Use it when something is wrong, and paste its output into a bug report. In a shell it is
``openmm-tsf doctor``, or ``openmm-tsf doctor run/`` with a directory; ``--json`` prints a JSON
object. In Python::

    report = openmm_tsf.doctor.examine("run/")

It takes about ten seconds and shows

- versions, processor, memory, GPUs, C++ compiler, and OpenMM's platforms and plugins;
- the environment variables that set threads, devices and plugins, and no others. The home directory
  is shown as ``~``;
- of a directory: its stage and progress, damaged JSON files, and packages of another version now;
  of a run in shards the iterations of each and whether it is running, finished, interrupted or
  damaged;
- a self-test: energies and forces of every platform and of ``TorchPotential`` are compared with
  OpenMM's Reference platform; internal coordinates and a flow must be invertible.

The exit status is 1 if the self-test fails.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_tsf.doctor.report import Report, examine

__all__ = ["Report", "examine"]


def __getattr__(name: str) -> Any:
    # On first use: the self-test needs torch and OpenMM, whose import takes seconds.
    if name in __all__:
        from openmm_tsf.doctor import report

        return getattr(report, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
