"""The content of ``summary.json`` in words: the table, and what is not converged."""

from collections.abc import Iterator
from typing import Any

from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES

#: A run counts as converged up to this standard error of delta F (and enough effective samples).
MAX_FREE_ENERGY_STDERR_KT = 0.25
MAX_Z = 3.0
MIN_P_VALUE = 0.01
MAX_RAMACHANDRAN_RATIO = 1.5
MIN_ROUND_TRIPS_PER_WALKER = 1

_COMPARED = {"phi_positive": "P(phi > 0)", "energy_kJ_mol": "<U>"}
_TOO_FEW = "cannot be compared with the reference (too few effective samples)"
_ENSEMBLE = {
    "energy_ratio_mol_kJ": "the slope of ln[P(U)/P(U)]",
    "heat_capacity_kJ_mol_K": "the change of <U> with temperature",
}


def describe(summary: dict[str, Any]) -> str:
    """Return the tables of a summary: estimates, acceptance, mixing, test of the ensemble, cost."""
    lines = [
        f"{summary['n_walkers']} walkers, {summary['n_iterations']} iterations, "
        f"{summary['n_samples_per_rung']} samples at every temperature"
    ]
    if summary["n_iterations"]:
        lines += _rungs(summary)
    lines += ["", "accepted moves"]
    for name, rates in summary["acceptance"].items():
        values = list(rates.values()) if isinstance(rates, dict) else _neighbours(rates)
        if values:
            lines.append(f"  {name:<18}" + "".join(f"{_number(rate, 3):>9}" for rate in values))
    lines.append(f"  round trips of the temperature ladder: {summary['round_trips']}")
    relaxation = summary["replica_relaxation"]["iterations"]
    if relaxation is not None:
        lines.append(f"  relaxation time of replicas: {relaxation:.1f} saved iterations")
    lines += _energy_ratios(summary)
    lines += ["", f"{'cost':<22}" + "".join(f"{k:>14}" for k in ("md", "training", "sampling"))]
    for label, key in (("energy evaluations", "energy_evaluations"), ("seconds", "wall_seconds")):
        costs = summary[key]
        row = "".join(f"{_count(costs[k]):>14}" for k in ("md", "training", "sampling"))
        lines.append(f"  {label:<20}{row}")
    for label, key in (
        ("of which compiling", "compilation"),
        ("expected at the start", "expected"),
    ):
        if (seconds := summary["wall_seconds"].get(key)) is not None:
            lines.append(f"  {label:<20}{_count(seconds):>14}")
    notes = [*summary["monitor"]["notes"], *_reweighted(summary)]
    if notes:
        lines += ["", "notes", *(f"  {note}" for note in notes)]
    return "\n".join(lines)


def advice(summary: dict[str, Any]) -> str | None:
    """Return what to do about the most serious problem of a run, or None without a problem.

    More sampling does not remove a disagreement with the reference or the Boltzmann distribution:
    that is a bias, of the sampler or of its settings.
    """
    if disagreements(summary):
        return (
            "a difference from the reference or from the Boltzmann distribution beyond the errors "
            "does not go away with more iterations: compare the System, the temperatures and the "
            "burn-in with the reference's, and the time step with what the dynamics can take"
        )
    if unsampled(summary):
        return "more iterations, training or walkers help"
    if concerns(summary):
        return "more walkers, started in other basins, or training on this run's frames may help"
    return None


def unsampled(summary: dict[str, Any]) -> list[str]:
    """Return what more sampling improves: few effective samples, unknown errors, round trips."""
    return [*_few_samples(summary), *_not_tested(summary), *_not_compared(summary)]


def disagreements(summary: dict[str, Any]) -> list[str]:
    """Return where the run is wrong beyond its errors.

    That is where it differs from the reference, at a rung by |z| >= 3 or over all by p <= 0.01;
    and, with or without a reference, where energies of neighbouring rungs are not those of
    Boltzmann distributions, |z| >= 3.
    """
    return [*_differences(summary), *_wrong_ensembles(summary)]


def concerns(summary: dict[str, Any]) -> list[str]:
    """Return the warnings of the monitor."""
    return list(summary["monitor"]["warnings"])


def _reweighted(summary: dict[str, Any]) -> Iterator[str]:
    """Say at which temperatures the run was compared if these are not its own."""
    comparison = summary.get("comparison", {})
    if comparison.get("by_mbar"):
        kelvins = ", ".join(comparison["energy_kJ_mol"]["z"])
        yield (
            f"compared with the reference by MBAR at {kelvins} K: no temperature of the ladder is "
            "one of the reference"
        )


def _rungs(summary: dict[str, Any]) -> Iterator[str]:
    names = list(summary["dihedral_positive"])
    titles = "".join(f"{f'P({name} > 0)':>22}{'N_eff':>8}" for name in names)
    free_energies = summary.get("delta_F_phi_kT")
    yield ""
    yield f"{'T (K)':>8}{'<U> (kJ/mol)':>20}{titles}" + (
        f"{'dF_phi (kT)':>18}" if free_energies else ""
    )
    for rung in (f"{kelvin:.2f}" for kelvin in summary["temperatures_K"]):
        energy = summary["energy_kJ_mol"][rung]
        line = f"{rung:>8}{_with_error(energy['mean'], energy['stderr'], 2):>20}"
        for name in names:
            p = summary["dihedral_positive"][name][rung]
            line += f"{_with_error(p['p'], p['stderr'], 4):>22}{_number(p['n_eff'], 0):>8}"
        if free_energies:
            value = free_energies[rung]
            line += f"{_with_error(value['value'], value['stderr'], 2):>18}"
        yield line


def _energy_ratios(summary: dict[str, Any]) -> Iterator[str]:
    pairs = summary.get("ensemble_check", {}).get("energy_ratio_mol_kJ", {})
    if not pairs:
        return
    yield ""
    yield f"{'ln[P(U)/P(U)], slope':<22}{'(mol/kJ)':>18}{'expected':>12}{'z':>8}"
    for pair, check in pairs.items():
        slope = _with_error(check["value"], check["stderr"], 4)
        expected, z = _number(check["expected"], 4), check["z"]
        yield f"  {f'{pair} K':<20}{slope:>18}{expected:>12}{'?' if z is None else f'{z:+.1f}':>8}"


def _few_samples(summary: dict[str, Any]) -> Iterator[str]:
    if summary["n_iterations"] == 0:
        yield "no samples yet"
        return
    estimates = {
        **{f"P({name} > 0)": rungs for name, rungs in summary["dihedral_positive"].items()},
        "<U>": summary["energy_kJ_mol"],
        "C_V": summary["heat_capacity_kJ_mol_K"],
    }
    for label, rungs in estimates.items():
        for rung, estimate in rungs.items():
            if (estimate["n_eff"] or 0) < MIN_EFFECTIVE_SAMPLES:
                yield f"{rung} K: {label} {_rests_on(estimate['n_eff'])}"
    for rung, value in summary.get("delta_F_phi_kT", {}).items():
        if value["stderr"] is None:
            yield f"{rung} K: the error of delta F is not known"
        elif value["stderr"] > MAX_FREE_ENERGY_STDERR_KT:
            yield (
                f"{rung} K: the error of delta F is {value['stderr']:.2f} kT, more than "
                f"{MAX_FREE_ENERGY_STDERR_KT} kT"
            )
    if len(summary["temperatures_K"]) > 1:
        trips = summary["round_trips"] / summary["n_walkers"]
        if trips < MIN_ROUND_TRIPS_PER_WALKER:
            yield f"{trips:.2f} round trips of the temperature ladder for each walker"


def _not_tested(summary: dict[str, Any]) -> Iterator[str]:
    for key, pairs in summary.get("ensemble_check", {}).items():
        for pair, check in pairs.items():
            if check["z"] is not None:
                continue
            n_eff = f"so few effective samples ({_number(check['n_eff'], 0)} of <U>)"
            reason = f"{_ENSEMBLE[key]} cannot be tested on {n_eff}"
            if check["value"] is None:
                reason = "the energies of the two rungs do not overlap: bring them closer together"
            yield f"{pair} K: {reason}"


def _not_compared(summary: dict[str, Any]) -> Iterator[str]:
    comparison = summary.get("comparison")
    if comparison is None:
        return
    for key, label in _COMPARED.items():
        for rung, z in comparison[key]["z"].items():
            if z is None:
                yield f"{rung} K: {label} {_TOO_FEW}"
        if comparison[key]["p_value"] is None:
            yield f"all rungs: {label} {_TOO_FEW}"
    for rung, distance in comparison["ramachandran"].items():
        if distance["total_variation"] is None or distance["floor_total_variation"] is None:
            yield f"{rung} K: the Ramachandran distance has no floor to compare with"
        elif (distance["n_slowest"] or 0) < MIN_EFFECTIVE_SAMPLES:
            yield f"{rung} K: the Ramachandran plot {_TOO_FEW}"


def _differences(summary: dict[str, Any]) -> Iterator[str]:
    comparison = summary.get("comparison")
    if comparison is None:
        return
    for key, label in _COMPARED.items():
        for rung, z in comparison[key]["z"].items():
            if z is not None and abs(z) >= MAX_Z:
                yield f"{rung} K: {label} differs from the reference by {z:+.1f} standard errors"
        p_value = comparison[key]["p_value"]
        if p_value is not None and p_value <= MIN_P_VALUE:
            yield (
                f"all rungs: {label} differs from the reference, chi2 {comparison[key]['chi2']:.1f}"
                f", p = {p_value:.1g}, not above {MIN_P_VALUE}"
            )
    for rung, distance in comparison["ramachandran"].items():
        value, floor = distance["total_variation"], distance["floor_total_variation"]
        if (distance["n_slowest"] or 0) < MIN_EFFECTIVE_SAMPLES:
            continue
        if value is not None and floor is not None and value > MAX_RAMACHANDRAN_RATIO * floor:
            yield (
                f"{rung} K: Ramachandran distance to the reference {value:.3f}, more than "
                f"{MAX_RAMACHANDRAN_RATIO} times the floor {floor:.3f}"
            )


def _wrong_ensembles(summary: dict[str, Any]) -> Iterator[str]:
    for key, pairs in summary.get("ensemble_check", {}).items():
        for pair, check in pairs.items():
            z = check["z"]
            if z is not None and abs(z) >= MAX_Z:
                yield (
                    f"{pair} K: {_ENSEMBLE[key]} is not that of Boltzmann distributions, "
                    f"by {z:+.1f} standard errors"
                )


def _rests_on(n_eff: float | None) -> str:
    if not n_eff:
        return "has no known error"
    return f"rests on {n_eff:.0f} effective samples, fewer than {MIN_EFFECTIVE_SAMPLES}"


def _neighbours(rates: list[Any]) -> list[Any]:
    """Return the swap acceptance of neighbouring rungs from a list of them or a matrix."""
    if rates and isinstance(rates[0], list):
        return [rates[k][k + 1] for k in range(len(rates) - 1)]
    return rates


def _number(value: float | None, digits: int) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _with_error(value: float | None, stderr: float | None, digits: int) -> str:
    return f"{_number(value, digits)} ± {_number(stderr, digits)}"
