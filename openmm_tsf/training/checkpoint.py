"""Checkpoints of a training: read, of which training they are, and what earlier versions wrote."""

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.validation import Validation
from openmm_tsf.utils.validation import check_int, require_entry

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 4


def read_checkpoint(path: Path, settings: FitSettings, origin: str) -> dict[str, Any]:
    """The content of a checkpoint, whose numbers are not looked at yet.

    Parameters
    ----------
    path
        The file.
    settings, origin
        Of the training that is to go on; see :func:`origin_of`.

    Raises
    ------
    ValueError
        If it is of another training, or no checkpoint.
    """
    content = _as_now(read_tensors(path, "training checkpoint"))
    number = content.get("format")
    if not isinstance(number, int) or number != CHECKPOINT_FORMAT:
        raise ValueError(f"{path}: not a training checkpoint of format {CHECKPOINT_FORMAT}")
    found = content.get("settings")
    asked = settings.to_config()
    if found != asked:
        found = found if isinstance(found, dict) else {}
        changed = [str(key) for key in asked | found if found.get(key) != asked.get(key)]
        raise ValueError(f"{path}: made with other settings ({', '.join(changed)})")
    if content.get("origin") != origin:
        raise ValueError(f"{path}: made from other frames or with another seed")
    return content


def load_best_weights(flow: AugmentedFlow, checkpoint: str | os.PathLike[str]) -> bool:
    """Give a flow the best weights of a training that was stopped, if it came so far.

    Returns
    -------
    found
        Whether there is a checkpoint; the flow is left alone otherwise.

    Raises
    ------
    ValueError
        If it is damaged, or of another flow.
    """
    path = Path(checkpoint)
    if not path.is_file():
        return False
    content = read_tensors(path, "training checkpoint")
    try:
        flow.network.load_state_dict(content["best_weights"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: not a training checkpoint of this flow: {error}") from error
    return True


def _as_now(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an earlier format in the present one; whatever else it is, as it is."""
    number = content.get("format")
    if not isinstance(number, int) or number not in (1, 2, 3):
        return content
    if not isinstance(content.get("settings"), dict):
        return content
    # Of before path gradients (1) or before Muon (2): what has come since is at its default.
    content = {"objective": {}, "optimizers": {"adam": content.get("optimizer")}} | content
    settings = FitSettings().to_config() | {"optimizer": "adam"} | content["settings"]
    objective = content["objective"]
    if isinstance(objective, dict) and "basin_shares" in objective:
        # Shares of data in groups, not of draws at temperatures (3); no Bennett's ratio yet (2).
        ladder = settings["temperatures"]
        n_rungs = len(ladder) if isinstance(ladder, list) else 1
        if number == 2:
            none = torch.zeros(n_rungs, 2, dtype=torch.float64)
            objective = {"population_ratios": none, "basins_met": none} | objective
        shares = torch.full((n_rungs,), 0.5, dtype=torch.float64)
        objective = objective | {"basin_shares": shares, "relaxed": True}
        content = content | {"objective": objective}
    if settings["estimator"] == "path" and settings["basin_balance"]:
        logger.warning(
            "training: a checkpoint of format %d, when basin_balance=%g was a weight at data and "
            "not at draws; it goes on as a weight at draws",
            number,
            settings["basin_balance"],
        )
    return content | {"format": CHECKPOINT_FORMAT, "settings": settings}


def origin_of(flow: AugmentedFlow, datasets: Sequence[MDDataset], seed: int) -> str:
    """Hash of the frames, their temperatures and the seed, and of what the points are of."""
    digest = hashlib.sha256(str(seed).encode() + (b"overlap" if flow.overlap else b""))
    for dataset in datasets:
        digest.update(f"{dataset.temperature} {dataset.weight}".encode())
        digest.update(dataset.positions.numpy().tobytes())
    return digest.hexdigest()


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
        check_int(require_entry(content, name, int), name, least=0)
    if content["step"] > n_steps:
        raise ValueError(f"step: expected at most {n_steps}, got {content['step']}")
    seconds = require_entry(content, "wall_seconds", int | float)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"wall_seconds: expected a time, got {seconds}")
    weights = network.state_dict()
    for name in _NETWORKS:
        found = require_entry(content, name, dict)
        if list(found) != list(weights):
            raise ValueError(f"{name}: expected the network's weights, got others")
        for key, like in weights.items():
            _check_like(f"{name}: {key}", found[key], like)
    states = require_entry(content, "optimizers", dict)
    if states.keys() != optimizers.keys():
        raise ValueError(f"optimizers: expected {', '.join(optimizers)}, got others")
    n_made = content["step"] - content["n_skipped"]
    for name, optimizer in optimizers.items():
        _check_optimizer(name, require_entry(states, name, dict), optimizer, n_made)
    generator = require_entry(content, "generator", Tensor)
    if generator.dtype != torch.uint8 or generator.shape != torch.Generator().get_state().shape:
        raise ValueError("generator: expected the state of a random number generator")
    _check_figures(require_entry(content, "running", dict), "running")
    _check_history(require_entry(content, "history", list), content["step"])


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
    state, groups = (
        require_entry(content, "state", dict),
        require_entry(content, "param_groups", list),
    )
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
            _check_like(f"{name}: {key}", require_entry(of_one, key, Tensor), parameters[index])
        if of_one.keys() != moments:
            raise ValueError(f"{name}: expected {', '.join(sorted(moments))} only, got others")
        if name == "adam":
            step = require_entry(of_one, "step", Tensor)
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
        at = check_int(row["step"], "history: step", least=0, most=step)
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
