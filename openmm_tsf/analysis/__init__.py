"""A run directory read back: trajectories, free energies, tables, pictures. Knows no models."""

from openmm_tsf.analysis.diagnostics import plot_diagnostics
from openmm_tsf.analysis.importance import (
    ImportanceEstimate,
    importance_profile,
    importance_thermodynamics,
)
from openmm_tsf.analysis.plots import plot_ramachandran
from openmm_tsf.analysis.reference import Comparison, Reference, compare, load_reference
from openmm_tsf.analysis.run import Run, load_run
from openmm_tsf.analysis.summary import write_summary
from openmm_tsf.analysis.thermodynamics import Profile, Thermodynamics
from openmm_tsf.analysis.thermodynamics_plot import (
    compare_thermodynamics,
    plot_thermodynamics,
    write_thermodynamics,
)

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
