"""Reference data by replica exchange of Metropolised dynamics alone, without any flow.

    python data/make_reference.py run --directory reference_run --iterations 10000
    python data/make_reference.py export --directory reference_run --output data/ala2_reference.npz

``run`` continues a directory that exists, so that a reference can be extended or killed at any
time; ``export`` writes one file from its iterations after the burn-in. The molecule is alanine
dipeptide in the default force field, in another (``--alanine-dipeptide ff96-obc1``), or that of
``--pdb`` with ``--forcefield`` or ``--system``.

Every iteration is 25 steps of velocity Verlet (2 fs, hydrogens of 4 amu, partly refreshed
velocities) whose energy error is accepted or rejected, hence without an error of the time step,
and swaps between neighbouring rungs. Masses do not enter the Boltzmann distribution of the
positions. Walkers start at random frames of 600 K on all rungs: the shipped ones, or 400 of MD
(200 ps) for other molecules.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from openmm_tsf.analysis import Run, load_run
from openmm_tsf.analysis.frame_checks import is_cis, peptide_bonds
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.kernels import PlainSwap, TorchLangevin
from openmm_tsf.systems import MDDataset, MolecularSystem, alanine_dipeptide
from openmm_tsf.systems.files import load_molecule
from openmm_tsf.units import as_temperatures
from openmm_tsf.workflow.frames import load_trajectory
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import MDSettings

#: 300 to 848.5 K; 300, 424.26 and 600 K are rungs. The hot ones are where phi crosses its barriers.
TEMPERATURES_K = [300.0 * 2.0 ** (k / 4) for k in range(5)] + [
    600.0 * 2.0 ** (k / 6) for k in range(1, 4)
]
HIGHEST_KEPT_K = 600.0
TIMESTEP_PS, FRICTION_PER_PS, N_STEPS = 0.002, 5.0, 25
SAVE_INTERVAL = 5  # iterations: 0.25 ps
N_POSITIONS = 2000  # frames that are kept at 300 and at 600 K


def read_molecule(args: argparse.Namespace) -> MolecularSystem:
    """Return the molecule of the arguments."""
    if args.pdb is not None:
        return load_molecule(args.pdb, args.system, args.forcefield)
    return alanine_dipeptide(args.alanine_dipeptide)


def start_frames(molecule: MolecularSystem, directory: Path, seed: int) -> MDDataset:
    """Return frames of 600 K: the shipped ones, or those of MD beside the directory."""
    if molecule.fingerprint == alanine_dipeptide().fingerprint:
        return MDDataset.shipped(molecule)
    folder = directory.with_name(directory.name + "_start")
    settings = MDSettings(n_frames=400, steps_per_frame=500, seed=seed)
    run_md(molecule, folder, settings, options=RunOptions(resume=folder.exists()))
    return load_trajectory(folder, molecule)


def make_sampler(
    molecule: MolecularSystem,
    dataset: MDDataset,
    temperatures: Sequence[float],
    n_walkers: int,
    seed: int,
) -> ParallelTempering:
    """Return the sampler at its start."""
    potential = molecule.potential("torch", compile=True)
    masses = torch.tensor(molecule.heavy_hydrogen_masses)
    kernels = [
        TorchLangevin(potential, temperatures, masses, None, N_STEPS, TIMESTEP_PS, FRICTION_PER_PS),
        PlainSwap(temperatures, potential.boltzmann_constant),
    ]
    # The sampler asks for a flow, which none of these kernels uses.
    unused = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,), seed=1)
    sampler = ParallelTempering(
        molecule, unused, temperatures, n_walkers, kernels, potential=potential, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    shape = (n_walkers, len(temperatures))
    index = torch.randint(len(dataset), (math.prod(shape),), generator=generator)
    sampler.set_positions(dataset.positions[index].unflatten(0, shape))
    return sampler


def check_ladder(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Return the temperatures of a ladder with swaps, ascending and at least two."""
    ladder = as_temperatures(temperatures, "--temperatures")
    if len(ladder) < 2:
        raise ValueError(f"--temperatures: expected at least two, to swap between, got {ladder}")
    return ladder


def run(args: argparse.Namespace) -> None:
    """Sample until the directory has the given number of iterations."""
    temperatures = check_ladder(args.temperatures)
    molecule, directory = read_molecule(args), Path(args.directory)
    dataset = start_frames(molecule, directory, args.seed)
    sampler = make_sampler(molecule, dataset, temperatures, args.walkers, args.seed)
    if (directory / "config.json").exists():
        sampler.resume(directory)
    left = args.iterations - sampler.state.iteration
    if left > 0:
        sampler.run(left, directory, save_interval=SAVE_INTERVAL)


def find_cis(run: Run) -> npt.NDArray[np.bool_]:
    """Return whether a peptide bond is cis in each frame [F, W, R]."""
    _, omegas = peptide_bonds(run.topology)
    parts = [
        is_cis(run.trajectory(float(t)), omegas).any(axis=1).reshape(-1, run.n_walkers)
        for t in run.temperatures
    ]
    return np.stack(parts, axis=-1)


def export(args: argparse.Namespace) -> None:
    """Write the samples after the burn-in to one file, with standard errors and some positions.

    Peptide bonds isomerise too rarely for an equilibrium, at the hottest rungs once in a while:
    walkers in which one did, at any rung, are left out.
    """
    run = load_run(args.directory, start=args.burn_in // SAVE_INTERVAL)
    kept = np.flatnonzero(run.temperatures <= HIGHEST_KEPT_K + 0.01)
    walkers = np.flatnonzero(~find_cis(run).any(axis=(0, 2)))
    part = np.ix_(np.arange(run.n_used)[:: args.stride], walkers, kept)
    # 0.002 rad and 1/64 kJ/mol: far below any error, and half of the size.
    data = {
        name: run.dihedral_at_all_rungs(name)[part].astype(np.float16)
        for name in run.dihedral_atoms
    }
    data["energy"] = (np.round(64.0 * run.energy[part]) / 64.0).astype(np.float32)
    for temperature in (300.0, 600.0):
        xyz = run.trajectory(temperature).xyz.reshape(-1, run.n_walkers, run.topology.n_atoms, 3)
        frames = xyz[:, walkers].reshape(-1, *xyz.shape[2:])
        chosen = np.linspace(0, len(frames) - 1, N_POSITIONS).astype(int)
        data[f"positions_{temperature:.0f}K"] = frames[chosen]
    series = {"mean_energy": run.energy}
    if "phi" in run.dihedral_atoms:
        series["phi_positive"] = run.dihedral_at_all_rungs("phi") > 0
    for name, values in series.items():
        means = [estimate_mean(values[:, walkers, rung]) for rung in kept]
        data[name] = np.array([estimate.value for estimate in means])
        data[name + "_stderr"] = np.array([estimate.stderr for estimate in means])
    np.savez_compressed(
        args.output,
        temperatures_K=run.temperatures[kept],
        interval_ps=TIMESTEP_PS * N_STEPS * SAVE_INTERVAL * args.stride,
        n_md_steps=run.segments.n_evaluations,
        n_walkers_left_out=run.n_walkers - len(walkers),
        **data,
    )
    n_frames = len(data["energy"])
    print(f"{n_frames} frames of {len(walkers)} of {run.n_walkers} walkers at a rung")
    for rung, kelvin in enumerate(run.temperatures[kept]):
        line = f"{kelvin:7.2f} K"
        for name in series:
            value, error = data[name][rung], data[name + "_stderr"][rung]
            line += f"  {name} {value:.5f} +- {error:.5f} ({abs(error / value):.2%})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("--directory", required=True)
    command.add_argument("--iterations", type=int, required=True, help="in all, of 50 fs each")
    command.add_argument("--walkers", type=int, default=128)
    command.add_argument(
        "--temperatures", type=float, nargs="+", default=TEMPERATURES_K, metavar="K",
        help="another ladder; export needs one with 300 and 600 K",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=20201)
    command.add_argument("--alanine-dipeptide", default="amber99sbildn-obc2", help="force field")
    command.add_argument("--pdb", help="another molecule, with --forcefield or --system")
    command.add_argument("--system", metavar="XML", help="serialized System")
    command.add_argument("--forcefield", nargs="+", metavar="XML")
    command.set_defaults(function=run)
    command = commands.add_parser("export")
    command.add_argument("--directory", required=True)
    command.add_argument("--output", required=True)
    command.add_argument("--burn-in", type=int, default=1500, help="iterations to leave out")
    command.add_argument("--stride", type=int, default=1, help="saved iterations, 0.25 ps each")
    command.set_defaults(function=export)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
