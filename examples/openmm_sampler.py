# %% [markdown]
# # OpenMM's own replica exchange, with moves through a flow
#
# A script around `openmm.app.ReplicaExchangeSampler` (OpenMM 8.6) gets flow moves and steered swaps
# by one changed line. The flow learns from the script's own MD at 600 K. Bonds to hydrogen may be
# constrained (`constraints=app.HBonds`).

# %%
from importlib.resources import files

import mdtraj
import openmm
import openmm.app as app
from openmm.unit import femtosecond, kelvin, picosecond

import openmm_tsf as tsf
from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler

N_EQUILIBRATION = 20_000
N_MD = 500_000
N_STEPS = 2000
N_ITERATIONS = 2000

pdb = app.PDBFile(str(files("openmm_tsf.data") / "ala2.pdb"))  # your molecule
force_field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
system = force_field.createSystem(pdb.topology, nonbondedMethod=app.NoCutoff, constraints=None)
integrator = openmm.LangevinMiddleIntegrator(600 * kelvin, 1 / picosecond, 1 * femtosecond)
integrator.setRandomNumberSeed(1)
simulation = app.Simulation(pdb.topology, system, integrator)
simulation.context.setPositions(pdb.positions)
simulation.minimizeEnergy()
simulation.step(N_EQUILIBRATION)

# %% A reporter makes a dataset of the MD; its energies are checked against the System
reporter = tsf.TSFDatasetReporter(100, "md.npz")
simulation.reporters.append(reporter)
simulation.step(N_MD)
simulation.reporters.clear()
dataset = reporter.dataset()
flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, seed=1)
ladder = [300, 424, 600]
settings = tsf.FitSettings(n_steps=N_STEPS, validate_interval=N_STEPS // 4, temperatures=ladder)
tsf.fit(flow, dataset, dataset.molecule.potential(), settings=settings, seed=2)

# %% The one line: `app.ReplicaExchangeSampler(states, simulation, 50)` before
states = [{"temperature": t * kelvin} for t in ladder]
sampler = FlowReplicaExchangeSampler(states, simulation, 50, flow=flow, seed=3)
files_of_run = {"trajectoryPerState": True, "energy": True, "checkpoints": True}
sampler.reporters.append(app.ReplicaExchangeReporter("remd", 10, sampler, **files_of_run))
sampler.simulate(N_ITERATIONS)

# %%
frames = mdtraj.load("remd/state_0.xtc", top=mdtraj.Topology.from_openmm(pdb.topology))
print("P(phi > 0) at 300 K:", (mdtraj.compute_phi(frames)[1] > 0).mean())
for name in ("flow_independent", "flow_crank_nicolson", "swap_steered"):
    counts = sampler.flowStatistics[name]
    print(name, "accepted:", counts["accepted"].sum() / counts["proposed"].sum())
