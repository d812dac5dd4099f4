# %% [markdown]
# # A molecule of your own
#
# What is needed: a PDB file with all atoms and a force field, in vacuum or implicit solvent,
# without a periodic box. Bonds to hydrogen may be constrained (`constraints=app.HBonds`), in System
# and frames alike. Here alanine dipeptide stands for your file.

# %%
from importlib.resources import files

import openmm
import openmm.app as app
import openmm.unit as unit

import openmm_tsf as tsf

PDB = str(files("openmm_tsf.data") / "ala2.pdb")
TEMPERATURE = 600  # high enough that MD crosses the barriers
N_EQUILIBRATION = 20_000
N_MD = 500_000
N_STEPS = 2000
N_ITERATIONS = 500

# %%
pdb = app.PDBFile(PDB)
force_field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
system = force_field.createSystem(pdb.topology, nonbondedMethod=app.NoCutoff, constraints=None)
molecule = tsf.MolecularSystem(system, pdb.topology, pdb.positions)

# %% [markdown]
# Frames to learn from, by OpenMM alone. DCD keeps single precision; XTC would be too coarse.

# %%
integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1 / unit.picosecond, 1 * unit.femtosecond)
integrator.setRandomNumberSeed(1)
simulation = app.Simulation(pdb.topology, system, integrator)
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy()
simulation.step(N_EQUILIBRATION)
simulation.reporters.append(app.DCDReporter("md.dcd", 100))
simulation.step(N_MD)
simulation.reporters.clear()  # closes the file

# %%
dataset = tsf.MDDataset.load("md.dcd", molecule, TEMPERATURE, n_evaluations=N_MD)
flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, seed=1)
potential = molecule.potential()  # in torch, checked against OpenMM, where it covers the System
ladder = [300, 424, 600]
settings = tsf.FitSettings(n_steps=N_STEPS, validate_interval=N_STEPS // 4, temperatures=ladder)
tsf.fit(flow, dataset, potential, settings=settings, seed=2)

# %%
with tsf.ParallelTempering(molecule, flow, ladder, 32, potential=potential, seed=7) as sampler:
    sampler.tune(100)
    sampler.run(N_ITERATIONS, output="run/")
run = tsf.load_run("run/")
print("named torsions:", list(run.dihedral_atoms))
print("what the run says about itself:", run.summary()["monitor"]["warnings"])
