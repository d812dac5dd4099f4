"""Internal coordinates of molecules, and their standardisation."""

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.coordinates.zmatrix import ZMatrix

__all__ = ["Constraints", "InternalCoordinates", "Whitening", "ZMatrix"]
