"""The benchmark of costs: OpenMM's samplers that are continued, estimates, ratios, tables."""

import json
import math
from argparse import Namespace

import numpy as np
import pytest

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.units import KB
from tests.support.examples import load_example

for name in ("common", "openmm_samplers", "lean_sampling", "cost_report"):
    load_example(f"benchmarks/{name}.py")
samplers = load_example("benchmarks/openmm_samplers.py")
cost = load_example("benchmarks/cost.py")
lean = load_example("benchmarks/lean_sampling.py")
OPTIONS = "Reference", "amber99sbildn-obc2"
P = 0.02


def chains(n, n_walkers, leave, seed):
    """Two states [n, W] that are left for the second with p, in and out as often as `leave`."""
    rng = np.random.default_rng(seed)
    redraw, fresh = rng.random((n, n_walkers)) < leave, rng.random((n, n_walkers)) < P
    values = fresh.copy()
    for step in range(1, n):
        values[step] = np.where(redraw[step], fresh[step], values[step - 1])
    return values


def exchange_runs(n, n_walkers, leave, seed=1):
    """Files of replica exchange whose phi is positive in these states."""
    states = chains(n + cost.EQUILIBRATION, n_walkers, leave, seed)
    return [
        {
            "phi": np.where(s, 1.0, -1.0),
            "psi": np.zeros(len(s)),
            "n_evaluations": 10,
            "cpu_seconds": 1,
        }
        for s in states.T
    ]


def test_exchange_is_continued(tmp_path):
    path = tmp_path / "3_0.npz"
    assert samplers.advance(path, 3, 5, 450, *OPTIONS) == 450
    first = samplers.load_series(path)
    assert len(first["phi"]) == 3
    assert first["state_positions"].shape == (3, 22, 3)
    state = {"positions": first["state_positions"], "velocities": first["state_velocities"]}
    again = samplers.Exchange(3, state, 6, *OPTIONS).sampler
    for rung, conformation in enumerate(again.replicaConformation):
        positions = conformation.getPositions(asNumpy=True)._value
        np.testing.assert_allclose(positions, state["positions"][rung], atol=1e-12)
        velocities = conformation.getVelocities(asNumpy=True)._value
        np.testing.assert_allclose(velocities, state["velocities"][rung], atol=1e-12)
    assert samplers.advance(path, 3, 5, 300, *OPTIONS) == 750
    second = samplers.load_series(path)
    np.testing.assert_array_equal(second["phi"][:3], first["phi"])
    assert len(second["phi"]) == 5
    assert not np.isin(second["phi"][3:], first["phi"]).any()  # another seed


def test_metadynamics_is_continued(tmp_path):
    path = tmp_path / "metadynamics_0.npz"
    for expected in (5000, 10_000):
        assert samplers.advance(path, samplers.METADYNAMICS, 5, 5000, *OPTIONS) == expected
        data = samplers.load_series(path)
        assert (len(data["p_bias"]), len(data["phi"])) == (expected // 5000, expected // 250)
    state = {k.removeprefix("state_"): v for k, v in data.items() if k.startswith("state_")}
    again = samplers.Metadynamics(state, 6, *OPTIONS)
    free_energy = again.bias.getFreeEnergy()._value
    # 40 Gaussians, none of them higher than the first.
    volume = 1.2 * 2 * math.pi * 0.35**2 * (90 / (2 * math.pi)) ** 2
    assert 25 * volume < state["bias"].sum() < 41 * volume
    np.testing.assert_allclose(free_energy, -1.2 * state["bias"], rtol=1e-12)
    assert samplers.integrate(free_energy) == pytest.approx(data["p_bias"][-1], rel=1e-12)


def test_population_of_a_free_energy():
    """Equal weights of two halves of phi, whatever psi does."""
    grid = np.linspace(-np.pi, np.pi, 91)
    high = KB * 300.0 * math.log(9.0)
    free_energy = np.where(grid > 0, high, 0.0)[None] + 0.7 * np.cos(grid)[:, None]
    free_energy[:, [0, 45, 90]] = high + 0.7 * np.cos(grid)[:, None]  # half of the two borders
    # 44 points of weight 1/9, and the halves of two of them; 44 of weight 1, and the other halves.
    assert samplers.integrate(free_energy) == pytest.approx(45 / 9 / (44 + 46 / 9), rel=1e-9)


def test_exchange_of_known_correlation():
    """Redrawn with 1/10 in each exchange: g = 19."""
    row = cost.summarise_exchange(exchange_runs(2000, 60, 0.1), 5)
    assert row["n_evaluations"] == 60 * 2000 * 5 * 50
    assert row["n_eff"] == pytest.approx(60 * 2000 / 19, rel=0.4)
    assert row["n_eff_per_million"] == pytest.approx(row["n_eff"] / 30, rel=1e-12)
    assert row["n_eff_per_million_correlation"] >= row["n_eff_per_million"]
    with pytest.raises(ValueError, match="5 rungs: expected more than 1000 exchanges, got 600"):
        cost.summarise_exchange(exchange_runs(100, 8, 0.1), 5)
    never = [run | {"phi": -np.ones(2000)} for run in exchange_runs(1500, 2, 0.1)]
    with pytest.raises(ValueError, match="5 rungs: phi > 0 was never entered in 2000 exchanges"):
        cost.summarise_exchange(never, 5)


def test_metadynamics_whose_error_falls_with_time():
    """Each run's delta F is the mean of so much noise: a variance of 900/t at evaluation t."""
    rng = np.random.default_rng(3)
    known = cost.reference_population(300.0)
    n, n_runs = 400, 60
    walk = np.cumsum(rng.normal(0.0, 30.0 / math.sqrt(5000), (n, n_runs)), axis=0)
    f = known.free_energy[0] + walk / np.arange(1, n + 1)[:, None]
    runs = [
        {"p_bias": 1 / (1 + np.exp(c)), "n_evaluations": 5000.0 * n, "cpu_seconds": 1.0}
        for c in f.T
    ]
    row = cost.summarise_metadynamics(runs)
    assert row["estimate"] == "last"
    assert abs(row["z"]) < 3
    error = math.hypot(row["delta_F_stderr"], known.free_energy[1])
    assert row["z"] == pytest.approx((known.free_energy[0] - row["delta_F_kT"]) / error)
    assert row["squared_error_times_evaluations"]["last"] == pytest.approx(900.0, rel=0.35)
    n_eff = row["n_eff_per_million"] * known.value * (1 - known.value)
    assert n_eff == pytest.approx(1e6 / 900.0, rel=0.35)
    # Runs that agree on another value are not converged.
    wrong = [run | {"p_bias": 1 / (1 + np.exp(f.mean() + 2 + 0 * run["p_bias"]))} for run in runs]
    wrong = cost.summarise_metadynamics(wrong)
    error = math.sqrt(4 - known.free_energy[1] ** 2)
    np.testing.assert_allclose(wrong["curve"]["error_kT"], error, rtol=0.1)
    with pytest.raises(ValueError, match="expected 4 runs of 20 estimates, got 3 of 400"):
        cost.summarise_metadynamics(runs[:3])


def test_costs():
    flow, other = cost.Cost(1000.0, 60.0, 0.2, 5.0), cost.Cost(100.0, 2.0, 0.01, 0.5)
    assert (flow.samples(500), flow.samples(1500)) == (0.0, 100.0)
    assert (flow.samples_in(50.0), flow.samples_in(70.0)) == (0.0, 50.0)
    assert flow.seconds_until(100.0) == 80.0
    at = flow.break_even(other)
    assert flow.samples(at) == pytest.approx(other.samples(at))
    assert other.break_even(flow) == math.inf
    assert cost.Cost(1000.0, 60.0, 0.0, 0.0).seconds_until(100.0) == math.inf


@pytest.fixture(scope="module")
def estimates(molecule):
    """What is measured of a small untrained flow."""
    frames = MDDataset.shipped(molecule, stride=40)
    flow = TemperatureSteerableFlow.from_dataset(frames, n_blocks=1, hidden=(8,), seed=1)
    args = Namespace(
        seed=1, draws=400, chosen_draws=4000, walkers=20, burn_in=1, iterations=12, independent=2,
        dynamics_interval=6,
    )  # fmt: skip
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        return lean.estimate_flow(flow, potential, molecule, frames.positions, args)


def test_flow_is_measured(estimates):
    # 12 times 2 proposals, 2 pieces of dynamics of 26 evaluations; some outside.
    chain = estimates["chain"]
    assert 20 * 2 * 26 < chain["n_evaluations"] <= 20 * (12 * 2 + 2 * 26)
    assert set(chain["acceptance"]) == {"flow_independent", "local"}
    assert chain["start"]["evaluations"] > 20
    assert 200 < estimates["draws"]["n_evaluations"] <= 400
    assert 0 < estimates["chosen draws"]["n_evaluations"] < 2000
    assert all(row["cpu_seconds"] > 0 for row in estimates.values())


def weighted_blocks(n_blocks, chosen, seed):
    """Blocks of draws from P(phi > 0) = 0.05 whose weights make it 0.02; a fifth of it hidden."""
    rng, blocks = np.random.default_rng(seed), []
    for _ in range(n_blocks):
        above = rng.random(2000) < 0.05
        hidden = above & (rng.random(2000) < 0.1)
        # Mean weights: 0.02 / 0.05 above, 0.98 / 0.95 below; of the hidden basin twice as much.
        mean = np.where(above, 0.4 / 1.1, 0.98 / 0.95) * np.where(hidden, 2.0, 1.0)
        weights = np.log(mean) + rng.normal(-0.5, 1.0, 2000) + 30.0
        known = above | (np.cumsum(~above) <= above.sum()) if chosen else np.ones(2000, bool)
        drawn = above.sum(), (~above).sum()
        blocks.append((drawn, above[known], hidden[known], weights[known]))
    return blocks


#: ln of the mean weights over the target, E[w^2] / E[w] over the draws, with their factor of e^30.
LOG_MEANS = np.log([0.4 / 1.1 * (1.3 / 1.1), 0.98 / 0.95, 2 * 0.4 / 1.1]) + 31.0
HIDDEN_SHARE = 0.2 / 1.1


@pytest.mark.parametrize("chosen", [False, True])
def test_populations_of_weighted_draws(chosen):
    """Means of both populations, and that the errors are those of repeated estimates.

    Both errors are measured: that of the draws alone, and that of the weights of frames.
    """
    truth = 0.02, 0.02 * HIDDEN_SHARE
    few = np.full(3, -np.inf), 0.0  # frames of no weight: the error is that of the draws
    for known in (few, (LOG_MEANS, HIDDEN_SHARE)):
        found = np.array(
            [
                lean.estimate_populations(weighted_blocks(40, chosen, seed), *known)
                for seed in range(60)
            ]
        )
        for values, expected in zip(found.transpose(1, 0, 2), truth, strict=True):
            z = (values[:, 0].mean() - expected) / (values[:, 0].std(ddof=1) / math.sqrt(60))
            assert abs(z) < 4
            ratio = np.mean(values[:, 1] ** 2) / values[:, 0].var(ddof=1)
            assert 0.5 < ratio < 2.0


def test_draws_that_miss_what_frames_have():
    """A hundredth of phi > 0 that the flow hardly draws: the error is known from the frames."""
    blocks = weighted_blocks(40, False, 1)
    seen = lean.estimate_populations(blocks, LOG_MEANS, HIDDEN_SHARE)[0][1]
    rare = np.log(np.exp(LOG_MEANS[0]) + 0.01 * np.exp(LOG_MEANS[0] + 8))
    missed = lean.estimate_populations(blocks, np.array([rare, *LOG_MEANS[1:]]), HIDDEN_SHARE)[0]
    assert missed[1] > 3 * seen


def test_draws_without_weights_are_refused():
    blocks = [((1, 1), np.array([True, False]), np.array([False, False]), np.full(2, -np.inf))]
    with pytest.raises(ValueError, match="expected finite weights, got none"):
        lean.estimate_populations(blocks, LOG_MEANS, HIDDEN_SHARE)


def test_report(estimates, tmp_path):
    """A run with MD of its own and one with shipped frames, which are paid by the speed of MD."""
    row = estimates["chain"] | {"n_eff_per_million": 5e4, "n_eff_per_cpu_second": 100.0}
    row |= {"start": {"evaluations": 1000, "seconds": 2.0}, "p": 0.02, "stderr": 0.001}
    row["hidden"] = {"p": 0.001, "stderr": 0.0005, "z": 0.5}
    flows = []
    for name, seconds in (("run1", 40.0), ("run2", None)):
        (tmp_path / name).mkdir()
        spent = {
            "energy_evaluations": {"md": 1_000_000, "training": 499_000},
            "wall_seconds": {"md": seconds, "training": 58.0},
        }
        (tmp_path / name / "summary.json").write_text(json.dumps(spent))
        flows.append(cost.costs_of_flow(row, tmp_path / name, tmp_path / name, 20_000.0, 2))
    assert flows[0]["nothing"] == cost.Cost(1_500_000, 100.0, 0.05, 200.0)
    assert flows[1]["nothing"].seconds == 110.0
    assert flows[1]["frames"] == cost.Cost(500_000, 60.0, 0.05, 200.0)
    exchange = cost.summarise_exchange(exchange_runs(2000, 8, 0.1), 8)
    exchange |= {"n_eff_per_million": 50.0, "equilibration_evaluations": 0}
    rows, rates = {"8": exchange}, {"8": 20_000.0}
    costs = cost.costs_of_openmm(rows, rates, 2)
    assert costs["8"] == cost.Cost(0, 0.0, 5e-5, 2.0)
    # The ratios are to replica exchange, also where metadynamics is better.
    others = costs | {samplers.METADYNAMICS: cost.Cost(0, 0.0, 1.0, 1000.0)}
    ratios = [cost.compare(flow, others, 5000.0) for flow in flows]
    assert ratios[0]["sampling_only"] == pytest.approx(1000.0)
    assert ratios[0]["over_metadynamics"] == pytest.approx(0.05)
    assert ratios[0]["per_second_sampling"] == pytest.approx(100.0)
    nothing = ratios[0]["nothing"]
    assert nothing["all_in"] == pytest.approx(1000.0 * 8.5 / 10)
    assert nothing["per_second_5_minutes"] == pytest.approx(100 * 200 / 300)
    assert nothing["seconds_until_error"] == pytest.approx(125.0)
    assert nothing["break_even_evaluations"] == pytest.approx(1.5e6, rel=2e-3)
    rows["8"]["seconds_until_error"] = costs["8"].seconds_until(5000.0)
    measured = [row | {"ratios": r} for r in ratios]
    measured[1] |= {"p": 0.023}
    over = cost.summarise_runs(measured)
    assert over["seconds_until_error_from_nothing"]["worst"] == pytest.approx(135.0)
    assert over["per_second_5_minutes_from_nothing"]["worst"] == pytest.approx(100 * 190 / 300)
    assert over["hidden_basin_right"] == 2
    assert over["mean"]["stderr"] == pytest.approx(0.001 / math.sqrt(2))
    assert over["p_spread"] == pytest.approx(math.erfc(1.5))  # 3 / sqrt(2) standard errors
    measured[1] |= {"delta_F_kT": None, "delta_F_stderr": None, "z": None}  # never visited
    report = {
        "cores": 2,
        "reference": {"p": 0.0213, "stderr": 0.0014, "p_hidden": 0.0012, "p_hidden_stderr": 2e-4},
        "n_eff_for_0.1_kT": 5000.0,
        "samplers": rows,
        "rates": rates,
        "flows": [
            {"run": name, "estimates": dict.fromkeys(estimates, entry)}
            for name, entry in zip(("run1", "run2"), measured, strict=True)
        ],
        "over_the_runs": dict.fromkeys(estimates, over),
    }
    tables = load_example("benchmarks/cost_report.py")
    tables.write_tables(report, tmp_path / "cost.md")
    text = (tmp_path / "cost.md").read_text()
    assert "| replica exchange, 8 rungs | 8 × 0.8 |" in text
    assert "| 850 (850) / 950 (950) |" in text
    assert "| run2 | 1.5 / 0.5; 110 / 60 | –, – | 0.0010, +0.5 | 50 000, 100 |" in text
    assert "50 by OpenMM's replica exchange (8 rungs); 2 500 by OpenMM's replica" in text
    assert "by weighted draws; 135 (130) s |" in text
    assert "the flow pays off from 1 501 " in text
    tables.draw(report, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
