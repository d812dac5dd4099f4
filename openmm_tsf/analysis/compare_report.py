"""A comparison as a page for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from openmm_tsf.analysis.agreement import quantity_label
from openmm_tsf.analysis.report import shorten

_DISTANCES = (
    ("energy_w2_kJ_mol", "E-W2 (kJ/mol)"),
    ("energy_w2_kT", "E-W2 (kT)"),
    ("torus_w2_rad", "torus W2 (rad)"),
    ("tica_w2", "TICA-W2"),
)


def describe_comparison(content: Mapping[str, Any]) -> str:
    """Return the page of a comparison: the verdict, distances, populations, flow and costs."""
    sentence = content["verdict"]["sentence"]
    lines = [sentence, "", f"{content['run']}, compared with {content['reference']}"]
    for block in (_distances, _quantities, _flow, _costs):
        lines += block(content)
    for title, key in (
        ("wrong", "wrong"),
        ("cannot be decided", "undecided"),
        ("to be looked at", "warnings"),
    ):
        if content["verdict"][key]:
            lines += ["", f"{title}:", *(f"  {each}" for each in shorten(content["verdict"][key]))]
    if content["notes"]:
        lines += ["", *content["notes"]]
    return "\n".join([*lines, "", sentence])


def _distances(content: Mapping[str, Any]) -> Iterator[str]:
    halves = next(iter(content["at"].values()))["halves"]
    yield ""
    yield (
        "distances of run and reference; floor: the same of two halves of the reference, of "
        f"different {halves}"
    )
    yield f"{'T (K)':>8}  {'':<32}{'run':>10}{'floor':>10}{'':>22}{'samples':>9}"
    for key, entry in content["at"].items():
        for name, label in _DISTANCES:
            distance = entry[name]
            if distance is not None:
                yield _distance(key, label, distance.get("distance", distance))
        for residue, distances in entry["ramachandran"].items():
            of = f" of phi{residue}, psi{residue}"
            yield _distance(key, f"total variation{of}", distances["total_variation"])
            yield _distance(key, f"KL{of}", distances["kl"])


def _distance(key: str, label: str, distance: Mapping[str, Any]) -> str:
    spread = f"({_number(distance['floor_low'])} to {_number(distance['floor_high'])})"
    value, floor = (_number(distance[name]) for name in ("value", "floor"))
    return f"{key:>8}  {label:<32}{value:>10}{floor:>10}{spread:>22}{distance['n_samples']:>9,}"


def _quantities(content: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{'T (K)':>8}  {'':<42}{'run':>22}{'reference':>22}{'z':>7}"
    for key, entry in content["at"].items():
        for name, quantity in entry["quantities"].items():
            run, reference = (_estimate(quantity[side]) for side in ("run", "reference"))
            z = "" if quantity["z"] is None else f"{quantity['z']:+.1f}"
            yield f"{key:>8}  {quantity_label(name):<42}{run:>22}{reference:>22}{z:>7}"
    numbers = {key: entry["n_independent"] for key, entry in content["at"].items()}
    counts = [f"{key} K {n['run']:,.0f} and {n['reference']:,.0f}" for key, n in numbers.items()]
    yield f"independent samples by the slowest observable, run and reference: {', '.join(counts)}"


def _flow(content: Mapping[str, Any]) -> Iterator[str]:
    entries = {key: entry["flow"] for key, entry in content["at"].items() if entry["flow"]}
    if not entries:
        return
    yield ""
    yield "the flow, by the joint density of coordinates and momenta (in parentheses: both halves)"
    yield f"{'T (K)':>8}{'reverse ESS':>20}{'forward ESS':>34}{'EUBO':>30}{'NLL':>30}"
    for key, entry in entries.items():
        reverse = entry["reverse_ess"]
        first = "none" if reverse is None else f"{reverse['value']:.3f} ± {reverse['stderr']:.3f}"
        cells = [_with_halves(entry.get(name)) for name in ("forward_ess", "eubo", "nll")]
        yield f"{key:>8}{first:>20}{cells[0]:>34}{cells[1]:>30}{cells[2]:>30}"
        if entry["outside"]:
            yield (
                f"{'':>8}{entry['outside']:.2%} of the reference's frames are outside the flow's "
                "domain: without these"
            )


def _costs(content: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    for side in ("run", "reference"):
        costs = content["costs"][side]
        evaluations, seconds = costs["energy_evaluations"]["all"], costs["core_seconds"]
        words = "energy evaluations are not recorded"
        if evaluations is not None:
            words = f"{evaluations:,} energy evaluations"
        if seconds is not None:
            words += f", {seconds:,.0f} core-seconds of the stages whose time is recorded"
        yield f"{side}: {words}"


def _estimate(entry: Mapping[str, Any]) -> str:
    value, stderr = entry["value"], entry["stderr"]
    digits = 2 if abs(value) > 2 else 4
    if stderr is None:
        bound = ""  # of a state that was never seen, or never left
        if entry["high"] is not None and value < entry["high"]:
            bound = f" (< {entry['high']:.{digits}f})"
        elif entry["low"] is not None and value > entry["low"]:
            bound = f" (> {entry['low']:.{digits}f})"
        return f"{value:.{digits}f}{bound}"
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _with_halves(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "none"
    value, *halves = map(_number, (entry["value"], *entry["halves"]))
    return f"{value} ({', '.join(halves)})"


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"
