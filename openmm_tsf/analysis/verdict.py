"""The verdict on a run, from the content of its ``summary.json``.

A run is ``wrong`` where it differs from the reference or from Boltzmann distributions beyond its
errors (`openmm_tsf.analysis.agreement`); else ``not yet`` converged where a quantity lacks samples
or a check cannot decide; else ``converged``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import ceil
from typing import Any

from openmm_tsf.analysis.agreement import (
    RARE,
    find_differences,
    is_bounded,
    quantity_label,
    undecided_ensemble_tests,
    undecided_tests,
)

CONVERGED, NOT_YET, WRONG = "converged", "not yet", "wrong"
#: A state that is never or hardly seen, and need not be: only its bound is known.
BOUNDED = "bounded"
#: Exit status of commands that judge; 1 and 2 are those of failed commands.
EXIT_STATUS = {CONVERGED: 0, NOT_YET: 3, WRONG: 4}

MIN_ROUND_TRIPS_PER_WALKER = 1.0
#: A flow is of no use where no move that needs it is accepted more often than this.
USELESS_ACCEPTANCE = 0.01

#: What is a function of another quantity: it is as converged as that, and not listed twice.
_DERIVED = {"delta_F_phi_kT": "phi_positive"}
_LENGTHEN = "more iterations, training or walkers help"


@dataclass(frozen=True)
class Verdict:
    """A verdict with its reasons, in words; of a run, or of any samples that were judged.

    Examples
    --------
    >>> from openmm_tsf.analysis.verdict import Verdict
    >>> Verdict(missing=("300.00 K: <U>: 12 effective samples of 100",)).sentence
    'not yet converged: 300.00 K: <U>: 12 effective samples of 100'
    """

    #: What disagrees with the reference or with Boltzmann distributions.
    wrong: tuple[str, ...] = ()
    #: What more sampling would give.
    missing: tuple[str, ...] = ()
    #: Checks that cannot decide, with what would.
    undecided: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    #: What agrees: "the reference", "Boltzmann".
    agrees_with: tuple[str, ...] = ()
    #: ``n_iterations``, ``energy_evaluations``, ``wall_seconds`` of production in all, None where
    #: they cannot be predicted, and whether they are a lower bound (``at_least``).
    predicted: Mapping[str, Any] = field(default_factory=dict)
    #: The status of each quantity at each temperature.
    quantities: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``"converged"``, ``"not yet"`` or ``"wrong"``."""
        if self.wrong:
            return WRONG
        return NOT_YET if self.missing or self.undecided else CONVERGED

    @property
    def exit_status(self) -> int:
        """The exit status of commands that judge: 0, 3 or 4."""
        return EXIT_STATUS[self.status]

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        if self.wrong:
            return f"wrong: {_first(self.wrong)}"
        if self.missing or self.undecided:
            return f"not yet converged: {_first((*self.missing, *self.undecided))}"
        if not self.agrees_with:
            return CONVERGED
        return f"{CONVERGED}, in agreement with {' and with '.join(self.agrees_with)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the entry ``verdict`` of ``summary.json``."""
        content = asdict(self)
        del content["quantities"]  # they stand beside their numbers
        lists = {key: list(v) if isinstance(v, tuple) else v for key, v in content.items()}
        return {"status": self.status, "sentence": self.sentence} | lists


def _first(reasons: tuple[str, ...]) -> str:
    more = len(reasons) - 1
    return reasons[0].split("; ")[0] + (f" (and {more} more)" if more else "")


def judge(summary: Mapping[str, Any]) -> Verdict:
    """Return the verdict on a run from its summary: a function of its numbers alone.

    A difference between the run and the reference, or between neighbouring rungs and Boltzmann
    distributions, counts from 3 standard errors (or p = 0.01) on if it is no accident among all the
    tests, and is a warning otherwise. Where an error is not known the test is undecided, and the
    run not yet converged.
    """
    if summary["n_iterations"] == 0:
        return Verdict(missing=("there are no samples yet",), advice=(_LENGTHEN,))
    found, by_chance = find_differences(summary)
    statuses = _statuses(summary, {each for test in found for each in test.of})
    wrong = tuple(test.words for test in found)
    missing = (*_lacking(summary, statuses), *_not_equilibrated(summary), *_not_mixed(summary))
    undecided = tuple(undecided_tests(summary))
    useless = (*_useless_flow(summary),)
    warnings = (
        *(f"{test.words}: as one of many tests, this may be chance" for test in by_chance),
        *_never_seen(summary, statuses),
        *summary["monitor"]["warnings"],
        *useless,
    )
    agrees_with: tuple[str, ...] = ()
    if not wrong and not undecided:
        agrees_with += ("the reference",) if summary.get("comparison") else ()
        agrees_with += ("Boltzmann",) if any(summary.get("ensemble_check", {}).values()) else ()
    return Verdict(
        wrong=wrong,
        missing=missing,
        undecided=undecided,
        warnings=warnings,
        advice=(*_advise(wrong, missing or undecided, summary["monitor"]["warnings"], useless),),
        agrees_with=agrees_with,
        predicted=_predict(summary, statuses) if missing or undecided else {},
        quantities=statuses,
    )


def _statuses(summary: Mapping[str, Any], wrong: set[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Return the status of each quantity at each rung."""
    quantities = summary["quantities"]
    result: dict[str, dict[str, str]] = {}
    for key in quantities:
        base = _DERIVED.get(key, key)
        one_sided = _is_one_sided(quantities[base].values())
        result[key] = {}
        for rung, entry in quantities[base].items():
            if (base, rung) in wrong:
                result[key][rung] = WRONG
            elif entry["converged"]:
                result[key][rung] = CONVERGED
            else:
                result[key][rung] = BOUNDED if one_sided or is_bounded(entry) else NOT_YET
        rungs = list(quantities[base])
        for a, b in [*pairwise(rungs), *pairwise(reversed(rungs))]:
            # A rung alone does not know how rare a state is that its neighbour cannot tell.
            if (result[key][a], result[key][b]) == (NOT_YET, BOUNDED):
                result[key][b] = NOT_YET
    return result


def _is_one_sided(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a state was never entered, or never left, at any rung, and nothing expects it."""
    values = {entry["value"] for entry in entries}
    expected = [p for entry in entries if (p := entry.get("expected_p")) is not None]
    is_state = all(entry.get("n_visits") is not None for entry in entries)
    return is_state and values in ({0.0}, {1.0}) and all(not RARE < p < 1 - RARE for p in expected)


def _lacking(
    summary: Mapping[str, Any], statuses: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    for key, rungs in summary["quantities"].items():
        for rung, entry in rungs.items():
            if key not in _DERIVED and not entry["converged"] and statuses[key][rung] != BOUNDED:
                reasons = "; ".join(entry["missing"]) or "its error is not known"
                yield f"{rung} K: {quantity_label(key)}: {reasons}"


def _never_seen(
    summary: Mapping[str, Any], statuses: Mapping[str, Mapping[str, str]]
) -> Iterator[str]:
    """Say what bound is known of states that were never entered or left at any rung."""
    for key, rungs in summary["quantities"].items():
        if key in _DERIVED or BOUNDED not in statuses[key].values():
            continue
        if not _is_one_sided(rungs.values()):
            continue
        values, lows, highs = ([e[k] for e in rungs.values()] for k in ("value", "low", "high"))
        never = values[0] == 0
        bound = max(highs) if never else 1 - min(lows)
        yield (
            f"all rungs: {quantity_label(key)}: the state was never "
            f"{'entered' if never else 'left'}, which bounds {'it' if never else 'the other one'} "
            f"by {bound:.2g} at 95 %"
        )


def _not_equilibrated(summary: Mapping[str, Any]) -> Iterator[str]:
    burn_in = summary.get("burn_in", {})
    if burn_in.get("is_equilibrated") is False:
        drift = burn_in.get("drift") or {}
        of = f" ({drift['series']})" if "series" in drift else ""
        yield f"the run is not equilibrated: it still drifts in its second half{of}"


def _not_mixed(summary: Mapping[str, Any]) -> Iterator[str]:
    if len(summary["temperatures_K"]) > 1:
        trips = summary["round_trips"] / summary["n_walkers"]
        if trips < MIN_ROUND_TRIPS_PER_WALKER:
            yield f"{trips:.2f} round trips of the temperature ladder for each walker"


def _useless_flow(summary: Mapping[str, Any]) -> Iterator[str]:
    """Say that no move that needs the flow is accepted, where it is so."""
    acceptance = summary["acceptance"]
    rates = [r for r in acceptance.get("flow_independent", {}).values() if r is not None]
    swaps = [r for r in _flat(acceptance.get("swap_steered", [])) if r is not None]
    if rates and max(rates) < USELESS_ACCEPTANCE and max(swaps, default=0.0) < USELESS_ACCEPTANCE:
        steered = f", and steered swaps to {max(swaps):.1%}" if swaps else ""
        yield (
            f"this flow is of no use here: its independent draws are accepted to {max(rates):.1%} "
            f"at most{steered}"
        )


def _flat(rates: list[Any]) -> list[Any]:
    return [rate for row in rates for rate in (row if isinstance(row, list) else [row])]


def _advise(
    wrong: Sequence[str], short: Sequence[str], monitored: Sequence[str], useless: Sequence[str]
) -> Iterator[str]:
    if wrong:
        # More sampling does not remove a bias, of the sampler or of its settings.
        yield (
            "a difference from the reference or from the Boltzmann distribution beyond the errors "
            "does not go away with more iterations: compare the System, the temperatures and the "
            "burn-in with the reference's, and the time step with what the dynamics can take"
        )
    if wrong and short:
        yield "but this run is not yet converged: if it still remembers its start, lengthen it"
    if useless:
        yield (
            "train the flow for longer (--preset thorough, --steps), on more frames (--frames), or "
            "from frames nearer to the lowest temperature; without that, replica exchange by "
            "dynamics alone needs fewer evaluations"
        )
    if short and not wrong:
        yield _LENGTHEN
    elif monitored and not wrong:
        yield "more walkers, started in other basins, or training on this run's frames may help"


def _predict(
    summary: Mapping[str, Any], statuses: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Return the lengths and costs of production, in all, that would give what is missing.

    Where what is missing has no known rate, twice the present length is a lower bound.
    """
    saved = summary["n_iterations"]
    start = summary.get("burn_in", {}).get("start", 0)
    used = saved - start
    needs = [
        entry.get("n_iterations_needed")
        for key, rungs in summary["quantities"].items()
        for rung, entry in rungs.items()
        if not entry["converged"] and statuses[key][rung] != BOUNDED
    ]
    needs += [
        used * test.n_needed / test.check["n_eff"] if test.check["n_eff"] else None
        for test in undecided_ensemble_tests(summary)
    ]
    trips = summary["round_trips"] / summary["n_walkers"]
    if len(summary["temperatures_K"]) > 1 and trips < MIN_ROUND_TRIPS_PER_WALKER:
        needs.append(used * MIN_ROUND_TRIPS_PER_WALKER / trips if trips else None)
    known = [need for need in needs if need is not None and need > used]
    at_least = not known or len(known) < len(needs)
    total = max(start + max(known, default=0.0), 2 * saved if at_least else 0)
    ratio, production = total / saved, summary["production"]
    return {
        "n_iterations": ceil(total) * summary.get("numbers_interval", summary["save_interval"]),
        "energy_evaluations": ceil(production["energy_evaluations"] * ratio),
        "wall_seconds": production["wall_seconds"] * ratio,
        "at_least": at_least,
    }
