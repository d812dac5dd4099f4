"""What decides the numbers of a run: recorded when it starts, compared when it goes on."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels import Every
from openmm_tsf.sampling.moves import FlowLike
from openmm_tsf.sampling.tuning import HasStepSize
from openmm_tsf.systems import MolecularSystem


def sampling_choices(
    molecule: MolecularSystem | None,
    flow: FlowLike,
    potential: Potential,
    schedule: Sequence[Every],
    save_interval: int,
) -> dict[str, Any]:
    """Every choice of a sampler, measured ones included, json-able."""
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
    tuned = {
        entry.kernel.name: entry.kernel.sigma.tolist()
        for entry in schedule
        if isinstance(entry.kernel, HasStepSize)
    }
    return {
        "molecule": None if molecule is None else molecule.fingerprint,
        "kernels": kernels,
        "sigma": tuned,
        "flow": {
            "class": type(flow).__name__,
            "dtype": str(flow.dtype),
            "reference_temperature_K": flow.reference_temperature,
            "sha256": hash_of(flow),
        },
        "potential": {
            "class": type(potential).__name__,
            "platform": getattr(potential, "platform_name", None),
            "n_contexts": getattr(potential, "n_contexts", None),
        },
        "save_interval": save_interval,
        "torch_threads": torch.get_num_threads(),
    }


def check_same(where: Any, written: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare a run's choices with those of the sampler that is to continue it.

    Raises
    ------
    ValueError
        If the molecule, the flow or the kernels differ. Another platform or number of threads is
        only warned of: the samples are then valid, but not the same bit by bit.
    """
    for name in ("molecule", "flow", "kernels"):
        if own[name] != written[name]:
            raise ValueError(
                f"{where}: expected the {name} that the run was started with, {written[name]}, "
                f"got {own[name]}"
            )
    for name in ("potential", "torch_threads"):
        if own[name] != written[name]:
            warnings.warn(
                f"{where}: written with {name} {written[name]}, resumed with {own[name]}; "
                "the continuation is valid but not the same bit by bit",
                stacklevel=3,
            )


def hash_of(flow: FlowLike) -> str | None:
    """SHA-256 of the flow's parameters and buffers."""
    if not isinstance(flow, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in flow.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
