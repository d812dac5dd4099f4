# %% [markdown]
# # A kernel of your own
#
# It takes W walkers at R temperatures, and returns the next walkers and its counts. `metropolis`
# accepts or rejects its proposals, so that it leaves the Boltzmann distributions invariant.

# %%
import torch

import openmm_tsf as tsf
from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials import DoubleWell

N_WALKERS, N_ITERATIONS = 4000, 50


class CauchyWalk:
    """Random walk with Cauchy increments: mostly short, now and then from well to well."""

    name, exact = "cauchy_walk", True

    def __init__(self, potential, temperatures, width):
        self.potential, self.temperatures, self.width = potential, temperatures, width
        self.counts_shape = (len(temperatures),)
        self.kt = potential.boltzmann_constant * torch.tensor(temperatures, dtype=torch.float64)

    def __call__(self, state, generator):
        x = state.x + self.width * torch.empty_like(state.x).cauchy_(generator=generator)
        energy = self.potential.energy(x.flatten(0, 1)).view_as(state.energy)
        log_weights = [(-u / self.kt).flatten() for u in (state.energy, energy)]
        accepted, non_finite = (a.view_as(energy) for a in metropolis(*log_weights, generator))
        proposed = torch.full(self.counts_shape, state.n_walkers)
        counts = (accepted.sum(0), proposed, int(non_finite.sum()))
        info = tsf.kernels.KernelInfo(*counts, n_evaluations=energy.numel())
        x = torch.where(accepted[..., None], x, state.x)  # [..., None, None] for molecules
        return state.evolve(x=x, energy=torch.where(accepted, energy, state.energy)), info

    def settings(self):
        return {"width": self.width}

    def state_dict(self):  # what tuning changes: nothing here
        return {}

    def load_state_dict(self, content): ...


# %% The test: walkers that start as exact samples must be exact samples afterwards
potential, ladder = DoubleWell(0.5, -4.0, 1.0), (0.5, 1.0, 2.0)  # two wells in 1-d; k_B = 1
kernels = [CauchyWalk(potential, ladder, width=0.3), tsf.kernels.PlainSwap(ladder, 1.0)]
identity = tsf.kernels.WhitenedCoordinates.identity(1)  # in place of a flow
sampler = tsf.ParallelTempering(None, identity, ladder, N_WALKERS, kernels, potential, seed=1)
generator = torch.Generator().manual_seed(2)
sampler.set_positions(torch.stack([potential.sample(N_WALKERS, t, generator) for t in ladder], 1))
sampler.run(N_ITERATIONS, progress=False)
p = (sampler.state.x[..., 0] > 0).double().mean(dim=0)
exact = torch.cat([potential.probability_positive(t) for t in ladder])
z = (p - exact) / (exact * (1 - exact) / N_WALKERS).sqrt()
print("accepted:", sampler.totals["cauchy_walk"].acceptance, "z of P(x > 0):", z)
assert z.abs().max() < 4
