"""Molecules: a System with its Topology and positions, from files or by name; MD frames of it."""

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import load_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem

__all__ = ["MDDataset", "MolecularSystem", "alanine_dipeptide", "load_molecule"]
