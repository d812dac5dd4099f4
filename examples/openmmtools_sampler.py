# %% [markdown]
# # In openmmtools' samplers
#
# Moves through a flow beside openmmtools' own: each state has them at its temperature. This takes
# the flow that `first_run.py` trained, from its directory `run/`.

# %%
import mdtraj
import openmm
import openmm.unit as unit
from openmmtools.cache import ContextCache
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove
from openmmtools.multistate import MultiStateReporter, ReplicaExchangeSampler
from openmmtools.states import SamplerState, ThermodynamicState

import openmm_tsf as tsf
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove

FLOW = "run/flow.pt"
N_ITERATIONS, N_MD = 500, 250

# %%
molecule = tsf.systems.alanine_dipeptide()
ladder = [300, 424, 600]
states = [ThermodynamicState(molecule.system, temperature=t * unit.kelvin) for t in ladder]
start = SamplerState(molecule.positions * unit.nanometer)

# %% [markdown]
# Independent draws move farthest where they are accepted; eight of them in one batch cost little
# more than one. Steps in the latent space (`beta`, or `sigma`) are accepted more often.

# %%
moves = SequenceMove(
    [
        LangevinDynamicsMove(timestep=1 * unit.femtosecond, n_steps=N_MD, reassign_velocities=True),
        TSFIndependenceMove(FLOW, molecule, n_steps=8, seed=1),
        TSFMove(FLOW, molecule, beta=0.5, seed=2),
    ]
)
reporter = MultiStateReporter("openmmtools.nc", checkpoint_interval=1)
sampler = ReplicaExchangeSampler(mcmc_moves=moves, number_of_iterations=N_ITERATIONS)
sampler.create(states, start, reporter)

# %% A killed run continues: `ReplicaExchangeSampler.from_storage("openmmtools.nc").run()`
reference = openmm.Platform.getPlatform("Reference")  # faster than "CPU" for few atoms
sampler.sampler_context_cache = sampler.energy_context_cache = ContextCache(reference)
sampler.run()
for kelvin, move in zip(ladder, sampler.mcmc_moves, strict=True):
    rates = [f"{s['n_accepted'] / s['n_proposed']:.2f}" for s in move.statistics if s]
    print(f"{kelvin} K: accepted draws and steps: {rates}")

# %% The frames of 300 K
replicas = reporter.read_replica_thermodynamic_states()
frames = [
    reporter.read_sampler_states(iteration=i)[list(row).index(0)].positions / unit.nanometer
    for i, row in enumerate(replicas)
]
phi = mdtraj.compute_phi(mdtraj.Trajectory(frames, molecule.mdtraj_topology))[1][:, 0]
print(f"300 K: P(phi > 0) = {(phi > 0).mean():.3f} of {len(phi)} frames")
