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
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.analysis.verdict import Verdict

_LONGER = "a longer run would decide"


def compare_means(run: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, Any]:
    """Return the assessments of the means of two series [n, W], and z of their difference."""
    assessed = assess_mean(run), assess_mean(reference)
    return _entry("mean", run, reference, assessed, is_long=True)


def compare_states(
    run: npt.ArrayLike, reference: npt.ArrayLike, pieces: Sequence[float]
) -> dict[str, Any]:
    """Return the same of the probabilities of a state, of truth values [n, W].

    `pieces` are the independent samples of both, see
    `openmm_tsf.analysis.convergence.assess_probability`. A state is lacking where the run should
    have visited it 50 times in these, and did not.
    """
    assessed = assess_probability(run, pieces[0]), assess_probability(reference, pieces[1])
    expected = assessed[1].value
    lacking = 1.0 - expected if assessed[0].value > 0.5 else expected
    return _entry("state", run, reference, assessed, is_long=pieces[0] * lacking >= MIN_VISITS)


def _entry(
    kind: Kind,
    run: npt.ArrayLike,
    reference: npt.ArrayLike,
    assessed: tuple[Assessment, Assessment],
    is_long: bool,
) -> dict[str, Any]:
    """Return assessments and z; z is NaN where the run is too short for it to mean anything."""
    means = estimate_mean(run), estimate_mean(reference)
    z = z_of_difference(kind, means, (assessed[0].n_eff, assessed[1].n_eff))
    decided = assessed[0].converged and means[0].n_samples >= MIN_EFFECTIVE_SAMPLES
    if kind == "mean":
        is_long = means[0].n_independent >= MIN_EFFECTIVE_SAMPLES
    if not (decided or (is_long and abs(z) >= DECISIVE_Z)):
        z = float("nan")
    entries = {
        name: each.to_dict() for name, each in zip(("run", "reference"), assessed, strict=True)
    }
    return entries | {"z": z}


def judge_comparison(content: Mapping[str, Any]) -> Verdict:
    """Return the verdict on the content of a comparison.

    Wrong is a mean or population that differs from the reference beyond chance among all tests
    (Benjamini and Hochberg, see `openmm_tsf.analysis.agreement`), and a Ramachandran distance of
    1.5 times its floor where the run has 100 effective samples. Wasserstein distances and numbers
    of the flow are not judged: they have no errors.
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
        run, reference = quantity["run"], quantity["reference"]
        expected = {"expected_p": reference["value"], "expected_stderr": reference["stderr"]}
        if quantity["z"] is None and not is_bounded(run | expected):
            reason = run["missing"][0] if run["missing"] else "its error is not known"
            yield f"{rung} K: {quantity_label(key)} cannot be compared: {reason}; {_LONGER}"


def _far_apart(content: Mapping[str, Any]) -> Iterator[str]:
    for rung, entry in content["at"].items():
        for label, residue in entry["ramachandran"].items():
            distance, known = residue["total_variation"], residue["n_slowest"] or 0
            ratio = distance["ratio"]
            if known >= MIN_EFFECTIVE_SAMPLES and (ratio or 0) > MAX_RAMACHANDRAN_RATIO:
                yield (
                    f"{rung} K: Ramachandran distance{f' of residue {label}' if label else ''} to "
                    f"the reference {distance['value']:.3f}, more than {MAX_RAMACHANDRAN_RATIO} "
                    f"times that of its halves, {distance['floor']:.3f}"
                )
