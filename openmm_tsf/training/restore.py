"""What a training checkpoint has to hold before anything is taken from it."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.training.validation import Validation
from openmm_tsf.utils.validation import entry, whole_number

_COUNTS = ("step", "n_skipped", "skipped_in_a_row", "n_evaluations")
_NETWORKS = ("network", "average", "best_weights")
_ADAM, _MUON = {"exp_avg", "exp_avg_sq", "step"}, {"momentum"}


def check_checkpoint(
    content: Mapping[str, Any],
    network: torch.nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
    n_steps: int,
) -> None:
    """Refuse a checkpoint that is not of this network, or was changed.

    Raises
    ------
    ValueError
        If weights, moments of the optimizer or figures are missing or cannot be.
    """
    for name in _COUNTS:
        whole_number(entry(content, name, int), name, least=0)
    if content["step"] > n_steps:
        raise ValueError(f"step: expected at most {n_steps}, got {content['step']}")
    seconds = entry(content, "wall_seconds", int | float)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"wall_seconds: expected a time, got {seconds}")
    weights = network.state_dict()
    for name in _NETWORKS:
        found = entry(content, name, dict)
        if list(found) != list(weights):
            raise ValueError(f"{name}: expected the network's weights, got others")
        for key, like in weights.items():
            _check_like(f"{name}: {key}", found[key], like)
    states = entry(content, "optimizers", dict)
    if states.keys() != optimizers.keys():
        raise ValueError(f"optimizers: expected {', '.join(optimizers)}, got others")
    n_made = content["step"] - content["n_skipped"]
    for name, optimizer in optimizers.items():
        _check_optimizer(name, entry(states, name, dict), optimizer, n_made)
    generator = entry(content, "generator", Tensor)
    if generator.dtype != torch.uint8 or generator.shape != torch.Generator().get_state().shape:
        raise ValueError("generator: expected the state of a random number generator")
    _check_figures(entry(content, "running", dict), "running")
    _check_history(entry(content, "history", list), content["step"])


def _check_like(name: str, value: Any, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name}: expected {like.dtype} of shape {tuple(like.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def _check_optimizer(
    name: str, content: dict[str, Any], optimizer: torch.optim.Optimizer, n_made: int
) -> None:
    """Moments have the shapes of their parameters: one kernel runs over all of them."""
    (own,) = optimizer.param_groups
    parameters = own["params"]
    state, groups = entry(content, "state", dict), entry(content, "param_groups", list)
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError(f"{name}: expected one group of parameters, got {len(groups)}")
    if groups[0].get("params") != list(range(len(parameters))):
        raise ValueError(f"{name}: expected {len(parameters)} parameters, got others")
    moments, needed = (_ADAM, {"betas", "eps"}) if name == "adam" else (_MUON, {"momentum"})
    for key, value in own.items():
        # Other versions of torch have more or fewer options.
        found = groups[0].get(key, None if key in needed else value)
        if key not in ("params", "lr") and found != value:
            raise ValueError(f"{name}: expected {key}={value}, got {str(found)[:40]}")
    every = set(range(len(parameters)))
    if not (state.keys() == every or (name == "adam" and not n_made and not state)):
        raise ValueError(f"{name}: expected moments of all parameters and no others")
    for index, of_one in state.items():
        for key in moments - {"step"}:
            _check_like(f"{name}: {key}", entry(of_one, key, Tensor), parameters[index])
        if of_one.keys() != moments:
            raise ValueError(f"{name}: expected {', '.join(sorted(moments))} only, got others")
        if name == "adam":
            step = entry(of_one, "step", Tensor)
            if step.shape != () or step.dtype != torch.float32 or not 0 <= float(step) < math.inf:
                raise ValueError("adam: expected a count of steps")
            if bool((of_one["exp_avg_sq"] < 0).any()):
                raise ValueError("adam: expected squares, got negative numbers")


def _check_history(history: list[Any], step: int) -> None:
    names = {field.name for field in fields(Validation)}
    keys: list[str] | None = None
    before = -1
    for row in history:
        if not isinstance(row, dict) or row.keys() != names:
            raise ValueError(f"history: expected validations with {', '.join(sorted(names))}")
        at = whole_number(row["step"], "history: step", least=0, most=step)
        if at <= before:
            raise ValueError(f"history: expected ascending steps, got {at} after {before}")
        before = at
        for name in names - {"step"}:
            value = row[name]
            _check_figures(value if isinstance(value, dict) else {name: value}, "history")
        found = list(Validation(**row).row())
        if keys is not None and found != keys:
            raise ValueError("history: expected the same figures in every validation")
        keys = found


def _check_figures(figures: dict[Any, Any], name: str) -> None:
    for key, value in figures.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(key, str) or not key.isprintable() or not is_number:
            raise ValueError(f"{name}: expected named numbers, got {str(key)[:40]!r}")
