"""Custom expressions of OpenMM Forces, as torch operations."""
