"""Checkpoints of a training: read, and checked to belong to it."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.serialization import check_format
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.target_points import check_tensor_like
from openmm_tsf.training.validation import Validation
from openmm_tsf.utils.validation import check_int, require_entry

#: The only format that is read.
CHECKPOINT_FORMAT = 6
_COUNTS = ("step", "n_skipped", "skipped_in_a_row", "n_evaluations")
_NETWORKS = ("network", "average", "best_weights")
_ADAM, _MUON = {"exp_avg", "exp_avg_sq", "step"}, {"momentum"}


def read_checkpoint(path: Path, settings: FitSettings, origin: str) -> dict[str, Any]:
    """Return the content of a checkpoint, checked for format, settings and origin only."""
    content = read_tensors(path, "training checkpoint")
    check_format(path, "training checkpoint", content.get("format"), CHECKPOINT_FORMAT)
    expected, recorded = settings.to_config(), content.get("settings")
    if recorded != expected:
        recorded = recorded if isinstance(recorded, dict) else {}
        names = [str(k) for k in expected | recorded if recorded.get(k) != expected.get(k)]
        raise ValueError(f"{path}: made with other settings ({', '.join(names)})")
    if content.get("origin") != origin:
        raise ValueError(f"{path}: made from other frames or with another seed")
    return content


def load_best_weights(flow: AugmentedFlow, checkpoint: str | os.PathLike[str]) -> bool:
    """Load an interrupted training's best weights into a flow; False if there is no checkpoint."""
    path = Path(checkpoint)
    if not path.is_file():
        return False
    content = read_tensors(path, "training checkpoint")
    try:
        flow.network.load_state_dict(content["best_weights"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a training checkpoint of this flow: {error}") from error
    return True


def compute_origin(flow: AugmentedFlow, datasets: Sequence[MDDataset], seed: int) -> str:
    """Return a hash of the frames, their temperatures, the seed and whether copies overlap."""
    digest = hashlib.sha256(str(seed).encode() + (b"overlap" if flow.overlap else b""))
    for dataset in datasets:
        digest.update(f"{dataset.temperature} {dataset.weight}".encode())
        digest.update(dataset.positions.numpy().tobytes())
    return digest.hexdigest()


def check_checkpoint(
    content: Mapping[str, Any],
    network: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    generator: torch.Generator,
    n_steps: int,
) -> None:
    """Refuse a checkpoint that does not fit this network, or is damaged."""
    for name in _COUNTS:
        check_int(require_entry(content, name, int), name, least=0)
    if content["step"] > n_steps:
        raise ValueError(f"step: expected at most {n_steps}, got {content['step']}")
    seconds = require_entry(content, "wall_seconds", int | float)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"wall_seconds: expected a time, got {seconds}")
    weights = network.state_dict()
    for name in _NETWORKS:
        recorded = require_entry(content, name, dict)
        if list(recorded) != list(weights):
            raise ValueError(f"{name}: expected the network's weights, got others")
        for key, like in weights.items():
            check_tensor_like(recorded[key], like, f"{name}: {key}")
    states = require_entry(content, "optimizers", dict)
    if states.keys() != optimizers.keys():
        raise ValueError(f"optimizers: expected {', '.join(optimizers)}, got others")
    n_made = content["step"] - content["n_skipped"]
    for name, optimizer in optimizers.items():
        _check_optimizer(name, require_entry(states, name, dict), optimizer, n_made)
    kind, expected = require_entry(content, "generator_device", str), generator.device.type
    if kind != expected:  # their streams of random numbers are not the same
        message = f"device: this training draws its random numbers on {kind[:40]!r}"
        raise ValueError(f"{message}, got a flow on {expected!r}")
    state = require_entry(content, "generator", Tensor)
    if state.dtype != torch.uint8 or state.shape != generator.get_state().shape:
        raise ValueError("generator: expected the state of a random number generator")
    _check_numbers(require_entry(content, "running", dict), "running")
    _check_history(require_entry(content, "history", list), content["step"])


def _check_optimizer(
    name: str, content: dict[str, Any], optimizer: torch.optim.Optimizer, n_made: int
) -> None:
    """Refuse other options or moments: the fused kernel trusts the shapes of the moments."""
    (group,) = optimizer.param_groups
    parameters = group["params"]
    groups = require_entry(content, "param_groups", list)
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError(f"{name}: expected one group of parameters, got {len(groups)}")
    if groups[0].get("params") != list(range(len(parameters))):
        raise ValueError(f"{name}: expected {len(parameters)} parameters, got others")
    moments, required = (_ADAM, {"betas", "eps"}) if name == "adam" else (_MUON, {"momentum"})
    for key, value in group.items():
        # Other versions of torch have more or fewer options.
        recorded = groups[0].get(key, None if key in required else value)
        if key not in ("params", "lr") and recorded != value:
            raise ValueError(f"{name}: expected {key}={value}, got {str(recorded)[:40]}")
    state = require_entry(content, "state", dict)
    complete = state.keys() == set(range(len(parameters)))
    if not (complete or (name == "adam" and not n_made and not state)):
        raise ValueError(f"{name}: expected moments of all parameters and no others")
    for index, entry in state.items():
        for key in moments - {"step"}:
            moment = require_entry(entry, key, Tensor)
            check_tensor_like(moment, parameters[index], f"{name}: {key}")
        if entry.keys() != moments:
            raise ValueError(f"{name}: expected {', '.join(sorted(moments))} only, got others")
        if name == "adam":
            step = require_entry(entry, "step", Tensor)
            if step.shape != () or step.dtype != torch.float32 or not 0 <= float(step) < math.inf:
                raise ValueError("adam: expected a count of steps")
            if bool((entry["exp_avg_sq"] < 0).any()):
                raise ValueError("adam: expected squares, got negative numbers")


def _check_history(history: list[Any], step: int) -> None:
    names = {field.name for field in fields(Validation)}
    columns: list[str] | None = None
    previous = -1
    for row in history:
        if not isinstance(row, dict) or row.keys() != names:
            raise ValueError(f"history: expected validations with {', '.join(sorted(names))}")
        number = check_int(row["step"], "history: step", least=0, most=step)
        if number <= previous:
            raise ValueError(f"history: expected ascending steps, got {number} after {previous}")
        previous = number
        for name in names - {"step"}:
            value = row[name]
            _check_numbers(value if isinstance(value, dict) else {name: value}, "history")
        row_columns = list(Validation(**row).row())
        if columns is not None and row_columns != columns:
            raise ValueError("history: expected the same columns in every validation")
        columns = row_columns


def _check_numbers(numbers: dict[Any, Any], name: str) -> None:
    for key, value in numbers.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(key, str) or not key.isprintable() or not is_number:
            raise ValueError(f"{name}: expected named numbers, got {str(key)[:40]!r}")
