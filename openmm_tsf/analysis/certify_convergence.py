"""Are mean energies and populations of basins converged, so that walkers and halves agree?"""

from collections.abc import Mapping, Sequence

import numpy as np

from openmm_tsf.analysis.certify_basins import LabelledSamples
from openmm_tsf.analysis.certify_checks import MISSING, PASSED, RARE, Check
from openmm_tsf.analysis.certify_coverage import Coverage
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
    """Check each assessment; what is certainly rare, by frames or flow, needs no more than that."""
    bounds = {
        (f"basin {basin.name}", f"{each.temperature:.2f}"): basin.high
        for each in coverage
        if each.decided
        for basin in each.basins
    }
    checks = []
    for name, table in quantities.items():
        label = "<U>" if name == "energy_kJ_mol" else f"P({name.removeprefix('basin ')})"
        for key, assessed in table.items():
            where, numbers = f"{key} K", {"value": assessed.value, "stderr": assessed.stderr}
            highest = min(assessed.high, bounds.get((name, key), np.inf))
            if assessed.converged:
                words = f"{label} = {assessed.value:.4g} ± {assessed.stderr:.2g} is converged"
                checks.append(Check("convergence", where, PASSED, words, numbers))
            elif name != "energy_kJ_mol" and highest < RARE:
                words = f"{label} is at most {highest:.1g} (95 %)"
                checks.append(Check("convergence", where, PASSED, words, numbers))
            else:
                words = f"{label} = {assessed.value:.4g}: {'; '.join(assessed.missing)}"
                if assessed.n_visits == 0 and assessed.value == 0:
                    words += f", at most {highest:.2g} (95 %)"
                checks.append(Check("convergence", where, MISSING, words, numbers))
    return checks
