"""A run directory read back: trajectories, free energies, tables, pictures. Knows no models."""

from openmm_tsf.analysis.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots import plot_ramachandran
from openmm_tsf.analysis.reference import Comparison, Reference, compare, load_reference
from openmm_tsf.analysis.run import Run, load_run
from openmm_tsf.analysis.summary import write_summary

__all__ = [
    "Comparison",
    "Reference",
    "Run",
    "compare",
    "load_reference",
    "load_run",
    "plot_diagnostics",
    "plot_ramachandran",
    "write_summary",
]
