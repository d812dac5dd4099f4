"""Flow files of either class."""

import os
from typing import Any

import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.realnvp import RealNVPFlow
from openmm_tsf.flows.serialization import read_flow_file
from openmm_tsf.flows.tsf import TemperatureSteerableFlow


def load_flow(path: str | os.PathLike[str], molecule: Any = None) -> AugmentedFlow:
    """Read a flow file of either class; see :meth:`AugmentedFlow.load`."""
    content = read_flow_file(path)
    for flow_class in (TemperatureSteerableFlow, RealNVPFlow):
        if content["kind"] == flow_class.kind:
            return flow_class.from_content(content, path, molecule)
    raise ValueError(f"{path}: unknown kind of flow {content['kind']!r}")


def place_for_sampling(flow: AugmentedFlow, device: torch.device) -> AugmentedFlow:
    """Move a flow to the device on which it samples, and return it.

    On a GPU its networks are of the flow's own precision: products in float32 depend there on the
    size of the batch, by more than the round trip of a move may miss.
    """
    flow = flow.to(device)
    if device.type != "cpu":
        flow.conditioner_dtype = None
    return flow
