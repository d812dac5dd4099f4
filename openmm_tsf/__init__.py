"""Temperature-steerable flows for OpenMM: Boltzmann ensembles over a temperature ladder.

    import openmm_tsf as tsf

The public names are imported on first use, so that ``import openmm_tsf`` is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_tsf import doctor, systems, units
    from openmm_tsf.analysis import Run, load_run, statistics
    from openmm_tsf.analysis.certify import certify
    from openmm_tsf.analysis.compare_ensembles import compare
    from openmm_tsf.coordinates import InternalCoordinates
    from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
    from openmm_tsf.flows.load import load_flow
    from openmm_tsf.hosts.dataset_reporter import TSFDatasetReporter
    from openmm_tsf.potentials import OpenMMPotential, Potential, TorchPotential
    from openmm_tsf.sampling import ParallelTempering, kernels
    from openmm_tsf.systems import MDDataset, MolecularSystem
    from openmm_tsf.training import FitSettings, fit
    from openmm_tsf.workflow.adapt import AdaptResult, AdaptSettings, adapt
    from openmm_tsf.workflow.at import sample_at
    from openmm_tsf.workflow.plan import plan
    from openmm_tsf.workflow.retarget import retarget

__version__ = version("openmm-tsf")

_MODULES = {
    "doctor": "openmm_tsf.doctor",
    "kernels": "openmm_tsf.sampling.kernels",
    "statistics": "openmm_tsf.analysis.statistics",
    "systems": "openmm_tsf.systems",
    "units": "openmm_tsf.units",
}
_HOMES = {
    "AdaptResult": "openmm_tsf.workflow.adapt",
    "AdaptSettings": "openmm_tsf.workflow.adapt",
    "FitSettings": "openmm_tsf.training",
    "InternalCoordinates": "openmm_tsf.coordinates",
    "MDDataset": "openmm_tsf.systems",
    "MolecularSystem": "openmm_tsf.systems",
    "OpenMMPotential": "openmm_tsf.potentials",
    "ParallelTempering": "openmm_tsf.sampling",
    "Potential": "openmm_tsf.potentials",
    "RealNVPFlow": "openmm_tsf.flows",
    "Run": "openmm_tsf.analysis",
    "TSFDatasetReporter": "openmm_tsf.hosts.dataset_reporter",
    "TemperatureSteerableFlow": "openmm_tsf.flows",
    "TorchPotential": "openmm_tsf.potentials",
    "adapt": "openmm_tsf.workflow.adapt",
    "certify": "openmm_tsf.analysis.certify",
    "compare": "openmm_tsf.analysis.compare_ensembles",
    "fit": "openmm_tsf.training",
    "load_flow": "openmm_tsf.flows",
    "load_run": "openmm_tsf.analysis",
    "plan": "openmm_tsf.workflow.plan",
    "retarget": "openmm_tsf.workflow.retarget",
    "sample_at": "openmm_tsf.workflow.at",
}
__all__ = [
    "AdaptResult",
    "AdaptSettings",
    "FitSettings",
    "InternalCoordinates",
    "MDDataset",
    "MolecularSystem",
    "OpenMMPotential",
    "ParallelTempering",
    "Potential",
    "RealNVPFlow",
    "Run",
    "TSFDatasetReporter",
    "TemperatureSteerableFlow",
    "TorchPotential",
    "__version__",
    "adapt",
    "certify",
    "compare",
    "doctor",
    "fit",
    "kernels",
    "load_flow",
    "load_run",
    "plan",
    "retarget",
    "sample_at",
    "statistics",
    "systems",
    "units",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
