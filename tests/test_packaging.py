"""The wheel carries the data, and the README's commands agree with the project."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA_SUFFIXES = {".pdb", ".dcd", ".npz"}
DATA_FILES = {"ala2.pdb", "ala2_600K.dcd", "ala2_reference.npz"}

LOAD = """
import sys
from importlib.resources import as_file, files
import openmm_tsf
import openmm_tsf.systems
home = files("openmm_tsf.data")
with as_file(home / "ala2.pdb") as path:
    print("data from", path)
molecule = openmm_tsf.systems.alanine_dipeptide()
print("package from", openmm_tsf.__file__)
print("atoms", molecule.n_atoms, "typed", (files("openmm_tsf") / "py.typed").is_file())
print("files", *sorted(item.name for item in home.iterdir() if item.is_file()))
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, timeout=300,
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_installed_elsewhere_loads_the_shipped_data(tmp_path):
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "openmm_tsf", "data"):
        (source / name).symlink_to(ROOT / name)  # the build writes into tmp_path
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--no-compile")
    install = (sys.executable, "-m", "pip", "install", *options, "--target", target)
    run(*install, source, cwd=tmp_path)  # builds a wheel first
    # -P and the target first: nothing is imported from the working directory or the repository.
    out = run(sys.executable, "-P", "-c", LOAD, cwd=tmp_path, PYTHONPATH=str(target))
    places = (f"package from {target}", f"data from {target}")
    for expected in (*places, "atoms 22 typed True"):
        assert expected in out
    (listed,) = (line.split()[1:] for line in out.splitlines() if line.startswith("files "))
    assert {name for name in listed if Path(name).suffix in DATA_SUFFIXES} == DATA_FILES
    assert "README.md" in listed
    metadata = next(target.glob("openmm_tsf-*.dist-info"))
    assert any(metadata.rglob("LICENSE"))


def test_every_requirement_has_a_tested_version():
    def normalized(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line), line
            name, version = line.split("==")
            pins[normalized(name)] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    needed = {normalized(re.match(r"[A-Za-z0-9_.-]+", text).group()) for text in requirements}
    assert needed <= set(pins)


def test_every_data_file_and_array_is_described():
    text = (ROOT / "data" / "README.md").read_text()
    files = {path.name for path in (ROOT / "data").iterdir() if path.suffix in DATA_SUFFIXES}
    assert files == DATA_FILES
    with np.load(ROOT / "data" / "ala2_reference.npz") as data:
        names = files | set(data.files)
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_public_names():
    import openmm_tsf

    for name in openmm_tsf.__all__:
        assert getattr(openmm_tsf, name) is not None
    assert set(openmm_tsf.__all__) <= set(dir(openmm_tsf))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        openmm_tsf.nonsense  # noqa: B018


def test_readme_commands_are_complete():
    readme = (ROOT / "README.md").read_text()
    lasts = {"main-command": "openmm-tsf run --output run/", "test-command": "pytest"}
    for marker, last in lasts.items():
        block = re.search(rf"<!-- {marker} -->\s*```sh\n(.*?)\n```", readme, re.DOTALL)
        assert block, f"no shell block after {marker}"
        command = block.group(1)
        assert "\n" not in command  # one command
        assert "python3 -m venv .venv" in command
        assert "-c constraints.txt" in command
        assert command.endswith(last)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
