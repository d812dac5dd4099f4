"""A pilot, the ladder that it chooses, and what it predicts."""

import json
from dataclasses import replace

import mdtraj
import numpy as np
import pytest

from openmm_tsf.analysis.exchange_model import populations, state_inefficiency
from openmm_tsf.analysis.ladder import ladder_rejections
from openmm_tsf.analysis.observables import define_observables
from openmm_tsf.analysis.targets import Target
from openmm_tsf.cli.main import main
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.units import KB
from openmm_tsf.workflow import pilot as pilots
from openmm_tsf.workflow import temperatures
from openmm_tsf.workflow.exchange_plan import plan_exchange
from openmm_tsf.workflow.pilot import N_STEPS, Pilot, provisional_ladder, run_pilot
from openmm_tsf.workflow.plan import FlowPlan, Plan, plan
from openmm_tsf.workflow.temperatures import choose_temperatures
from tests.analysis.test_exchange_model import arrhenius, simulate
from tests.workflow.tiny import QUIET, SETTINGS

HOT = np.array([750.0, 960.0])
LADDER = np.array([300.0, 357.0, 424.0, 505.0, 600.0])
REJECTIONS = np.full(4, 0.45)
OUT_AT_600 = 0.004  # per iteration


def exact_pilot(seed, n=400, n_walkers=26):
    """A pilot of harmonic modes and a torsion with Arrhenius's rates, whose answers are known."""
    rng = np.random.default_rng(seed)
    betas, hot_betas = 1 / (KB * LADDER), 1 / (KB * HOT)
    cold, replica = simulate(rng, n, n_walkers, arrhenius(betas, OUT_AT_600), REJECTIONS)
    hot, _ = simulate(rng, n, 64, arrhenius(hot_betas, OUT_AT_600), np.array([1.0]))
    energy = 0.5 * KB * LADDER * rng.chisquare(60, cold.shape)

    def angles(inside):
        return {"phi": np.where(inside, 1.0, -1.5) + 0.2 * rng.normal(size=inside.shape)}

    return Pilot(
        temperatures=tuple(LADDER),
        boltzmann_constant=KB,
        energy=energy,
        angles=angles(cold),
        replica=replica,
        rejections=REJECTIONS,
        hot_temperatures=tuple(HOT),
        hot_angles=angles(hot),
        frames=None,
        n_evaluations=1_000_000,
        seconds=10.0,
    )


def test_predictions_are_those_of_the_rates_that_made_the_pilot():
    target = Target.parse("P(phi > 0) < 10 %")
    known, exchange = plan_exchange(exact_pilot(1), target)
    ladder = exchange.temperatures
    rates = arrhenius(1 / (KB * np.array(ladder)), OUT_AT_600)
    p = populations(rates)[0]
    assert known.mean == pytest.approx(p, rel=0.3)
    assert known.slowest in ("phi > 0", "phi < 0")
    assert known.n_passages > 30
    g = state_inefficiency(rates, exchange.rejections)
    iterations = max((1 - p) / p / 0.1**2, 50 / p) * g
    exact = iterations * len(ladder) * N_STEPS
    assert exchange.energy_evaluations == pytest.approx(exact, rel=0.5)
    low, high = exchange.evaluations_range
    assert low < exact < high < 4 * low
    assert exchange.wall_seconds == pytest.approx(exchange.energy_evaluations * 1e-5)
    # Harmonic energies: Λ = sqrt(60/(2π)) ln 2.
    assert exchange.barrier == pytest.approx(np.sqrt(60 / (2 * np.pi)) * np.log(2), rel=0.05)
    assert 0.7 < exchange.measured_round_trips / exchange.best_round_trips <= 1.0
    halved = plan_exchange(exact_pilot(1), Target.parse("P(phi > 0) < 5 %"))[1]
    assert halved.energy_evaluations == pytest.approx(4 * exchange.energy_evaluations)


@pytest.mark.slow
def test_ranges_hold_the_truth_as_often_as_they_say():
    """Of 40 pilots nine of ten should: the resampled ones miss the tails of few passages."""
    target, held = Target.parse("dF(phi) < 0.1 kT"), []
    for seed in range(40):
        exchange = plan_exchange(exact_pilot(seed, n=200, n_walkers=12), target, LADDER)[1]
        rates = arrhenius(1 / (KB * LADDER), OUT_AT_600)
        p = populations(rates)[0]
        iterations = state_inefficiency(rates, exchange.rejections) / (p * (1 - p) * 0.1**2)
        low, high = exchange.evaluations_range
        held.append(low < iterations * len(LADDER) * N_STEPS < high)
    assert np.mean(held) > 0.6


def test_a_ladder_of_ones_own():
    target, pilot = Target.parse("U < 0.1 kJ/mol"), exact_pilot(2)
    exchange = plan_exchange(pilot, target, LADDER)[1]
    assert exchange.temperatures == tuple(LADDER)
    np.testing.assert_allclose(exchange.rejections, 0.5, atol=0.03)  # as of choose_ladder
    with pytest.raises(ValueError, match="ladder: expected one from 300 to 600 K"):
        plan("U < 1 kJ/mol", ladder=(300, 500))


def test_a_plan_by_a_number_of_iterations_does_not_depend_on_the_clock(monkeypatch):
    lengths = []

    def note(*args, seconds=None, n_iterations=None, seed=1, observables=None):
        lengths.append((seconds, n_iterations, seed))
        raise InterruptedError

    monkeypatch.setattr("openmm_tsf.workflow.plan.run_pilot", note)
    for choices in ({"n_iterations": 7}, {"seconds": 3.0}):
        with pytest.raises(InterruptedError):
            plan("U < 1 kJ/mol", **choices, options=replace(QUIET, seed=2))
    assert lengths == [(None, 7, 2), (3.0, None, 2)]


def test_energies_are_not_decided_by_a_rare_state():
    known, exchange = plan_exchange(exact_pilot(2), Target.parse("U < 0.1 kJ/mol"))
    assert known.mean == pytest.approx(30 * KB * 300, rel=0.02)
    assert known.g < 1.5  # independent from iteration to iteration
    variance = 30 * (KB * 300) ** 2
    iterations = known.g * variance / 0.1**2
    predicted = exchange.energy_evaluations / (len(exchange.temperatures) * N_STEPS)
    assert predicted == pytest.approx(iterations, rel=0.1)


def test_a_state_that_the_pilot_never_saw_has_no_prediction():
    seen = exact_pilot(3, n=100)
    never = replace(
        seen,
        angles={"phi": np.full_like(seen.angles["phi"], -1.5), "psi": seen.angles["phi"]},
        hot_angles={
            "phi": np.full_like(seen.hot_angles["phi"], -1.5),
            "psi": seen.hot_angles["phi"],
        },
    )
    exchange = plan_exchange(never, Target.parse("dF(phi) < 0.1 kT"))[1]
    assert np.isnan(exchange.energy_evaluations)


def plan_of(pilot, text, seconds):
    """A plan of which the part with a flow takes so many seconds."""
    known, exchange = plan_exchange(pilot, Target.parse(text))
    largest = 40.0 if exchange.wall_seconds > seconds else 0.0
    parts = {"md": 0.0, "training": seconds / 2, "sampling": seconds / 2}
    flow = FlowPlan((300.0, 600.0), 64, 100, 3.5, largest, dict.fromkeys(parts, 10), parts)
    return Plan(text, 300.0, known.mean, exchange, flow, pilot.n_evaluations, pilot.seconds)


def test_a_plan_says_how_sure_it_is_and_what_it_assumes():
    pilot = exact_pilot(1)
    result = plan_of(pilot, "P(phi > 0) < 10 %", 1.0)
    exchange = result.exchange
    low, high = exchange.evaluations_range
    assert f"known from {exchange.n_passages} passages in the pilot" in str(result)
    assert f"{exchange.energy_evaluations:.2g} evaluations ({low:.2g} to {high:.2g}), " in str(
        result
    )
    assert exchange.seconds_range == pytest.approx((1e-5 * low, 1e-5 * high))
    assert "assumed, not measured: an independent sample takes 3.5 of them" in str(result)
    assert "a flow pays, on this assumption" in str(result)
    assert "md:" not in str(result)  # frames are shipped
    content = result.to_dict()["exchange"]
    assert content["seconds_range"] == list(exchange.seconds_range)
    assert "a flow does not pay" in str(plan_of(pilot, "P(phi > 0) < 10 %", 1e9))


def test_a_state_without_passages_has_no_prediction():
    """Replica 0 is in the state all the time: its population is not known."""
    seen = exact_pilot(3, n=100)
    hot = np.full_like(seen.hot_angles["phi"], -1.5)
    angles = {"phi": np.where(seen.replica == 0, 1.0, -1.5)}
    result = plan_of(replace(seen, angles=angles, hot_angles={"phi": hot}), "P(phi) < 10 %", 1.0)
    assert result.exchange.n_passages == 0
    assert np.isnan(result.exchange.energy_evaluations)
    assert result.flow_pays is None
    assert "an unknown number of evaluations" in str(result)
    assert "whether a flow pays is unknown: the pilot saw no passage" in str(result)
    assert result.to_dict()["exchange"]["evaluations_range"] == [None, None]


@pytest.fixture(autouse=True)
def few_replicas(monkeypatch):
    monkeypatch.setattr(pilots, "_REPLICAS", 12)
    monkeypatch.setattr(pilots, "_LEAST_ITERATIONS", 12)


@pytest.fixture
def pilot():
    molecule = alanine_dipeptide()
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        return run_pilot(molecule, potential, 500.0, 600.0, n_iterations=10, seed=2)


def test_a_pilot_of_dynamics(pilot):
    n, n_walkers, n_rungs = pilot.energy.shape
    assert pilot.temperatures == provisional_ladder(60, 500.0, 600.0)
    assert n == 8  # after the first third
    assert (n_walkers, n_rungs) == (4, 3)
    assert pilot.frames.shape == (n * n_walkers * 2, 22, 3)
    assert pilot.hot_temperatures == (750.0, 960.0)
    predicted = ladder_rejections(pilot.rejection(), pilot.temperatures)
    np.testing.assert_allclose(predicted, pilot.rejections, atol=0.3)
    assert 0 < pilot.mixing() <= 1


def test_a_pilot_records_observables():
    molecule = alanine_dipeptide()
    torsions = molecule.dihedrals
    definitions = {"turn": "dihedral:16,14,8,6", "d": "distance:1,18", "bend": "angle:1,4,6"}
    observables = define_observables(definitions, molecule.mdtraj_topology, torsions)
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        pilot = run_pilot(
            molecule, potential, 500.0, 600.0, n_iterations=10, seed=2, observables=observables
        )
    # The same angle as psi, whose single-precision values differ in their last bits.
    np.testing.assert_allclose(np.cos(pilot.angles["turn"] - pilot.angles["psi"]), 1, atol=1e-6)
    assert pilot.others["d"].shape == pilot.energy.shape
    n_walkers = pilot.energy.shape[1]
    frames = mdtraj.Trajectory(pilot.frames.numpy(), molecule.mdtraj_topology)
    length = mdtraj.compute_distances(frames, [[1, 18]], periodic=False)
    in_order = length.reshape(-1, n_walkers, 2)  # frames are those of the upper rungs
    np.testing.assert_allclose(pilot.others["d"][:, :, 1:], in_order, atol=1e-6)
    for text, mean in {
        "d < 0.01 nm": pilot.others["d"][:, :, 0].mean(),
        "bend < 1 %": pilot.others["bend"][:, :, 0].mean(),
        "P(bend > 117) < 0.1": (np.degrees(pilot.others["bend"][:, :, 0]) > 117).mean(),
    }.items():
        known, _ = plan_exchange(pilot, Target.parse(text))
        assert known.mean == pytest.approx(mean, rel=0.5)
        assert known.slowest is not None or known.mean == pytest.approx(mean, rel=1e-12)


def test_one_length_of_a_pilot_is_expected():
    molecule = alanine_dipeptide()
    for lengths in ({}, {"seconds": 1.0, "n_iterations": 3}):
        with pytest.raises(ValueError, match="seconds, n_iterations: expected one of the two"):
            run_pilot(molecule, None, 300.0, 600.0, **lengths)


def test_the_ladder_depends_on_the_seed_alone(monkeypatch):
    monkeypatch.setattr(temperatures, "_LADDER_ITERATIONS", 10)
    options = replace(QUIET, seed=2)
    first, second = (
        choose_temperatures(alanine_dipeptide(), (500, 600), most_rejected=0.2, options=options)
        for _ in range(2)
    )
    assert first == second
    assert (first[0], first[-1]) == (500.0, 600.0)
    assert len(first) >= 3
    with pytest.raises(ValueError, match="temperatures: expected the lowest and the highest"):
        choose_temperatures(alanine_dipeptide(), (300, 400, 500))


def test_targets_of_a_plan_are_checked_before_the_pilot():
    with pytest.raises(ValueError, match="target: expected one at the lowest"):
        plan("U < 1 kJ/mol at 600 K")
    with pytest.raises(ValueError, match="target: expected slow torsions of the molecule"):
        plan("dF(chi1) < 1 kT")
    with pytest.raises(ValueError, match="target: expected a target such as"):
        plan("rubbish")
    with pytest.raises(ValueError, match="target: expected the unit nm of d, got rad"):
        plan("d < 1 rad", options=replace(QUIET, observe={"d": "distance:1,18"}))
    one = replace(SETTINGS, sampling=replace(SETTINGS.sampling, temperatures=(300.0,)))
    with pytest.raises(ValueError, match="temperatures: expected at least two, got 300 K"):
        plan("U < 1 kJ/mol", settings=one)
    with pytest.raises(ValueError, match="seconds: expected a positive number"):
        plan("U < 1 kJ/mol", seconds=0)


@pytest.mark.slow
def test_a_plan_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("openmm_tsf.workflow.presets.PRESETS", {"default": SETTINGS})
    path = tmp_path / "plan.json"
    arguments = ["plan", "dF(phi) < 0.1 kT", "--seconds", "20", "--platform", "Reference"]
    assert main([*arguments, "--output", str(path)]) == 0
    said = capsys.readouterr().out
    assert "plain replica exchange:" in said
    assert "with a flow:" in said
    content = json.loads(path.read_text())
    assert content["exchange"]["temperatures"][0] == 500.0
    assert content["flow"]["total_seconds"] > 0
