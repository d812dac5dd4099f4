"""Replica exchange of alanine dipeptide by molecular dynamics alone: the reference data.

    python data/make_reference.py run --directory reference_run --minutes 120
    python data/make_reference.py export --directory reference_run

``run`` continues after the directory's last segment, so that the reference can be extended by
calling it again; ``export`` writes ``data/ala2_reference.npz`` from all segments. If the directory
no longer exists, ``export --append`` adds a new one (with another ``--seed``) to the file.

The System is the paper's (amber99sbildn + amber96_obc, no cutoff, no constraints). Hydrogens have a
mass of 4 amu, which slows the stiffest vibrations and so allows a time step of 2 fs; masses do not
enter the Boltzmann distribution of the positions. Swaps are even-odd between neighbours; they
exchange the temperatures of replicas, not their positions.
"""

import argparse
import json
import os
import time
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.systems import alanine_dipeptide

HERE = Path(__file__).resolve().parent
TEMPERATURES_K = 300.0 * 2.0 ** (np.arange(5) / 4)  # 300 to 600 K, geometric
KB = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
TIMESTEP_PS = 0.002
FRICTION_PER_PS = 1.0
HYDROGEN_MASS_AMU = 4.0
STEPS_PER_SWAP = 50
SWAPS_PER_RECORD = 10  # 1 ps
RECORDS_PER_FRAME = 10  # 10 ps
RECORDS_PER_SEGMENT = 250
EQUILIBRATION_SWAPS = 1000  # 100 ps
FRAME_STRIDE = 2  # of the stored frames, in the exported file: 20 ps
PHI, PSI = [4, 6, 8, 14], [6, 8, 14, 16]
OMEGAS = [[1, 4, 6, 8], [8, 14, 16, 18]]


class ReplicaExchange:
    """Replicas with one OpenMM Context each, resumed from a checkpoint if the directory has one."""

    def __init__(self, directory, seed):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        molecule = alanine_dipeptide()
        for atom in molecule.topology.atoms():
            if atom.element is app.element.hydrogen:
                molecule.system.setParticleMass(atom.index, HYDROGEN_MASS_AMU)
        self.topology = molecule.mdtraj_topology
        self.rng = np.random.default_rng(seed)
        self.rung_of = np.arange(len(TEMPERATURES_K))  # of each replica
        self.swap_index = self.segment = 0
        self.attempts = np.zeros(len(TEMPERATURES_K) - 1, dtype=np.int64)
        self.accepted = self.attempts.copy()
        platform = openmm.Platform.getPlatformByName("Reference")
        self.contexts = []
        for temperature in TEMPERATURES_K:
            integrator = openmm.LangevinMiddleIntegrator(temperature, FRICTION_PER_PS, TIMESTEP_PS)
            # A resumed run draws new noise: the seed depends on where it continues.
            integrator.setRandomNumberSeed(int(self.rng.integers(1, 2**31 - 1)))
            self.contexts.append(openmm.Context(molecule.system, integrator, platform))
        checkpoint = self.directory / "checkpoint.npz"
        if checkpoint.exists():
            self.load(checkpoint)
        else:
            for context, temperature in zip(self.contexts, TEMPERATURES_K, strict=True):
                context.setPositions(molecule.positions)
                openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
                seed = int(self.rng.integers(1, 2**31 - 1))
                context.setVelocitiesToTemperature(temperature, seed)
            for _ in range(EQUILIBRATION_SWAPS):
                self.advance()

    def load(self, path):
        """Restore the state from a checkpoint."""
        with np.load(path) as data:
            self.rung_of = data["rung_of"]
            self.swap_index, self.segment = int(data["swap_index"]), int(data["segment"])
            self.attempts, self.accepted = data["attempts"], data["accepted"]
            self.rng.bit_generator.state = json.loads(str(data["rng"]))
            for k, context in enumerate(self.contexts):
                context.setPositions(data["positions"][k])
                context.setVelocities(data["velocities"][k])
                context.getIntegrator().setTemperature(TEMPERATURES_K[self.rung_of[k]])

    def save(self):
        """Write a checkpoint, atomically."""
        states = [c.getState(getPositions=True, getVelocities=True) for c in self.contexts]
        path = self.directory / "checkpoint.tmp.npz"
        np.savez(
            path,
            rung_of=self.rung_of,
            swap_index=self.swap_index,
            segment=self.segment,
            attempts=self.attempts,
            accepted=self.accepted,
            rng=json.dumps(self.rng.bit_generator.state),
            positions=[s.getPositions(asNumpy=True)._value for s in states],
            velocities=[s.getVelocities(asNumpy=True)._value for s in states],
        )
        os.replace(path, self.directory / "checkpoint.npz")

    def advance(self):
        """Run dynamics of every replica, then even-odd swaps; return the energies by replica."""
        energies = np.empty(len(self.contexts))
        for k, context in enumerate(self.contexts):
            context.getIntegrator().step(STEPS_PER_SWAP)
            state = context.getState(getEnergy=True)
            energies[k] = state.getPotentialEnergy()._value
        replica_at = np.argsort(self.rung_of)
        beta = 1.0 / (KB * TEMPERATURES_K)
        for low in range(self.swap_index % 2, len(self.contexts) - 1, 2):
            a, b = replica_at[low], replica_at[low + 1]
            log_alpha = (beta[low] - beta[low + 1]) * (energies[a] - energies[b])
            self.attempts[low] += 1
            if np.log(self.rng.random()) < log_alpha:
                self.accepted[low] += 1
                self.set_rung(a, low + 1)
                self.set_rung(b, low)
        self.swap_index += 1
        return energies

    def set_rung(self, replica, rung):
        """Move a replica to another temperature, rescaling its velocities."""
        context = self.contexts[replica]
        scale = np.sqrt(TEMPERATURES_K[rung] / TEMPERATURES_K[self.rung_of[replica]])
        state = context.getState(getVelocities=True)
        context.setVelocities(state.getVelocities(asNumpy=True)._value * scale)
        context.getIntegrator().setTemperature(TEMPERATURES_K[rung])
        self.rung_of[replica] = rung

    def run_segment(self):
        """Run and write the next segment of records."""
        n_rungs = len(self.contexts)
        positions = np.empty((RECORDS_PER_SEGMENT, n_rungs, self.topology.n_atoms, 3))
        energies = np.empty((RECORDS_PER_SEGMENT, n_rungs))
        replicas = np.empty((RECORDS_PER_SEGMENT, n_rungs), dtype=np.int8)
        for i in range(RECORDS_PER_SEGMENT):
            for _ in range(SWAPS_PER_RECORD):
                by_replica = self.advance()
            order = np.argsort(self.rung_of)
            replicas[i] = order
            energies[i] = by_replica[order]
            for rung, replica in enumerate(order):
                state = self.contexts[replica].getState(getPositions=True)
                positions[i, rung] = state.getPositions(asNumpy=True)._value
        frames = mdtraj.Trajectory(positions.reshape(-1, *positions.shape[2:]), self.topology)
        angles = mdtraj.compute_dihedrals(frames, [PHI, PSI])
        path = self.directory / f"segment{self.segment:06d}.npz"
        np.savez(
            path.with_suffix(".tmp.npz"),
            phi=angles[:, 0].reshape(energies.shape).astype(np.float32),
            psi=angles[:, 1].reshape(energies.shape).astype(np.float32),
            energy=energies.astype(np.float32),
            replica=replicas,
            positions=positions[::RECORDS_PER_FRAME].astype(np.float32),
        )
        os.replace(path.with_suffix(".tmp.npz"), path)
        self.segment += 1
        self.save()


def run(args):
    """Append segments to the directory until the time is over."""
    segments = len(list(Path(args.directory).glob("segment*.npz")))
    sampler = ReplicaExchange(args.directory, args.seed + segments)
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        start = time.monotonic()
        sampler.run_segment()
        rates = np.array2string(sampler.accepted / sampler.attempts, precision=3)
        duration = f"{time.monotonic() - start:.1f} s"
        print(f"segment {sampler.segment}: {duration}, swaps accepted {rates}", flush=True)


def export(args):
    """Write all segments to one file, with standard errors and thinned positions of two rungs."""
    from openmm_tsf.analysis.uncertainty import estimate_mean

    paths = sorted(Path(args.directory).glob("segment*.npz"))
    parts = [np.load(path) for path in paths if ".tmp" not in path.name]
    names = ("phi", "psi", "energy", "replica", "positions")
    data = {name: np.concatenate([part[name] for part in parts]) for name in names}
    positions = data.pop("positions")
    stored = {"300K": positions[::FRAME_STRIDE, 0], "600K": positions[::FRAME_STRIDE, -1]}
    topology = alanine_dipeptide().mdtraj_topology
    frames = mdtraj.Trajectory(positions.reshape(-1, *positions.shape[2:]), topology)
    omega = mdtraj.compute_dihedrals(frames, OMEGAS)
    n_cis = int((np.abs(omega) < np.pi / 2).sum())
    if args.append:  # the records of an earlier, independent run come first
        with np.load(args.output) as earlier:
            n_cis += int(earlier["n_cis_frames"])
            data = {key: np.concatenate([earlier[key], data[key]]) for key in data}
            for key in stored:
                stored[key] = np.concatenate([earlier[f"positions_{key}"], stored[key]])
    columns = {}
    for name, series in (("phi_positive", data["phi"] > 0), ("mean_energy", data["energy"])):
        means = [estimate_mean(series[:, rung, None]) for rung in range(len(TEMPERATURES_K))]
        columns[name] = np.array([estimate.value for estimate in means])
        columns[name + "_stderr"] = np.array([estimate.stderr for estimate in means])
    np.savez_compressed(
        args.output,
        temperatures_K=TEMPERATURES_K,
        interval_ps=TIMESTEP_PS * STEPS_PER_SWAP * SWAPS_PER_RECORD,
        n_md_steps=len(data["phi"]) * len(TEMPERATURES_K) * SWAPS_PER_RECORD * STEPS_PER_SWAP,
        n_cis_frames=n_cis,
        positions_300K=stored["300K"],
        positions_600K=stored["600K"],
        **data,
        **columns,
    )
    print(f"{len(data['phi'])} ps per rung, {n_cis} frames with a cis peptide bond")
    for rung, kelvin in enumerate(TEMPERATURES_K):
        p, error = columns["phi_positive"][rung], columns["phi_positive_stderr"][rung]
        energy, energy_error = columns["mean_energy"][rung], columns["mean_energy_stderr"][rung]
        print(
            f"{kelvin:7.2f} K  P(phi>0) = {p:.5f} +- {error:.5f} ({error / p:.1%})  "
            f"<U> = {energy:.3f} +- {energy_error:.3f} kJ/mol"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--directory", required=True)
    command.add_argument("--minutes", type=float, required=True)
    command.add_argument("--seed", type=int, default=20201)
    command.set_defaults(function=run)
    command = commands.add_parser("export")
    command.add_argument("--directory", required=True)
    command.add_argument("--output", default=str(HERE / "ala2_reference.npz"))
    keep = "keep the records already in the output file"
    command.add_argument("--append", action="store_true", help=keep)
    command.set_defaults(function=export)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
