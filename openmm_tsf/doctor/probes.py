"""What a bug report needs to know about a machine and a directory. No probe raises."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import openmm
import torch

from openmm_tsf.doctor.self_test import brief
from openmm_tsf.io.directory import read_stage
from openmm_tsf.io.files import read_json
from openmm_tsf.potentials.platforms import available_cores

#: Lines of a section: name to a value, or to a list of lines.
Lines = dict[str, Any]

_PACKAGES = (
    "openmm-tsf", "openmm", "torch", "numpy", "mdtraj", "pymbar", "openmmtools", "scipy",
    "matplotlib",
)  # fmt: skip
_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS", "CUDA_VISIBLE_DEVICES",
    "OPENMM_PLUGIN_DIR",
)  # fmt: skip
_DATA = ("ala2.pdb", "ala2_600K.dcd", "ala2_reference.npz")
_MOST_FILES = 40


def probed(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the probe says, or how it failed, with the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # of libraries among themselves
        try:
            found = function(*arguments)
        except Exception as error:
            found = f"failed: {brief(error)}"
    if not caught:
        return found
    said = list(dict.fromkeys(" ".join(str(item.message).split()) for item in caught))
    return [*(found if isinstance(found, list) else [found]), *(f"warning: {w}" for w in said)]


def versions() -> Lines:
    """Python and the packages."""
    found = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> Lines:
    """Operating system, processor, memory, temporary files."""
    return {
        "system": probed(platform.platform),
        "architecture": probed(platform.machine),
        "processor": probed(_processor),
        "cores": probed(lambda: f"{available_cores()} for this process, of {os.cpu_count()}"),
        "memory": probed(_memory),
        "temporary files": probed(_temporary),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return platform.processor() or "unknown"


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.is_file():
        return "unknown"
    kib = {}
    for line in info.read_text().splitlines():
        name, _, rest = line.partition(":")
        kib[name] = rest.split()[0] if rest.split() else "0"
    total, available = (int(kib[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return f"{_size(total)}, {_size(available)} available"


def _temporary() -> str:
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile() as file:
        file.write(b"written")
    return f"{folder}, writable, {_size(shutil.disk_usage(folder).free)} free"


def openmm_platforms() -> tuple[Lines, list[str]]:
    """What OpenMM has loaded and what not, and the names of the platforms that run."""
    lines: Lines = {}
    running = []
    for index in range(openmm.Platform.getNumPlatforms()):
        found = openmm.Platform.getPlatform(index)
        name = found.getName()
        try:
            lines[name] = f"speed {found.getSpeed():g}, runs{_properties(found)}"
            running.append(name)
        except Exception as error:
            lines[name] = f"speed {found.getSpeed():g}, does not run: {brief(error)}"
    lines["plugins"] = probed(
        lambda: [", ".join(sorted(Path(name).name for name in openmm.pluginLoadedLibNames))]
    )
    lines["plugins that failed"] = probed(
        lambda: [" ".join(line.split()) for line in openmm.Platform.getPluginLoadFailures()]
    )
    return lines, running


def _properties(found: openmm.Platform) -> str:
    """What a Context on this platform says of itself."""
    system = openmm.System()
    system.addParticle(1.0)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), found)
    known = found.getPropertyNames()
    shown = [name for name in ("DeviceName", "Precision", "Threads") if name in known]
    return "".join(f", {name} {found.getPropertyValue(context, name)}" for name in shown)


def torch_devices() -> Lines:
    """CUDA, threads, and whether torch can compile."""
    return {
        "CUDA": probed(_cuda),
        "threads": probed(torch.get_num_threads),
        "C++ compiler": probed(_compiler),
        "compile cache": probed(_compile_cache),
    }


def _cuda() -> list[str] | str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "not available, " + (f"torch is built for CUDA {built}" if built else "CPU build")
    return [
        f"{index}: {found.name}, {_size(found.total_memory)}"
        for index in range(torch.cuda.device_count())
        for found in [torch.cuda.get_device_properties(index)]
    ]


def _compiler() -> str:
    # Private, but the only word on which compiler torch takes: CXX, or its own search.
    from torch._inductor.cpp_builder import get_cpp_compiler

    name = get_cpp_compiler()
    path = shutil.which(name)
    if path is None:
        return f"none: torch takes {name}, which is not there; TorchPotential runs uncompiled"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    first = (said.stdout or said.stderr).strip().splitlines()[:1]
    return f"{path}, {first[0] if first else 'says no version'}"


def _compile_cache() -> str:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    shown = given
    if given is None:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        given = default_cache_dir()  # ends in the user's name, which is nobody's business
        shown = str(Path(given).with_name("torchinductor_USER"))
    if not Path(given).is_dir():
        return f"{shown}, not there yet"
    return f"{shown}, {'' if os.access(given, os.W_OK) else 'not '}writable"


def environment() -> Lines:
    """Variables that change how many threads, which devices and plugins; only those set."""
    names = sorted({*_VARIABLES, *(name for name in os.environ if name.startswith("OPENBLAS_"))})
    return {name: os.environ[name] for name in names if name in os.environ}


def shipped_data() -> Lines:
    """The data files of the package."""
    return {name: probed(_data_file, name) for name in _DATA}


def _data_file(name: str) -> str:
    found = files("openmm_tsf.data") / name
    if not found.is_file():
        return "missing"
    return _size(len(found.read_bytes()))


def directory(folder: Path) -> Lines:
    """What lies in a directory that a stage wrote, from its JSON files and names."""
    damaged: list[str] = []
    found: dict[str, dict[str, Any]] = {}
    for name in ("config.json", "summary.json"):
        if not (folder / name).is_file():
            continue
        try:
            found[name] = read_json(folder / name)
        except (ValueError, OSError, RecursionError) as error:
            damaged.append(f"{folder / name}: {brief(error)}")
    config = found.get("config.json", {})
    lines: Lines = {
        "path": str(folder),
        "stage": probed(_stage, folder, config),
        "progress": probed(_progress, folder, found),
        "choices": probed(_choices, config),
        "other versions": probed(_other_versions, found),
        "files": probed(_files, folder),
    }
    if damaged:
        lines["damaged"] = damaged
    return lines


def _stage(folder: Path, config: dict[str, Any]) -> str:
    stage = read_stage(folder)
    if stage is not None:
        return stage
    if "temperatures_K" in config:
        return "sample"
    return "unknown"


def _progress(folder: Path, found: dict[str, dict[str, Any]]) -> list[str]:
    """Figures as they were written, whatever they are."""
    config, summary = found.get("config.json", {}), found.get("summary.json", {})
    lines = []
    if isinstance(config.get("progress"), dict):  # MD
        lines += [_line(name, value) for name, value in config["progress"].items()]
        choices = config.get("choices")
        settings = choices.get("settings") if isinstance(choices, dict) else None
        if isinstance(settings, dict):
            lines.append(_line("n_frames asked for", settings.get("n_frames")))
    for name in ("energy_evaluations", "wall_seconds", "temperatures_K", "n_walkers"):
        if name in config:
            lines.append(_line(name, config[name]))
    if (folder / "segments").is_dir():
        lines.append(f"segments: {sum(1 for _ in (folder / 'segments').glob('*.npz'))}")
    if "n_iterations" in summary:
        lines.append(_line("n_iterations of summary.json", summary["n_iterations"]))
    return lines


def _line(name: str, value: Any) -> str:
    return f"{name}: {json.dumps(value)}"[:300]


def _choices(config: dict[str, Any]) -> list[str]:
    choices = config.get("choices")
    names = ("platform", "potential") if isinstance(choices, dict) else ()
    return [_line(name, choices[name]) for name in names if choices and name in choices]


def _other_versions(found: dict[str, dict[str, Any]]) -> list[str]:
    now = versions() | {"python": platform.python_version()}
    lines = []
    for file, content in found.items():
        written = content.get("versions")
        for name, then in written.items() if isinstance(written, dict) else ():
            if now.get(name) != then:
                there = now.get(name, "not looked for")
                lines.append(f"{_line(f'{file}: {name}', then)}, now {there}")
    return lines


def _files(folder: Path) -> list[str]:
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name)
    lines = []
    for entry in entries[:_MOST_FILES]:
        if entry.is_dir():
            lines.append(f"{entry.name}/: {probed(_folder, entry)}")
        else:
            lines.append(f"{entry.name}: {probed(lambda path=entry: _size(path.stat().st_size))}")
    if len(entries) > _MOST_FILES:
        lines.append(f"and {len(entries) - _MOST_FILES} more")
    return lines


def _folder(folder: Path) -> str:
    # One level: the directory may be somebody's home.
    sizes = [path.stat().st_size for path in folder.iterdir() if path.is_file()]
    return f"{len(sizes)} files, {_size(sum(sizes))}"


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"
