# %% [markdown]
# # Any temperature of the ladder
#
# A run has samples at its rungs. Between them there are two estimates: MBAR over all rungs, and
# draws of the flow at that very temperature with importance weights. This reads the directory
# `run/` of `first_run.py`.

# %%
import mdtraj
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis import importance_thermodynamics
from openmm_tsf.flows.draws import draw_weighted

RUN = "run/"
TEMPERATURES = [350.0, 500.0]
N_DRAWS = 20_000

# %% [markdown]
# MBAR: mean energy, heat capacity and the free energy of φ > 0 with standard errors, and any
# function of an `mdtraj.Trajectory`.

# %%
run = tsf.load_run(RUN)
table = run.thermodynamics(TEMPERATURES)


def left_handed_helix(trajectory):
    return mdtraj.compute_phi(trajectory)[1][:, 0] > 0


for k, kelvin in enumerate(TEMPERATURES):
    print(f"{kelvin:g} K, MBAR: <U> = {table.energy[k]:.2f} ± {table.energy_stderr[k]:.2f} kJ/mol")
    value, stderr = run.free_energy_difference(left_handed_helix, kelvin)
    print(f"{kelvin:g} K, MBAR: F(phi > 0) - F(phi < 0) = {value:.2f} ± {stderr:.2f} kT")

# %% [markdown]
# The flow alone: independent draws with weights p/q of configuration and momenta. The effective
# sample size says how far they can be trusted; a basin that the flow does not draw is missing
# without a sign of it.

# %%
molecule = tsf.systems.alanine_dipeptide()
flow = tsf.load_flow(run.path / "flow.pt", molecule)
potential = molecule.potential()
generator = torch.Generator().manual_seed(1)
for kelvin in TEMPERATURES:
    draws = draw_weighted(flow, potential, kelvin, N_DRAWS, generator)
    estimate = importance_thermodynamics(
        draws.log_weights, draws.energy, kelvin, potential.boltzmann_constant
    )
    value, stderr = estimate.energy
    print(f"{kelvin:g} K, flow: <U> = {value:.2f} ± {stderr:.2f}, ESS {estimate.ess.fraction:.3f}")
