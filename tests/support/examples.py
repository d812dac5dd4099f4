"""Loads scripts of ``examples/``, which is no package and not on ``sys.path``."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


def load_example(path: str) -> ModuleType:
    """The module of a script, e.g. ``"paper/figure3.py"``, known to others by its stem.

    What it imports from the scripts beside it has to be loaded before it.
    """
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
