"""The examples in docstrings run, and every public class has one."""

import doctest
import importlib
import inspect
import io
from pathlib import Path

import pytest

import openmm_tsf

PACKAGE = Path(openmm_tsf.__file__).parent
#: Packages whose ``__all__`` is public.
PUBLIC = (
    "openmm_tsf",
    "openmm_tsf.analysis",
    "openmm_tsf.coordinates",
    "openmm_tsf.flows",
    "openmm_tsf.potentials",
    "openmm_tsf.sampling",
    "openmm_tsf.sampling.kernels",
    "openmm_tsf.systems",
    "openmm_tsf.training",
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules_with_examples() -> list[str]:
    """Names of the modules of the package whose source contains a doctest."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text():
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def public_classes() -> dict[str, type]:
    """Public classes by the name under which a user imports them."""
    return {
        f"{package}.{name}": value
        for package in PUBLIC
        for name in importlib.import_module(package).__all__
        if inspect.isclass(value := getattr(importlib.import_module(package), name))
    }


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report = io.StringIO()
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
        runner.run(example, out=report.write)
    assert runner.summarize(verbose=False).attempted > 0
    assert report.getvalue() == ""


@pytest.mark.parametrize("name", sorted(public_classes()))
def test_public_classes_have_an_example(name):
    assert ">>> " in inspect.getdoc(public_classes()[name]), f"{name}: no example"
