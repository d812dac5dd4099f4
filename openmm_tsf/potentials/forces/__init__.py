"""The energy of each kind of OpenMM Force, as torch operations."""
