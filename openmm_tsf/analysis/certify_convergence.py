"""Are mean energies and populations of basins converged, so that walkers and halves agree?"""

from collections.abc import Mapping, Sequence

import numpy as np

from openmm_tsf.analysis.certify_basins import LabelledSamples
from openmm_tsf.analysis.certify_checks import MISSING, PASSED, RARE, Check
from openmm_tsf.analysis.certify_coverage import Coverage, hardly_reached
from openmm_tsf.analysis.convergence import Assessment, assess_mean, assess_probability

Quantities = dict[str, dict[str, Assessment]]


def assess_samples(labelled: Sequence[LabelledSamples]) -> Quantities:
    """Return the assessments of ⟨U⟩ and of every basin's population, by temperature."""
    quantities: Quantities = {"energy_kJ_mol": {}}
    for each in labelled:
        key = f"{each.samples.temperature:.2f}"
        if np.isfinite(each.samples.energy).all():
            quantities["energy_kJ_mol"][key] = assess_mean(each.samples.energy)
        for k, name in enumerate(each.names):
            inside = assess_probability((each.labels == k).any(axis=-1), each.n_pieces)
            quantities.setdefault(f"basin {name}", {})[key] = inside
    return quantities


def check_convergence(
    quantities: Mapping[str, Mapping[str, Assessment]], coverage: Sequence[Coverage] = ()
) -> list[Check]:
    """Check each assessment; of a basin that is certainly rare the bound is enough.

    It is certain only where the basin is known at the next higher temperature as well: visits that
    are rare and long leave no trace in the statistics of those who never came.
    """
    hardly = hardly_reached(coverage)
    bounds = {
        (f"basin {basin.name}", f"{each.temperature:.2f}"): basin.high
        for each in coverage
        if each.decided
        for basin in each.basins
        if basin.name not in hardly
    }
    checks: list[Check] = []
    for name, table in quantities.items():
        label = "<U>" if name == "energy_kJ_mol" else f"P({name.removeprefix('basin ')})"
        known_above = True
        of_quantity: list[Check] = []
        for key, assessed in reversed(list(table.items())):
            numbers = {"value": assessed.value, "stderr": assessed.stderr, "high": assessed.high}
            highest = min(assessed.high, bounds.get((name, key), np.inf))
            rare = name != "energy_kJ_mol" and highest < RARE
            status = PASSED if assessed.converged or (rare and known_above) else MISSING
            if assessed.converged:
                words = f"{label} = {assessed.value:.4g} ± {assessed.stderr:.2g} is converged"
            elif rare:
                words = f"{label} is at most {highest:.1g} (95 %)"
                words += "" if known_above else ", if the next higher temperature is converged"
            else:
                words = f"{label} = {assessed.value:.4g}: {'; '.join(assessed.missing)}"
                if assessed.value == 0:
                    words += f", at most {highest:.2g} (95 %)"
            known_above = status == PASSED
            of_quantity.append(Check("convergence", f"{key} K", status, words, numbers))
        checks += reversed(of_quantity)
    return checks
