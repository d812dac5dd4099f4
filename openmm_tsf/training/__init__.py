"""Training a flow."""

from openmm_tsf.training.fit import FitResult, FitSettings, fit
from openmm_tsf.training.validate import Validation

__all__ = ["FitResult", "FitSettings", "Validation", "fit"]
