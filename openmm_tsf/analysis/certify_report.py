"""The verdict on a certificate's checks, and its page for the terminal."""

from collections.abc import Iterable, Iterator
from typing import Any

from openmm_tsf.analysis.certify_checks import MISSING, NOTED, PASSED, UNDECIDED, WRONG, Check
from openmm_tsf.analysis.verdict import Verdict

#: Checks that tell whether samples are of Boltzmann distributions.
_OF_BOLTZMANN = ("Boltzmann", "configurational temperature")


def judge_checks(checks: Iterable[Check]) -> Verdict:
    """Return the verdict on checks.

    It is ``wrong`` if any found what cannot be of the Boltzmann ensemble; else ``not yet`` where
    samples are missing or a check cannot decide; else ``converged``.
    """
    checks = list(checks)
    wrong, missing, undecided, warnings = (
        tuple(check.sentence for check in checks if check.status == status)
        for status in (WRONG, MISSING, UNDECIDED, NOTED)
    )
    agrees = any(check.name in _OF_BOLTZMANN and check.status == PASSED for check in checks)
    return Verdict(
        wrong=wrong,
        missing=missing,
        undecided=undecided,
        warnings=warnings,
        agrees_with=("Boltzmann",) if agrees and not wrong and not undecided else (),
    )


def describe_certificate(certificate: dict[str, Any]) -> str:
    """Return the page of a certificate: the verdict, the samples, all checks by name."""
    verdict = certificate["verdict"]
    lines = [f"certificate: {verdict['sentence']}", ""]
    lines += _samples(certificate)
    for name in dict.fromkeys(check["name"] for check in certificate["checks"]):
        lines += ["", name]
        for check in certificate["checks"]:
            if check["name"] == name:
                lines.append(f"  {check['status']:<9} {check['where']}: {check['words']}")
    lines += _coverage(certificate)
    for title, key in (
        ("wrong", "wrong"),
        ("not yet converged", "missing"),
        ("cannot be decided", "undecided"),
        ("to be looked at", "warnings"),
    ):
        if verdict[key]:
            lines += ["", f"{title}:", *(f"  {reason}" for reason in verdict[key])]
    lines += ["", f"certificate: {verdict['sentence']}"]
    return "\n".join(lines)


def _samples(certificate: dict[str, Any]) -> Iterator[str]:
    energies = certificate["quantities"]["energy_kJ_mol"]
    yield f"{'T (K)':>8}{'frames':>12}{'walkers':>9}{'<U> (kJ/mol)':>22}{'N_eff':>9}{'R-hat':>8}"
    for key, samples in certificate["samples"].items():
        energy = energies.get(key, {})
        value, stderr = energy.get("value"), energy.get("stderr")
        yield (
            f"{key:>8}{samples['n_frames']:>12,}{samples['n_walkers']:>9}"
            f"{f'{_number(value, 2)} ± {_number(stderr, 2)}':>22}"
            f"{_number(energy.get('n_eff'), 0):>9}{_number(energy.get('r_hat'), 3):>8}"
        )
        if samples["n_left_out"]:
            yield (
                f"{'':>8}{samples['n_left_out']:,} frames are left out: walkers are cut to the "
                "length of the shortest"
            )


def _coverage(certificate: dict[str, Any]) -> Iterator[str]:
    if not certificate["coverage"]:
        return
    yield ""
    yield "basins, by the frames and by the flow's weighted draws (95 %)"
    yield f"{'T (K)':>8}  {'basin':<36}{'frames':>26}{'flow':>26}{'ln(p/q)':>9}"
    for key, table in certificate["coverage"].items():
        for name, basin in table["basins"].items():
            frames = basin["frames"]
            by_flow = _number(basin["p"], 4)
            if basin["high"] is not None:
                by_flow += f" ({_number(basin['low'], 4)}, {_number(basin['high'], 4)})"
            by_frames = (
                f"{_number(frames['value'], 4)} "
                f"({_number(frames['low'], 4)}, {_number(frames['high'], 4)})"
            )
            yield (
                f"{key:>8}  {name:<36}{by_frames:>26}{by_flow:>26}"
                f"{_number(basin['median_log_weight'], 1):>9}"
            )


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:.{digits}f}"
