"""The training loop with path gradients, chains and population terms."""

import copy
import dataclasses
import math

import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io.tensors import read_tensors
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import fit, path_objective
from openmm_tsf.training.losses import negative_log_likelihood
from openmm_tsf.training.path_gradients import COTANGENT_LIMIT
from tests.support import path_training as support
from tests.support.path_training import KINDS, SHORT, D, make_objective, rough_flow, toy, weights


def new_flow():
    return TemperatureSteerableFlow(D, D, 2, (16,), seed=1)


def test_a_step_corrects_populations(monkeypatch):
    """A step that knows basin 1 to be drawn too rarely raises the flow's density in it."""
    support.two_basins(monkeypatch)
    potential, data = toy()
    flow = rough_flow("tsf")
    made = []
    for ratio in (0.0, 1.0):
        objective = make_objective(flow, potential, data)
        network = copy.deepcopy(flow.network).float()
        objective.populations.population_ratios[:, 1] = ratio
        objective.populations.basins_met[:] = 1
        objective.backward(network, SHORT.n_steps, torch.Generator().manual_seed(2))
        made.append([parameter.grad.clone() for parameter in network.parameters()])
        ratios = objective.populations.population_ratios
        assert bool((ratios[:, 0] != 0).all())  # updated by the draws of this step
    n = 4000
    x, p, tau = support.sampled(potential, flow, 1.0, n, 3)
    y, zero = torch.cat([x, p], dim=1).float(), torch.zeros(n)
    levels = []
    for sign in (-1, 1):
        network = copy.deepcopy(flow.network).float()
        with torch.no_grad():
            for parameter, without, with_term in zip(network.parameters(), *made, strict=True):
                parameter -= sign * 0.02 * (with_term - without)
            nll = negative_log_likelihood(network, y[:, :D], zero, y[:, D:], tau.float())
        levels.append(float(nll[x[:, 0] <= 0].mean() - nll[x[:, 0] > 0].mean()))
    assert levels[1] > levels[0] + 1e-4


def test_points_that_are_cut_keep_their_log_variance_term(monkeypatch):
    """The flow misses just those most, and the target's gradient has no part in the term."""

    def cut(v, *_):
        return torch.full_like(v, COTANGENT_LIMIT / v.shape[1] ** 0.5)

    monkeypatch.setattr(path_objective, "data_cotangent", cut)
    potential, data = toy()
    network = rough_flow("tsf").network.float()
    gradients = []
    for weight in (0.0, 0.2):
        settings = dataclasses.replace(SHORT, log_variance=weight)
        objective = make_objective(rough_flow("tsf"), potential, data, settings)
        objective.backward(network, 0, torch.Generator().manual_seed(2))
        gradients.append(torch.cat([each.grad.flatten() for each in network.parameters()]))
    assert float((gradients[1] - gradients[0]).norm()) > 0.01 * float(gradients[0].norm())


@pytest.mark.parametrize("calls", [30, 75])  # while the chains relax to T = 0.5; after it
def test_resume_is_exact_bit_by_bit(calls, tmp_path, monkeypatch):
    support.two_basins(monkeypatch)
    potential, data = toy()
    whole, settings = new_flow(), dataclasses.replace(SHORT, basin_share=0.4)
    result = fit(whole, data, potential, settings=settings, seed=3, progress=False)
    path, steps = tmp_path / "training.pt", []

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
    options = {"settings": settings, "seed": 3, "checkpoint_path": path, "progress": False}
    with pytest.raises(Stop):
        fit(new_flow(), data, stopping, checkpoint_seconds=0, **options)
    flow = new_flow()
    state = read_tensors(path, "training checkpoint")["objective"]
    assert state["relaxed"] == (calls == 75)
    # or a resumed one would not need them
    assert bool(state["population_ratios"].any()) == (calls == 75)
    assert bool(state["basins_met"].all()) == (calls == 75)
    again = fit(flow, data, potential, resume=True, **options)
    assert torch.equal(weights(flow), weights(whole))
    assert again.n_evaluations >= result.n_evaluations


def test_the_recorded_likelihood_is_that_of_the_direct_estimator(tmp_path):
    """The acceptance of the chains is recorded, too."""
    potential, data = toy()
    recorded = {}
    for name, chains in (("direct", 0), ("path", 40)):
        changes = {"n_steps": 200, "validate_interval": 200, "estimator": name, "n_chains": chains}
        rates = {"learning_rate": 1e-9, "final_learning_rate": 1e-9}
        settings = dataclasses.replace(SHORT, **changes, **rates)
        result = fit(new_flow(), data, potential, settings=settings, progress=False)
        recorded[name] = result.history[-1]
    apart = recorded["path"].row()["train_nll"] - recorded["direct"].row()["train_nll"]
    assert abs(apart) < 0.3, recorded  # means over some 50 batches of 64
    assert 0.01 < recorded["path"].row()["train_chains"] < 1
    assert math.isnan(recorded["direct"].row()["train_chains"])


def test_a_second_thread_changes_nothing():
    potential, data = toy()
    trained = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            flow = new_flow()
            fit(flow, data, potential, settings=SHORT, seed=3, progress=False)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        trained.append(weights(flow))
    assert torch.equal(*trained)


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
    flow = new_flow()
    objective = make_objective(flow, broken, data)
    network = flow.network.to(SHORT.dtype)
    broken.broken = True
    before = objective.chains.points.y.clone()
    objective.backward(network, SHORT.n_steps, torch.Generator().manual_seed(2))
    assert all(bool(torch.isnan(p.grad).all()) for p in network.parameters())
    assert torch.equal(objective.chains.points.y, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "other"}, "estimator"),
        ({"estimator": "direct"}, "n_chains: expected 0 for the direct estimator"),
        ({"kl_batch_size": 1, "n_chains": 0}, "at least one draw of each of 2 temperatures"),
        ({"n_chains": 10}, "n_chains: expected at least 32, twice the draws"),
        ({"lambda_max": 0.0}, "without draws"),
        ({"chain_share": 1.5}, "chain_share"),
        ({"log_variance": -1.0}, "log_variance"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **changes)


def test_path_gradients_need_a_potential():
    settings = dataclasses.replace(SHORT, lambda_max=0.0, n_chains=0)
    with pytest.raises(ValueError, match="potential: expected one for path gradients"):
        fit(new_flow(), toy()[1], settings=settings, progress=False)
