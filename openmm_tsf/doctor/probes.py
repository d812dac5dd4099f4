"""Facts about a machine and a directory; what cannot be determined is reported as a failure."""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import openmm
import torch

from openmm_tsf.doctor.self_test import summarize_error
from openmm_tsf.io.directory import read_stage
from openmm_tsf.io.files import read_json
from openmm_tsf.io.run_config import read_run_config
from openmm_tsf.io.shards import DAMAGED, FINISHED, MISSING, read_shards, target_iterations
from openmm_tsf.potentials.platforms import available_cores
from openmm_tsf.utils.devices import available_devices

#: A section: names with a value, or with a list of lines.
Lines = dict[str, Any]

_PACKAGES = (
    "openmm-tsf", "openmm", "torch", "numpy", "mdtraj", "pymbar", "openmmtools", "scipy",
    "matplotlib",
)  # fmt: skip
#: The environment variables that are reported, beside those of OpenBLAS.
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS", "CUDA_VISIBLE_DEVICES",
    "OPENMM_PLUGIN_DIR",
)  # fmt: skip
_DATA = ("ala2.pdb", "ala2_600K.dcd", "ala2_reference.npz")
_MAX_FILES = 40


def run_probe(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a function, or its error as text, with the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # from one library to another
        try:
            result = function(*arguments)
        except Exception as error:
            result = f"failed: {summarize_error(error)}"
    if not caught:
        return result
    messages = dict.fromkeys(" ".join(str(item.message).split()) for item in caught)
    lines = result if isinstance(result, list) else [result]
    return [*lines, *(f"warning: {message}" for message in messages)]


def installed_versions() -> Lines:
    """Return the versions of Python and of packages that may be missing."""
    lines = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for name in _PACKAGES:
        try:
            lines[name] = version(name)
        except PackageNotFoundError:
            lines[name] = "not installed"
    return lines


def machine() -> Lines:
    """Describe the operating system, processor, memory and temporary files."""
    return {
        "system": run_probe(platform.platform),
        "architecture": run_probe(platform.machine),
        "processor": run_probe(_processor),
        "cores": run_probe(lambda: f"{available_cores()} for this process, of {os.cpu_count()}"),
        "memory": run_probe(_memory),
        "temporary files": run_probe(_temporary),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*:(.*)$", text, re.MULTILINE):
            return match[1].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return platform.processor() or "unknown"


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return "unknown"
    kib = dict(re.findall(r"(\w+): *(\d+)", info.read_text()))
    total, available = (int(kib[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return f"{_size(total)}, {_size(available)} available"


def _temporary() -> str:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile() as file:
        file.write(b"written")
    return f"{folder}, writable, {_size(shutil.disk_usage(folder).free)} free"


def openmm_platforms() -> tuple[Lines, list[str]]:
    """Describe OpenMM's platforms and plugins, and return the names of the platforms that run."""
    lines: Lines = {}
    running = []
    for index in range(openmm.Platform.getNumPlatforms()):
        candidate = openmm.Platform.getPlatform(index)
        name, speed = candidate.getName(), f"speed {candidate.getSpeed():g}"
        try:
            lines[name] = f"{speed}, runs{_properties(candidate)}"
            running.append(name)
        except Exception as error:
            lines[name] = f"{speed}, does not run: {summarize_error(error)}"
    lines["plugins"] = run_probe(
        lambda: [", ".join(sorted(Path(name).name for name in openmm.pluginLoadedLibNames))]
    )
    lines["plugins that failed"] = run_probe(
        lambda: [" ".join(line.split()) for line in openmm.Platform.getPluginLoadFailures()]
    )
    return lines, running


def _properties(candidate: openmm.Platform) -> str:
    """Return the properties of a Context on this platform."""
    system = openmm.System()
    system.addParticle(1.0)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), candidate)
    known = candidate.getPropertyNames()
    names = [name for name in ("DeviceName", "Precision", "Threads") if name in known]
    return "".join(f", {name} {candidate.getPropertyValue(context, name)}" for name in names)


def torch_devices() -> Lines:
    """Describe CUDA, torch's threads, and its C++ compiler."""
    return {
        "CUDA": run_probe(_cuda),
        "devices": run_probe(lambda: ", ".join(available_devices())),
        "threads": run_probe(torch.get_num_threads),
        "C++ compiler": run_probe(_compiler),
        "compile cache": run_probe(_compile_cache),
    }


def _cuda() -> list[str] | str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "not available, " + (f"torch is built for CUDA {built}" if built else "CPU build")
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        f"{i}: {d.name}, {_size(d.total_memory)}, {_float64_speed(d.major, d.minor)}"
        for i, d in enumerate(devices)
    ]


def _float64_speed(major: int, minor: int) -> str:
    """Say how fast double precision is on a compute capability (CUDA C++ Programming Guide)."""
    fast = minor == 0 and major in (6, 7, 8, 9, 10)
    return f"float64 at {'1/2' if fast else '1/32 or less'} of the speed of float32"


def _compiler() -> str:
    # Private, but the only way to learn which compiler torch uses: CXX, or the result of a search.
    from torch._inductor.cpp_builder import get_cpp_compiler

    name = get_cpp_compiler()
    path = shutil.which(name)
    if path is None:
        return f"none: torch takes {name}, which is missing; TorchPotential runs uncompiled"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    lines = (output.stdout or output.stderr).strip().splitlines()
    return f"{path}, {lines[0] if lines else 'unknown version'}"


def _compile_cache() -> str:
    folder = shown = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if folder is None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        folder = default_cache_dir()  # ends in the user's name, which is private
        shown = str(Path(folder).with_name("torchinductor_USER"))
    if not Path(folder).is_dir():
        return f"{shown}, does not exist yet"
    return f"{shown}, {'' if os.access(folder, os.W_OK) else 'not '}writable"


def environment() -> Lines:
    """Return the variables that are set and choose threads, devices and plugins."""
    names = sorted({*VARIABLES, *(name for name in os.environ if name.startswith("OPENBLAS_"))})
    return {name: os.environ[name] for name in names if name in os.environ}


def shipped_data() -> Lines:
    """Return the data files of the package with their sizes."""
    return {name: run_probe(_data_file, name) for name in _DATA}


def _data_file(name: str) -> str:
    file = files("openmm_tsf.data") / name
    return _size(len(file.read_bytes())) if file.is_file() else "missing"


def describe_directory(folder: Path) -> Lines:
    """Describe the output directory of a stage from its JSON files and file names."""
    damaged: list[str] = []
    contents: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "summary.json"):
        try:
            if (folder / name).is_file():
                contents[name] = read_json(folder / name)
        except (ValueError, OSError, RecursionError) as error:
            damaged.append(f"{folder / name}: {summarize_error(error)}")
    config = contents.get("config.json", {})
    lines: Lines = {
        "path": str(folder),
        "stage": run_probe(_stage, folder, config),
        "progress": run_probe(_progress, folder, contents),
        "choices": run_probe(_choices, config),
        "other versions": run_probe(_other_versions, contents),
        "files": run_probe(_files, folder),
    }
    if isinstance(config.get("n_shards"), int):
        lines["shards"] = run_probe(_shards, folder)
    if damaged:
        lines["damaged"] = damaged
    return lines


def _stage(folder: Path, config: dict[str, Any]) -> str:
    return read_stage(folder) or ("sample" if "temperatures_K" in config else "unknown")


def _progress(folder: Path, contents: dict[str, dict[str, Any]]) -> list[str]:
    """Return the numbers of JSON files as they were written; they are not checked."""
    config, summary = contents.get("config.json", {}), contents.get("summary.json", {})
    lines = []
    if isinstance(config.get("progress"), dict):  # MD
        lines += [_line(name, value) for name, value in config["progress"].items()]
        choices = config.get("choices")
        settings = choices.get("settings") if isinstance(choices, dict) else None
        if isinstance(settings, dict):
            lines.append(_line("n_frames requested", settings.get("n_frames")))
    names = ("device", "energy_evaluations", "wall_seconds", "temperatures_K", "n_walkers")
    lines += [_line(name, config[name]) for name in names if name in config]
    if (folder / "segments").is_dir():
        lines.append(f"segments: {sum(1 for _ in (folder / 'segments').glob('*.npz'))}")
    if "n_iterations" in summary:
        lines.append(_line("n_iterations of summary.json", summary["n_iterations"]))
    return lines


def _shards(folder: Path) -> list[str]:
    """Return how many shards are in which state, then those that are not finished first."""
    config = read_run_config(folder)
    shards, target = read_shards(folder, config), target_iterations(config)
    states = Counter(shard.state for shard in shards)
    lines = [", ".join(f"{n} {state}" for state, n in states.items()) + f", of {len(shards)}"]
    shown = sorted(shards, key=lambda shard: shard.state == FINISHED)[:_MAX_FILES]
    for shard in sorted(shown, key=lambda shard: shard.number):
        why = shard.problem if shard.state == DAMAGED else ""
        if shard.state not in (FINISHED, DAMAGED, MISSING) and shard.owner:
            why = shard.owner.strip()
        done = f"{shard.n_iterations:,} of {target:,} iterations"
        lines.append(f"{shard.name}: {done}, {shard.state}{f' ({why})' if why else ''}")
    if len(shown) < len(shards):
        lines.append(f"and {len(shards) - len(shown)} more")
    return lines


def _line(name: str, value: Any) -> str:
    return f"{name}: {json.dumps(value)}"[:300]


def _choices(config: dict[str, Any]) -> list[str]:
    choices = config.get("choices")
    if not isinstance(choices, dict):
        return []
    names = ["platform", "device", "potential"]
    if "numbers_interval" in choices:  # frames are saved less often than numbers
        names += ["save_interval", "numbers_interval"]
    return [_line(name, choices[name]) for name in names if name in choices]


def _other_versions(contents: dict[str, dict[str, Any]]) -> list[str]:
    installed = installed_versions() | {"python": platform.python_version()}
    lines = []
    for file, content in contents.items():
        recorded = content.get("versions")
        for name, before in recorded.items() if isinstance(recorded, dict) else ():
            if installed.get(name) != before:
                now = installed.get(name, "unknown")
                lines.append(f"{_line(f'{file}: {name}', before)}, now {now}")
    return lines


def _files(folder: Path) -> list[str]:
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    lines = [
        f"{entry.name}{'/' if entry.is_dir() else ''}: {run_probe(_entry, entry)}"
        for entry in entries[:_MAX_FILES]
    ]
    if len(entries) > _MAX_FILES:
        lines.append(f"and {len(entries) - _MAX_FILES} more")
    return lines


def _entry(entry: Path) -> str:
    if not entry.is_dir():
        return _size(entry.stat().st_size)
    # One level only: the directory may be a user's home.
    sizes = [path.stat().st_size for path in entry.iterdir() if path.is_file()]
    return f"{len(sizes)} files, {_size(sum(sizes))}"


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
