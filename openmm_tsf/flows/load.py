"""Flow files of any class."""

import os
from typing import Any

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.realnvp import RealNVPFlow
from openmm_tsf.flows.serialization import read_flow_file
from openmm_tsf.flows.tsf import TemperatureSteerableFlow


def load_flow(path: str | os.PathLike[str], molecule: Any = None) -> AugmentedFlow:
    """Read a flow file of either class; see :meth:`AugmentedFlow.load`."""
    content = read_flow_file(path)
    for kind in (TemperatureSteerableFlow, RealNVPFlow):
        if content["kind"] == kind.kind:
            return kind.from_content(content, path, molecule)
    raise ValueError(f"{path}: unknown kind of flow {content['kind']!r}")
