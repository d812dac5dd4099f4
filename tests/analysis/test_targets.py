"""Targets of precision: their texts, what is refused, and what meets them."""

import math

import numpy as np
import pytest

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.targets import Target, parse_targets
from tests.support.analysis_runs import TEMPERATURES, two_state_run
from tests.support.fabricate import write_run


@pytest.mark.parametrize(
    ("text", "usual", "tolerance", "relative"),
    [
        ("dF(phi)<0.05kT", "dF(phi > 0) < 0.05 kT", 0.05, False),
        ("P(phi > 0) < 10%", "P(phi > 0) < 10 %", 0.1, True),
        ("P(phi>0,|psi| > 120)<0.001", "P(phi > 0, |psi| > 120) < 0.001", 0.001, False),
        ("U < 0.1 kJ/mol at 424.26", "U < 0.1 kJ/mol at 424.26 K", 0.1, False),
        ("C_V < 2e-3 kJ/(mol K)", "C_V < 0.002 kJ/(mol K)", 0.002, False),
        (" cos( psi2 ) < 0.01 at 300 K ", "cos(psi2) < 0.01 at 300 K", 0.01, False),
    ],
)
def test_texts(text, usual, tolerance, relative):
    target = Target.parse(text)
    assert str(target) == usual
    assert (target.tolerance, target.relative) == (tolerance, relative)
    assert Target.parse(usual) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dF(phi) < 0.05", "expected the unit kT of dF"),
        ("dF(phi) < 5 %", "expected the unit kT of dF"),
        ("U < 0.1 kT", "expected the unit kJ/mol of U"),
        ("P(phi > 0) < -1 %", "expected a positive number"),
        ("P(phi > 0) < nan", "expected a target such as"),
        ("P(phi > 1.2.3) < 10 %", "expected a number"),
        ("P(|phi) < 10 %", "expected conditions such as"),
        ("cos(phi > 0) < 0.1", "expected the name of one torsion"),
        ("P < 10 %", "expected a target such as"),
        ("U(phi) < 1 kJ/mol", "expected a target such as"),
        ("phi", "expected a target such as"),
        (3, "expected a target such as"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=f"until: {message}"):
        Target.parse(text)


def test_a_single_text_is_no_sequence():
    with pytest.raises(ValueError, match="until: expected a sequence of targets"):
        parse_targets("dF(phi) < 0.05 kT")
    assert parse_targets(["dF(phi)<0.05kT"]) == ("dF(phi > 0) < 0.05 kT",)


def test_torsions_and_temperatures_must_exist():
    with pytest.raises(ValueError, match=r"slow torsions of the molecule \(phi, psi\), got 'chi'"):
        Target.parse("dF(chi) < 1 kT").check_for(["phi", "psi"], TEMPERATURES.tolist())
    with pytest.raises(ValueError, match=r"of the ladder \(300, 424.26, 600 K\), got 350 K"):
        Target.parse("U < 1 kJ/mol at 350 K").check_for(["phi"], TEMPERATURES.tolist())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rng = np.random.default_rng(3)
    energy, states = two_state_run(rng, n=400, n_walkers=16, rho=0.3)
    phi = np.where(states, 1.0, -1.0) + 0.1 * rng.normal(size=states.shape)
    folder = tmp_path_factory.mktemp("targets") / "run"
    return load_run(write_run(folder, TEMPERATURES, energy, {"phi": phi}))


def test_a_target_is_met_by_its_error_and_a_converged_estimate(run):
    first = Target.parse("P(phi > 0) < 1").assess(run)
    assert first.is_met
    error = first.assessment.stderr
    assert Target.parse(f"P(phi > 0) < {1.01 * error}").assess(run).is_met
    assert not Target.parse(f"P(phi > 0) < {0.99 * error}").assess(run).is_met
    relative = Target.parse(f"P(phi > 0) < {101 * error / first.assessment.value} %")
    assert relative.assess(run).is_met
    p = first.assessment.value
    free = Target.parse(f"dF(phi) < {1.01 * error / (p * (1 - p))} kT").assess(run)
    assert free.is_met
    assert math.isclose(free.assessment.value, math.log((1 - p) / p))


def test_an_error_without_convergence_meets_nothing(run, tmp_path):
    # 8 iterations: the error is known, and is below the tolerance.
    path = write_run(
        tmp_path / "short", TEMPERATURES, run.energy[:4], {"phi": run.dihedrals[:4, ..., 0]}
    )
    short = Target.parse("U < 1000 kJ/mol").assess(load_run(path))
    assert short.error < 1000
    assert not short.is_met
    assert short.assessment.missing
    never = Target.parse("P(phi > 179) < 50 %").assess(run)
    assert not never.is_met
    assert "the state was never visited" in str(never)


def test_other_rungs_and_observables(run):
    hot = Target.parse("U < 1 kJ/mol at 600").assess(run)
    assert hot.temperature == 600.0
    assert math.isclose(hot.assessment.value, float(run.energies(600).mean()))
    cosine = Target.parse("cos(phi) < 0.1").assess(run)
    assert math.isclose(cosine.assessment.value, float(np.cos(run.dihedral("phi", 300)).mean()))
    outside = Target.parse("P(|phi| < 90) < 1").assess(run).assessment.value
    assert math.isclose(outside, float((np.abs(run.dihedral("phi", 300)) < np.pi / 2).mean()))
    capacity = Target.parse("C_V < 50 %").assess(run)
    assert math.isclose(capacity.assessment.value, run.heat_capacity(300).value, rel_tol=1e-6)


def test_the_iterations_that_would_meet_it(run):
    first = Target.parse("U < 1 kJ/mol").assess(run)
    target = Target.parse(f"U < {first.error / 3} kJ/mol").assess(run)
    assert math.isclose(target.n_iterations_needed(run.n_used), 9 * run.n_used, rel_tol=1e-6)
