"""Contents of ``summary.json`` with known verdicts."""

from openmm_tsf.analysis.verdict import judge

RUNGS = ("300.00", "600.00")
PAIR = "300.00-600.00"


def assessed(value, stderr, n_visits=None, **changes):
    """A converged estimate, as `Assessment.to_dict` writes it."""
    return {
        "value": value, "stderr": stderr, "low": value - 2 * stderr, "high": value + 2 * stderr,
        "n_eff": 900.0, "r_hat": 1.0, "drift": 0.5, "n_visits": n_visits, "missing": [],
        "n_iterations_needed": 500.0, "converged": True,
    } | changes  # fmt: skip


def short(value, stderr, reason="12 effective samples, fewer than 100", **changes):
    """An estimate that is not yet converged."""
    changes = {"n_eff": 12.0, "n_iterations_needed": 8000.0} | changes
    return assessed(value, stderr, missing=[reason], converged=False, **changes)


def never_visited(bound=0.05, **changes):
    """A state that was never visited, with its upper bound."""
    reason = "the state was never visited"
    numbers = {"low": 0.0, "high": bound, "n_iterations_needed": None, "n_visits": 0} | changes
    return short(0.0, 0.0, reason, **numbers) | {"stderr": None}


def good_summary():
    """A converged run of two rungs that agrees with the reference, without its verdict."""

    def agreement():
        return {"z": dict.fromkeys(RUNGS, 0.5), "chi2": 1.0, "p_value": 0.6}

    check = {"value": 0.2, "stderr": 0.01, "expected": 0.195, "n_eff": 500.0, "z": 0.5}
    distance = {"total_variation": 0.05, "floor_total_variation": 0.05, "n_slowest": 500.0}
    return {
        "temperatures_K": [300.0, 600.0],
        "n_walkers": 4, "n_iterations": 1000, "n_samples_per_rung": 4000, "save_interval": 1,
        "quantities": {
            "energy_kJ_mol": {rung: assessed(-60.123, 0.5) for rung in RUNGS},
            "heat_capacity_kJ_mol_K": {rung: assessed(0.25, 0.01) for rung in RUNGS},
            "phi_positive": {rung: assessed(0.02, 0.001, 300) for rung in RUNGS},
            "psi_positive": {rung: assessed(0.7, 0.01, 300) for rung in RUNGS},
            "delta_F_phi_kT": {rung: assessed(3.9, 0.05, 300) for rung in RUNGS},
            "basin phi > 0": {rung: assessed(0.02, 0.001, 300) for rung in RUNGS},
            "basin phi < 0": {rung: assessed(0.98, 0.001, 300) for rung in RUNGS},
        },
        "acceptance": {
            "local": dict.fromkeys(RUNGS, 0.9), "flow_walk": {"300.00": 0.25, "600.00": None},
            "flow_independent": dict.fromkeys(RUNGS, 0.4),
            "swap_plain": [0.125], "swap_steered": [], "swap_random": [[0.0, 0.5], [0.0, 0.0]],
        },
        "round_trips": 40,
        "replica_relaxation": {"second_eigenvalue": 0.875, "iterations": 8.0},
        "ensemble_check": {
            key: {PAIR: dict(check)} for key in ("energy_ratio_mol_kJ", "heat_capacity_kJ_mol_K")
        },
        "monitor": {"warnings": [], "notes": []},
        "energy_evaluations": {"md": None, "training": 5, "sampling": 12345},
        "wall_seconds": {"md": None, "training": 5.0, "sampling": 10.0},
        "production": {"energy_evaluations": 10_000, "wall_seconds": 20.0},
        "comparison": {
            "by_mbar": False,
            "phi_positive": agreement(),
            "energy_kJ_mol": agreement(),
            "heat_capacity_kJ_mol_K": agreement(),
            "basins": {"phi > 0": agreement()},
            "ramachandran": {rung: dict(distance) for rung in RUNGS},
        },
    }  # fmt: skip


def changed(*changes):
    """The good summary with entries replaced: pairs of a path and a value."""
    summary = good_summary()
    for path, value in changes:
        *keys, last = path.split("/")
        part = summary
        for key in keys:
            part = part[key]
        part[last] = value
    return summary


def with_verdict(summary):
    """The summary with its verdict, as it is written."""
    verdict = judge(summary)
    for key, statuses in verdict.quantities.items():
        for rung, status in statuses.items():
            summary["quantities"][key][rung]["status"] = status
    return summary | {"verdict": verdict.to_dict()}
