# %% [markdown]
# # Any temperature of the ladder
#
# A run has samples at its rungs. Between them there are two ways: all of its frames, weighted by
# MBAR, and frames drawn anew by the flow at that very temperature and Metropolised there. This
# reads the directory `run/` of `first_run.py`.

# %%
import mdtraj
import numpy as np

import openmm_tsf as tsf

RUN = "run/"
N_FRAMES = 10_000

# %% [markdown]
# Weighted frames: an `mdtraj.Trajectory` with weights. Histograms and means take them along.

# %%
run = tsf.load_run(RUN)
frames = run.at(350)
phi = mdtraj.compute_phi(frames)[1][:, 0]
populations, edges = np.histogram(phi, bins=36, range=(-np.pi, np.pi), weights=frames.weights)
print(f"350 K: {frames.n_frames} frames of all rungs are worth {frames.n_eff:.0f} of equal weight")

# %% [markdown]
# Any function of the frames as a function of temperature, with standard errors.


# %%
def left_handed_helix(trajectory):
    return mdtraj.compute_phi(trajectory)[1][:, 0] > 0


temperatures = np.linspace(300, 600, 7)
curve = run.curve(left_handed_helix, temperatures)
for kelvin, value, stderr in zip(temperatures, curve.value, curve.stderr, strict=True):
    print(f"{kelvin:.0f} K: P(phi > 0) = {value:.4f} ± {stderr:.4f}")
energy = run.curve("energy", 350)
print(f"350 K: <U> = {energy.value[0]:.2f} ± {energy.stderr[0]:.2f} kJ/mol")

# %% [markdown]
# New frames of equal weight, with a record beside them. In a shell:
# `openmm-tsf at run/ --temperature 350 --output 350K.dcd`.

# %%
drawn = tsf.sample_at(run, 350, "350K.dcd", n_frames=N_FRAMES)
entry = drawn.record["energy_kJ_mol"]
print(f"350 K: {drawn.trajectory.n_frames} frames, <U> = {entry['value']:.2f} kJ/mol")
