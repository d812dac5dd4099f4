"""Means and populations of a run beside those of a reference, and the verdict on a comparison."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from openmm_tsf.analysis.agreement import (
    MAX_RAMACHANDRAN_RATIO,
    Difference,
    discovery_limit,
    is_bounded,
    quantity_label,
)
from openmm_tsf.analysis.comparison import Kind, z_of_difference
from openmm_tsf.analysis.convergence import MIN_VISITS, Assessment, assess_mean, assess_probability
from openmm_tsf.analysis.ensemble_checks import DECISIVE_Z
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES
from openmm_tsf.analysis.uncertainty import MeanEstimate, estimate_mean
from openmm_tsf.analysis.verdict import Verdict

_SIDES = ("run", "reference")


def compare_means(run: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, Any]:
    """Return the assessments of the means of two series [n, W], and z of their difference.

    z is given where both are converged and of 100 samples; else, from 5 on, where both have 100
    effective samples.
    """
    means = estimate_mean(run), estimate_mean(reference)
    are_long = [each.n_independent >= MIN_EFFECTIVE_SAMPLES for each in means]
    return _entry("mean", means, (assess_mean(run), assess_mean(reference)), are_long)


def compare_states(
    run: npt.ArrayLike, reference: npt.ArrayLike, pieces: Sequence[float]
) -> dict[str, Any]:
    """Return the same of the probabilities of a state, of truth values [n, W].

    `pieces` are the independent samples of both, see
    `openmm_tsf.analysis.convergence.assess_probability`. Where it is not converged, z is given from
    5 on if either side should have visited the state (or left it) 50 times in these by the other.
    """
    assessed = assess_probability(run, pieces[0]), assess_probability(reference, pieces[1])
    are_long = []
    for side, other, n in zip(assessed, reversed(assessed), pieces, strict=True):
        lacking = 1.0 - other.value if side.value > 0.5 else other.value
        are_long.append(n * lacking >= MIN_VISITS)
    return _entry("state", (estimate_mean(run), estimate_mean(reference)), assessed, are_long)


def _entry(
    kind: Kind,
    means: tuple[MeanEstimate, MeanEstimate],
    assessed: tuple[Assessment, Assessment],
    are_long: Sequence[bool],
) -> dict[str, Any]:
    """Return assessments and z; z is NaN where a side is too short for it to mean anything."""
    z = z_of_difference(kind, means, (assessed[0].n_eff, assessed[1].n_eff))
    decisive = abs(z) >= DECISIVE_Z
    for mean, each, is_long in zip(means, assessed, are_long, strict=True):
        decided = each.converged and mean.n_samples >= MIN_EFFECTIVE_SAMPLES
        if not (decided or (is_long and decisive)):
            z = float("nan")
    entries = {name: each.to_dict() for name, each in zip(_SIDES, assessed, strict=True)}
    return entries | {"z": z}


def judge_comparison(content: Mapping[str, Any]) -> Verdict:
    """Return the verdict on the content of a comparison.

    Wrong is a mean or population that differs from the reference beyond chance among all tests
    (Benjamini and Hochberg, see `openmm_tsf.analysis.agreement`), and a Ramachandran distance of
    1.5 times its floor where both sides have 100 effective samples. Where a side has too few
    samples for one of these the comparison is undecided, and says which side. Wasserstein distances
    and numbers of the flow are not judged: they have no errors.
    """
    tests = list(_tests(content))
    limit = discovery_limit([test.p_value for test in tests])
    remarkable = [test for test in tests if test.remarkable]
    found = [test.words for test in remarkable if test.p_value <= limit]
    chance = [test.words for test in remarkable if test.p_value > limit]
    wrong = (*found, *_far_apart(content))
    undecided = tuple(_undecided(content))
    return Verdict(
        wrong=wrong,
        undecided=undecided,
        warnings=tuple(f"{words}: as one of many tests, this may be chance" for words in chance),
        agrees_with=() if wrong or undecided else ("the reference",),
    )


def _quantities(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for rung, entry in content["at"].items():
        for key, quantity in entry["quantities"].items():
            yield rung, key, quantity


def _tests(content: Mapping[str, Any]) -> Iterator[Difference]:
    for rung, key, quantity in _quantities(content):
        if quantity["z"] is not None:
            words = f"{rung} K: {quantity_label(key)} differs from the reference"
            yield Difference.of_z(words, quantity["z"], (key, rung))


def _undecided(content: Mapping[str, Any]) -> Iterator[str]:
    for rung, key, quantity in _quantities(content):
        if quantity["z"] is not None:
            continue
        what = f"{rung} K: {quantity_label(key)} cannot be compared"
        for side, other in (_SIDES, _SIDES[::-1]):
            entry, expected = quantity[side], quantity[other]
            known = {"expected_p": expected["value"], "expected_stderr": expected["stderr"]}
            if not (entry["converged"] or is_bounded(entry | known)):
                yield _too_short(what, side, (entry["missing"] or ["its error is not known"])[0])
    for rung, entry in content["at"].items():
        for label, residue in entry["ramachandran"].items():
            what = f"{rung} K: the Ramachandran plot{_of_residue(label)} cannot be compared"
            for side in _SIDES:
                number = residue["n_slowest"][side] or 0
                if number < MIN_EFFECTIVE_SAMPLES:
                    yield _too_short(what, side, f"{number:.0f} effective samples")


def _too_short(what: str, side: str, reason: str) -> str:
    where = "" if side == "run" else "of the reference: "
    return f"{what}: {where}{reason}; a longer {side} would decide"


def _of_residue(label: str) -> str:
    return f" of residue {label}" if label else ""


def _far_apart(content: Mapping[str, Any]) -> Iterator[str]:
    for rung, entry in content["at"].items():
        for label, residue in entry["ramachandran"].items():
            distance, known = residue["total_variation"], residue["n_slowest"]
            is_known = min(known[side] or 0 for side in _SIDES) >= MIN_EFFECTIVE_SAMPLES
            if is_known and (distance["ratio"] or 0) > MAX_RAMACHANDRAN_RATIO:
                yield (
                    f"{rung} K: Ramachandran distance{_of_residue(label)} to "
                    f"the reference {distance['value']:.3f}, more than {MAX_RAMACHANDRAN_RATIO} "
                    f"times that of its halves, {distance['floor']:.3f}"
                )
