"""The summary in words."""

import pytest

from openmm_tsf.analysis.report import describe, describe_verdict
from tests.support.summaries import RUNGS, changed, good_summary, never_visited, with_verdict
from tests.support.summaries import short as not_converged


def table(*changes):
    return describe(with_verdict(changed(*changes)))


def line_of(text, start):
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [start]]
    return line


def test_a_good_run():
    text = table()
    for words in ("P(psi > 0)", "relaxation time of replicas: 8.0 saved iterations", "12,345",
                  "0.250", "0.125", "0.500", "round trips", "<U> (kJ/mol)", "delta F"):  # fmt: skip
        assert words in text
    for words in ("-60.12 ± 0.50", "0.0200 ± 0.0010", "900", "3.90 ± 0.05"):
        assert words in line_of(text, "300.00")
    assert "notes" not in text
    assert "*" not in text
    (line,) = [line for line in text.splitlines() if "300.00-600.00 K" in line]
    assert line.split() == ["300.00-600.00", "K", "0.2000", "±", "0.0100", "0.1950", "+0.5"]
    assert describe_verdict(with_verdict(good_summary())) == ""


def test_the_expected_time_stands_beside_the_real_one():
    text = table(("wall_seconds/expected", 1234.4))
    assert "  expected at the start" in text
    assert "1,234" in text
    assert "expected at the start" not in table()


def test_runs_of_one_rung():
    checks = {"energy_ratio_mol_kJ": {}, "heat_capacity_kJ_mol_K": {}}
    relaxation = {"second_eigenvalue": None, "iterations": None}
    text = table(("ensemble_check", checks), ("replica_relaxation", relaxation))
    assert "relaxation" not in text
    assert "ln[P(U)/P(U)]" not in text


def test_notes():
    text = table(("monitor/notes", ["phi is cut at 0 degrees"]))
    assert text.endswith("\nnotes\n  phi is cut at 0 degrees")


def test_rare_states_are_shown_by_bounds_and_intervals():
    hardly = not_converged(0.001, 0.001, n_visits=3, low=1e-5, high=0.021)
    once = not_converged(0.001, 0.001, n_visits=1, low=2e-17, high=0.021)
    always = not_converged(1.0, 0.0, n_visits=0, low=0.95, high=1.0) | {"stderr": None}
    text = table(
        ("quantities/basin phi > 0/300.00", never_visited(0.047)),
        ("quantities/basin phi > 0/600.00", hardly),
        ("quantities/basin phi < 0/300.00", always),
        ("quantities/basin phi < 0/600.00", once),
    )
    above, below = (line for line in text.splitlines() if line.startswith("phi "))
    assert above.split() == ["phi", ">", "0", "<", "0.047", "*", "1e-05", "to", "0.021", "*"]
    assert below.split() == ["phi", "<", "0", ">", "0.9500", "*", "<", "0.021", "*"]
    assert "* not converged, or hardly seen: 95 % intervals and bounds" in text


def test_undecided_checks_are_named():
    text = table(("ensemble_check/energy_ratio_mol_kJ/300.00-600.00/z", None))
    (line,) = [line for line in text.splitlines() if "300.00-600.00 K" in line]
    assert line.split()[-2:] == ["0.1950", "undecided"]


def test_unknown_numbers():
    unknown = not_converged(19.0, 0.0) | {"stderr": None, "low": None, "high": None, "n_eff": None}
    text = table(("quantities/energy_kJ_mol/600.00", unknown))
    assert "19.00 ± ? *" in line_of(text, "600.00")


def test_the_verdict_in_words():
    summary = with_verdict(
        changed(
            ("quantities/energy_kJ_mol/300.00", not_converged(-60.0, 3.0)),
            ("comparison/phi_positive/z/600.00", -5.0),
            ("comparison/heat_capacity_kJ_mol_K/z/600.00", None),
            ("monitor/warnings", ["the basin was lost"]),
        )
    )
    text = describe_verdict(summary)
    titles = [line for line in text.splitlines() if line.endswith(":")]
    assert titles == [
        "wrong (reference, Boltzmann distribution):",
        "not converged:",
        "undecided:",
        "to be looked at:",
    ]
    for words in (
        "  600.00 K: P(phi > 0) differs from the reference by -5.0 standard errors",
        "  300.00 K: <U>: 12 effective samples, fewer than 100",
        "  600.00 K: C_V cannot be compared",
        "  the basin was lost",
        "80,000 energy evaluations, 160 seconds",
        "does not go away",
    ):
        assert words in text


@pytest.mark.parametrize("at_least", [False, True])
def test_the_prediction(at_least):
    needed = None if at_least else 8000.0
    entry = not_converged(-60.0, 3.0, n_iterations_needed=needed)
    text = describe_verdict(with_verdict(changed(("quantities/energy_kJ_mol/300.00", entry))))
    assert ("at least 2,000 iterations" in text) == at_least
    assert ("about 8,000 iterations" in text) != at_least


def test_every_rung_has_its_line():
    text = table()
    assert all(line_of(text, rung) for rung in RUNGS)
