"""Run directories with known answers, written without any sampler."""

import json
from pathlib import Path

import mdtraj
import numpy as np
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.io.run_config import CONFIG_FORMAT
from openmm_tsf.units import KB


def four_atoms() -> mdtraj.Topology:
    """Return a chain of four carbons: one dihedral."""
    topology = mdtraj.Topology()
    residue = topology.add_residue("BUT", topology.add_chain())
    for k in range(4):
        topology.add_atom(f"C{k}", mdtraj.element.carbon, residue)
    return topology


def chain_positions(dihedral):
    """Return positions [..., 4, 3] in nm of a chain with right angles and a dihedral (rad)."""
    phi = np.asarray(dihedral)
    x = np.zeros((*phi.shape, 4, 3))
    x[..., 0, 0] = 1.0
    x[..., 2:, 2] = 1.0
    x[..., 3, 0], x[..., 3, 1] = np.cos(phi), np.sin(phi)
    return (0.15 * x).astype(np.float32)


def two_state_chains(rng, shape, p, rho):
    """Return stationary two-state chains [n, ...] with P(1) = p and autocorrelation rho**lag.

    Exact statistical inefficiency: (1 + rho) / (1 - rho).
    """
    state = rng.random(shape[1:]) < p
    out = np.empty(shape, dtype=bool)
    for i in range(shape[0]):
        renew = rng.random(shape[1:]) >= rho
        state = np.where(renew, rng.random(shape[1:]) < p, state)
        out[i] = state
    return out


class DoubleWell:
    """A dihedral in a double well and 20 harmonic modes: everything known by quadrature.

    V(φ) = 4 (1 + cos 2φ) + 3 sin φ kJ/mol: minima near ±90°, that at φ < 0 lower.
    """

    MODES = 20

    def __init__(self, points=100_001):
        self.grid = np.linspace(-np.pi, np.pi, points)

    @staticmethod
    def potential(phi):
        return 4 * (1 + np.cos(2 * phi)) + 3 * np.sin(phi)

    def density(self, kelvin):
        weight = np.exp(-self.potential(self.grid) / (KB * kelvin))
        return weight / np.trapezoid(weight, self.grid)

    def _mean(self, values, kelvin):
        return np.trapezoid(values * self.density(kelvin), self.grid)

    def exact(self, kelvin):
        """Return ⟨U⟩ in kJ/mol, configurational C_V in kJ/(mol K), ΔF_φ in kT."""
        v, modes = self.potential(self.grid), 0.5 * self.MODES * KB
        mean = self._mean(v, kelvin)
        capacity = modes + self._mean((v - mean) ** 2, kelvin) / (KB * kelvin**2)
        positive = self.probability(0.0, np.pi, kelvin)
        return np.array([mean + modes * kelvin, capacity, np.log((1 - positive) / positive)])

    def probability(self, low, high, kelvin):
        """Return P(low < φ < high)."""
        return np.diff(np.interp([low, high], self.grid, self.cumulative(kelvin)))[0]

    def cumulative(self, kelvin):
        """Return the cumulative distribution of φ on the grid."""
        p = self.density(kelvin)
        steps = 0.5 * (p[1:] + p[:-1]) * np.diff(self.grid)
        total = np.concatenate([[0.0], np.cumsum(steps)])
        return total / total[-1]

    def draw(self, rng, shape, temperatures, rho=0.0):
        """Return energies and φ [n, W, R]: stationary chains, autocorrelation rho**lag, exact.

        All rungs of a walker use one uniform number, so that they are correlated as in replica
        exchange.
        """
        uniform = rng.random(shape)
        radius = rng.chisquare(self.MODES, shape)
        keep = rng.random(shape) < rho
        for i in range(1, shape[0]):
            uniform[i] = np.where(keep[i], uniform[i - 1], uniform[i])
            radius[i] = np.where(keep[i], radius[i - 1], radius[i])
        quantiles = [np.interp(uniform, self.cumulative(t), self.grid) for t in temperatures]
        phi = np.stack(quantiles, axis=-1)
        energy = self.potential(phi) + 0.5 * KB * np.asarray(temperatures) * radius[..., None]
        return energy, phi


def write_run(
    path,
    temperatures,
    energy,
    dihedrals=None,
    replica=None,
    positions=None,
    per_segment=100,
    kernels=None,
    frame_interval=None,
    **config,
):
    """Write a run directory: energy [n, W, R], named dihedrals, positions [n, W, R, N, 3].

    With a `frame_interval` only iterations that are multiples of it have frames.
    """
    path = Path(path)
    (path / "segments").mkdir(parents=True)
    dihedrals = dihedrals or {}
    n, n_walkers, n_rungs = energy.shape
    if replica is None:
        replica = np.broadcast_to(np.arange(n_rungs), energy.shape)
    if kernels is None:
        kernels = {"local": n_rungs, "flow_walk": n_rungs, "swap_plain": max(n_rungs - 1, 0)}
    content = {
        "format": CONFIG_FORMAT,
        "temperatures_K": list(map(float, temperatures)),
        "n_walkers": n_walkers,
        "seed": 5,
        "dihedrals": {name: [0, 1, 2, 3] for name in dihedrals},
        "boltzmann_constant": KB,
        "choices": {},
        "versions": {"numpy": np.__version__},
    }
    (path / "config.json").write_text(json.dumps(content | config))
    angles = np.stack([np.zeros(energy.shape), *dihedrals.values()], axis=-1)[..., 1:]
    for number, start in enumerate(range(0, n, per_segment)):
        part = slice(start, min(start + per_segment, n))
        length = part.stop - start
        arrays = {
            "energy": energy[part],
            "replica": replica[part].astype(np.int16),
            "iteration": np.arange(part.start, part.stop),
            "dihedrals": angles[part].astype(np.float32),
            "rejected_non_finite": np.int64(1),
            "outside_domain": np.int64(0),
            "mirror_images": np.int64(2),
            "n_evaluations": np.int64(100 * length),
            "wall_seconds": 0.5,
        }
        for k, (name, size) in enumerate(kernels.items()):
            arrays[f"proposed_{name}"] = np.full(size, 10 * length, dtype=np.int64)
            arrays[f"accepted_{name}"] = np.full(size, (k + 2) * length, dtype=np.int64)
        if frame_interval is not None:
            framed = arrays["iteration"] % frame_interval == 0
            arrays["frame_iteration"] = arrays["iteration"][framed]
        np.savez(path / "segments" / f"segment_{number:06d}.npz", **arrays)
    if positions is not None:
        write_frames(path, temperatures, positions[:: frame_interval or 1])
    return path


def write_frames(path, temperatures, positions, topology=None):
    """Write DCD files with OpenMM, and topology.pdb."""
    topology = topology or four_atoms()
    openmm_topology = topology.to_openmm()
    n_atoms = positions.shape[-2]
    with open(Path(path) / "topology.pdb", "w") as file:
        app.PDBFile.writeFile(openmm_topology, positions[0, 0, 0] * unit.nanometer, file)
    for rung, temperature in enumerate(temperatures):
        with open(Path(path) / f"T{temperature:.2f}K.dcd", "wb") as file:
            dcd = app.DCDFile(file, openmm_topology, 1.0)
            for frame in positions[:, :, rung].reshape(-1, n_atoms, 3):
                dcd.writeModel(frame * unit.nanometer)
