"""Versions of the packages that a result depends on."""

import platform
from importlib.metadata import version

_PACKAGES = ("openmm-tsf", "openmm", "torch", "numpy", "mdtraj", "pymbar")


def package_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the packages that its numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
