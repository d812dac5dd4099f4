"""The verdict as a function of the numbers of a summary."""

import json

import numpy as np
import pytest

from openmm_tsf.analysis import Reference, load_run
from openmm_tsf.analysis.agreement import FALSE_ALARMS
from openmm_tsf.analysis.verdict import EXIT_STATUS, judge
from tests.support.analysis_runs import WELL
from tests.support.fabricate import write_run
from tests.support.summaries import PAIR, RUNGS, assessed, changed, good_summary, never_visited
from tests.support.summaries import short as not_converged

CHECKS = ("energy_ratio_mol_kJ", "heat_capacity_kJ_mol_K")


def kinds(verdict):
    return len(verdict.wrong), len(verdict.missing), len(verdict.undecided), len(verdict.warnings)


def test_a_good_run():
    verdict = judge(good_summary())
    assert verdict.sentence == "converged, in agreement with the reference and with Boltzmann"
    assert (verdict.status, verdict.exit_status, kinds(verdict)) == ("converged", 0, (0, 0, 0, 0))
    assert (verdict.advice, verdict.predicted) == ((), {})
    assert {s for rungs in verdict.quantities.values() for s in rungs.values()} == {"converged"}
    content = verdict.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["status"] == "converged"
    assert "quantities" not in content


def test_without_a_reference_and_of_one_rung():
    summary = good_summary()
    del summary["comparison"]
    assert judge(summary).sentence == "converged, in agreement with Boltzmann"
    summary = changed(("ensemble_check", {key: {} for key in CHECKS}), ("round_trips", 0))
    del summary["comparison"]
    summary["temperatures_K"] = [300.0]
    assert judge(summary).sentence == "converged"


def test_the_summary_is_not_changed():
    summary = changed(("quantities/phi_positive/300.00", never_visited()))
    before = json.dumps(summary)
    judge(summary)
    assert json.dumps(summary) == before


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("energy_kJ_mol/300.00", "300.00 K: <U>: "),
        ("heat_capacity_kJ_mol_K/600.00", "600.00 K: C_V: "),
        ("psi_positive/600.00", "600.00 K: P(psi > 0): "),
        ("basin phi > 0/300.00", "300.00 K: P(phi > 0): "),
    ],
)
@pytest.mark.parametrize(
    "reason", ["split-R-hat 1.63, more than 1.05", "the second half differs from the first by -3.6"]
)
def test_what_more_sampling_gives(path, words, reason):
    visits = None if "kJ" in path else 30
    entry = not_converged(0.1, 0.01, reason, n_visits=visits)
    verdict = judge(changed((f"quantities/{path}", entry)))
    assert verdict.missing == (words + reason,)
    assert verdict.sentence == f"not yet converged: {words}{reason}"
    assert (verdict.status, verdict.exit_status, kinds(verdict)) == ("not yet", 3, (0, 1, 0, 0))
    key, rung = path.split("/")
    assert verdict.quantities[key] == dict.fromkeys(RUNGS, "converged") | {rung: "not yet"}
    assert "more iterations" in verdict.advice[0]
    # 8000 iterations, of which 1000 cost 10 000 evaluations and 20 seconds.
    assert verdict.predicted == {
        "n_iterations": 8000,
        "energy_evaluations": 80_000,
        "wall_seconds": 160.0,
        "at_least": False,
    }


def test_what_has_no_rate_predicts_a_lower_bound():
    entry = not_converged(0.1, 0.01, n_iterations_needed=None)
    verdict = judge(changed(("quantities/energy_kJ_mol/300.00", entry), ("save_interval", 5)))
    assert verdict.predicted["at_least"]
    assert verdict.predicted["n_iterations"] == 2 * 1000 * 5
    longer = not_converged(0.1, 0.01, n_iterations_needed=3000.0)
    both = changed(
        ("quantities/energy_kJ_mol/300.00", entry), ("quantities/energy_kJ_mol/600.00", longer)
    )
    assert (judge(both).predicted["n_iterations"], judge(both).predicted["at_least"]) == (
        3000,
        True,
    )


def test_iterations_that_were_left_out_are_counted():
    entry = not_converged(0.1, 0.01, n_iterations_needed=8000.0)
    burn_in = {"start": 200, "n_used": 800, "is_equilibrated": True}
    summary = changed(("quantities/energy_kJ_mol/300.00", entry), ("burn_in", burn_in))
    assert judge(summary).predicted["n_iterations"] == 8200
    summary = changed(("burn_in", burn_in | {"is_equilibrated": False, "drift": {"series": "U"}}))
    (line,) = judge(summary).missing
    assert "not equilibrated" in line
    assert line.endswith("(U)")


def test_a_free_energy_is_as_converged_as_its_probability():
    entry = not_converged(0.0077, 0.0063, "1.2 effective successes, fewer than 16", n_visits=5)
    verdict = judge(changed(("quantities/phi_positive/300.00", entry)))
    assert len(verdict.missing) == 1
    assert verdict.quantities["delta_F_phi_kT"] == {"300.00": "not yet", "600.00": "converged"}


def test_what_was_never_visited_at_one_rung_only_is_missing():
    verdict = judge(changed(("quantities/phi_positive/300.00", never_visited())))
    assert verdict.missing == ("300.00 K: P(phi > 0): the state was never visited",)
    assert verdict.status == "not yet"


@pytest.mark.parametrize("bound", [0.05, 5e-4])
def test_a_state_that_nothing_expects_is_bounded_and_said(bound):
    """As phi > 0 of proline."""
    states = {rung: never_visited(bound) for rung in RUNGS}
    summary = changed(("quantities/phi_positive", states))
    del summary["comparison"]
    verdict = judge(summary)
    assert verdict.status == "converged"
    assert verdict.quantities["phi_positive"] == dict.fromkeys(RUNGS, "bounded")
    (line,) = verdict.warnings
    assert "P(phi > 0): the state was never entered, which bounds it by" in line
    # Frames of the training, or the reference, have it: it is missing.
    expected = {rung: never_visited(bound, expected_p=0.02) for rung in RUNGS}
    verdict = judge(changed(("quantities/phi_positive", expected)))
    assert (verdict.status, len(verdict.missing)) == ("not yet", 2)


def test_states_below_one_thousandth_need_no_population():
    rare = not_converged(2e-4, 1e-4, n_visits=6, low=1e-5, high=8e-4)
    path = "quantities/basin phi > 0/300.00"
    verdict = judge(changed((path, rare)))
    assert (verdict.status, verdict.quantities["basin phi > 0"]["300.00"]) == (
        "converged",
        "bounded",
    )
    # Its interval is wide, or more is expected.
    for change in ({"high": 0.025}, {"expected_p": 1.6e-3}, {"high": 2e-3, "expected_p": 1.6e-3}):
        assert judge(changed((path, rare | change))).status == "not yet"
    assert judge(changed((path, rare | {"high": 2e-3}))).status == "converged"
    # Little is expected, and little was found.
    wide = {"high": 2e-3, "expected_p": 3e-4, "expected_stderr": 1e-4}
    assert judge(changed((path, rare | wide))).status == "converged"
    assert judge(changed((path, rare | wide | {"expected_stderr": 1e-3}))).status == "not yet"
    # The other rung has it, and does not know how much: then this one does not either.
    unknown = not_converged(0.004, 0.004, n_visits=6, low=0.0, high=0.05)
    both = judge(changed((path, rare), ("quantities/basin phi > 0/600.00", unknown)))
    assert len(both.missing) == 2
    assert set(both.quantities["basin phi > 0"].values()) == {"not yet"}
    # A population of more than one thousandth that a few visits tell within a narrow interval.
    some = not_converged(3e-3, 1.4e-3, n_visits=17, low=5e-4, high=1.2e-2, expected_p=2e-3)
    some["n_eff"] = 1500.0
    assert judge(changed((path, some))).status == "converged"
    for change in ({"n_visits": 4}, {"n_eff": 600.0}, {"high": 0.03}, {"r_hat": 1.1}, {"drift": 4}):
        assert judge(changed((path, some | change))).status == "not yet"
    for expected in ({"expected_p": 0.03, "expected_stderr": 5e-3}, {"expected_p": 1e-4}):
        assert judge(changed((path, some | expected))).status == "not yet"
    # A mean that is small is no rare state.
    small = not_converged(2e-4, 1e-4, low=1e-5, high=8e-4)
    assert judge(changed(("quantities/energy_kJ_mol/300.00", small))).status == "not yet"


@pytest.mark.parametrize(
    ("path", "words", "key"),
    [
        ("comparison/phi_positive/z/600.00", "600.00 K: P(phi > 0) differs", "phi_positive"),
        ("comparison/energy_kJ_mol/z/600.00", "600.00 K: <U> differs", "energy_kJ_mol"),
        (
            "comparison/heat_capacity_kJ_mol_K/z/600.00",
            "600.00 K: C_V differs",
            "heat_capacity_kJ_mol_K",
        ),
        ("comparison/basins/phi > 0/z/600.00", "600.00 K: P(phi > 0) differs", "basin phi > 0"),
    ],
)
@pytest.mark.parametrize("z", [-4.0, 4.5])
def test_a_difference_from_the_reference_is_wrong(path, words, key, z):
    verdict = judge(changed((path, z)))
    (line,) = verdict.wrong
    assert line == f"{words} from the reference by {z:+.1f} standard errors"
    assert (verdict.status, verdict.exit_status) == ("wrong", 4)
    assert verdict.sentence == f"wrong: {line}"
    assert verdict.quantities[key] == {"300.00": "converged", "600.00": "wrong"}
    assert "does not go away" in verdict.advice[0]
    assert verdict.agrees_with == ()
    assert len(verdict.advice) == 1
    # A run that is not yet converged either may still remember its start.
    short = ("quantities/psi_positive/300.00", not_converged(0.7, 0.1, n_visits=3))
    assert "still remembers its start" in judge(changed((path, z), short)).advice[1]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("comparison/energy_kJ_mol/p_value", 1e-6, "all rungs: <U> differs"),
        ("comparison/basins/phi > 0/p_value", 1e-6, "all rungs: P(phi > 0) differs"),
        ("comparison/ramachandran/300.00/total_variation", 0.2, "Ramachandran distance"),
    ],
)
def test_differences_of_all_rungs(path, value, words):
    verdict = judge(changed((path, value)))
    (line,) = verdict.wrong
    assert words in line


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("key", CHECKS)
def test_a_wrong_ensemble_needs_no_reference(key, with_reference):
    summary = changed((f"ensemble_check/{key}/{PAIR}/z", -4.0))
    if not with_reference:
        del summary["comparison"]
    verdict = judge(summary)
    (line,) = verdict.wrong
    assert line.startswith(f"{PAIR} K: ")
    assert "not that of Boltzmann distributions, by -4.0 standard errors" in line
    assert set(verdict.quantities["energy_kJ_mol"].values()) == {"wrong"}


def test_a_basin_that_contradicts_its_neighbour_is_wrong():
    check = {"value": 3.0, "stderr": 0.2, "expected": 0.9, "n_eff": 400.0, "z": 10.5}
    verdict = judge(changed(("ensemble_check/basin_ratio", {"phi > 0": {PAIR: check}})))
    assert "the ratio of P(phi > 0)" in verdict.wrong[0]
    assert set(verdict.quantities["basin phi > 0"].values()) == {"wrong"}


def test_the_ratio_of_a_rare_state_need_not_be_tested():
    reason = "4 effective samples inside the state, fewer than 16"
    check = {"value": 3.0, "stderr": 0.9, "expected": 0.9, "n_eff": 4.0, "z": None}
    ratio = ("ensemble_check/basin_ratio", {"phi > 0": {PAIR: check | {"undecided": reason}}})
    common = assessed(0.3, 0.02, 300)
    wide = [(f"quantities/basin phi > 0/{rung}", common) for rung in RUNGS]
    verdict = judge(changed(ratio, *wide))
    (line,) = verdict.undecided
    assert line.endswith(f"P(phi > 0) cannot be tested: {reason}; a longer run would decide")
    assert verdict.predicted["n_iterations"] == 4000  # 16 effective samples
    rare = not_converged(2e-4, 1e-4, n_visits=6, low=1e-5, high=8e-4)
    one, other = ((f"quantities/basin phi > 0/{rung}", rare) for rung in RUNGS)
    assert judge(changed(ratio, one, other)).status == "converged"
    assert judge(changed(ratio, one, wide[1])).status == "not yet"


@pytest.mark.parametrize("key", CHECKS)
def test_a_check_that_cannot_decide_says_what_would(key):
    path = f"ensemble_check/{key}/{PAIR}"
    verdict = judge(changed((f"{path}/z", None), (f"{path}/n_eff", 20.0)))
    (line,) = verdict.undecided
    assert line.endswith("cannot be tested: 20 effective samples; a longer run would decide")
    assert (verdict.status, verdict.predicted["n_iterations"]) == ("not yet", 5000)
    verdict = judge(changed((f"{path}/z", None), (f"{path}/value", None)))
    assert "a rung between them would decide" in verdict.undecided[0]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("phi_positive/z/300.00", "P(phi > 0) cannot be compared"),
        ("energy_kJ_mol/p_value", "all rungs: <U> cannot be compared"),
        ("ramachandran/300.00/floor_total_variation", "no floor"),
        ("ramachandran/300.00/n_slowest", "Ramachandran plot has too few effective samples"),
    ],
)
def test_a_comparison_that_cannot_decide(path, words):
    verdict = judge(changed((f"comparison/{path}", None)))
    (line,) = verdict.undecided
    assert words in line
    assert line.endswith("a longer run would decide")
    assert verdict.status == "not yet"


def test_a_rare_state_need_not_be_compared():
    rare = not_converged(2e-4, 1e-4, n_visits=6, low=1e-5, high=8e-4)
    none = ("comparison/basins/phi > 0/z/300.00", None)
    assert judge(changed(("quantities/basin phi > 0/300.00", rare), none)).status == "converged"


def test_walkers_that_do_not_travel():
    (line,) = judge(changed(("round_trips", 2))).missing
    assert line == "0.50 round trips of the temperature ladder for each walker"
    assert judge(changed(("round_trips", 2))).predicted["n_iterations"] == 2000
    assert judge(changed(("round_trips", 0))).predicted["at_least"]


def test_no_samples():
    verdict = judge({"n_iterations": 0})
    assert verdict.sentence == "not yet converged: there are no samples yet"


def test_what_the_monitor_says():
    verdict = judge(changed(("monitor/warnings", ["300.00 K: the basin was lost"])))
    assert verdict.warnings == ("300.00 K: the basin was lost",)
    assert "other basins" in verdict.advice[0]


@pytest.mark.parametrize("steered", [[], [0.004], [[None, 0.004], [0.004, None]]])
def test_a_flow_of_no_use(steered):
    refused = ("acceptance/flow_independent", {"300.00": 0.002, "600.00": 0.009})
    verdict = judge(changed(refused, ("acceptance/swap_steered", steered)))
    (line,) = verdict.warnings
    assert line.startswith(
        "this flow is of no use here: its independent draws are accepted to 0.9%"
    )
    assert "train the flow for longer" in verdict.advice[0]
    for useful in (
        ("acceptance/swap_steered", [0.3]),
        ("acceptance/flow_independent", {"300.00": 0.002, "600.00": 0.02}),
    ):
        assert judge(changed(refused, useful)).warnings == ()


def test_what_is_remarkable_among_many_tests_is_a_warning():
    verdict = judge(changed(("comparison/phi_positive/z/300.00", 3.1)))
    assert verdict.status == "converged"
    (line,) = verdict.warnings
    assert line.startswith("300.00 K: P(phi > 0) differs from the reference by +3.1 standard err")
    assert "may be chance" in line
    # Two of them are no chance any more.
    both = [(f"comparison/{k}/z/300.00", 3.3) for k in ("phi_positive", "energy_kJ_mol")]
    assert judge(changed(*both)).status == "wrong"


def test_right_runs_are_called_wrong_no_more_often_than_promised():
    """Exact z of 40 tests; the share of runs below is that of the level of 1 %."""
    rng, n = np.random.default_rng(3), 1500
    summary = changed(("ensemble_check", {key: {} for key in CHECKS}))
    names = [f"state {k}" for k in range(40)]
    n_wrong = 0
    for _ in range(n):
        summary["comparison"] = {
            "basins": {
                name: {"z": {"300.00": z}, "chi2": None, "p_value": None}
                for name, z in zip(names, rng.normal(size=40), strict=True)
            }
        }
        n_wrong += judge(summary).status == "wrong"
    assert n_wrong < n * FALSE_ALARMS + 4 * np.sqrt(n * FALSE_ALARMS)
    assert n_wrong > 0


def test_exit_status():
    assert EXIT_STATUS == {"converged": 0, "not yet": 3, "wrong": 4}


def test_bad_numbers_are_never_tested():
    """An unknown error is undecided, not agreement."""
    summary = changed(*((f"comparison/energy_kJ_mol/z/{rung}", None) for rung in RUNGS))
    verdict = judge(summary)
    assert (verdict.agrees_with, len(verdict.undecided)) == ((), 2)
    entry = assessed(0.1, 0.01) | {"stderr": None, "converged": False}
    verdict = judge(changed(("quantities/energy_kJ_mol/300.00", entry)))
    assert verdict.missing == ("300.00 K: <U>: its error is not known",)


def exact_run(rng, path, drawn_at, n=400, n_walkers=20):
    """A run of two rungs of the double well whose replicas change places at every iteration."""
    ladder = [300.0, 424.26]
    energy, phi = WELL.draw(rng, (n, n_walkers), drawn_at, 0.3)
    swapped = np.arange(n)[:, None, None] % 2
    replica = np.broadcast_to((np.arange(2) + swapped) % 2, energy.shape)
    return load_run(write_run(path, ladder, energy, {"phi": phi, "psi": phi}, replica=replica))


def test_the_verdict_on_exact_and_on_wrong_samples(tmp_path):
    """From the samples to the verdict."""
    rng, ladder = np.random.default_rng(5), np.array([300.0, 424.26])
    energy, phi = WELL.draw(rng, (6000, 1), ladder)
    reference = Reference(ladder, phi[:, 0], phi[:, 0], energy[:, 0], 1.0)
    summary = exact_run(rng, tmp_path / "right", ladder).summary(reference)
    verdict = summary["verdict"]
    assert verdict["sentence"] == "converged, in agreement with the reference and with Boltzmann"
    entry = summary["quantities"]["energy_kJ_mol"]["300.00"]
    assert (entry["status"], entry["missing"]) == ("converged", [])
    assert summary["quantities"].keys() >= {
        *("energy_kJ_mol", "heat_capacity_kJ_mol_K", "phi_positive", "delta_F_phi_kT"),
        *(f"basin {name}" for name in summary["basins"]),
    }
    assert summary["comparison"]["basins"].keys() == summary["basins"].keys()
    verdict = exact_run(rng, tmp_path / "hot", [330.0, 424.26]).summary()["verdict"]
    assert verdict["status"] == "wrong"
    assert any("the slope of ln[P(U)/P(U)]" in line for line in verdict["wrong"])
    verdict = exact_run(rng, tmp_path / "short", ladder, n=6, n_walkers=3).summary()["verdict"]
    assert (verdict["status"], verdict["wrong"]) == ("not yet", [])
