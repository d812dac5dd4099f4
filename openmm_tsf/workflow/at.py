"""Samples at any temperature, drawn anew with the frozen flow of a run."""

import logging
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import torch

from openmm_tsf.analysis.convergence import assess_mean, assess_probability
from openmm_tsf.analysis.load import Run, load_run
from openmm_tsf.analysis.observables import DIHEDRAL
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.files import PathLike, check_new_file, replace_together, write_json
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.provenance import hash_of, read_sampler_config
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.files import read_molecule
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.systems.slow_torsions import torsion_angles
from openmm_tsf.utils.random import Seeds
from openmm_tsf.utils.validation import check_instance, check_int
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import batch_of, open_potential, planned_sampling
from openmm_tsf.workflow.record import recorded_settings
from openmm_tsf.workflow.sample import kernels_of, sampling_threads
from openmm_tsf.workflow.settings import SamplingSettings

logger = logging.getLogger(__name__)

#: Independent walkers, at most; fewer for fewer frames.
_N_WALKERS = 100
#: Iterations that tune step sizes. Walkers start from weighted frames, which are of the ensemble
#: already, up to the error of the run.
N_TUNING = 50


@dataclass(frozen=True)
class TemperatureSamples:
    """What `sample_at` returns.

    Attributes
    ----------
    trajectory
        The frames, of equal weight: iteration by iteration, the walkers of an iteration in order.
    energy
        [n, W] of n iterations and W walkers in kJ/mol.
    record
        What is written beside the frames: the temperature, seed and sizes; the acceptance of each
        kernel; ⟨U⟩ (``energy_kJ_mol``), P(dihedral > 0) (``dihedral_positive``) and the means of
        observables that are not dihedrals (``observable_mean``), with the fields
        of `openmm_tsf.analysis.convergence.Assessment`; beside each of them the run's estimate by
        MBAR at the same temperature, and z of their difference.
    """

    trajectory: mdtraj.Trajectory
    energy: Array
    record: dict[str, Any]


class _EnergyReporter:
    """Keeps the energies [W] of every iteration."""

    interval = 1

    def __init__(self) -> None:
        self.energies: list[Array] = []

    def __call__(self, sampler: Any, state: WalkerState) -> None:
        self.energies.append(state.energy[:, 0].cpu().numpy().copy())


def sample_at(
    run: PathLike | Run,
    temperature: Any,
    output: PathLike | None = None,
    *,
    n_frames: int = 10_000,
    potential: Potential | None = None,
    options: RunOptions | None = None,
) -> TemperatureSamples:
    """Sample one temperature with the frozen flow of a run, which need not have a rung there.

    Walkers start from frames of the run, drawn by their weights at this temperature (`Run.at`).
    Then they make the moves of the run, without its swaps (of a run that records none, the moves of
    the defaults of :class:`openmm_tsf.workflow.settings.SamplingSettings`): the flow proposes at
    this very temperature, between pieces of dynamics. All are accepted or rejected by Metropolis'
    rule, so that the samples are of the Boltzmann distribution there, however well the flow has
    learned it. `Run.at` needs no energies, but its frames have weights, and are those of the rungs.

    Parameters
    ----------
    run
        A run directory with its flow, complete or not; it is only read.
    temperature
        In K, of the run's ladder, or near it: see `Run.at`.
    output
        DCD file to write, with a JSON file of the same name beside it; both are new, and complete
        or absent. None to write nothing.
    n_frames
        Frames to draw: at least as many, in whole iterations of 100 walkers (or of as many walkers
        as frames).
    potential
        The energy that the run was sampled with, if that is not one of the molecule's.
    options
        Seed (1 by default), platform, device and progress.

    Raises
    ------
    FileExistsError
        If `output` or the JSON file exists.
    ValueError
        If the run is not of a molecule, its flow or energy is not the one that it was sampled with,
        or too few of its samples count at this temperature.
    """
    check_instance(options, "options", RunOptions)
    check_instance(potential, "potential", Potential)
    options, n_frames = options or RunOptions(), check_int(n_frames, "n_frames")
    if options.resume:
        raise ValueError("resume: expected False, the samples of one temperature are written once")
    file = None if output is None else _check_output(output)
    data = run if isinstance(run, Run) else load_run(Path(run))
    data.observe(options.observe)
    molecule, flow = _read_run(data, potential)
    flow = place_for_sampling(flow, torch.device(options.choose_device({})))
    weighted, begun = data.at(temperature), time.monotonic()
    kelvin, n_walkers = weighted.temperature, min(_N_WALKERS, n_frames)
    settings = replace(
        recorded_settings(data.path, "sample", SamplingSettings) or SamplingSettings(),
        temperatures=(kelvin,),
        n_walkers=n_walkers,
        n_iterations=-(-n_frames // n_walkers),
        n_shards=1,
        n_tuning=N_TUNING,
        save_interval=1,
        numbers_interval=None,
    )
    seeds = Seeds(options.choose_seed({}))
    chosen = weighted.draw_indices(n_walkers, seeds.next())
    index = data.frame_index()
    energies = np.moveaxis(data.energy[index], 2, 0).ravel()[chosen]
    start = torch.from_numpy(weighted.xyz[chosen].astype(np.float64))
    with sampling_threads(), _open(molecule, potential, options, settings) as energy_function:
        before = energy_function.n_evaluations
        _check_energies(energy_function, start, energies)
        kernels = kernels_of(settings, molecule, flow, energy_function)
        with ParallelTempering(
            molecule, flow, (kelvin,), n_walkers, kernels, energy_function, seeds.next()
        ) as sampler:
            positions, energy = _sample(sampler, start, settings, options.progress)
    record = {
        "temperature_K": kelvin,
        "seed": options.choose_seed({}),
        "run": str(data.path),
        "run_temperatures_K": data.temperatures.tolist(),
        "run_iterations": [data.start, data.start + int(index[-1]) + 1],
        "start_n_eff": weighted.n_eff,
        "n_frames": energy.size,
        **_describe(sampler, settings),
        "energy_evaluations": energy_function.n_evaluations - before,
        "wall_seconds": round(time.monotonic() - begun, 3),
        **_estimates(data, kelvin, energy, positions),
        "versions": package_versions(),
    }
    frames = mdtraj.Trajectory(positions.reshape(-1, *positions.shape[2:]), data.topology)
    result = TemperatureSamples(frames, energy, json_ready(record))
    if file is not None:
        _write(result, file)
    return result


def _check_output(output: PathLike) -> Path:
    """Return the path of the DCD file to write; refuse files that exist."""
    file = Path(output)
    if file.suffix != ".dcd":
        raise ValueError(f"output: expected a name that ends in .dcd, got {file}")
    for path in (file, file.with_suffix(".json")):
        check_new_file(path)
    return file


def _read_run(run: Run, potential: Potential | None) -> tuple[MolecularSystem, AugmentedFlow]:
    """Return the molecule of a run and the flow that it was sampled with."""
    if not run.has_structure:
        raise ValueError(f"run: expected one of a molecule, {run.path} has no structure")
    choices = read_sampler_config(run.path)["choices"]
    sampled_with = choices["potential"]["class"]
    if potential is None and sampled_with not in ("TorchPotential", "OpenMMPotential"):
        raise ValueError(f"potential: expected the run's, a {sampled_with}, got none")
    molecule, flow = read_molecule(run.path), load_flow(run.path / "flow.pt")
    if hash_of(flow) != choices["flow"]["sha256"]:
        raise ValueError(f"run: {run.path / 'flow.pt'} is not the flow that it was sampled with")
    return molecule, flow


def _open(
    molecule: MolecularSystem,
    potential: Potential | None,
    options: RunOptions,
    settings: SamplingSettings,
) -> Potential:
    """Return the given potential, or the fastest for this much work."""
    if potential is not None:
        return potential
    return open_potential(
        molecule,
        options.platform,
        planned_sampling(settings),
        batch_of(settings),
        device=torch.device(options.choose_device({})),
    )


def _check_energies(potential: Potential, x: torch.Tensor, expected: Array) -> None:
    """Refuse a potential that does not give the energies [W] of a run's frames [W, N, 3]."""
    with torch.no_grad():
        energy = evaluate.energy(potential, x).cpu().numpy()
    # Frames have single precision, and maybe the platform.
    wrong = ~(np.abs(energy - expected) <= 0.1 + 1e-4 * np.abs(expected))
    if wrong.any():
        raise ValueError(
            f"potential: expected the energies of the run, got {energy[wrong][0]:g} for "
            f"{expected[wrong][0]:g} kJ/mol ({wrong.sum()} of {len(wrong)} frames differ)"
        )


def _sample(
    sampler: ParallelTempering, start: torch.Tensor, settings: SamplingSettings, progress: bool
) -> tuple[Array, Array]:
    """Return positions [n, W, N, 3] and energies [n, W] after the walkers' first iterations."""
    sampler.set_positions(start[:, None])
    sampler.tune(settings.n_tuning, progress=progress)
    reporter = _EnergyReporter()
    sampler.reporters.append(reporter)
    positions = sampler.run(settings.n_iterations, progress=progress, collect=True)
    assert positions is not None
    return positions[:, :, 0].cpu().numpy(), np.array(reporter.energies)


def _describe(sampler: ParallelTempering, settings: SamplingSettings) -> dict[str, Any]:
    """Return the sizes, choices and counts of the sampler for the record."""
    totals = sampler.totals
    return {
        "n_walkers": settings.n_walkers,
        "n_iterations": settings.n_iterations,
        "n_tuning": settings.n_tuning,
        "acceptance": {name: float(info.acceptance[0]) for name, info in totals.items()},
        "rejected_non_finite": sum(info.rejected_non_finite for info in totals.values()),
        "mirror_images": sum(info.mirror_images for info in totals.values()),
        "choices": sampler.choices(),
    }


def _estimates(run: Run, kelvin: float, energy: Array, positions: Array) -> dict[str, Any]:
    """Return what the samples say of ⟨U⟩ and of observables, beside the run's own estimates."""

    def compared(assessed: Any, observable: Any) -> dict[str, Any]:
        with warnings.catch_warnings():  # `Run.at` has said that it is outside the ladder
            warnings.simplefilter("ignore", UserWarning)
            curve = run.curve(observable, kelvin)
        value, stderr = float(curve.value[0]), float(curve.stderr[0])
        z = (assessed.value - value) / np.hypot(assessed.stderr, stderr)
        return assessed.to_dict() | {"run_value": value, "run_stderr": stderr, "z": float(z)}

    dihedrals = dict(torsion_angles(positions, run.dihedral_atoms))
    frames = mdtraj.Trajectory(positions.reshape(-1, *positions.shape[2:]), run.topology)
    means = {}
    for name, observable in run.observables.items():
        values = observable.evaluate(frames).reshape(energy.shape)
        if observable.kind != DIHEDRAL:
            means[name] = compared(assess_mean(values), run.observable(name))
        elif name not in dihedrals:
            dihedrals[name] = values

    return {
        "energy_kJ_mol": compared(assess_mean(energy), "energy"),
        "dihedral_positive": {
            name: compared(assess_probability(angle > 0), run.observable(name) > 0)
            for name, angle in dihedrals.items()
        },
        **({"observable_mean": means} if means else {}),
    }


def _write(samples: TemperatureSamples, file: Path) -> None:
    _check_output(file)  # another process may have written it in the meantime
    with replace_together(file.absolute().parent) as folder:
        writer = DCDWriter(folder / file.name, samples.trajectory.n_atoms)
        writer.create(f"{samples.record['temperature_K']:g} K; frames: iteration, walker")
        writer.append(samples.trajectory.xyz, 0)
        write_json(folder / file.with_suffix(".json").name, samples.record)
