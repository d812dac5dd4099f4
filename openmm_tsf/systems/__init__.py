"""Molecules: a System with its Topology and positions, and MD frames of it."""

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import MolecularSystem, alanine_dipeptide

__all__ = ["MDDataset", "MolecularSystem", "alanine_dipeptide"]
