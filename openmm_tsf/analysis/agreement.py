"""Tests of a run against the reference and against Boltzmann distributions, from its summary.

All tests of a run are judged together: the differences that count are those of Benjamini and
Hochberg's procedure (J. R. Stat. Soc. B 57, 289 (1995)) at a level of 1 %, so that of right runs at
most 1 % are called wrong, however many basins and temperatures they have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import erfc, sqrt
from typing import Any

from openmm_tsf.analysis.convergence import MAX_DRIFT, MAX_R_HAT, MIN_EFFECTIVE_SUCCESSES
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES

#: The probability that a right run is called wrong.
FALSE_ALARMS = 0.01
#: A difference below this many standard errors is none, nor is a p value above the other.
MAX_Z, MIN_P_VALUE = 3.0, 0.01
MAX_RAMACHANDRAN_RATIO = 1.5
#: States below this population need not be sampled: a bound is enough.
RARE = 1e-3
#: Nor do the others where the interval is narrower than this, with so many effective successes (an
#: error of 70 %) and independent visits.
NARROW, FEW_SUCCESSES, FEW_VISITS = 0.02, 2, 5

_LABELS = {
    "energy_kJ_mol": "<U>",
    "heat_capacity_kJ_mol_K": "C_V",
    "delta_F_phi_kT": "delta F of phi",
}
_ENSEMBLE = {
    "energy_ratio_mol_kJ": "the slope of ln[P(U)/P(U)]",
    "heat_capacity_kJ_mol_K": "the change of <U> with temperature",
}
#: Before the name of a basin in ``quantities``.
BASIN = "basin "
#: Before the name of an observable there: its mean is meant.
MEAN = "mean "
#: After the name of a dihedral there: the probability that it is positive.
POSITIVE = "_positive"
_LONGER = "a longer run would decide"
_TOO_FEW = f"cannot be compared with the reference before it is converged; {_LONGER}"


def quantity_label(key: str) -> str:
    """Return the symbol of a key of ``quantities``.

    Examples
    --------
    >>> from openmm_tsf.analysis.agreement import quantity_label
    >>> quantity_label("phi_positive"), quantity_label("basin phi > 0, psi beta")
    ('P(phi > 0)', 'P(phi > 0, psi beta)')
    """
    if key.startswith(BASIN):
        return f"P({key.removeprefix(BASIN)})"
    if key.startswith(MEAN):
        return f"<{key.removeprefix(MEAN)}>"
    if key.endswith(POSITIVE):
        return f"P({key.removesuffix(POSITIVE)} > 0)"
    return _LABELS.get(key, key)


@dataclass(frozen=True)
class Difference:
    """A difference that was tested."""

    words: str
    p_value: float
    remarkable: bool  # by itself
    of: tuple[tuple[str, str], ...] = ()  # quantities at rungs that cannot be right with it

    @classmethod
    def of_z(cls, words: str, z: float, *of: tuple[str, str]) -> "Difference":
        """Return the difference of this many standard errors."""
        words = f"{words} by {z:+.1f} standard errors"
        return cls(words, erfc(abs(z) / sqrt(2)), abs(z) >= MAX_Z, of)


def find_differences(summary: Mapping[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """Return the differences that count, and those that are remarkable but may be chance.

    Numbers whose error is not known are not tested: `undecided_tests` names them.
    """
    tests = [*_reference_tests(summary), *_ensemble_tests(summary)]
    limit = discovery_limit([test.p_value for test in tests])
    remarkable = [test for test in tests if test.remarkable]
    found = [test for test in remarkable if test.p_value <= limit]
    return [*found, *_distances(summary)], [t for t in remarkable if t.p_value > limit]


def undecided_tests(summary: Mapping[str, Any]) -> list[str]:
    """Return the tests that cannot decide, with what would, in words."""
    return [*_not_compared(summary), *_not_tested(summary)]


def discovery_limit(p_values: list[float]) -> float:
    """Return the largest p value that is no accident (Benjamini and Hochberg); -1 if none is."""
    n = len(p_values)
    steps = enumerate(sorted(p_values), start=1)
    return max((p for k, p in steps if p <= FALSE_ALARMS * k / n), default=-1.0)


def is_bounded(entry: Mapping[str, Any]) -> bool:
    """Whether the population of a state is known well enough although it is hardly ever visited.

    That is where its 95 % interval spans less than two hundredths, walkers and halves agree, the
    population expected elsewhere (from frames, or from other rungs) lies in it, and the state has 2
    effective successes in 5 visits, or is rare: its estimate and its expectation are below one
    thousandth, or above 999. Of a rare state either the interval or an expectation is enough.
    """
    value, low, high = entry["value"], entry["low"], entry["high"]
    if entry.get("n_visits") is None or None in (value, low, high):
        return False
    expected, margin = entry.get("expected_p"), 2 * (entry.get("expected_stderr") or 0.0)
    lowest = highest = value
    if expected is not None:
        lowest, highest = min(value, expected - margin), max(value, expected + margin)
        if expected + margin < low or expected - margin > high:
            return False
    rare = highest < RARE or lowest > 1 - RARE
    if rare and (expected is not None or high < RARE or low > 1 - RARE):
        return True
    mixed = (entry.get("r_hat") or 1.0) <= MAX_R_HAT and abs(entry.get("drift") or 0.0) < MAX_DRIFT
    successes = min(value, 1 - value) * (entry["n_eff"] or 0.0)
    enough = successes >= FEW_SUCCESSES and entry["n_visits"] >= FEW_VISITS
    return bool(mixed and high - low < NARROW and (rare or enough))


def _compared(summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The means of run and reference, by quantity."""
    comparison = summary.get("comparison") or {}
    for key in ("phi_positive", "energy_kJ_mol", "heat_capacity_kJ_mol_K"):
        if key in comparison:
            yield key, comparison[key]
    for name, compared in comparison.get("basins", {}).items():
        yield f"{BASIN}{name}", compared


def _reference_tests(summary: Mapping[str, Any]) -> Iterator[Difference]:
    for key, compared in _compared(summary):
        words = f"{quantity_label(key)} differs from the reference"
        for rung, z in compared["z"].items():
            if z is not None:
                yield Difference.of_z(f"{rung} K: {words}", z, (key, rung))
        p = compared["p_value"]
        if p is not None and len(compared["z"]) > 1:
            chi2 = f"chi2 {compared['chi2']:.1f}, p = {p:.1g}"
            yield Difference(f"all rungs: {words}, {chi2}", p, p <= MIN_P_VALUE)


def _not_compared(summary: Mapping[str, Any]) -> Iterator[str]:
    for key, compared in _compared(summary):
        for rung, z in compared["z"].items():
            entry = summary["quantities"].get(key, {}).get(rung)
            # The population that the reference expects lies within its interval.
            need_not = entry is not None and not entry["converged"] and is_bounded(entry)
            if z is None and not need_not:
                yield f"{rung} K: {quantity_label(key)} {_TOO_FEW}"
        tested = all(z is not None for z in compared["z"].values())
        if tested and compared["p_value"] is None and len(compared["z"]) > 1:
            yield f"all rungs: {quantity_label(key)} {_TOO_FEW}"
    for rung, distance in (summary.get("comparison") or {}).get("ramachandran", {}).items():
        if distance["total_variation"] is None or distance["floor_total_variation"] is None:
            yield f"{rung} K: the Ramachandran distance has no floor to compare with; {_LONGER}"
        elif (distance["n_slowest"] or 0) < MIN_EFFECTIVE_SAMPLES:
            yield f"{rung} K: the Ramachandran plot has too few effective samples; {_LONGER}"


def _distances(summary: Mapping[str, Any]) -> Iterator[Difference]:
    for rung, distance in (summary.get("comparison") or {}).get("ramachandran", {}).items():
        value, floor = distance["total_variation"], distance["floor_total_variation"]
        if (distance["n_slowest"] or 0) < MIN_EFFECTIVE_SAMPLES or value is None or floor is None:
            continue
        if value > MAX_RAMACHANDRAN_RATIO * floor:
            words = (
                f"{rung} K: Ramachandran distance to the reference {value:.3f}, more than "
                f"{MAX_RAMACHANDRAN_RATIO} times the floor {floor:.3f}"
            )
            yield Difference(words, 0.0, True)


@dataclass(frozen=True)
class EnsembleTest:
    """A test between two neighbouring rungs, with its entry in the summary."""

    words: str
    keys: tuple[str, ...]  # the quantities that it tests
    pair: str
    check: Mapping[str, Any]
    n_needed: int  # effective samples that decide


def ensemble_tests(summary: Mapping[str, Any]) -> Iterator[EnsembleTest]:
    """Return the tests between neighbouring rungs."""
    checks = summary.get("ensemble_check", {})
    for key, words in _ENSEMBLE.items():
        for pair, check in checks.get(key, {}).items():
            keys = ("energy_kJ_mol", "heat_capacity_kJ_mol_K")
            yield EnsembleTest(words, keys, pair, check, MIN_EFFECTIVE_SAMPLES)
    for name, pairs in checks.get("basin_ratio", {}).items():
        for pair, check in pairs.items():
            words = f"the ratio of P({name})"
            yield EnsembleTest(words, (f"{BASIN}{name}",), pair, check, MIN_EFFECTIVE_SUCCESSES)


def _ensemble_tests(summary: Mapping[str, Any]) -> Iterator[Difference]:
    for test in ensemble_tests(summary):
        if (z := test.check["z"]) is not None:
            of = [(key, rung) for key in test.keys for rung in test.pair.split("-")]
            words = f"{test.pair} K: {test.words} is not that of Boltzmann distributions,"
            yield Difference.of_z(words, z, *of)


def _not_tested(summary: Mapping[str, Any]) -> Iterator[str]:
    for test in undecided_ensemble_tests(summary):
        check, where = test.check, f"{test.pair} K: {test.words} cannot be tested"
        if check["value"] is None:
            yield (
                f"{where}, as the energies of the two rungs do not overlap; a rung between them "
                "would decide"
            )
        else:
            reason = check.get("undecided") or f"{check['n_eff'] or 0:.0f} effective samples"
            yield f"{where}: {reason}; {_LONGER}"


def undecided_ensemble_tests(summary: Mapping[str, Any]) -> list[EnsembleTest]:
    """Return the tests between rungs that cannot decide; those of rare states need not."""
    quantities = summary["quantities"]
    return [
        test
        for test in ensemble_tests(summary)
        if test.check["z"] is None
        and not all(
            is_bounded(quantities[key][rung]) for key in test.keys for rung in test.pair.split("-")
        )
    ]
