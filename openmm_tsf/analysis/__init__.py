"""A run directory read back: trajectories, free energies, tables, pictures. Knows no models."""

from openmm_tsf.analysis.importance import (
    ImportanceEstimate,
    importance_profile,
    importance_thermodynamics,
)
from openmm_tsf.analysis.load import Run, load_run
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.ramachandran import plot_ramachandran
from openmm_tsf.analysis.plots.thermodynamics import (
    compare_thermodynamics,
    plot_thermodynamics,
    write_thermodynamics,
)
from openmm_tsf.analysis.reference import Comparison, Reference, compare, load_reference
from openmm_tsf.analysis.summary import write_summary
from openmm_tsf.analysis.thermodynamics import Profile, Thermodynamics

__all__ = [
    "Comparison",
    "ImportanceEstimate",
    "Profile",
    "Reference",
    "Run",
    "Thermodynamics",
    "compare",
    "compare_thermodynamics",
    "importance_profile",
    "importance_thermodynamics",
    "load_reference",
    "load_run",
    "plot_diagnostics",
    "plot_ramachandran",
    "plot_thermodynamics",
    "write_summary",
    "write_thermodynamics",
]
