"""Are mean energies and populations of basins converged, so that walkers and halves agree?"""

from collections.abc import Mapping, Sequence

import mdtraj
import numpy as np

from openmm_tsf.analysis.agreement import BASIN, RARE, is_bounded, quantity_label
from openmm_tsf.analysis.burn_in import BurnIn
from openmm_tsf.analysis.certify_basins import LabelledSamples
from openmm_tsf.analysis.certify_checks import MAX_Z, MISSING, PASSED, WRONG, Check
from openmm_tsf.analysis.certify_coverage import Coverage, hardly_reached
from openmm_tsf.analysis.convergence import Assessment, assess_mean, assess_probability
from openmm_tsf.analysis.ensemble_checks import basin_ratio
from openmm_tsf.analysis.observables import Observable
from openmm_tsf.analysis.observed import assess_observable, find_observed_wells
from openmm_tsf.units import KB

Quantities = dict[str, dict[str, Assessment]]


def check_start(burn_in: BurnIn) -> Check:
    """Check that the start of equilibrated sampling was found in a run."""
    where = "all temperatures"
    if not burn_in.is_equilibrated:
        words = "the run still drifts in its second half, which alone is judged"
        return Check("equilibration", where, MISSING, words)
    words = "no drift was found"
    if burn_in.start:
        words = (
            f"the first {burn_in.start:,} of {burn_in.n_iterations:,} saved iterations drift, and "
            "are left out"
        )
    return Check("equilibration", where, PASSED, words)


def assess_samples(labelled: Sequence[LabelledSamples]) -> Quantities:
    """Return the assessments of ⟨U⟩ and of every basin's population, by temperature."""
    quantities: Quantities = {"energy_kJ_mol": {}}
    for each in labelled:
        key = f"{each.samples.temperature:.2f}"
        if np.isfinite(each.samples.energy).all():
            quantities["energy_kJ_mol"][key] = assess_mean(each.samples.energy)
        for k, name in enumerate(each.names):
            inside = assess_probability((each.labels == k).any(axis=-1), each.n_pieces)
            quantities.setdefault(f"{BASIN}{name}", {})[key] = inside
    return quantities


def assess_observed(
    labelled: Sequence[LabelledSamples],
    observables: Mapping[str, Observable],
    topology: mdtraj.Topology,
) -> Quantities:
    """Return the assessments of observables, by temperature."""
    quantities: Quantities = {}
    for observable in observables.values():
        values = []
        for each in labelled:
            positions = each.samples.positions
            flat = positions.reshape(-1, *positions.shape[2:])
            of_frames = observable.evaluate(mdtraj.Trajectory(flat, topology))
            values.append(of_frames.reshape(positions.shape[:2]))
        wells = find_observed_wells(observable, values)
        for each, of_walkers in zip(labelled, values, strict=True):
            assessed = assess_observable(observable, of_walkers, wells, each.n_pieces)
            for key, assessment in assessed.items():
                quantities.setdefault(key, {})[f"{each.samples.temperature:.2f}"] = assessment
    return quantities


def check_basin_ratios(low: LabelledSamples, high: LabelledSamples) -> list[Check]:
    """Check populations of basins at two temperatures by the energies in them.

    Of as many frames and walkers as both have. Basins with too few visits at both temperatures are
    left out: they are not converged, or rare.
    """
    energies = low.samples.energy, high.samples.energy
    n, n_walkers = (min(energy.shape[k] for energy in energies) for k in range(2))
    first, second = (energy[:n, :n_walkers] for energy in energies)
    if not low.names or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return []
    kelvins = low.samples.temperature, high.samples.temperature
    betas = 1 / (KB * kelvins[0]), 1 / (KB * kelvins[1])
    wrong, largest, n_tested = [], 0.0, 0
    for k, name in enumerate(low.names):
        in_low, in_high = ((each.labels[:n, :n_walkers] == k).any(axis=-1) for each in (low, high))
        n_pieces = min(low.n_pieces, high.n_pieces)
        check = basin_ratio(first, second, in_low, in_high, betas, n_pieces)
        if np.isnan(check.z):
            continue
        n_tested, largest = n_tested + 1, max(largest, abs(check.z))
        if abs(check.z) >= MAX_Z:
            bound = "" if check.bound is None else " (a bound: never visited at one of the two)"
            wrong.append(
                f"{name}: ln[P({kelvins[1]:.0f} K)/P({kelvins[0]:.0f} K)] is {check.value:.2f}"
                f"{bound}, by the energies {check.expected:.2f} ({check.z:+.1f} errors)"
            )
    where = f"{kelvins[0]:.2f}-{kelvins[1]:.2f} K"
    if wrong:
        words = f"basins do not have the same ensemble at both: {'; '.join(wrong)}"
        return [Check("Boltzmann in basins", where, WRONG, words)]
    words = (
        f"{n_tested} of {len(low.names)} basins could be tested and are populated as the energies "
        f"tell, to {largest:.1f} errors"
    )
    return [Check("Boltzmann in basins", where, PASSED, words)]


def check_convergence(
    quantities: Mapping[str, Mapping[str, Assessment]], coverage: Sequence[Coverage] = ()
) -> list[Check]:
    """Check each assessment; of a basin that is rare, or known to 0.01, an interval is enough.

    It is known only where the basin is known at the next higher temperature as well: visits that
    are rare and long leave no trace in the statistics of those who never came.
    """
    hardly = hardly_reached(coverage)
    bounds = {
        (f"{BASIN}{basin.name}", f"{each.temperature:.2f}"): basin.high
        for each in coverage
        if each.decided
        for basin in each.basins
        if basin.name not in hardly
    }
    checks: list[Check] = []
    for name, table in quantities.items():
        label = quantity_label(name)
        known_above = True
        of_quantity: list[Check] = []
        for key, assessed in reversed(list(table.items())):
            numbers = {"value": assessed.value, "stderr": assessed.stderr, "high": assessed.high}
            highest = min(assessed.high, bounds.get((name, key), np.inf))
            is_state = name.startswith(BASIN)
            bounded = is_bounded(assessed.to_dict()) or (is_state and highest < RARE)
            status = PASSED if assessed.converged or (bounded and known_above) else MISSING
            if assessed.converged:
                words = f"{label} = {assessed.value:.4g} ± {assessed.stderr:.2g} is converged"
            elif bounded:
                words = f"{label} is between {assessed.low:.2g} and {highest:.2g} (95 %)"
                words += "" if known_above else ", but not converged at the next higher temperature"
            else:
                words = f"{label} = {assessed.value:.4g}: {'; '.join(assessed.missing)}"
                if assessed.value == 0:
                    words += f", at most {highest:.2g} (95 %)"
            known_above = status == PASSED
            of_quantity.append(Check("convergence", f"{key} K", status, words, numbers))
        checks += reversed(of_quantity)
    return checks
