r"""Series of phi by OpenMM's own samplers: replica exchange and metadynamics, written to a folder.

    python examples/benchmarks/openmm_samplers.py openmm_samplers/

``openmm.app.ReplicaExchangeSampler`` (OpenMM 8.6 and later) of alanine dipeptide from 300 to 600 K
with 3, 5 and 8 rungs, an exchange every 0.1 ps, and ``openmm.app.Metadynamics`` at 300 K on phi and
psi (Gaussians of 0.35 rad and 1.2 kJ/mol every 0.5 ps, bias factor 6): hydrogens of 4 amu, so that
LangevinMiddle takes 2 fs, on the fastest platform, one thread. An evaluation is one MD step of one
replica; the energies of the exchanges and the updates of the bias are not counted, their time is.

Each run is a file, which is continued until it has ``--evaluations``: the command may be killed,
and repeated with more. cost.py reads the folder.
"""

import argparse
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.io.files import read_json, write_arrays, write_json
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.units import KB

LOW_K, HIGH_K = 300.0, 600.0
TIMESTEP_PS, FRICTION_PER_PS = 0.002, 1.0
STEPS_PER_EXCHANGE = 50
WIDTH, HEIGHT_KJ_MOL, BIAS_FACTOR, STEPS_PER_GAUSSIAN = 0.35, 1.2, 6.0, 250
GAUSSIANS_PER_ESTIMATE = 20  # the bias is integrated every 10 ps
METADYNAMICS = "metadynamics"


def make_simulation(platform, force_field, seed, steer=None):
    """A minimised molecule and its Simulation; `steer` makes Metadynamics of the System."""
    molecule = alanine_dipeptide(force_field)
    system = openmm.XmlSerializer.clone(molecule.system)
    for index, mass in enumerate(molecule.heavy_hydrogen_masses):
        system.setParticleMass(index, mass)
    steering = steer(molecule, system) if steer else None
    integrator = openmm.LangevinMiddleIntegrator(LOW_K, FRICTION_PER_PS, TIMESTEP_PS)
    integrator.setRandomNumberSeed(seed)
    # One core, as the flow has one.
    one_thread = {"Threads": "1"} if platform == "CPU" else {}
    where = openmm.Platform.getPlatformByName(platform)
    simulation = app.Simulation(molecule.topology, system, integrator, where, one_thread)
    simulation.context.setPositions(molecule.positions)
    simulation.minimizeEnergy(maxIterations=200)
    simulation.context.setVelocitiesToTemperature(LOW_K, seed)
    return molecule, simulation, steering


def find_fastest_platform(force_field):
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


class Exchange:
    """Replica exchange that is begun, or continued from a saved state."""

    def __init__(self, n_rungs, state, seed, platform, force_field):
        self.molecule, simulation, _ = make_simulation(platform, force_field, seed)
        self.n_rungs, ladder = n_rungs, np.geomspace(LOW_K, HIGH_K, n_rungs).tolist()
        states = [{"temperature": t * unit.kelvin} for t in ladder]
        self.sampler = app.ReplicaExchangeSampler(states, simulation, STEPS_PER_EXCHANGE)
        random.seed(seed)  # the sampler draws its exchanges from the module's own generator
        context = simulation.context
        for rung in range(n_rungs):
            if state:
                context.setPositions(state["positions"][rung])
                context.setVelocities(state["velocities"][rung])
            elif rung:  # the sampler would start all with velocities of the lowest rung
                context.setVelocitiesToTemperature(ladder[rung], seed + rung)
            self.sampler.replicaConformation[rung] = context.getState(
                positions=True, velocities=True, parameters=True, integratorParameters=True
            )

    def advance(self, evaluations):
        """Return the series of phi and psi [n] at the lowest rung, and the evaluations."""
        frames, sampler = [], self.sampler

        def keep(_):
            lowest = sampler.replicaStateIndex.index(0)
            frames.append(sampler.replicaConformation[lowest].getPositions(asNumpy=True)._value)

        n = max(1, round(evaluations / (self.n_rungs * STEPS_PER_EXCHANGE)))
        sampler.reporters = [keep]
        sampler.simulate(n - 1)
        sampler.reporters.append(self._keep_state)
        sampler.simulate(1)
        trajectory = mdtraj.Trajectory(np.array(frames), self.molecule.mdtraj_topology)
        atoms = [self.molecule.dihedrals[name] for name in ("phi", "psi")]
        phi, psi = mdtraj.compute_dihedrals(trajectory, atoms).astype(np.float32).T
        return {"phi": phi, "psi": psi}, n * self.n_rungs * STEPS_PER_EXCHANGE

    def _keep_state(self, sampler):
        # Before the exchange of an iteration, velocities are those of the rungs.
        order = [sampler.replicaStateIndex.index(rung) for rung in range(self.n_rungs)]
        rows = [sampler.replicaConformation[replica] for replica in order]
        self.state = {
            "positions": np.array([row.getPositions(asNumpy=True)._value for row in rows]),
            "velocities": np.array([row.getVelocities(asNumpy=True)._value for row in rows]),
        }


class Metadynamics:
    """Metadynamics on phi and psi that is begun, or continued from a saved state."""

    def __init__(self, state, seed, platform, force_field):
        with tempfile.TemporaryDirectory() as folder:
            if state:  # what app.Metadynamics itself reads after an interruption
                np.save(Path(folder) / "bias_0_0.npy", state["bias"])
            _, self.simulation, self.bias = make_simulation(
                platform, force_field, seed, lambda *args: self._bias(*args, folder)
            )
        if state:
            self.simulation.context.setPositions(state["positions"])
            self.simulation.context.setVelocities(state["velocities"])

    @staticmethod
    def _bias(molecule, system, folder):
        variables = []
        for name in ("phi", "psi"):
            force = openmm.CustomTorsionForce("theta")
            force.addTorsion(*molecule.dihedrals[name], [])
            variables.append(app.BiasVariable(force, -np.pi, np.pi, WIDTH, periodic=True))
        return app.Metadynamics(
            system, variables, LOW_K, BIAS_FACTOR, HEIGHT_KJ_MOL, STEPS_PER_GAUSSIAN,
            saveFrequency=10**9 * STEPS_PER_GAUSSIAN, biasDir=folder,
        )  # fmt: skip

    def advance(self, evaluations):
        """Return phi, psi [n] at every Gaussian, P(phi > 0) by the bias [n / 20], and the steps."""
        series = {"phi": [], "psi": [], "p_bias": []}
        n = max(1, round(evaluations / (GAUSSIANS_PER_ESTIMATE * STEPS_PER_GAUSSIAN)))
        for _ in range(n):
            for _ in range(GAUSSIANS_PER_ESTIMATE):
                self.bias.step(self.simulation, STEPS_PER_GAUSSIAN)
                phi, psi = self.bias.getCollectiveVariables(self.simulation)
                series["phi"].append(phi)
                series["psi"].append(psi)
            free_energy = self.bias.getFreeEnergy()._value
            series["p_bias"].append(integrate(free_energy))
        end = self.simulation.context.getState(positions=True, velocities=True)
        self.state = {
            "positions": end.getPositions(asNumpy=True)._value,
            "velocities": end.getVelocities(asNumpy=True)._value,
            "bias": free_energy * (1.0 - BIAS_FACTOR) / BIAS_FACTOR,
        }
        steps = n * GAUSSIANS_PER_ESTIMATE * STEPS_PER_GAUSSIAN
        return {name: np.array(values) for name, values in series.items()}, steps


def make_sampler(method, *options):
    """The sampler of a method: "metadynamics", or a number of rungs."""
    return Metadynamics(*options) if method == METADYNAMICS else Exchange(int(method), *options)


def integrate(free_energy):
    """P(phi > 0) of a free energy [psi, phi] in kJ/mol on equal grids from -pi to pi."""
    weights = np.exp((free_energy.min() - free_energy) / (KB * LOW_K))[:-1].sum(axis=0)
    # The last point of a grid is the first; those at -pi and, if there is one, 0 are on the border.
    phi = np.linspace(-np.pi, np.pi, len(weights))[:-1]
    inside = np.where(np.abs(phi) < 1e-9, 0.5, phi > 0)
    inside[0] = 0.5
    return float(inside @ weights[:-1] / weights[:-1].sum())


def advance(path, method, seed, evaluations, platform, force_field):
    """Continue the run of one file, or begin it, by some evaluations; return how many it has."""
    before = load_series(path) if path.is_file() else {}
    state = {k.removeprefix("state_"): v for k, v in before.items() if k.startswith("state_")}
    chunk = int(before.get("n_chunks", 0))
    seed = int(np.random.SeedSequence([seed, chunk]).generate_state(1)[0] >> 1)
    sampler = make_sampler(method, state, seed, platform, force_field)
    began = time.perf_counter(), time.process_time()
    series, n = sampler.advance(evaluations)
    clocks = time.perf_counter() - began[0], time.process_time() - began[1]
    joined = {k: np.concatenate([before[k], v]) if before else v for k, v in series.items()}
    total = int(before.get("n_evaluations", 0)) + n
    joined |= {
        "n_evaluations": total,
        "n_chunks": chunk + 1,
        "wall_seconds": float(before.get("wall_seconds", 0.0)) + clocks[0],
        "cpu_seconds": float(before.get("cpu_seconds", 0.0)) + clocks[1],
    }
    joined |= {f"state_{name}": value for name, value in sampler.state.items()}
    write_arrays(path, joined)
    return total


def load_series(path):
    """The arrays of one run."""
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def read_folder(folder):
    """The runs of a folder by method, "3", "5", "8" (rungs) or "metadynamics", and its settings."""
    settings, runs = read_json(Path(folder) / "settings.json"), {}
    for path in sorted(Path(folder).glob("*.npz")):
        runs.setdefault(path.stem.rsplit("_", 1)[0], []).append(load_series(path))
    if not runs:
        raise FileNotFoundError(f"{folder}: has no run of openmm_samplers.py")
    return runs, settings


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--evaluations", type=float, default=8e6, help="of each replica exchange")
    parser.add_argument(
        "--metadynamics-evaluations", type=float, default=5e6, help="of each metadynamics"
    )
    parser.add_argument("--rungs", type=int, nargs="*", default=[3, 5, 8])
    parser.add_argument("--replicates", type=int, default=4, help="of each ladder")
    parser.add_argument("--metadynamics", type=int, default=8, help="runs of it")
    parser.add_argument("--chunk", type=float, default=500_000, help="evaluations between saves")
    parser.add_argument("--workers", type=int, default=1, help="parallel processes")
    parser.add_argument("--platform", help="by default the fastest")
    parser.add_argument("--force-field", default="amber99sbildn-obc2")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not hasattr(app, "ReplicaExchangeSampler"):
        parser.error(f"OpenMM {openmm.__version__} has no ReplicaExchangeSampler")
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "settings.json"
    if not file.is_file():
        platform, rates = find_fastest_platform(args.force_field)
        content = {
            "openmm": openmm.__version__,
            "platform": args.platform or platform,
            "md_steps_per_second": rates,
            "force_field": args.force_field,
            "seed": args.seed,
        }
        write_json(file, content)
    settings = read_json(file)
    for name in ("force_field", "seed"):
        if settings[name] != getattr(args, name):
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: expected {settings[name]!r} of {args.folder}")
    print(settings, flush=True)
    # Every run a chunk further before any has the next one: all are of use at any time.
    jobs, context = [], multiprocessing.get_context("spawn")
    for k in range(max(args.replicates, args.metadynamics)):
        for n in args.rungs if k < args.replicates else []:
            jobs.append((args.folder / f"{n}_{k}.npz", n, 1000 * n + k, args.evaluations))
        if k < args.metadynamics:
            path = args.folder / f"{METADYNAMICS}_{k}.npz"
            jobs.append((path, METADYNAMICS, k, args.metadynamics_evaluations))
    have = {
        job: int(load_series(job[0])["n_evaluations"]) if job[0].is_file() else 0 for job in jobs
    }
    with ProcessPoolExecutor(args.workers, context) as pool:
        while left := [job for job in jobs if have[job] < 0.999 * job[3]]:
            futures = {}
            for job in left:
                path, method, seed, target = job
                futures[job] = pool.submit(
                    advance, path, method, 100_000 * args.seed + seed,
                    min(args.chunk, target - have[job]), settings["platform"], args.force_field,
                )  # fmt: skip
            for job, future in futures.items():
                have[job] = future.result()
            done = {job[0].stem: have[job] for job in left}
            print(done, flush=True)


if __name__ == "__main__":
    main()
