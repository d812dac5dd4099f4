"""The training's Markov chains sample the target for any flow."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch

from openmm_tsf.potentials import GaussianWell, MixedDoubleWell
from openmm_tsf.training.independence_chains import EVERYWHERE, IndependenceChains
from openmm_tsf.training.langevin_relaxation import FIRST_STEP, relax_mala
from openmm_tsf.training.losses import draw_normal
from openmm_tsf.training.target import Target
from openmm_tsf.training.target_points import Points
from tests.support.path_training import (
    FAR,
    SHORT,
    D,
    SignBasins,
    make_objective,
    rough_flow,
    toy,
    two_basins,
)


def assert_moments(x, first, second):
    """The means of x [n, D] and of its squares, within four standard errors."""
    for values, expected in ((x, first), (x**2, second)):
        z = (values.mean(0) - expected) / values.std(0) * len(x) ** 0.5
        assert float(z.abs().max()) < 4, z


def test_chains_sample_the_target(monkeypatch):
    """A poor flow as proposal: exact samples of two temperatures, and basins, stay exact."""
    two_basins(monkeypatch)
    potential, flow = MixedDoubleWell.random(D, 3), rough_flow("tsf")
    generator, n, per_call = torch.Generator().manual_seed(7), 20_000, 5000
    ladder = torch.tensor([0.7, 1.0], dtype=torch.float64)
    tau = ladder.repeat_interleave(n)
    start = torch.cat([potential.sample(n, t, generator) for t in ladder.tolist()])
    target = Target(flow, potential, SignBasins(), FAR)
    chains = IndependenceChains(Points.at(target, start, tau), 2, 2)

    def log_ratio(points, v, momenta):
        squares = v.square().sum(1) - momenta.square().sum(1)
        return -points.reduced_energy + 0.5 * squares / points.tau

    with torch.no_grad():
        for _ in range(60):
            index = chains.next_chains(per_call)
            points = chains.points.take(index)
            p = draw_normal(points.tau, D, generator)
            v, _ = flow.network.inverse_and_log_det(torch.cat([points.y, p], dim=1))
            z = draw_normal(points.tau, 2 * D, generator)
            y, _ = flow.network.forward_and_log_det(z)
            new = Points.at(target, y[:, :D], points.tau)
            ratios = log_ratio(new, z, y[:, D:]), log_ratio(points, v, p)
            assert 0.05 < chains.propose(index, new, *ratios, generator) < 0.95
    for rung, temperature in enumerate(ladder.tolist()):
        x = chains.points.y[rung * n : (rung + 1) * n]
        basins = chains.points.basin[rung * n : (rung + 1) * n].double()
        exact = (potential.sample(400_000, temperature, generator)[:, 0] > 0).double().mean()
        assert 0.1 < exact < 0.9
        assert abs(basins.mean() - exact) < 4 * (exact * (1 - exact) / n) ** 0.5
        assert_moments(x, *(potential.moment(order, temperature) for order in (1, 2)))


def test_chains_with_a_home_sample_its_part_of_the_target():
    """Half of the chains stay in their basins; the populations of the others do not change."""
    potential, flow, n = MixedDoubleWell.random(D, 3), rough_flow("tsf"), 20_000
    generator = torch.Generator().manual_seed(9)
    target, tau = Target(flow, potential, SignBasins(), FAR), torch.ones(n, dtype=torch.float64)
    points = Points.at(target, potential.sample(n, 1.0, generator), tau)
    is_free = torch.arange(n) < n // 2
    chains = IndependenceChains(points, 1, 2, torch.where(is_free, EVERYWHERE, points.basin))
    start = points.y.clone()
    with torch.no_grad():
        for _ in range(60):
            index = chains.next_chains(n)
            now = chains.points.take(index)
            p = draw_normal(now.tau, D, generator)
            v, _ = flow.network.inverse_and_log_det(torch.cat([now.y, p], dim=1))
            z = draw_normal(now.tau, 2 * D, generator)
            y, _ = flow.network.forward_and_log_det(z)
            new = Points.at(target, y[:, :D], now.tau)
            ratios = [
                -each.reduced_energy + 0.5 * (a.square().sum(1) - b.square().sum(1))
                for each, a, b in ((new, z, y[:, D:]), (now, v, p))
            ]
            chains.propose(index, new, *ratios, generator)
    exact = potential.sample(400_000, 1.0, generator)
    for basin in (0, 1):
        members = chains.home == basin
        assert bool((chains.points.basin[members] == basin).all())
        assert float((chains.points.y[members] != start[members]).any(1).double().mean()) > 0.5
        part = exact[(exact[:, 0] > 0) == bool(basin)]
        assert_moments(chains.points.y[members], part.mean(0), (part**2).mean(0))
    assert_moments(chains.points.y[is_free], exact.mean(0), (exact**2).mean(0))
    p = float((exact[:, 0] > 0).double().mean())
    of_free = float(chains.points.basin[is_free].double().mean())
    assert abs(of_free - p) < 4 * (p * (1 - p) / (n // 2)) ** 0.5


def test_chains_walk_at_home():
    """From copies of few points, those with a home sample their basins; the others stay."""
    potential, flow, n = MixedDoubleWell.random(D, 3), rough_flow("tsf"), 4000
    generator, ladder = torch.Generator().manual_seed(9), torch.tensor([0.5, 1.0]).double()
    few = potential.sample(40, 1.0, generator)[torch.arange(2 * n) % 40]
    evaluate = partial(Points.at, Target(flow, potential, SignBasins(), FAR))
    points = evaluate(few, ladder.repeat_interleave(n))
    is_free = torch.arange(2 * n) % 4 == 0
    chains = IndependenceChains(points, 2, 2, torch.where(is_free, EVERYWHERE, points.basin))
    start = points.y.clone()
    for _ in range(300):
        walk = chains.propose_walk(generator, n // 2)
        chains.finish_walk(walk, evaluate(walk.y, walk.tau), generator)
        turn = chains.next_chains(n // 2)  # those that walked
        assert torch.equal(walk.chains, turn[chains.home[turn] != EVERYWHERE])
    assert torch.equal(chains.points.y[is_free], start[is_free])
    assert bool((chains.step_sizes != FIRST_STEP).all())
    for rung, temperature in enumerate(ladder.tolist()):
        exact = potential.sample(400_000, temperature, generator)
        for basin in (0, 1):
            members = chains.home == basin
            members[: rung * n] = members[(rung + 1) * n :] = False
            part = exact[(exact[:, 0] > 0) == bool(basin)]
            assert_moments(chains.points.y[members], part.mean(0), (part**2).mean(0))
    content = chains.state_dict() | {"step_sizes": torch.zeros(2).double()}
    with pytest.raises(ValueError, match="step_sizes: expected positive numbers"):
        chains.load_state_dict(content)


def test_chains_take_turns_cyclically():
    zero = torch.zeros(10)
    points = Points(zero[:, None], zero.double(), zero[:, None], zero.long(), torch.ones(10))
    chains = IndependenceChains(points, 2, 1)
    seen = torch.cat([chains.next_chains(2) for _ in range(5)])
    assert sorted(seen.tolist()) == sorted([*range(10)] * 2)
    before = chains.points.y.clone()
    one = points.take(torch.tensor([0, 1]))
    ratio = torch.tensor([math.nan, -math.inf], dtype=torch.float64)
    present = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):  # proposals to any chain, or within basins
        generator = torch.Generator().manual_seed(seed)
        assert chains.propose(torch.tensor([0, 1]), one, ratio, present, generator) == 0
    assert torch.equal(chains.points.y, before)


def test_a_rare_basin_receives_proposals_of_the_same_basin():
    """2 of 100 chains at each of two temperatures; 3 of 100 proposals."""
    n, generator = 200, torch.Generator().manual_seed(1)

    def points_with(numbers, in_basin_1):
        basin = torch.zeros(n).long()
        basin[in_basin_1] = 1
        zero = torch.zeros(n)
        return Points(numbers[:, None], zero.double(), zero[:, None], basin, torch.ones(n))

    rare_chains = torch.tensor([3, 40, 107, 188])
    rare_draws = torch.tensor([5, 50, 80, 100, 120, 199])
    start = points_with(-1.0 - torch.arange(n), rare_chains)
    new = points_with(torch.arange(n).float(), rare_draws)
    zero = torch.zeros(n, dtype=torch.float64)  # all are accepted
    n_within = 0
    for _ in range(60):
        chains = IndependenceChains(start.take(torch.arange(n)), 2, 2)
        chains.propose(chains.next_chains(100), new, zero, zero, generator)
        now = chains.points
        moved = now.y[:, 0] >= 0
        assert bool((now.y[moved, 0].long() // 100 == moved.nonzero().flatten() // 100).all())
        assert torch.equal(now.basin[moved], new.basin[now.y[moved, 0].long()])
        if int(moved.sum()) < n:  # within basins
            n_within += 1
            assert torch.equal(now.basin, start.basin)
            assert now.y[rare_chains, 0].tolist() == [5, 50, 100, 120]
            assert int((~moved).sum()) == 2  # 98 and 98 chains, 97 and 97 proposals
    assert 15 < n_within < 45


def test_frames_relax_to_another_temperature():
    """From samples at T = 1 to T = 0.4 of a well, whose moments are known."""
    scale = torch.linspace(0.5, 2.0, D, dtype=torch.float64)
    potential, flow, n = GaussianWell(torch.diag(1 / scale**2)), rough_flow("tsf"), 8000
    generator, tau = torch.Generator().manual_seed(5), torch.full((8000,), 0.4, dtype=torch.float64)
    evaluate = partial(Points.at, Target(flow, potential, SignBasins(), FAR))
    points = evaluate(potential.sample(n, 1.0, generator), tau)
    points.put(torch.tensor([0]), evaluate(torch.full((1, D), 6.0).double(), tau[:1].clone()))
    acceptance = relax_mala(points, evaluate, 100, generator)
    assert 0.5 < acceptance < 0.65  # the step was tuned
    again = evaluate(points.y, tau)
    for name in ("reduced_energy", "gradient", "tau"):
        assert torch.allclose(getattr(points, name), getattr(again, name))
    assert_moments(points.y / scale, 0.0, 0.4)

    def without_energy(y, tau):
        result = evaluate(y, tau)
        result.reduced_energy[:] = math.nan
        return result

    before = points.y.clone()
    assert relax_mala(points, without_energy, 4, generator) == 0
    assert torch.equal(points.y, before)


def test_the_objectives_chains_sample_their_temperatures(monkeypatch):
    """Also at temperatures without frames, and with a poor flow, which does not change here."""
    two_basins(monkeypatch)
    potential, data = toy()
    flow, n = rough_flow("tsf"), 2000
    settings = dataclasses.replace(SHORT, n_chains=n, kl_batch_size=n)
    objective = make_objective(flow, potential, data, settings)
    network, generator = copy.deepcopy(flow.network).float(), torch.Generator().manual_seed(2)
    for _ in range(160):
        objective.backward(network, SHORT.n_steps, generator)
        objective.update(generator)
    assert objective.chains is not None
    for rung, temperature in enumerate((0.5, 1.0)):
        y = objective.chains.points.y[rung * n : (rung + 1) * n].double()
        assert_moments(y, *(potential.moment(order, temperature) for order in (1, 2)))
