"""The frozen flow of a run on another System of the same Topology.

Another force field, another model of the solvent, a restraint: the flow was not trained for it, but
it proposes, and Metropolis' rule with the other energy decides. So the samples are exact there, for
a small part of what a training costs. The flow stays as it is; where it is too far off, few of its
proposals are accepted, and the run says that it is not converged.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmm_tsf.analysis.bar import estimate_difference
from openmm_tsf.analysis.convergence import Assessment, assess_mean, assess_probability
from openmm_tsf.analysis.load import Run, load_run
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.coordinates.bond_graph import centres_of
from openmm_tsf.coordinates.chirality import handedness_signs
from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import place_for_sampling
from openmm_tsf.io.directory import open_output_directory
from openmm_tsf.io.files import PathLike, write_json
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.provenance import hash_of
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.random import Seeds, make_generator
from openmm_tsf.utils.topology import bonds_of
from openmm_tsf.utils.validation import check_instance
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.at import read_molecule_and_flow
from openmm_tsf.workflow.costs import Costs
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.potential_choice import batch_of, open_potential, planned_sampling
from openmm_tsf.workflow.record import (
    new_config,
    recorded_choices,
    recorded_settings,
    resumed_choices,
)
from openmm_tsf.workflow.sample import (
    has_started,
    make_sampler,
    sample,
    sample_and_analyze,
    sampler_seeds,
    sampling_threads,
    start_sampling,
)
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.stage import Stage
from openmm_tsf.workflow.start import choose_by_weight, replace_half_by_draws
from openmm_tsf.workflow.until import check_targets, record_observables

logger = logging.getLogger(__name__)

#: Written beside the run on the other System.
RETARGET = "retarget.json"
#: Frames of each rung whose energy in the other System is computed, for the start and for ΔF.
_N_FRAMES = 1000
#: Walkers, iterations of tuning and of production: some 2e5 evaluations on three rungs.
_LENGTHS = {"n_walkers": 16, "n_tuning": 40, "n_iterations": 350}


@dataclass(frozen=True)
class _Frames:
    """Frames of one rung, evenly spaced in time: x [n W, N, 3] in nm, energies [n, W] in kJ/mol."""

    x: Tensor
    energy: Array


def retarget_settings(run: PathLike) -> SamplingSettings:
    """Return the default settings: moves and ladder of the run, for some 2e5 evaluations."""
    recorded = recorded_settings(run, "sample", SamplingSettings) or SamplingSettings()
    settings: SamplingSettings = replace(
        recorded, until=(), n_shards=1, save_interval=1, numbers_interval=None, **_LENGTHS
    )
    return settings


def retarget(
    run: PathLike,
    molecule: MolecularSystem,
    output: PathLike,
    settings: SamplingSettings | None = None,
    *,
    options: RunOptions | None = None,
) -> dict[str, Any]:
    """Sample another System with the frozen flow of a run, and return the content of its summary.

    Half of the walkers start from frames of the run, chosen by their weights in the other System,
    the others from weighted draws of the flow. `output` becomes a run directory like any other (to
    be resumed by ``sample``, analysed, certified), with ``retarget.json`` beside it: at each rung
    that both runs have the free-energy difference of the two Systems in kT, by BAR of samples of
    both (:mod:`openmm_tsf.analysis.bar`; of configurations, masses do not enter), ⟨U⟩ and
    P(dihedral > 0) in both with z of their difference, and the evaluations spent.

    Parameters
    ----------
    run
        Run directory with a flow and samples; it is only read.
    molecule
        The same atoms and bonds, in the same order, with the same handedness, in another System.
    output
        Run directory, new or empty, or the one to resume.
    settings
        Ladder, walkers, lengths, moves; by default `retarget_settings`.
    options
        How it is run.

    Raises
    ------
    FileExistsError, DirectoryInUse
        If `output` is not empty and not to be resumed, or another process writes to it.
    ValueError
        If the molecule has other atoms, bonds, constraints (or constrained atoms of other masses)
        or handedness, distinguishes hydrogens that the flow does not, or its energy depends on
        position or orientation; if the run has no samples, or was sampled with an energy that its
        directory does not hold.
    KeyboardInterrupt
        After Ctrl-C, with everything written and analysed.
    """
    check_instance(molecule, "molecule", MolecularSystem)
    check_instance(settings, "settings", SamplingSettings)
    if settings is not None and settings.n_shards > 1:
        raise ValueError(f"n_shards: expected 1, shards are of run, got {settings.n_shards}")
    check_instance(options, "options", RunOptions)
    options, directory = options or RunOptions(), Path(output)
    data = load_run(Path(run))
    data.require_samples()
    original, flow, energy_of_run = read_molecule_and_flow(data)
    if energy_of_run is not None:
        raise ValueError(f"run: expected samples of its System, these are of a {energy_of_run}")
    _check_same_topology(original, molecule)
    molecule.check_pose_independent()
    _check_labels(flow, molecule)
    if directory.resolve() == data.path.resolve():
        raise ValueError(f"output: expected another directory than the run's, got {output}")
    if options.resume and directory.is_dir() and has_started(directory):
        summary = sample(None, directory, settings, molecule=molecule, options=options)
    else:
        settings = settings or retarget_settings(data.path)
        check_targets(settings.until, settings.temperatures, molecule, options.observe)
        summary = _start(data, flow, molecule, directory, settings, options)
    _compare(data, original, load_run(directory), molecule, options)
    return summary


def _check_same_topology(original: MolecularSystem, molecule: MolecularSystem) -> None:
    """Refuse other elements, bonds or handedness; names of atoms and residues may differ."""
    elements, others = (
        [atom.element.symbol if atom.element else None for atom in m.topology.atoms()]
        for m in (original, molecule)
    )
    if elements != others:
        raise ValueError(
            "molecule: expected the run's atoms in their order, got "
            + (f"{len(others)} of {len(elements)}" if len(others) != len(elements) else "others")
        )
    bonds, others_bonds = (
        {(min(pair), max(pair)) for pair in bonds_of(m.topology).tolist()}
        for m in (original, molecule)
    )
    if bonds != others_bonds:
        pair = sorted(bonds ^ others_bonds)[0]
        raise ValueError(f"molecule: expected the bonds of the run's, atoms {pair} differ")
    pairs, others_pairs = (
        {} if m.constraints is None else _lengths(m.constraints) for m in (original, molecule)
    )
    if pairs.keys() != others_pairs.keys() or not np.allclose(
        [pairs[pair] for pair in sorted(pairs)], [others_pairs[pair] for pair in sorted(pairs)],
        rtol=1e-9,
    ):  # fmt: skip
        raise ValueError(
            f"molecule: expected the run's constraints, {len(pairs)} bonds of the same lengths, "
            f"got {len(others_pairs)}, or others: the flow has no other lengths"
        )
    if original.measure != molecule.measure and pairs:
        raise ValueError(f"molecule: expected the run's measure, {original.measure!r}, got another")
    atoms = sorted({atom for pair in pairs for atom in pair})
    same_masses = np.allclose(original.masses[atoms], molecule.masses[atoms], rtol=1e-9)
    if original.measure == MEASURES[0] and not same_masses:
        raise ValueError(
            "molecule: expected the run's masses of constrained atoms, which the density depends on"
        )
    centres = centres_of(original.topology)
    first, other = (handedness_signs(m.positions, centres) for m in (original, molecule))
    if not np.array_equal(first, other):
        raise ValueError(
            "molecule: expected the handedness of the run's, got another stereoisomer (or other "
            "labels of hydrogens)"
        )


def _lengths(constraints: Constraints) -> dict[tuple[int, int], float]:
    """Return the lengths of constrained bonds by their atoms."""
    pairs = [(min(pair), max(pair)) for pair in constraints.pairs.tolist()]
    return dict(zip(pairs, constraints.lengths.tolist(), strict=True))


def _check_labels(flow: AugmentedFlow, molecule: MolecularSystem) -> None:
    """Refuse a System that distinguishes hydrogens of which the flow knows one labelling alone."""
    assert flow.coordinates is not None
    triples = {tuple(sorted(triple)) for triple in flow.coordinates.labelling.triples}
    distinguished = triples - {tuple(sorted(t)) for t in equivalent_hydrogens(molecule)}
    if distinguished:
        raise ValueError(
            f"molecule: expected hydrogens {sorted(distinguished)[0]} to be equivalent, as they "
            "are for the flow, but this System distinguishes them"
        )


def _start(
    run: Run,
    flow: AugmentedFlow,
    molecule: MolecularSystem,
    output: Path,
    settings: SamplingSettings,
    options: RunOptions,
) -> dict[str, Any]:
    """Start walkers on the other System, tune, sample, analyse."""
    recorded = resumed_choices(output, "sample", options)
    with open_output_directory(output, resume=options.resume) as lock:
        request = new_config(
            "sample",
            molecule,
            settings=settings,
            seed=options.choose_seed(recorded),
            device=options.choose_device(recorded),
            flow_file=str(run.path / "flow.pt"),
            flow_sha256=hash_of(flow),
            retargeted={"run": str(run.path), "molecule": flow.fingerprint},
        )
        request["costs"] = {"flow": Costs({"md": 0, "training": 0, "sampling": 0}).to_config()}
        stage = Stage.open(lock, molecule, options, request, ("n_iterations", "until"))
        stage.restore_costs("flow")  # none: the flow is the run's
        if (basins := recorded_choices(run.path).get("basins")) is not None:
            stage.record(basins=basins)
        record_observables(stage)
        flow.fingerprint = molecule.fingerprint
        flow.save(stage.directory / "flow.pt")
        flow, seeds = place_for_sampling(flow, stage.device), Seeds(stage.choices["seed"])
        sampler_seed, start_seed = sampler_seeds(seeds, fresh=True)
        assert start_seed is not None
        n_planned, batch = planned_sampling(settings), batch_of(settings)
        with sampling_threads(), stage.open_potential(n_planned, batch) as potential:
            with stage.costs.counting("sampling", potential):
                generator = make_generator(start_seed, flow.device)
                start = _start_positions(run, flow, potential, settings, generator)
                seeds_of = sampler_seed, None
                sampler = make_sampler(molecule, flow, settings, potential, seeds_of, start)
                sampler.tune(settings.n_tuning, progress=options.progress)
            with sampler:
                start_sampling(stage, sampler)
                return sample_and_analyze(stage, sampler, settings.n_iterations, settings.until)


def _start_positions(
    run: Run,
    flow: AugmentedFlow,
    potential: Potential,
    settings: SamplingSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return configurations [W, R, N, 3]: frames of the nearest rung by weight, and draws."""
    k, columns = potential.boltzmann_constant, []
    for kelvin in settings.temperatures:
        rung = int(np.abs(np.log(run.temperatures / kelvin)).argmin())
        frames = _read_frames(run, rung)
        log_weight = torch.from_numpy(frames.energy.ravel() / (k * run.temperatures[rung]))
        log_weight = log_weight - evaluate.energy(potential, frames.x) / (k * kelvin)
        log_weight = torch.where(torch.isfinite(log_weight), log_weight, -torch.inf)
        chosen = choose_by_weight(log_weight, settings.n_walkers, generator)
        if len(chosen) == 0:
            raise ValueError(
                f"molecule: expected a System in which frames of the run have finite energies, "
                f"none of {len(frames.x)} at {run.temperatures[rung]:.2f} K has one"
            )
        # A short run has fewer frames than there are walkers.
        repeats = -(-settings.n_walkers // len(chosen))
        columns.append(frames.x[chosen.repeat(repeats)[: settings.n_walkers]])
    x = torch.stack(columns, dim=1).to(flow.device)
    return replace_half_by_draws(x, flow, potential, settings.temperatures, generator)


def _read_frames(run: Run, rung: int) -> _Frames:
    """Return some 1000 frames of a rung of a run, all walkers of some iterations."""
    index = run.frame_index()
    stride = max(1, len(index) * run.n_walkers // _N_FRAMES)
    xyz = run.trajectory(run.temperatures[rung], stride=stride).xyz.astype(np.float64)
    energy = run.energy[index[::stride], :, rung]
    return _Frames(torch.from_numpy(xyz[: energy.size]), np.asarray(energy, dtype=np.float64))


def _compare(
    first: Run,
    original: MolecularSystem,
    second: Run,
    molecule: MolecularSystem,
    options: RunOptions,
) -> None:
    """Write the free-energy differences and the estimates of both runs at their common rungs."""
    pairs = [
        (rung, nearest_rung(second.temperatures, float(kelvin)))
        for rung, kelvin in enumerate(first.temperatures)
    ]
    common = [(a, b) for a, b in pairs if b is not None]
    others = sorted(
        {float(t) for k, t in enumerate(first.temperatures) if k not in dict(common)}
        | {float(t) for k, t in enumerate(second.temperatures) if k not in dict(common).values()}
    )
    if not common:
        logger.warning(
            "%s and %s have no temperature in common: no free-energy difference of the two Systems",
            first.path,
            second.path,
        )
    entries: dict[str, Any] = {}
    n_evaluations = 0
    with (
        open_potential(original, options.platform, 0, 1) as in_first,
        open_potential(molecule, options.platform, 0, 1) as in_second,
    ):
        for a, b in common:
            kt = in_first.boltzmann_constant * float(first.temperatures[a])
            frames_a, frames_b = _read_frames(first, a), _read_frames(second, b)
            work_a = _energies(in_second, frames_a) - frames_a.energy
            work_b = frames_b.energy - _energies(in_first, frames_b)
            difference = estimate_difference(work_a / kt, work_b / kt)
            kelvin = f"{first.temperatures[a]:.2f}"
            entries[kelvin] = {
                "delta_F_kT": vars(difference),
                "energy_kJ_mol": _beside(
                    assess_mean(first.energies(first.temperatures[a])),
                    assess_mean(second.energies(second.temperatures[b])),
                ),
                "dihedral_positive": {
                    name: _beside(
                        assess_probability(first.dihedral(name, first.temperatures[a]) > 0),
                        assess_probability(second.dihedral(name, second.temperatures[b]) > 0),
                    )
                    for name in first.dihedral_atoms
                    if name in second.dihedral_atoms
                },
            }
        n_evaluations = in_first.n_evaluations + in_second.n_evaluations
    content = {
        "run": str(first.path),
        "molecules": {"run": original.fingerprint, "here": molecule.fingerprint},
        "by_temperature": entries,
        "not_in_both_K": others,
        "energy_evaluations": n_evaluations,
        "versions": package_versions(),
    }
    write_json(second.path / RETARGET, json_ready(content))


def _energies(potential: Potential, frames: _Frames) -> Array:
    """Return energies [n, W] of frames in kJ/mol."""
    with torch.no_grad():
        energy = evaluate.energy(potential, frames.x)
    return np.asarray(energy.cpu().numpy().reshape(frames.energy.shape))


def _beside(first: Assessment, second: Assessment) -> dict[str, Any]:
    """Return the estimates of both runs, and z of their difference."""
    z = (second.value - first.value) / np.hypot(first.stderr, second.stderr)
    return {"run": first.to_dict(), "here": second.to_dict(), "z": float(z)}
