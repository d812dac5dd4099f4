"""Checks of what a killed stage left behind, and a comparison of directories, bit by bit."""

import csv
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch

from openmm_tsf.analysis import load_run
from openmm_tsf.io.dcd import HEADER_BYTES

#: Entries that differ from run to run: times, processes, and the number of Contexts, which is
#: measured and changes no result on the Reference platform.
_VARIABLE = ("wall_seconds", "n_eff_phi_per_second", "since", "pid", "n_contexts")
#: Figures and pages that show times, or the name of the directory.
TIMED = ("diagnostics.png", "report.html")


def quiet_stdout() -> None:
    """Silence mdtraj's reader of DCD files, which prints; Python's own output stays."""
    sys.stdout.flush()
    sys.stdout = open(os.dup(1), "w", buffering=1)  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def temporaries(directory: Path) -> list[str]:
    """Return the temporary files, relative to the directory."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*.tmp"))


def _files(directory: Path) -> dict[str, Path]:
    """Return all files but locks and temporary files, by relative name."""
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: path for name, path in files.items() if "/." not in f"/{name}"}


def content(path: Path) -> Any:
    """Return the content of a file without variable entries; raise if it is damaged."""
    if path.suffix == ".json":
        return _constant_part(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            return _constant_part({name: data[name] for name in data.files})
    if path.suffix == ".pt":
        return _constant_part(torch.load(path, weights_only=True))
    if path.suffix == ".csv":
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("not a table")
        return rows
    raw = path.read_bytes()
    ends = {".png": b"IEND\xaeB`\x82", ".xml": b"</System>\n", ".pdb": b"END\n"}
    for suffix, end in (ends | {".html": b"</html>\n"}).items():
        if path.suffix == suffix and not raw.endswith(end):
            raise ValueError("cut short")
    return raw


def _constant_part(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _constant_part(item) for key, item in value.items() if key not in _VARIABLE}
    return value


def damaged(directory: Path) -> list[str]:
    """Return the files that cannot be read; `check_trajectories` is for trajectories."""
    problems = []
    for name, path in _files(directory).items():
        if path.suffix == ".dcd":
            continue
        try:
            content(path)
        except Exception as error:
            problems.append(f"{name}: damaged: {type(error).__name__}: {error}")
    return problems


def _check_trajectory(path: Path, whole: Path, topology: Path) -> list[str]:
    """Compare the complete frames with the first ones of `whole`, and read them with mdtraj."""
    raw, expected = path.read_bytes(), whole.read_bytes()
    if len(raw) < HEADER_BYTES:
        return []  # killed while it was created
    frame = 3 * (4 * mdtraj.load_topology(str(topology)).n_atoms + 8)
    n_frames = (len(raw) - HEADER_BYTES) // frame
    end = HEADER_BYTES + n_frames * frame
    problems = []
    if raw[HEADER_BYTES:end] != expected[HEADER_BYTES:end]:
        problems.append(f"{path.name}: other frames than without a kill")
    counted = int(np.frombuffer(raw[8:12], "<i4")[0])
    if counted > n_frames:
        problems.append(f"{path.name}: its header counts {counted} frames of {n_frames}")
    if counted:
        try:
            read = mdtraj.load_dcd(str(path), top=str(topology)).n_frames
        except Exception as error:
            return [*problems, f"{path.name}: mdtraj: {type(error).__name__}: {error}"]
        if read not in (counted, n_frames):
            problems.append(f"{path.name}: mdtraj reads {read}, not {counted} or {n_frames} frames")
    return problems


def check_trajectories(directory: Path, whole: Path) -> list[str]:
    """Return the problems of all trajectories, compared with those of the uninterrupted run."""
    topology = next(whole.rglob("topology.pdb"), whole / "topology.pdb")
    return [
        problem
        for path in directory.rglob("*.dcd")
        for problem in _check_trajectory(path, whole / path.relative_to(directory), topology)
    ]


def check_run(directory: Path, whole: Path) -> tuple[str, list[str]]:
    """Compare `load_run` with the first part of the whole run; return its state and problems."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = load_run(directory)
        except (FileNotFoundError, ValueError) as error:
            if (directory / "config.json").is_file() and "not started sampling" not in str(error):
                return "refused", [f"load_run: {error}"]
            return "no run yet", []
        except Exception as error:
            return "failed", [f"load_run: {type(error).__name__}: {error}"]
        n, problems = run.n_iterations, []
        complete = load_run(whole)
        for name in ("energy", "dihedrals"):
            expected = getattr(complete.segments, name)[:n]
            if not np.array_equal(getattr(run.segments, name), expected):
                problems.append(f"load_run: {name} differs in the first {n} iterations")
        for kelvin in run.temperatures if n else ():
            try:
                frames = run.trajectory(kelvin).xyz
            except Exception as error:
                problems.append(f"trajectory({kelvin}): {type(error).__name__}: {error}")
                continue
            if len(frames) != n * run.n_walkers:
                problems.append(f"trajectory({kelvin}): {len(frames)} frames of {n} iterations")
            if not np.array_equal(frames, complete.trajectory(kelvin).xyz[: len(frames)]):
                problems.append(f"trajectory({kelvin}): other frames")
    return f"{n} iterations" if n else "no samples yet", problems


def differences(directory: Path, whole: Path, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return the differences from the directory of the uninterrupted run.

    The time decides where segments end: their arrays are concatenated, and their counts summed.
    """
    files, expected = _files(directory), _files(whole)
    names = files.keys() | expected.keys()
    segments = {name for name in names if "segments/" in name}
    problems = []
    for name in sorted(names - segments - set(ignored)):
        if name not in files or name not in expected:
            problems.append(f"{name}: {'missing' if name not in files else 'new'} after kills")
            continue
        try:
            a, b = content(files[name]), content(expected[name])
        except Exception as error:
            problems.append(f"{name}: damaged: {error}")
            continue
        if name == "checkpoint.pt":  # the time decides how many there are
            a, b = a | {"n_segments": 0}, b | {"n_segments": 0}
        problems += [f"{name}{where}" for where in _unequal(a, b)]
    if segments:
        a, b = _segments(directory), _segments(whole)
        problems += [f"segments{where}" for where in _unequal(a, b)]
    return problems + [f"{name}: left over" for name in temporaries(directory)]


def _segments(directory: Path) -> dict[str, np.ndarray]:
    parts = [content(path) for path in sorted((directory / "segments").glob("*.npz"))]
    series = ("energy", "replica", "iteration", "dihedrals", "positions")
    joined = {}
    for name in parts[0] if parts else ():
        arrays = [part[name] for part in parts]
        joined[name] = np.concatenate(arrays) if name in series else np.sum(arrays, axis=0)
    return joined


def _unequal(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: other entries: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [line for key in a for line in _unequal(a[key], b[key], f"{where}[{key}]")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [line for k, (x, y) in pairs for line in _unequal(x, y, f"{where}[{k}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        same = a.dtype == b.dtype and np.array_equal(a, b)
    else:
        same = type(a) is type(b) and (a == b or (a != a and b != b))
    return [] if same else [f"{where}: differs"]
