"""Path gradients: the same mean as the direct ones, none for an exact flow; chains are exact."""

import copy
import dataclasses
import math

import pytest
import torch

from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.potentials import GaussianWell, MixedDoubleWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.training import path_gradients as path_gradients
from openmm_tsf.training.basin_populations import Populations
from openmm_tsf.training.independence_chains import IndependenceChains
from openmm_tsf.training.langevin_relaxation import relax
from openmm_tsf.training.losses import negative_log_likelihood, variational_free_energy
from openmm_tsf.training.objectives import PathObjective
from openmm_tsf.training.path_gradients import (
    COTANGENT_LIMIT,
    data_cotangent,
    draw_cotangent,
    draw_score,
    limited,
    log_density_at_draws,
    whole,
)
from openmm_tsf.training.target_points import Points

D, FAR = 3, 1e9
KINDS = {"tsf": (TemperatureSteerableFlow, D), "realnvp": (RealNVPFlow, 0)}


def rough_flow(kind, seed=2):
    """A flow that is no identity and fits nothing."""
    flow_class, n_momenta = KINDS[kind]
    flow = flow_class(D, n_momenta, 2, (8,), seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.15 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return flow


def gradients(losses, parameters, chunks=40):
    """Mean gradient [P] over chunks of a sum of per-sample losses, and its standard error."""
    found = []
    for part in losses.chunk(chunks):
        grads = torch.autograd.grad(part.mean(), parameters, retain_graph=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    every = torch.stack(found)
    return every.mean(0), every.std(0) / len(every) ** 0.5


def assert_same(direct, path):
    """Two estimates of one gradient, of independent samples."""
    z = (direct[0] - path[0]) / (direct[1].square() + path[1].square()).sqrt().clamp(min=1e-12)
    assert float(z.abs().max()) < 4.5, z.abs().max()
    assert float((direct[0] / direct[1].clamp(min=1e-12)).abs().max()) > 8  # there is one


def sampled(potential, flow, temperature, n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = potential.sample(n, temperature, generator)
    p = torch.randn(n, flow.n_momenta, generator=generator, dtype=torch.float64)
    return x, p * math.sqrt(temperature), torch.full((n,), temperature, dtype=torch.float64)


def slope_of(potential, x, momenta, tau):
    _, forces = potential.energy_and_forces(x)
    return torch.cat([-forces, momenta], dim=1) / tau[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_data_gradients_have_the_same_mean(kind, temperature, monkeypatch):
    monkeypatch.setattr(path_gradients, "COTANGENT_LIMIT", FAR)
    potential, flow, n = MixedDoubleWell.random(D, 1), rough_flow(kind), 40_000
    network = flow.network
    parameters = list(network.parameters())
    x, p, tau = sampled(potential, flow, temperature, n, 1)
    direct = gradients(
        negative_log_likelihood(network, x, torch.zeros(n, dtype=torch.float64), p, tau), parameters
    )
    x, p, tau = sampled(potential, flow, temperature, n, 2)
    v, _, pullback = network.inverse_and_pullback(torch.cat([x, p], dim=1))
    cotangent = data_cotangent(v, pullback, slope_of(potential, x, p, tau), tau)
    path = gradients((v * cotangent).sum(dim=1), parameters)
    assert_same(direct, path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draw_gradients_have_the_same_mean(kind, temperature, monkeypatch):
    monkeypatch.setattr(path_gradients, "COTANGENT_LIMIT", FAR)
    potential, flow, n = MixedDoubleWell.random(D, 1), rough_flow(kind), 40_000
    network = flow.network
    parameters = list(network.parameters())
    tau = torch.full((n,), temperature, dtype=torch.float64)
    v = flow.sample_prior(n, temperature, torch.Generator().manual_seed(3))
    direct = gradients(variational_free_energy(flow, network, potential, v, tau, FAR), parameters)
    v = flow.sample_prior(n, temperature, torch.Generator().manual_seed(4))
    y, _, pullback = network.forward_and_pullback(v)
    slope = slope_of(potential, y[:, :D].detach(), y[:, D:].detach(), tau)
    cotangent = draw_cotangent(draw_score(v, pullback, tau), slope)
    path = gradients((y * cotangent).sum(dim=1), parameters)
    assert_same(direct, path)


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_draws_is_the_gradient_at_fixed_points(kind):
    flow, tau = rough_flow(kind), torch.full((20,), 0.6, dtype=torch.float64)
    network, parameters = flow.network, list(flow.network.parameters())
    v = flow.sample_prior(20, 0.6, torch.Generator().manual_seed(5))
    y, log_det, pullback = network.forward_and_pullback(v)
    found = gradients(log_density_at_draws(y, log_det, draw_score(v, pullback, tau)), parameters)
    zero = torch.zeros(20, dtype=torch.float64)
    x, p = y[:, :D].detach(), y[:, D:].detach()
    expected = gradients(-negative_log_likelihood(network, x, zero, p, tau), parameters)
    assert torch.allclose(found[0], expected[0], atol=1e-10)
    assert float(found[0].norm()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_pull_back_is_the_derivative_of_the_other_way(kind, way):
    """The same as differentiating the other way at the image; the first way's graph is whole."""
    network, generator = rough_flow(kind).network, torch.Generator().manual_seed(8)
    other = {"forward": "inverse", "inverse": "forward"}[way]
    start, cotangent = torch.randn(2, 50, 2 * D, generator=generator, dtype=torch.float64)
    if kind == "realnvp":
        start, cotangent = start[:, :D], cotangent[:, :D]
    image, log_det, pullback = getattr(network, f"{way}_and_pullback")(start)
    found = pullback(cotangent)
    leaf = image.detach().requires_grad_()
    back, log_det_back = getattr(network, f"{other}_and_log_det")(leaf)
    (expected,) = torch.autograd.grad((back * cotangent).sum() - log_det_back.sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    parameters = list(network.parameters())
    plain, plain_log_det = getattr(network, f"{way}_and_log_det")(start)
    torch.testing.assert_close((image, log_det), (plain, plain_log_det))
    for a, b in zip(
        torch.autograd.grad((image**2).sum() + log_det.sum(), parameters),
        torch.autograd.grad((plain**2).sum() + plain_log_det.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_flow_is_left_alone_by_every_point(kind):
    """The direct gradients of single points are as large as ever."""
    flow_class, n_momenta = KINDS[kind]
    flow = flow_class(D, n_momenta, 2, (8,), seed=1)  # the identity
    potential = GaussianWell(torch.eye(D, dtype=torch.float64))
    for temperature in (0.5, 1.0):
        x, p, tau = sampled(potential, flow, temperature, 200, 6)
        v, _, pullback = flow.network.inverse_and_pullback(torch.cat([x, p], dim=1))
        slope = slope_of(potential, x, p, tau)
        assert float(data_cotangent(v, pullback, slope, tau).abs().max()) < 1e-12
        assert float(slope.norm(dim=1).mean()) > 1
        _, _, pullback = flow.network.forward_and_pullback(v.detach())
        assert float(draw_cotangent(draw_score(v, pullback, tau), slope).abs().max()) < 1e-12


def test_steep_points_are_cut_and_others_left_out():
    cotangents = torch.tensor([[3.0, 4.0], [300.0, 400.0], [math.nan, 1.0], [math.inf, 1.0]])
    found = limited(cotangents)
    torch.testing.assert_close(found[0], cotangents[0])
    torch.testing.assert_close(found[1].norm(), torch.tensor(COTANGENT_LIMIT))
    assert not found[2:].any()
    assert whole(found).tolist() == [True, False, False, False]


# -- chains -------------------------------------------------------------------------------------


def test_chains_sample_the_target(monkeypatch):
    """A poor flow as proposal: exact samples of two temperatures, and basins, stay exact."""
    two_basins(monkeypatch)
    potential, flow = MixedDoubleWell.random(D, 3), rough_flow("tsf")
    generator, n, per_turn = torch.Generator().manual_seed(7), 20_000, 5000
    ladder = torch.tensor([0.7, 1.0], dtype=torch.float64)
    tau = ladder.repeat_interleave(n)
    start = torch.cat([potential.sample(n, t, generator) for t in ladder.tolist()])
    chains = IndependenceChains(Points.at(flow, potential, None, start, tau, FAR), 2)

    def log_ratio(points, v, momenta):
        squares = v.square().sum(1) - momenta.square().sum(1)
        return -points.action + 0.5 * squares / points.tau

    with torch.no_grad():
        for _ in range(60):
            index = chains.turn(per_turn)
            points = chains.points.take(index)
            p = torch.randn(len(index), D, generator=generator, dtype=torch.float64)
            p = p * points.tau.sqrt()[:, None]
            v, _ = flow.network.inverse_and_log_det(torch.cat([points.y, p], dim=1))
            z = torch.randn(len(index), 2 * D, generator=generator, dtype=torch.float64)
            z = z * points.tau.sqrt()[:, None]
            y, _ = flow.network.forward_and_log_det(z)
            new = Points.at(flow, potential, None, y[:, :D], points.tau, FAR)
            ratios = log_ratio(new, z, y[:, D:]), log_ratio(points, v, p)
            assert 0.05 < chains.propose(index, new, *ratios, generator) < 0.95
    for rung, temperature in enumerate(ladder.tolist()):
        x = chains.points.y[rung * n : (rung + 1) * n]
        shares = chains.points.basin[rung * n : (rung + 1) * n].double()
        share = (potential.sample(400_000, temperature, generator)[:, 0] > 0).double().mean()
        assert 0.1 < share < 0.9
        assert abs(shares.mean() - share) < 4 * (share * (1 - share) / n) ** 0.5
        for order in (1, 2):
            values = x**order
            z = (values.mean(0) - potential.moment(order, temperature)) / values.std(0) * n**0.5
            assert float(z.abs().max()) < 4, (temperature, order, z)


def test_turns_go_round():
    points = Points(
        torch.zeros(10, 1), torch.zeros(10).double(), torch.zeros(10, 1), torch.zeros(10).long(),
        torch.ones(10),
    )  # fmt: skip
    chains = IndependenceChains(points, 2)
    seen = torch.cat([chains.turn(2) for _ in range(5)])
    assert sorted(seen.tolist()) == sorted([*range(10)] * 2)
    before = chains.points.y.clone()
    one = points.take(torch.tensor([0, 1]))
    ratio = torch.tensor([math.nan, -math.inf], dtype=torch.float64)
    present = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):  # any chain, or of the same basin
        generator = torch.Generator().manual_seed(seed)
        assert chains.propose(torch.tensor([0, 1]), one, ratio, present, generator) == 0
    assert torch.equal(chains.points.y, before)


def test_a_rare_basin_meets_proposals_of_its_own():
    """2 of 100 chains at each of two temperatures; 3 of 100 proposals."""
    n, generator = 200, torch.Generator().manual_seed(1)

    def made(numbers, where):
        basin = torch.zeros(n).long()
        basin[where] = 1
        zero = torch.zeros(n)
        return Points(numbers[:, None], zero.double(), zero[:, None], basin, torch.ones(n))

    mine, theirs = torch.tensor([3, 40, 107, 188]), torch.tensor([5, 50, 80, 100, 120, 199])
    start = made(-1.0 - torch.arange(n), mine)
    new = made(torch.arange(n).float(), theirs)
    zero = torch.zeros(n, dtype=torch.float64)  # all are accepted
    own = 0
    for _ in range(60):
        chains = IndependenceChains(start.take(torch.arange(n)), 2)
        chains.propose(chains.turn(100), new, zero, zero, generator)
        now = chains.points
        moved = now.y[:, 0] >= 0
        assert bool((now.y[moved, 0].long() // 100 == moved.nonzero().flatten() // 100).all())
        assert torch.equal(now.basin[moved], new.basin[now.y[moved, 0].long()])
        if int(moved.sum()) < n:  # within basins
            own += 1
            assert torch.equal(now.basin, start.basin)
            assert now.y[mine, 0].tolist() == [5, 50, 100, 120]
            assert int((~moved).sum()) == 2  # 98 and 98 chains, 97 and 97 proposals
    assert 15 < own < 45


def test_frames_are_brought_to_another_temperature():
    """From samples at T = 1 to T = 0.4 of a well, whose moments are known."""
    scale = torch.linspace(0.5, 2.0, D, dtype=torch.float64)
    potential, flow, n = GaussianWell(torch.diag(1 / scale**2)), rough_flow("tsf"), 8000
    generator, tau = torch.Generator().manual_seed(5), torch.full((8000,), 0.4, dtype=torch.float64)

    def at(y, tau):
        return Points.at(flow, potential, None, y, tau, FAR)

    points = at(potential.sample(n, 1.0, generator), tau)
    points.put(torch.tensor([0]), at(torch.full((1, D), 6.0, dtype=torch.float64), tau[:1].clone()))
    acceptance = relax(points, at, 100, generator)
    assert 0.5 < acceptance < 0.65  # the step was tuned
    again = at(points.y, tau)
    for name in ("action", "slope", "tau"):
        assert torch.allclose(getattr(points, name), getattr(again, name))
    y = points.y / scale
    for order, expected in ((1, 0.0), (2, 0.4)):
        z = (y**order).mean(0).sub(expected) / (y**order).std(0) * n**0.5
        assert float(z.abs().max()) < 4, (order, z)

    def nowhere(y, tau):
        found = at(y, tau)
        found.action[:] = math.nan
        return found

    before = points.y.clone()
    assert relax(points, nowhere, 4, generator) == 0
    assert torch.equal(points.y, before)


def test_the_objectives_chains_sample_their_temperatures(monkeypatch):
    """Also where there are no frames, and by a poor flow, which does not change here."""
    two_basins(monkeypatch)
    potential, data = toy()
    flow, n = rough_flow("tsf"), 2000
    settings = dataclasses.replace(SHORT, n_chains=n, kl_batch_size=2 * n)
    objective = PathObjective(
        flow, [data.split().train], potential, settings, FAR, torch.Generator().manual_seed(1),
        lambda *_: None,
    )  # fmt: skip
    network, generator = copy.deepcopy(flow.network).float(), torch.Generator().manual_seed(2)
    for _ in range(80):
        objective.backward(network, 0.3, generator)
    assert objective.chains is not None
    for rung, temperature in enumerate((0.5, 1.0)):
        y = objective.chains.points.y[rung * n : (rung + 1) * n].double()
        for order in (1, 2):
            values = y**order
            z = (values.mean(0) - potential.moment(order, temperature)) / values.std(0) * n**0.5
            assert float(z.abs().max()) < 4, (temperature, order, z)


# -- populations ----------------------------------------------------------------------------------


ONE = torch.ones(1, dtype=torch.float64)


def test_log_ratios_of_a_group_are_pulled_together():
    found = Populations(ONE.repeat(2), ONE, 0.3, 0.0)
    group = torch.tensor([0, 0, 0, 1, 1])
    level = torch.tensor([-7.0, -7.0, -7.0, 4.0, 4.0], dtype=torch.float64)
    pull, spread = found.pull(level, group, 2)  # groups need not agree: there is ln Z in between
    assert float(pull.abs().max()) < 1e-12
    assert spread < 1e-12
    level[0] += 1.5  # the flow has too little here
    pull, _ = found.pull(level, group, 2)
    expected = 0.3 * torch.tensor([1.0, -0.5, -0.5, 0, 0], dtype=torch.float64) / 5
    assert torch.allclose(pull, expected)
    level[3] = math.nan
    assert torch.isfinite(found.pull(level, group, 2)[0]).all()


def test_what_pushes_the_populations():
    """Draws of a basin with too little of the flow are pushed up; nothing is where all is right."""
    ladder = torch.tensor([0.5, 1.0], dtype=torch.float64)
    few, many = torch.tensor([0, 0, 0, 1]).repeat(20), torch.tensor([0, 0, 1, 1]).repeat(20)
    basin = torch.cat([few, many])  # draws of one temperature, then of the other
    level = torch.full((160,), -7.0, dtype=torch.float64)
    under = level + 0.3 * basin  # ln(p/q) larger where the flow has too little
    data = torch.arange(2).repeat_interleave(80)
    same, other = Populations(ladder, ladder, 0.0, 0.6), Populations(ladder, ladder, 0.0, 0.6)
    for _ in range(3000):
        same.follow(level, data, basin, level, basin)
        other.follow(under, data, basin, under, basin)
        push = other.push(basin)
    assert float(same.missing.abs().max()) < 0.03
    assert float(same.push(basin).abs().max()) < 0.02
    # weight / rungs * missing * d ln(P_1/P_0): 1/P_1 of a draw in basin 1, -1/P_0 of another.
    expected = 0.3 * other.missing[:, None] / 80 * torch.tensor([[-4 / 3, 4.0], [-2.0, 2.0]])
    assert torch.allclose(push[:80], expected[0][few])
    assert torch.allclose(push[80:], expected[1][many])
    assert torch.allclose(other.missing, torch.full((2,), 0.3).double(), atol=0.03)
    assert float(push.view(2, 80).sum(1).abs().max()) < 1e-9


def test_one_draw_is_enough():
    found = Populations(ONE, ONE, 0.0, 1.0)
    found._ratio[:, 1], found._met[:] = 0.2, 1.0
    for _ in range(500):
        assert torch.isfinite(found.push(torch.tensor([1]))).all()


def test_the_push_has_the_gradient_of_the_populations():
    """E_q[push ln q] against d ln(P_1/P_0), which is known for a shifted normal density."""
    found, n, shift = Populations(ONE, ONE, 0.0, 1.0), 200_000, 0.3
    found._ratio[:, 1], found._met[:] = 0.2, 1.0
    x = torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + shift
    basin = (x > 0).long()
    for _ in range(1500):
        push = found.push(basin)
    each = push * (x - shift)  # d ln q / d shift
    up = torch.special.ndtr(torch.tensor(shift, dtype=torch.float64))
    density = math.exp(-0.5 * shift**2) / math.sqrt(2 * math.pi)
    expected = 0.2 * density / float(up * (1 - up))
    error = n**0.5 * float(each.std())
    assert abs(float(each.sum()) - expected) < 4 * error
    assert error < 0.02 * expected


@pytest.mark.parametrize("apart", [0.0, -0.4])
def test_populations_are_told_from_how_well_a_basin_is_known(apart):
    """ln(p/q) of data is larger, of draws smaller, where a basin is known less well."""
    generator, found = torch.Generator().manual_seed(4), Populations(ONE, ONE, 0.0, 1.0)
    measured = []
    for step in range(3000):
        basin = (torch.rand(400, generator=generator) < 0.2).long()
        width = 0.3 + 0.9 * basin.double()
        # q is p times a log-normal factor: KL(p || q) = KL(q || p) = width^2 / 2 in each basin.
        noise = torch.randn(400, generator=generator, dtype=torch.float64) * width
        level = apart * basin.double() - 3.0
        found.follow(
            level + noise + 0.5 * width**2, torch.zeros(400).long(), basin,
            level + noise.flip(0) * width / width.flip(0) - 0.5 * width**2, basin,
        )  # fmt: skip
        if step >= 500:
            measured.append(float(found.missing))
    mean, spread = sum(measured) / len(measured), torch.tensor(measured).std()
    assert mean == pytest.approx(apart, abs=0.03)  # by data alone: 0.67 more
    assert 0.01 < float(spread) < 0.25


def test_a_basin_that_is_not_drawn_is_missing():
    found = Populations(ONE, ONE, 0.0, 1.0)
    basin, level = torch.tensor([0, 0, 0, 1]), torch.zeros(4).double()
    for _ in range(300):
        found.follow(level, torch.tensor([0, 0, 0, 0]), basin, level, torch.zeros(4).long())
    assert float(found.missing) == 0.5  # as much as counts
    never = Populations(ONE, ONE, 0.0, 1.0)  # and where there is one basin only, nothing is missing
    never.follow(level, torch.zeros(4).long(), torch.zeros(4).long(), level, basin)
    assert float(never.missing) == 0


# -- the loop -----------------------------------------------------------------------------------

SHORT = FitSettings(
    n_steps=30,
    batch_size=64,
    kl_batch_size=32,
    validate_interval=10,
    n_validation_draws=100,
    ramp=(0.1, 0.5),
    lambda_max=0.3,
    temperatures=(0.5, 1.0),
    estimator="path",
    n_chains=40,
    optimizer="muon",
    learning_rate=1e-2,
)


def toy():
    potential = MixedDoubleWell.random(D, 1)
    data = MDDataset(potential.sample(2000, 1.0, torch.Generator().manual_seed(1)), 1.0)
    return potential, data


def weights(flow):
    return torch.cat([parameter.detach().flatten() for parameter in flow.parameters()])


def two_basins(monkeypatch):
    """The sign of the first coordinate, where there is no molecule."""
    monkeypatch.setattr(
        "openmm_tsf.training.target_points.basin_labels", lambda _, x: (x[:, 0] > 0).long()
    )


def test_populations_are_pushed_in_the_loop(monkeypatch):
    """A step with basin 1 known to be drawn too rarely raises the flow's density there."""
    two_basins(monkeypatch)
    potential, data = toy()
    flow = rough_flow("tsf")
    made = []
    for ratio in (0.0, 1.0):
        objective = PathObjective(
            flow, [data.split().train], potential, SHORT, FAR, torch.Generator().manual_seed(1),
            lambda *_: None,
        )  # fmt: skip
        network = copy.deepcopy(flow.network).float()
        objective.populations._ratio[:, 1] = ratio
        objective.populations._met[:] = 1
        objective.backward(network, 0.3, torch.Generator().manual_seed(2))
        made.append([parameter.grad.clone() for parameter in network.parameters()])
        followed = objective.populations._ratio
        assert bool((followed[:, 0] != 0).all())  # by the draws of this step
    n = 4000
    x, p, tau = sampled(potential, flow, 1.0, n, 3)
    y, zero = torch.cat([x, p], dim=1).float(), torch.zeros(n)
    levels = []
    for sign in (-1, 1):
        network = copy.deepcopy(flow.network).float()
        with torch.no_grad():
            for parameter, without, pulled in zip(network.parameters(), *made, strict=True):
                parameter -= sign * 0.02 * (pulled - without)
            nll = negative_log_likelihood(network, y[:, :D], zero, y[:, D:], tau.float())
        levels.append(float(nll[x[:, 0] <= 0].mean() - nll[x[:, 0] > 0].mean()))
    assert levels[1] > levels[0] + 1e-4


@pytest.mark.parametrize("calls", [30, 75])  # while the chains are brought to T = 0.5; after it
def test_stopped_and_resumed_bit_by_bit(calls, tmp_path, monkeypatch):
    two_basins(monkeypatch)
    potential, data = toy()
    whole = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
    result = fit(whole, data, potential, settings=SHORT, seed=3, progress=False)
    flow = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
    path = tmp_path / "training.pt"
    steps = []

    class Stop(Exception):
        pass

    class Stopping(type(potential)):
        def energy(self, x):
            if path.exists():
                steps.append(len(x))
            if len(steps) == calls:
                raise Stop
            return super().energy(x)

    stopping = Stopping(potential.wells, potential.mixing)
    options = {"settings": SHORT, "seed": 3, "checkpoint_path": path, "progress": False}
    with pytest.raises(Stop):
        fit(flow, data, stopping, checkpoint_seconds=0, **options)
    flow = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
    state = read_tensors(path, "training checkpoint")["objective"]
    assert state["relaxed"] == (calls == 75)
    # or a resumed one would not need them
    assert bool(state["population_ratios"].any()) == (calls == 75)
    assert bool(state["basins_met"].all()) == (calls == 75)
    again = fit(flow, data, potential, resume=True, **options)
    assert torch.equal(weights(flow), weights(whole))
    assert again.n_evaluations >= result.n_evaluations


def test_the_noted_likelihood_is_the_direct_ones(tmp_path):
    """And the chains' acceptance is noted, too."""
    potential, data = toy()
    noted = {}
    for name, estimator, chains in (("direct", "direct", 0), ("path", "path", 40)):
        settings = dataclasses.replace(
            SHORT, estimator=estimator, n_chains=chains, learning_rate=1e-9,
            final_learning_rate=1e-9, n_steps=200, validate_interval=200,
        )  # fmt: skip
        flow = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
        noted[name] = fit(flow, data, potential, settings=settings, progress=False).history[-1]
    apart = noted["path"].row()["train_nll"] - noted["direct"].row()["train_nll"]
    assert abs(apart) < 0.3, noted  # means over some 50 batches of 64
    assert 0.01 < noted["path"].row()["train_chains"] < 1
    assert math.isnan(noted["direct"].row()["train_chains"])


def test_a_second_thread_changes_nothing():
    potential, data = toy()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            flow = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
            fit(flow, data, potential, settings=SHORT, seed=3, progress=False)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        found.append(weights(flow))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind):
    """Held-out NLL and free energy go down; several datasets, one per temperature."""
    potential, data = toy()
    cold = MDDataset(potential.sample(2000, 0.5, torch.Generator().manual_seed(2)), 0.5)
    flow_class, n_momenta = KINDS[kind]
    flow = flow_class(D, n_momenta, 2, (32,), seed=1)
    settings = dataclasses.replace(SHORT, n_steps=300, validate_interval=150, n_chains=64)
    result = fit(flow, [data, cold], potential, settings=settings, seed=3, progress=False)
    assert result.history[-1].score < result.history[0].score - 0.3
    assert result.n_skipped == 0


def test_draws_without_energies_are_skipped_steps():
    potential, data = toy()

    class Broken(type(potential)):
        broken = False

        def energy(self, x):
            return super().energy(x) + (math.nan if self.broken else 0.0)

    broken = Broken(potential.wells, potential.mixing)
    flow = TemperatureSteerableFlow(D, D, 2, (16,), seed=1)
    objective = PathObjective(
        flow, [data.split().train], broken, SHORT, FAR, torch.Generator().manual_seed(1),
        lambda *_: None,
    )  # fmt: skip
    network = flow.network.to(SHORT.dtype)
    broken.broken = True
    before = objective.chains.points.y.clone()
    objective.backward(network, 0.3, torch.Generator().manual_seed(2))
    assert all(bool(torch.isnan(p.grad).all()) for p in network.parameters())
    assert torch.equal(objective.chains.points.y, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "other"}, "estimator"),
        ({"estimator": "direct"}, "n_chains: expected 0 for the direct estimator"),
        ({"basin_share": 0.1}, "basin_share: expected 0 for path gradients"),
        ({"kl_batch_size": 1, "n_chains": 0}, "at least one draw of each of 2 temperatures"),
        ({"n_chains": 10}, "n_chains: expected at least the 16 draws"),
        ({"lambda_max": 0.0}, "without draws"),
        ({"chain_share": 1.5}, "chain_share"),
        ({"log_variance": -1.0}, "log_variance"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_path_gradients_need_a_potential():
    _, data = toy()
    settings = dataclasses.replace(SHORT, lambda_max=0.0, n_chains=0)
    with pytest.raises(ValueError, match="potential: expected one for path gradients"):
        fit(TemperatureSteerableFlow(D, D, 1, (8,)), data, settings=settings, progress=False)
