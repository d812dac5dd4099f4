import pytest

from openmm_tsf.analysis.report import advice, concerns, describe, disagreements, unsampled

ENSEMBLE_CHECKS = ("energy_ratio_mol_kJ", "heat_capacity_kJ_mol_K")


def problems(summary):
    """Everything that a report says is wrong, by kind."""
    return unsampled(summary), disagreements(summary), concerns(summary)


def changed(path, value):
    """The summary of a good run with one entry replaced."""
    summary = good_summary()
    *keys, last = path.split("/")
    part = summary
    for key in keys:
        part = part[key]
    part[last] = value
    return summary


def good_summary():
    """A converged run of two rungs that agrees with the reference."""
    rungs = ("300.00", "600.00")
    probability = {"p": 0.1, "stderr": 0.01, "n_eff": 900.0, "g": 2.0}
    agreement = {"z": dict.fromkeys(rungs, 0.5), "chi2": 1.0, "p_value": 0.6}
    check = {"value": 0.2, "stderr": 0.01, "expected": 0.195, "n_eff": 500.0, "z": 0.5}
    distance = {"total_variation": 0.05, "floor_total_variation": 0.05, "n_slowest": 500.0}
    sizes = {"n_walkers": 4, "n_iterations": 1000, "n_samples_per_rung": 4000, "round_trips": 40}
    return sizes | {
        "temperatures_K": [300.0, 600.0],
        "dihedral_positive": {
            name: {rung: dict(probability) for rung in rungs} for name in ("phi", "psi")
        },
        "energy_kJ_mol": {rung: {"mean": 1.0, "stderr": 0.1, "n_eff": 500.0} for rung in rungs},
        "heat_capacity_kJ_mol_K": {rung: {"value": 1.0, "n_eff": 500.0} for rung in rungs},
        "delta_F_phi_kT": {rung: {"value": 2.0, "stderr": 0.1} for rung in rungs},
        "acceptance": {"local": dict.fromkeys(rungs, 0.9), "swap_plain": [0.5], "swap_steered": []},
        "replica_relaxation": {"second_eigenvalue": 0.875, "iterations": 8.0},
        "ensemble_check": {key: {"300.00-600.00": dict(check)} for key in ENSEMBLE_CHECKS},
        "monitor": {"warnings": [], "notes": []},
        "energy_evaluations": {"md": None, "training": 5, "sampling": 10},
        "wall_seconds": {"md": None, "training": 5.0, "sampling": 10.0},
        "comparison": {
            "phi_positive": agreement | {"z": dict(agreement["z"])},
            "energy_kJ_mol": agreement,
            "ramachandran": {rung: dict(distance) for rung in rungs},
        },
    }


def test_the_expected_time_stands_beside_the_real_one():
    summary = changed("wall_seconds/expected", 1234.4)
    assert "  expected at the start" in describe(summary)
    assert "1,234" in describe(summary)
    assert "expected at the start" not in describe(good_summary())


def test_a_good_run():
    summary = good_summary()
    assert (problems(summary), advice(summary)) == (([], [], []), None)
    text = describe(summary)
    for words in ("P(psi > 0)", "relaxation time of replicas: 8.0 saved iterations"):
        assert words in text
    assert "notes" not in text
    (line,) = [line for line in text.splitlines() if "300.00-600.00 K" in line]
    assert line.split() == ["300.00-600.00", "K", "0.2000", "±", "0.0100", "0.1950", "+0.5"]


def test_runs_without_a_reference_and_of_one_rung():
    summary = good_summary()
    del summary["comparison"]
    summary["ensemble_check"] = {key: {} for key in ENSEMBLE_CHECKS}
    summary["replica_relaxation"] = {"second_eigenvalue": None, "iterations": None}
    assert problems(summary) == ([], [], [])
    assert "relaxation" not in describe(summary)
    assert "ln[P(U)/P(U)]" not in describe(summary)


def test_what_the_monitor_says():
    summary = changed("monitor/warnings", ["300.00 K: the basin was lost"])
    assert problems(summary) == ([], [], ["300.00 K: the basin was lost"])
    assert "other basins" in advice(summary)
    summary = changed("monitor/notes", ["phi is cut at 0 degrees"])
    assert (problems(summary), advice(summary)) == (([], [], []), None)
    assert describe(summary).endswith("\nnotes\n  phi is cut at 0 degrees")


@pytest.mark.parametrize("key", ENSEMBLE_CHECKS)
@pytest.mark.parametrize("with_reference", [True, False])
def test_a_wrong_ensemble_needs_no_reference(key, with_reference):
    summary = changed(f"ensemble_check/{key}/300.00-600.00/z", -3.0)
    if not with_reference:
        del summary["comparison"]
    (line,) = disagreements(summary)
    assert line.startswith("300.00-600.00 K: ")
    assert "not that of Boltzmann distributions, by -3.0 standard errors" in line
    assert problems(summary) == ([], [line], [])
    assert "does not go away" in advice(summary)
    unknown = changed(f"ensemble_check/{key}/300.00-600.00/z", None)
    assert disagreements(unknown) == []
    (line,) = unsampled(unknown)
    assert "cannot be tested" in line
    assert "?" in describe(unknown) or key != "energy_ratio_mol_kJ"
    unknown["ensemble_check"][key]["300.00-600.00"]["value"] = None
    assert "do not overlap" in unsampled(unknown)[0]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("dihedral_positive/psi/600.00/n_eff", 12.0, "600.00 K: P(psi > 0) rests on 12"),
        ("dihedral_positive/phi/300.00/n_eff", 0.0, "300.00 K: P(phi > 0) has no known error"),
        ("energy_kJ_mol/300.00/n_eff", 20.0, "300.00 K: <U> rests on 20"),
        ("energy_kJ_mol/300.00/n_eff", None, "300.00 K: <U> has no known error"),
        ("heat_capacity_kJ_mol_K/300.00/n_eff", 20.0, "300.00 K: C_V rests on 20"),
        ("heat_capacity_kJ_mol_K/300.00/n_eff", None, "300.00 K: C_V has no known error"),
        ("delta_F_phi_kT/300.00/stderr", 0.4, "the error of delta F is 0.40 kT"),
        ("delta_F_phi_kT/300.00/stderr", None, "the error of delta F is not known"),
        ("round_trips", 2, "0.50 round trips"),
        ("n_iterations", 0, "no samples yet"),
        ("comparison/phi_positive/z/300.00", None, "P(phi > 0) cannot be compared"),
        ("comparison/energy_kJ_mol/p_value", None, "<U> cannot be compared"),
        ("comparison/ramachandran/300.00/floor_total_variation", None, "no floor"),
        ("comparison/ramachandran/300.00/n_slowest", 60.0, "Ramachandran plot cannot be compared"),
    ],
)
def test_what_more_sampling_cures(path, value, words):
    summary = changed(path, value)
    (line,) = unsampled(summary)
    assert words in line
    assert problems(summary) == ([line], [], [])
    assert "more iterations" in advice(summary)
    describe(summary)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("comparison/phi_positive/z/600.00", -3.0, "600.00 K: P(phi > 0) differs"),
        ("comparison/energy_kJ_mol/z/300.00", 4.5, "300.00 K: <U> differs"),
        ("comparison/phi_positive/p_value", 0.01, "all rungs: P(phi > 0) differs"),
        ("comparison/energy_kJ_mol/p_value", 1e-6, "all rungs: <U> differs"),
        ("comparison/ramachandran/300.00/total_variation", 0.2, "Ramachandran distance"),
    ],
)
def test_what_more_sampling_does_not_cure(path, value, words):
    summary = changed(path, value)
    (line,) = disagreements(summary)
    assert words in line
    assert problems(summary) == ([], [line], [])
    assert "does not go away" in advice(summary)
