# %% [markdown]
# # A first run
#
# Alanine dipeptide in implicit solvent: a flow learns from molecular dynamics at 600 K, then
# proposes moves in replica exchange between 300 and 600 K. In these sizes it takes three minutes;
# `openmm-tsf run --output run/` does the same at full length.

# %%
import openmm_tsf as tsf

N_STEPS = 1000
N_WALKERS = 32
N_TUNING = 100
N_ITERATIONS = 500
STRIDE = 2

# %% [markdown]
# Frames of 600 K come with the package. They are internally converted to bond lengths, angles and
# torsions, in which the flow works.

# %%
molecule = tsf.systems.alanine_dipeptide()
dataset = tsf.MDDataset.shipped(molecule, stride=STRIDE)
flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, seed=1)
potential = molecule.potential()

# %% [markdown]
# Training minimises (1 - lambda) likelihood + lambda energy; `result.history` has the
# validations.

# %%
ladder = [300, 424, 600]
settings = tsf.FitSettings(n_steps=N_STEPS, validate_interval=N_STEPS, temperatures=ladder)
result = tsf.fit(flow, dataset, potential, settings=settings, seed=2)
print(f"kept the weights of step {result.best.step}; {result.n_evaluations} energy evaluations")

# %% [markdown]
# From here on the flow is frozen. Every proposal is accepted or rejected with the molecule's own
# energy.

# %%
sampler = tsf.ParallelTempering(molecule, flow, ladder, N_WALKERS, potential=potential, seed=7)
sampler.tune(N_TUNING)  # step sizes and burn-in: all walkers start at one minimised conformation
sampler.run(N_ITERATIONS, output="run/")

# %% [markdown]
# The run directory has a DCD file for each temperature, energies, and what was chosen.

# %%
run = tsf.load_run("run/")
phi, psi = run.ramachandran(300)  # radians
run.plot("ramachandran.png")
summary = run.summary()
print("P(phi > 0):", {t: p["p"] for t, p in summary["phi_positive"].items()})
print("acceptance:", summary["acceptance"])
