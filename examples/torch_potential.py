# %% [markdown]
# # The energy of a System as a torch function
#
# `TorchPotential` reads an OpenMM System without cutoffs and periodic box, and gives the energies
# of many conformations at once, differentiable to any order. It is compared with OpenMM's
# Reference platform, Force by Force, before the object exists. No flow is needed.

# %%
import time

import openmm
import torch

import openmm_tsf as tsf

BATCH = 4096
COMPILE = True  # fuses the operations: a minute or two the first time, seconds from then on
torch.set_num_threads(1)

# %% A System of your own comes from openmm.XmlSerializer.deserialize or ForceField.createSystem
molecule = tsf.systems.alanine_dipeptide()
system = molecule.system
x = tsf.MDDataset.shipped(molecule).positions[:BATCH]  # [B, N, 3] in nm
potential = tsf.TorchPotential.from_system(system, positions=x[0], compile=COMPILE)
for force in potential.agreement:
    print(force)

# %% [markdown]
# The batch in one call, beside a loop over a Context of OpenMM's Reference platform.

# %%
potential.energy(x)  # compiles
start = time.perf_counter()
energies = potential.energy(x)  # [B] in kJ/mol
batch_seconds = time.perf_counter() - start

platform = openmm.Platform.getPlatformByName("Reference")
context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
loop = []
start = time.perf_counter()
for conformation in x.numpy():
    context.setPositions(conformation)
    loop.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
loop_seconds = time.perf_counter() - start
print(f"largest difference: {(energies - torch.tensor(loop)).abs().max():.1e} kJ/mol")
print(f"the loop takes {loop_seconds / batch_seconds:.2g} times as long as the batch")

# %% [markdown]
# Gradients by autograd, forces in one call, and a Hessian from a second derivative.

# %%
few = x[:4].clone().requires_grad_(True)
(gradient,) = torch.autograd.grad(potential.energy(few).sum(), few)
energies, forces = potential.energy_and_forces(few.detach())
hessian = torch.autograd.functional.hessian(lambda y: potential.energy(y[None])[0], x[0])
print("force = -gradient:", torch.allclose(forces, -gradient), "Hessian:", tuple(hessian.shape))
