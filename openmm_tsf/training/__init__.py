"""Training a flow."""

from openmm_tsf.training.fit import FitResult, fit
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.validation import Validation

__all__ = ["FitResult", "FitSettings", "Validation", "fit"]
