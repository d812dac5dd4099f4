"""Checks of frames and energies that need no reference: each passes, fails, or cannot decide."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt
import torch

from openmm_tsf.analysis.certify_samples import Samples, evaluate
from openmm_tsf.analysis.ensemble_checks import energy_ratio
from openmm_tsf.analysis.frame_checks import is_cis, is_mirrored, peptide_bonds, tetrahedral_centres
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.configurational_temperature import measure_temperature
from openmm_tsf.systems.constrained import project_frames
from openmm_tsf.systems.frame_checks import check_frames
from openmm_tsf.systems.frame_variation import check_variation
from openmm_tsf.systems.mean_torques import measure_torques
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB

PASSED, WRONG = "passed", "wrong"
#: More samples would decide; nothing here decides; not wrong, but to be looked at.
MISSING, UNDECIDED, NOTED = "missing", "undecided", "warning"
#: Standard errors beyond which a difference is none of chance, with a few dozen checks.
MAX_Z = 4.0
#: The largest of some ten mean torques, of two functions each, with errors from 32 blocks.
MAX_TORQUE_ERRORS = 6.0
#: Frames from which the configurational temperature is measured, fewer of larger molecules.
_MOST_FRAMES, _ATOMS_IN_ALL = 2048, 60_000
#: Frames of each temperature whose recorded energy is evaluated again.
_RECORDED = 256
#: Robust standard deviations of the energy, and kT above those, beyond which a frame is an outlier.
_OUTLIER_DEVIATIONS = 8.0
#: Standard deviations of a normal distribution in its median absolute deviation.
_PER_MAD = 1.4826


@dataclass(frozen=True)
class Check:
    """The outcome of one check: one of the words above, and why."""

    name: str
    where: str
    status: str
    words: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Where it is, and what was found."""
        return f"{self.where}: {self.words}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)


def check_samples(
    molecule: MolecularSystem, samples: Sequence[Samples], repeats_allowed: bool
) -> list[Check]:
    """Return all checks of samples, ascending in temperature; see the functions below.

    `repeats_allowed`: whether a walker may stay where it is, as Monte Carlo does where it rejects.
    """
    checks = []
    for each in samples:
        checks.append(check_energies(each))
        checks += check_structure(molecule, each)
        checks += check_forces(molecule, each)
    checks.append(check_copies(samples, repeats_allowed))
    checks += [check_ratio(low, high) for low, high in pairwise(samples)]
    return checks


def check_recorded(molecule: MolecularSystem, samples: Samples, potential: Potential) -> Check:
    """Check that energies which a run recorded are those of its frames, at 256 of them."""
    n, n_walkers = samples.energy.shape
    iteration, walker = np.unravel_index(
        np.unique(np.linspace(0, samples.n_frames - 1, _RECORDED).astype(np.int64)), (n, n_walkers)
    )
    again = evaluate(potential, samples.positions[iteration, walker][:, None])[:, 0]
    recorded = samples.energy[iteration, walker]
    # Frames are kept in single precision.
    wrong = ~(np.abs(again - recorded) <= 0.1 + 1e-4 * np.abs(recorded))
    where = _kelvin(samples)
    if wrong.any():
        words = (
            f"{wrong.sum()} of {len(wrong)} energies that were recorded are not those of their "
            "frames: a file was changed, or is of another System"
        )
        return Check("recorded energies", where, WRONG, words, {"n_wrong": int(wrong.sum())})
    words = f"energies of {len(wrong)} frames are those that were recorded"
    return Check("recorded energies", where, PASSED, words)


def check_energies(samples: Samples) -> Check:
    """Check that all energies are finite and none is far from all others.

    Far is more than 8 robust standard deviations from the median, and above it ln(F) kT more, as
    far as the largest of F energies of an exponential distribution lies.
    """
    energy, where = samples.energy.ravel(), _kelvin(samples)
    finite = np.isfinite(energy)
    numbers: dict[str, Any] = {"n_non_finite": int((~finite).sum()), "n_outliers": 0}
    if not finite.all():
        words = f"{(~finite).sum():,} of {energy.size:,} frames have no finite energy"
        return Check("energies", where, WRONG, words, numbers)
    median = np.median(energy)
    spread = _OUTLIER_DEVIATIONS * _PER_MAD * np.median(np.abs(energy - median))
    tail = KB * samples.temperature * np.log(energy.size)
    outside = (energy > median + spread + tail) | (energy < median - spread)
    numbers |= {"n_outliers": int(outside.sum()), "median_kJ_mol": float(median)}
    if outside.any():
        worst = energy[np.abs(energy - median).argmax()]
        words = (
            f"{outside.sum():,} of {energy.size:,} energies are far from all others, the farthest "
            f"{worst:.4g} kJ/mol, the median {median:.4g}: frames of other dynamics, or damaged"
        )
        return Check("energies", where, WRONG, words, numbers)
    words = f"all {energy.size:,} energies are finite, and none is far from the others"
    return Check("energies", where, PASSED, words, numbers)


def check_structure(molecule: MolecularSystem, samples: Samples) -> list[Check]:
    """Check bonds, overlaps, constraints, rounding, handedness, and cis peptide bonds."""
    where, frames = _kelvin(samples), samples.by_walker
    checks = []
    judges: list[tuple[str, Callable[..., Any], str]] = [
        ("bonds", check_frames, "bonds as in the reference positions, and no atoms overlap"),
        ("vibrations", check_variation, "bonds vibrate, and positions are not rounded"),
    ]
    if molecule.constraints is not None:
        words = f"{molecule.constraints.n_constraints} constrained bonds have their lengths"
        judges.append(("constraints", _check_constraints, words))
    for name, refuse, words in judges:
        try:
            refuse(molecule, frames, samples.temperature)
        except ValueError as error:
            checks.append(Check(name, where, WRONG, str(error).removeprefix("positions: ")))
        else:
            checks.append(Check(name, where, PASSED, words))
    topology = molecule.mdtraj_topology
    centres = tetrahedral_centres(topology, molecule.positions)
    mirrored = is_mirrored(frames, centres)
    numbers = {
        name: int(count)
        for name, count in zip(centres.names, mirrored.sum(axis=0), strict=True)
        if count
    }
    n_mirrored = int(mirrored.any(axis=1).sum())
    if n_mirrored:
        words = (
            f"{n_mirrored:,} of {samples.n_frames:,} frames have another handedness than the "
            f"reference positions, at {', '.join(numbers)}"
        )
        checks.append(Check("handedness", where, WRONG, words, numbers))
    elif centres.names:
        words = f"{len(centres.names)} centres have the handedness of the reference positions"
        checks.append(Check("handedness", where, PASSED, words))
    return [*checks, *_check_omegas(molecule, samples, frames)]


def _check_constraints(molecule: MolecularSystem, frames: torch.Tensor, kelvin: float) -> None:
    assert molecule.constraints is not None
    project_frames(molecule.constraints, molecule.topology, frames)


def _check_omegas(molecule: MolecularSystem, samples: Samples, frames: torch.Tensor) -> list[Check]:
    topology = molecule.mdtraj_topology
    names, omegas = peptide_bonds(topology)
    if not names:
        return []
    reference = is_cis(mdtraj.Trajectory(molecule.positions[None], topology), omegas)[0]
    turned = is_cis(mdtraj.Trajectory(frames.numpy(), topology), omegas) != reference
    counts = {name: int(n) for name, n in zip(names, turned.sum(axis=0), strict=True) if n}
    where = _kelvin(samples)
    if not counts:
        words = f"{len(names)} peptide bonds are cis or trans as in the reference positions"
        return [Check("peptide bonds", where, PASSED, words)]
    listed = ", ".join(f"{name} in {n:,}" for name, n in counts.items())
    words = (
        f"peptide bonds that are cis where the reference positions are trans, or the converse, in "
        f"{samples.n_frames:,} frames: {listed}; they turn too rarely for an equilibrium population"
    )
    return [Check("peptide bonds", where, WRONG, words, counts)]


def check_forces(molecule: MolecularSystem, samples: Samples) -> list[Check]:
    """Check the configurational temperature and the mean torques; each holds in equilibrium.

    The first tells other temperatures, bonds and angles, and time steps that are too long; the
    second other torsions, charges and solvents. Neither depends on the populations of basins.
    """
    where, frames = _kelvin(samples), samples.by_walker
    finite = np.isfinite(samples.energy.T.ravel())
    frames = frames[torch.from_numpy(finite)]
    checks = []
    number = min(_ATOMS_IN_ALL // molecule.n_atoms, _MOST_FRAMES)
    measured = measure_temperature(molecule, frames, number)
    if measured is None:
        words = (
            "the configurational temperature cannot be measured: fewer than 32 frames, or forces "
            "that jump"
        )
        checks.append(Check("configurational temperature", where, UNDECIDED, words))
    else:
        kelvin, error = measured
        z = (kelvin - samples.temperature) / error if error > 0 else np.inf
        numbers = {"kelvin": kelvin, "stderr": error, "z": z}
        words = f"by the forces, the frames are of {kelvin:.1f} ± {error:.1f} K ({z:+.1f} errors)"
        wrong = abs(z) >= MAX_Z
        if wrong:
            words += (
                ": another temperature or force field, no equilibrium, or a time step that is too "
                "long"
            )
        checks.append(
            Check("configurational temperature", where, WRONG if wrong else PASSED, words, numbers)
        )
    deviation = measure_torques(molecule, frames, samples.temperature)
    if deviation is not None:
        numbers = {"torque_kT": deviation.torque, "n_errors": deviation.n_errors}
        wrong = deviation.n_errors > MAX_TORQUE_ERRORS
        words = f"the largest deviation of a mean torque is {deviation.n_errors:.1f} errors"
        if wrong:
            words = (
                f"the torques about {deviation.bond} are not those of equilibrium, by "
                f"{deviation.n_errors:.1f} errors: another force field or solvent, or biased or "
                "too short dynamics"
            )
        checks.append(Check("mean torques", where, WRONG if wrong else PASSED, words, numbers))
    return checks


def check_copies(samples: Sequence[Samples], repeats_allowed: bool) -> Check:
    """Check that no frame, in all its digits, occurs twice.

    With `repeats_allowed` a walker may have the same frame in iterations without a gap, at one
    temperature each: a move was rejected. No walker comes back to it, and no other has it.
    """
    rows = []
    for rung, each in enumerate(samples):
        keys = _keys_of(each.positions)
        iteration, walker = np.indices(keys.shape)
        rung_of = np.full(keys.size, rung)
        rows.append(np.stack([keys.ravel(), walker.ravel(), iteration.ravel(), rung_of]))
    key, walker, iteration, rung_of = np.concatenate(rows, axis=1)
    order = np.lexsort((rung_of, iteration, walker, key))
    key, walker, iteration = key[order], walker[order], iteration[order]
    same = key[1:] == key[:-1]
    stayed = same & (walker[1:] == walker[:-1]) & (iteration[1:] == iteration[:-1] + 1)
    n_repeats, n_copies = int(stayed.sum()), int((same & ~stayed).sum())
    numbers = {"n_frames": int(key.size), "n_repeats": n_repeats, "n_copies": n_copies}
    where = "all temperatures" if len(samples) > 1 else _kelvin(samples[0])
    if n_copies:
        words = (
            f"{n_copies:,} of {key.size:,} frames are copies of others, of another walker or after "
            "a gap: frames were joined twice"
        )
        return Check("copies", where, WRONG, words, numbers)
    if n_repeats and not repeats_allowed:
        words = (
            f"{n_repeats:,} of {key.size:,} frames repeat the one before: they were written twice "
            "(of Monte Carlo, where moves are rejected, say so: monte_carlo=True, --monte-carlo)"
        )
        return Check("copies", where, WRONG, words, numbers)
    words = "no frame is a copy of another"
    if n_repeats:
        words += f"; {n_repeats:,} of {key.size:,} repeat the one before (rejected moves)"
    return Check("copies", where, PASSED, words, numbers)


def _keys_of(positions: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return a hash [n, W] of each frame's digits."""
    n, n_walkers = positions.shape[:2]
    flat = np.ascontiguousarray(positions.reshape(n * n_walkers, -1))
    keys = [hash(frame.tobytes()) for frame in flat]
    return np.array(keys, dtype=np.int64).reshape(n, n_walkers)


def check_ratio(low: Samples, high: Samples) -> Check:
    """Check that ln[P(U)/P(U)] of two temperatures has the slope of Boltzmann distributions.

    Of as many frames and walkers as both have.
    """
    n = min(len(low.energy), len(high.energy))
    w = min(low.n_walkers, high.n_walkers)
    first, second = low.energy[:n, :w], high.energy[:n, :w]
    where = f"{low.temperature:.2f}-{high.temperature:.2f} K"
    name = "Boltzmann"
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        words = "the slope of ln[P(U)/P(U)] cannot be tested: some energies are not finite"
        return Check(name, where, UNDECIDED, words)
    check = energy_ratio(first, second, (1 / (KB * low.temperature), 1 / (KB * high.temperature)))
    numbers = {
        "value": check.value,
        "stderr": check.stderr,
        "expected": check.expected,
        "n_eff": check.n_eff,
        "z": check.z,
    }
    if np.isnan(check.value):
        words = "the energies do not overlap: a temperature between the two would decide"
        return Check(name, where, UNDECIDED, words, numbers)
    if np.isnan(check.z):
        words = (
            f"the slope of ln[P(U)/P(U)] cannot be tested ({check.undecided}): longer trajectories "
            "decide"
        )
        return Check(name, where, UNDECIDED, words, numbers)
    slope = f"the slope of ln[P(U)/P(U)] is {check.value:.4f} ± {check.stderr:.4f} mol/kJ"
    if abs(check.z) >= MAX_Z:
        words = (
            f"{slope}, that of Boltzmann distributions {check.expected:.4f} ({check.z:+.1f} "
            "errors): a temperature is another, or the dynamics are biased"
        )
        return Check(name, where, WRONG, words, numbers)
    words = f"{slope}, as expected ({check.expected:.4f}, {check.z:+.1f} errors)"
    return Check(name, where, PASSED, words, numbers)


def _kelvin(samples: Samples) -> str:
    return f"{samples.temperature:.2f} K"
