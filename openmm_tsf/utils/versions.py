"""Versions of the packages that a result depends on."""

import platform
from importlib.metadata import version


def package_versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    names = ("openmm-tsf", "openmm", "torch", "numpy", "mdtraj", "pymbar")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


_PACKAGES = ("openmm-tsf", "openmm", "torch", "numpy", "mdtraj")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
