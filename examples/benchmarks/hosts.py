"""What moves through a flow cost in the samplers of other packages, against this package's own.

    python examples/benchmarks/hosts.py --output examples/results/hosts.json

Alanine dipeptide at 300, 424 and 600 K, a flow of the default size (untrained: weights do not
change the cost of a move), one thread, process CPU time. An iteration is one independence move and
one Crank-Nicolson move of every replica and a sweep of steered and plain exchanges (plain ones with
openmmtools, which moves one replica after the other); no dynamics. Both sides run in turns in one
process; given are the medians over rounds and their ratio, host over native, with one and with 32
replicas at every temperature (8 with openmmtools). The host alone is the same iteration without a
flow: what it spends on states, energies, exchanges and its files.
"""

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import openmm
import openmm.app as app
import openmm.unit as unit
import torch
from openmmtools import multistate
from openmmtools.cache import ContextCache
from openmmtools.mcmc import MCMCMove, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState

import openmm_tsf as tsf
from openmm_tsf.hosts.openmm_app import FlowReplicaExchangeSampler
from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove
from openmm_tsf.io.files import read_json, write_json

LADDER = (300.0, 424.0, 600.0)


def time_in_turns(sides, n_iterations, n_rounds):
    """Return the median CPU seconds per iteration of every side, a callable of a number."""
    seconds = {name: [] for name in sides}
    for number in range(n_rounds + 1):
        for name, run in sides.items():
            began = time.process_time()
            run(n_iterations)
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - began) / n_iterations)
    return {name: statistics.median(values) for name, values in seconds.items()}


def native(molecule, flow, potential, n_walkers, steered):
    """This package's sampler with the moves of a host's iteration."""
    parts = flow, potential, LADDER
    kernels = [
        tsf.kernels.FlowIndependence(*parts),
        tsf.kernels.FlowCrankNicolson(*parts),
        *([tsf.kernels.SteeredSwap(*parts)] if steered else []),
        tsf.kernels.PlainSwap(LADDER, potential.boltzmann_constant),
    ]
    sampler = tsf.ParallelTempering(molecule, flow, LADDER, n_walkers, kernels, potential, seed=1)
    return lambda n: sampler.run(n, progress=False)


def openmm_app(molecule, flow, potential, n_copies):
    """OpenMM's own replica exchange with the flow, and without."""

    def make(flow):
        integrator = openmm.LangevinMiddleIntegrator(300, 1.0, 0.001)
        platform = openmm.Platform.getPlatform("Reference")
        simulation = app.Simulation(molecule.topology, molecule.system, integrator, platform)
        simulation.context.setPositions(molecule.positions)
        states = [{"temperature": t * unit.kelvin} for t in LADDER for _ in range(n_copies)]
        options = {} if flow is None else {"potential": potential}
        sampler = FlowReplicaExchangeSampler(states, simulation, 0, flow=flow, seed=1, **options)
        sampler.exchangesPerIteration = len(states) ** 2 if n_copies == 1 else len(states)
        return sampler.simulate

    return make(flow), make(None)


class Rest(MCMCMove):
    """A move of openmmtools that does nothing."""

    def apply(self, thermodynamic_state, sampler_state, context_cache=None):
        """Leave the state as it is."""

    def __getstate__(self):
        return {}

    def __setstate__(self, serialization): ...


def openmmtools(molecule, flow, potential, n_copies):
    """Openmmtools' replica exchange with moves through the flow, and with moves that do nothing."""
    temporary = tempfile.TemporaryDirectory()
    path = Path(temporary.name) / "flow.pt"
    flow.save(path)

    def make(moves, name):
        sampler = multistate.ReplicaExchangeSampler(mcmc_moves=moves, number_of_iterations=10**9)
        sampler.online_analysis_interval = None
        reference = openmm.Platform.getPlatform("Reference")
        sampler.sampler_context_cache = sampler.energy_context_cache = ContextCache(reference)
        states = [
            ThermodynamicState(molecule.system, temperature=t * unit.kelvin)
            for t in LADDER
            for _ in range(n_copies)
        ]
        reporter = multistate.MultiStateReporter(Path(temporary.name) / f"{name}.nc")
        start = SamplerState(molecule.positions * unit.nanometer)
        sampler.create(states, [start] * len(states), reporter)
        return lambda n: (temporary, sampler.run(n))

    draw = TSFIndependenceMove(path, molecule, seed=1)
    step = TSFMove(path, molecule, beta=0.5, seed=2)
    return make(SequenceMove([draw, step]), "moves"), make(Rest(), "rest")


#: How a host is made, its package, replicas at a temperature, and whether it has steered swaps.
HOSTS = {
    "openmm.app": (openmm_app, "openmm", (1, 32), True),
    "openmmtools": (openmmtools, "openmmtools", (1, 8), False),
}


def measure(host, molecule, flow, potential, n_iterations, n_rounds):
    """Return a host's rows, one for each number of replicas at a temperature."""
    make, package, numbers, steered = HOSTS[host]
    rows = []
    for n_copies in numbers:
        with_flow, alone = make(molecule, flow, potential, n_copies)
        sides = {
            "host": with_flow,
            "native": native(molecule, flow, potential, n_copies, steered),
            "host_alone": alone,
        }
        seconds = time_in_turns(sides, n_iterations, n_rounds)
        rows.append(
            {
                "replicas_per_temperature": n_copies,
                "milliseconds_per_iteration": {k: 1e3 * v for k, v in seconds.items()},
                "host_over_native": seconds["host"] / seconds["native"],
            }
        )
        print(host, rows[-1], flush=True)
    return {"package": f"{package} {version(package)}", "rows": rows}


def main():
    """Measure hosts and add them to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=8, help="of the flow")
    options = parser.parse_args()
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    dataset = tsf.MDDataset.shipped(molecule, stride=40)
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=options.blocks, seed=1)
    potential = molecule.potential()
    result = read_json(options.output) if options.output.exists() else {}
    for host in options.hosts:
        sizes = options.iterations, options.rounds
        result[host] = measure(host, molecule, flow, potential, *sizes)
        write_json(options.output, result)


if __name__ == "__main__":
    main()
