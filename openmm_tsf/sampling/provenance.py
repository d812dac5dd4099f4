"""What determines the numbers of a run: recorded when it starts, compared when it continues."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.io.run_config import CONFIG, read_run_config
from openmm_tsf.potentials.base import Potential, describe_potential
from openmm_tsf.sampling.consistency import with_members
from openmm_tsf.sampling.kernels.base import SteerableMap
from openmm_tsf.sampling.kernels.schedule import Scheduled
from openmm_tsf.sampling.recorder import SaveIntervals
from openmm_tsf.sampling.tuning import HasStepSize
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import SECOND, in_unit
from openmm_tsf.utils.validation import check_int, check_seconds

#: Choices that decide which chain is sampled: a run directory holds samples of one.
_OF_THE_CHAIN = ("molecule", "flow", "kernels", "kernel_flows")
_REQUIRED = {*_OF_THE_CHAIN, "potential", "save_interval", "torch_threads"}


def read_sampler_config(directory: Path) -> dict[str, Any]:
    """Return ``config.json`` of a run directory with everything that a sampler recorded."""
    config = read_run_config(directory)
    missing = sorted(_REQUIRED - config.get("choices", {}).keys())
    if missing:
        names = ", ".join(missing)
        raise ValueError(f"{directory / CONFIG}: damaged, choices are missing: {names}")
    return config


def sampling_choices(
    molecule: MolecularSystem | None,
    flow: SteerableMap,
    potential: Potential,
    schedule: Sequence[Scheduled],
    intervals: SaveIntervals,
) -> dict[str, Any]:
    """Return every choice of a sampler, measured ones included, json-able."""
    kernels = [
        {
            "name": entry.kernel.name,
            "exact": entry.kernel.exact,
            "interval": entry.interval,
            "repeats": entry.repeats,
            **entry.kernel.settings(),
        }
        for entry in schedule
    ]
    members = dict(with_members(entry.kernel for entry in schedule))
    tunable = {name: k for name, k in members.items() if isinstance(k, HasStepSize)}
    flows: dict[str, Any] = {name: getattr(k, "flow", None) for name, k in members.items()}
    flows = {name: value for name, value in flows.items() if value is not None}
    distinct = {id(value): value for value in (flow, *flows.values())}
    hashes = {key: hash_of(value) for key, value in distinct.items()}
    return {
        **({"molecule": None} if molecule is None else molecule.identity),
        "kernels": kernels,
        "sigma": {name: kernel.sigma.tolist() for name, kernel in tunable.items()},
        "flow": {
            "class": type(flow).__name__,
            "dtype": str(flow.dtype),
            "reference_temperature_K": flow.reference_temperature,
            "sha256": hashes[id(flow)],
        },
        "kernel_flows": {name: hashes[id(value)] for name, value in flows.items()},
        "potential": describe_potential(potential),
        "save_interval": intervals.frames,
        **({} if intervals.are_equal else {"numbers_interval": intervals.numbers}),
        "torch_threads": torch.get_num_threads(),
    }


def check_same(where: Any, recorded: Mapping[str, Any], sampler: Mapping[str, Any]) -> None:
    """Compare a run's ``config.json`` with the sampler that is to continue it.

    Another platform or number of threads is only warned of: the samples are then valid, but not
    the same bit by bit.
    """
    for name in ("temperatures_K", "n_walkers"):
        if sampler[name] != recorded[name]:
            before, now = recorded[name], sampler[name]
            raise ValueError(f"{where}: expected the run's {name}, {before}, got {now}")
    before, now = recorded["choices"], sampler["choices"]
    for name in _OF_THE_CHAIN:
        if now[name] != before[name]:
            raise ValueError(
                f"{where}: expected the {name} that the run was started with, {before[name]}, "
                f"got {now[name]}"
            )
    for name in ("potential", "torch_threads"):
        if now[name] != before[name]:
            warnings.warn(
                f"{where}: written with {name} {before[name]}, resumed with {now[name]}; "
                "the continuation is valid but not the same bit by bit",
                stacklevel=3,
            )


def check_unchanged(where: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare a sampler's choices with those that it had when it opened the run directory."""
    for name in (*_OF_THE_CHAIN, "sigma"):
        if now[name] != before[name]:
            raise ValueError(
                f"output: the {name} changed since {where} was opened (by training, tuning or new "
                f"settings), from {before[name]} to {now[name]}; a run directory holds samples of "
                "one frozen sampler, write to a new one"
            )


def check_run_arguments(
    n_iterations: Any, checkpoint_interval: Any, checkpoint_seconds: Any, reporters: Sequence[Any]
) -> tuple[int, int | None, float]:
    """Return the numbers, all but the last, and refuse reporters without an interval."""
    checked = check_int(n_iterations, "n_iterations", least=0)
    if checkpoint_interval is not None:
        checkpoint_interval = check_int(checkpoint_interval, "checkpoint_interval")
    seconds = check_seconds(in_unit(checkpoint_seconds, SECOND, "checkpoint_seconds"))
    for reporter in reporters:
        if getattr(reporter, "interval", 0) < 1:
            raise TypeError(f"reporters: expected an interval of at least 1, on {reporter!r}")
    return checked, checkpoint_interval, seconds


def check_intervals(save_interval: Any, numbers_interval: Any) -> SaveIntervals:
    """Return the intervals of frames and of numbers, which must divide the former."""
    frames = check_int(save_interval, "save_interval")
    if numbers_interval is None:
        return SaveIntervals(frames, frames)
    numbers = check_int(numbers_interval, "numbers_interval")
    if frames % numbers:
        raise ValueError(
            f"numbers_interval: expected a divisor of save_interval, {frames}, so that each frame "
            f"has its numbers, got {numbers}"
        )
    return SaveIntervals(frames, numbers)


def recorded_intervals(choices: Mapping[str, Any]) -> SaveIntervals:
    """Return the intervals among the choices of a run."""
    return check_intervals(choices["save_interval"], choices.get("numbers_interval"))


def check_same_intervals(recorded: Mapping[str, Any], now: SaveIntervals) -> None:
    """Refuse intervals other than those that a run was started with."""
    before = recorded_intervals(recorded)
    for name, expected, got in zip(("save_interval", "numbers_interval"), before, now, strict=True):
        if expected != got:
            raise ValueError(f"{name}: this run was started with {expected}, got {got}")


def hash_of(flow: SteerableMap) -> str | None:
    """Return the SHA-256 of the flow's parameters and buffers; None if it is not a module."""
    if not isinstance(flow, torch.nn.Module):
        return None
    digest = hashlib.sha256(b"overlap" if getattr(flow, "overlap", False) else b"")
    for name, value in flow.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
