"""What an effective sample costs by OpenMM's own replica exchange.

    python examples/benchmarks/replica_exchange.py --minutes 10 --rungs 3 5 8 --replicates 4 \
        --output examples/results/replica_exchange.json

``openmm.app.ReplicaExchangeSampler`` (OpenMM 8.6 and later) on alanine dipeptide from 300 to 600 K,
with hydrogens of 4 amu, so that LangevinMiddle takes 2 fs; an exchange every 0.1 ps; the fastest
platform, measured first. Each replicate is an independent run in its own process. N_eff is that of
1[phi > 0] at 300 K, p(1 - p)/SE^2 with the larger of the two standard errors of
``analysis.uncertainty`` within a run, and for several replicates also from their spread. An
evaluation is one MD step of one replica; the energies of the exchanges are not counted, their time
is.
"""

import argparse
import math
import multiprocessing
import random
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.analysis.statistics import n_eff
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.io.files import write_json
from openmm_tsf.systems.library import alanine_dipeptide

LOW_K, HIGH_K = 300.0, 600.0
TIMESTEP_PS, FRICTION_PER_PS = 0.002, 1.0
STEPS_PER_EXCHANGE = 50
EQUILIBRATION_EXCHANGES = 500  # 50 ps a replica


def one_thread(name):
    """Properties of a platform that limit it to one core, as the flow has one."""
    return {"Threads": "1"} if name == "CPU" else {}


def make_simulation(platform, force_field, seed):
    """A Simulation with heavy hydrogens, minimised."""
    molecule = alanine_dipeptide(force_field)
    system = openmm.XmlSerializer.clone(molecule.system)
    for index, mass in enumerate(molecule.heavy_hydrogen_masses):
        system.setParticleMass(index, mass)
    integrator = openmm.LangevinMiddleIntegrator(LOW_K, FRICTION_PER_PS, TIMESTEP_PS)
    integrator.setRandomNumberSeed(seed)
    simulation = app.Simulation(
        molecule.topology,
        system,
        integrator,
        openmm.Platform.getPlatformByName(platform),
        one_thread(platform),
    )
    simulation.context.setPositions(molecule.positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(LOW_K, seed)
    return molecule, simulation


def fastest_platform(force_field):
    """The platform with the most MD steps a second, and the rate of each."""
    rates = {}
    for index in range(openmm.Platform.getNumPlatforms()):
        name = openmm.Platform.getPlatform(index).getName()
        try:
            simulation = make_simulation(name, force_field, 1)[1]
        except openmm.OpenMMException as error:
            print(f"{name}: {error}")
            continue
        simulation.step(200)
        began = time.perf_counter()
        simulation.step(2000)
        simulation.context.getState(getEnergy=True)
        rates[name] = 2000 / (time.perf_counter() - began)
    return max(rates, key=rates.get), rates


def run(n_rungs, seed, seconds, platform, force_field):
    """One replicate: the populations of 1[phi > 0] at the lowest rung, in time order."""
    molecule, simulation = make_simulation(platform, force_field, seed)
    states = [
        {"temperature": t * unit.kelvin} for t in np.geomspace(LOW_K, HIGH_K, n_rungs).tolist()
    ]
    sampler = app.ReplicaExchangeSampler(states, simulation, STEPS_PER_EXCHANGE)
    random.seed(seed)  # the sampler draws its exchanges from the module's own generator
    sampler.simulate(EQUILIBRATION_EXCHANGES)
    frames = []

    def keep(_):
        lowest = sampler.replicaStateIndex.index(0)
        frames.append(sampler.replicaConformation[lowest].getPositions(asNumpy=True)._value)

    sampler.reporters.append(keep)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        sampler.simulate(20)
    elapsed = time.perf_counter() - began
    trajectory = mdtraj.Trajectory(np.array(frames), molecule.mdtraj_topology)
    phi = mdtraj.compute_dihedrals(trajectory, [molecule.dihedrals["phi"]])[:, 0]
    estimate = estimate_mean((phi > 0).astype(float)[:, None])
    evaluations = len(frames) * n_rungs * STEPS_PER_EXCHANGE
    return {
        "n_rungs": n_rungs,
        "seed": seed,
        "p": estimate.value,
        "stderr": estimate.stderr,
        "n_eff": estimate.n_eff,
        "n_evaluations": evaluations,
        "seconds": elapsed,
        "n_eff_per_million": 1e6 * estimate.n_eff / evaluations,
        "n_eff_per_second": estimate.n_eff / elapsed,
    }


def summarise(rows):
    """By number of rungs: totals, and N_eff by the spread of the replicates."""
    table = {}
    for n_rungs in sorted({row["n_rungs"] for row in rows}):
        replicates = [row for row in rows if row["n_rungs"] == n_rungs]
        evaluations = sum(row["n_evaluations"] for row in replicates)
        seconds = sum(row["seconds"] for row in replicates)
        counted = sum(row["n_eff"] for row in replicates)
        weights = [row["n_evaluations"] / evaluations for row in replicates]
        p = sum(w * row["p"] for w, row in zip(weights, replicates, strict=True))
        entry = {
            "p": p,
            "stderr": math.sqrt(
                sum((w * row["stderr"]) ** 2 for w, row in zip(weights, replicates, strict=True))
            ),
            "n_evaluations": evaluations,
            "core_seconds": seconds,
            "n_eff": counted,
            "n_eff_per_million": 1e6 * counted / evaluations,
            "n_eff_per_core_second": counted / seconds,
        }
        if len(replicates) > 1:
            spread = statistics.stdev([row["p"] for row in replicates]) / math.sqrt(len(replicates))
            entry["stderr_spread"] = spread
            entry["n_eff_per_million_spread"] = 1e6 * n_eff(p, spread) / evaluations
        table[str(n_rungs)] = entry
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each replicate")
    parser.add_argument("--rungs", type=int, nargs="+", default=[3, 5, 8])
    parser.add_argument("--replicates", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="parallel processes")
    parser.add_argument("--platform", help="by default the fastest")
    parser.add_argument("--force-field", default="amber99sbildn-obc2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="replica_exchange.json")
    args = parser.parse_args()
    if not hasattr(app, "ReplicaExchangeSampler"):
        parser.error(f"OpenMM {openmm.__version__} has no ReplicaExchangeSampler")
    platform, rates = fastest_platform(args.force_field)
    platform = args.platform or platform
    print(f"MD steps per second: {rates}; used: {platform}", flush=True)
    jobs = [
        (n, args.seed + 1000 * n + k, 60 * args.minutes, platform, args.force_field)
        for k in range(args.replicates)
        for n in args.rungs
    ]
    context = multiprocessing.get_context("spawn")
    rows = []
    with ProcessPoolExecutor(args.workers, context) as pool:
        for future in [pool.submit(run, *job) for job in jobs]:
            rows.append(future.result())
            print(rows[-1], flush=True)
    report = {
        "openmm": openmm.__version__,
        "platform": platform,
        "md_steps_per_second": rates,
        "workers": args.workers,
        "force_field": args.force_field,
        "by_rungs": summarise(rows),
        "runs": rows,
    }
    write_json(args.output, report)
    print(report["by_rungs"])


if __name__ == "__main__":
    main()
