"""Molecules: a System with its Topology and positions, from files or by name; MD frames of it."""

from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.files import load_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.peptides import capped_peptide, published_peptide

__all__ = [
    "MDDataset",
    "MolecularSystem",
    "alanine_dipeptide",
    "capped_peptide",
    "load_molecule",
    "published_peptide",
]
