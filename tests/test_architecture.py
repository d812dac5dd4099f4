"""The layout of the package: imports go down from layer to layer, without cycles.

A component is a folder of the package or a module of its root. Components of one layer do not
import each other. Every import statement counts, those inside functions and under
``TYPE_CHECKING`` too.
"""

import ast
import functools
from pathlib import Path

import openmm_tsf

PACKAGE = Path(openmm_tsf.__file__).parent
ROOT_MODULES = {"__init__", "__main__", "metropolis", "units"}
LAYERS = (
    {"metropolis", "units", "utils"},
    {"coordinates", "io", "potentials"},
    {"systems"},
    {"flows"},
    {"analysis", "doctor", "sampling", "training"},
    {"hosts", "workflow"},
    {"cli", "__init__"},
    {"__main__"},
)
#: Components that may import a component of the same layer.
NEIGHBOURS = {("__init__", "workflow"), ("metropolis", "utils")}


def module_names(package: Path) -> dict[str, Path]:
    """Dotted names of all modules of a package, with their files."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@functools.cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """The import statements in a source, parsed once."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]


def imports(package: Path) -> dict[str, set[str]]:
    """For each module of a package, the modules of the package that it imports."""
    modules = module_names(package)
    graph = {}
    for module, path in modules.items():
        imported = set()
        for node in import_statements(path.read_text()):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            else:
                home = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
                base = ".".join([*home, *([node.module] if node.module else [])])
                for alias in node.names:
                    name = f"{base}.{alias.name}"
                    imported.add(name if name in modules else base)
        graph[module] = {name for name in imported if name in modules and name != module}
    return graph


def component(module: str) -> str:
    """The component of a dotted module name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a cycle; empty without a cycle."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for name in sorted(graph[module]):
            if members := search(name, [*path, module]):
                return members
        done.add(module)
        return []

    return next((members for module in graph if (members := search(module, []))), [])


def violations(package: Path) -> list[str]:
    """What breaks the layout, in words."""
    problems = [
        f"{path.name}: expected only {sorted(ROOT_MODULES)} in the root"
        for path in package.glob("*.py")
        if path.stem not in ROOT_MODULES
    ]
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    graph = imports(package)
    for module, names in graph.items():
        for name in names:
            above, below = component(module), component(name)
            if above == below or (above, below) in NEIGHBOURS or below not in layer:
                continue
            if above not in layer:
                problems.append(f"{above}: expected a component of a layer")
            elif layer[above] <= layer[below]:
                problems.append(f"{module} imports {name}, which is not below it")
    if together := cycle(graph):
        problems.append("cycle: " + " -> ".join(together))
    return problems


def test_imports_go_down():
    assert violations(PACKAGE) == []


def test_a_planted_violation_is_reported(tmp_path):
    package = tmp_path / "openmm_tsf"
    for path in module_names(PACKAGE).values():
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    assert violations(package) == []

    def planted(name: str, line: str) -> list[str]:
        path = package / name
        before = path.read_text() if path.exists() else None
        path.write_text(f"{before or ''}\n{line}\n")
        problems = violations(package)
        path.unlink() if before is None else path.write_text(before)
        return problems

    up = "def later():\n    from openmm_tsf.cli import main"
    assert any("cli.main, which is not below" in v for v in planted("flows/tsf.py", up))
    typed = "if TYPE_CHECKING:\n    from ..training import fit"
    assert any("training.fit, which is not" in v for v in planted("analysis/mbar.py", typed))
    back = "from openmm_tsf.flows import base"
    assert any(v.startswith("cycle: ") for v in planted("flows/coupling.py", back))
    assert planted("helpers.py", "") == [
        f"helpers.py: expected only {sorted(ROOT_MODULES)} in the root"
    ]
    (package / "extras").mkdir()
    extra = planted("extras/more.py", "import openmm_tsf.units")
    assert extra == ["extras: expected a component of a layer"]
