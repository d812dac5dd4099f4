"""Checkpoints of a training: read, of which training they are, and what earlier versions wrote."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.settings import FitSettings

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
