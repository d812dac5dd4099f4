"""Run and load the scripts of ``examples/``, which is not a package and not on ``sys.path``."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(path: str) -> ModuleType:
    """Return the module of a script, e.g. ``"paper/figure3.py"``, after those that it imports."""
    name = Path(path).stem
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def shortened(source: str, changes: dict[str, str]) -> str:
    """Return a source with each key, which must occur once, replaced by its value."""
    for old, new in changes.items():
        assert source.count(old) == 1, f"expected {old!r} once in the source"
        source = source.replace(old, new)
    return source


def run_source(source: str, path: Path = Path("script.py")) -> dict[str, Any]:
    """Write a source to a file, execute it as a script and return its variables."""
    path.write_text(source)
    return runpy.run_path(str(path), run_name="__main__")


def code_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page of Markdown."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
