# %% [markdown]
# # A molecule from Amber's files
#
# A prmtop and coordinates, to a run in one call: MD, training, replica exchange, analysis. Files of
# GROMACS (`top=`, `gro=`) and CHARMM (`psf=`, `crd=`, `parameters=`) are read in the same way. In a
# shell the same is
#
#     openmm-tsf run --prmtop my.prmtop --inpcrd my.inpcrd --implicit-solvent OBC2 \
#         --preset quick --output run/
#
# The files are those of one molecule without water. Here openmmtools' alanine dipeptide stands for
# yours.

# %%
from dataclasses import replace

from openmmtools.testsystems import get_data_filename

import openmm_tsf as tsf
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.run import run

FOLDER = "data/alanine-dipeptide-gbsa/alanine-dipeptide"
PRMTOP, INPCRD = get_data_filename(f"{FOLDER}.prmtop"), get_data_filename(f"{FOLDER}.crd")
SETTINGS = preset("quick")  # a minute and poor statistics; "default" is for results
TEMPERATURES = (300.0, 424.0, 600.0)

# %% [markdown]
# The arguments take paths, or what `openmm.app` loads: an `AmberPrmtopFile`, an `AmberInpcrdFile`.
# Without an implicit solvent the molecule is in vacuum.

# %%
molecule = tsf.systems.load_molecule(prmtop=PRMTOP, inpcrd=INPCRD, implicit_solvent="OBC2")
print(molecule.n_atoms, "atoms, torsions", list(molecule.dihedrals))
print("energies:", molecule.potential())

# %% [markdown]
# MD at 600 K makes the frames that the flow learns from.

# %%
sampling = replace(SETTINGS.sampling, temperatures=TEMPERATURES)
summary = run("run/", replace(SETTINGS, sampling=sampling), molecule=molecule)
print(summary["verdict"]["sentence"])

# %% [markdown]
# `run/report.html` has tables and plots.

# %%
phi, psi = tsf.load_run("run/").ramachandran(300)  # radians
print(f"P(phi > 0) at 300 K: {(phi > 0).mean():.3f}")
