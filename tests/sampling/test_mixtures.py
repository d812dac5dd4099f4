"""OneOf and OnRungs: counts, tuning, resuming, arguments; what a sampler requires of kernels."""

import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.mixtures import OneOf, OnRungs
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.schedule import Scheduled
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.state import KernelInfo
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.sampling.tuning import StepSizeTuner
from tests.sampling.conftest import assert_same_run

LADDER = (0.5, 1.0, 2.0)
ENDS = (0.5, 2.0)


@pytest.fixture
def potential():
    return DoubleWell(0.1, -1.0, 0.3)


@pytest.fixture
def flow():
    return TemperatureSteerableFlow(1, 2, 1, (4,), seed=2)


@pytest.fixture
def sampler(potential, flow):
    """Make a sampler with these kernels, or with all kinds of mixtures."""

    def sampler(kernels=None, seed=3, n_walkers=6):
        kernels = mixtures(flow, potential) if kernels is None else kernels
        made = ParallelTempering(None, flow, LADDER, n_walkers, kernels, potential, seed=seed)
        made.set_positions(torch.ones(n_walkers, 3, 1))
        return made

    return sampler


def mixtures(flow, potential):
    walk = FlowWalk(flow, potential, LADDER, 0.3)
    inner = OneOf([FlowIndependence(flow, potential, ENDS), FlowWalk(flow, potential, ENDS)])
    return [
        OneOf([walk, FlowIndependence(flow, potential, LADDER)], [3, 1], name="moves"),
        Scheduled(OnRungs(inner, LADDER), repeats=2),
        FlowCrankNicolson(flow, potential, LADDER, share=0.5),
        FlowMultipleTry(flow, potential, LADDER),
        OnRungs(CartesianHMC(potential, [1.0], 1.0, timestep=0.3), LADDER),
        OneOf([PlainSwap(LADDER, 1), SteeredSwap(flow, potential, LADDER)], name="swaps"),
        OnRungs(PlainSwap(ENDS, 1), LADDER),
    ]


def test_they_are_kernels(flow, potential):
    for kernel in (getattr(entry, "kernel", entry) for entry in mixtures(flow, potential)):
        assert isinstance(kernel, Kernel)
        assert kernel.exact
        assert kernel.temperatures == LADDER


def test_counts_and_energies(sampler, potential):
    made = sampler()
    before = potential.n_evaluations
    made.run(40, progress=False)
    totals, state = made.totals, made.state
    assert totals["moves"].proposed.tolist() == [240, 240, 240]
    assert totals["one_of_on_0_2"].proposed.tolist() == [480, 0, 480]
    assert totals["hmc_on_1"].proposed.tolist() == [0, 240, 0]
    assert totals["swap_plain_on_0_2"].proposed.tolist() == [[0, 0, 120], [0, 0, 0], [0, 0, 0]]
    assert int(totals["swaps"].proposed.sum()) == 240
    for name, kernel in made.kernels.items():
        assert totals[name].accepted.shape == kernel.counts_shape
    assert potential.n_evaluations - before == sum(t.n_evaluations for t in totals.values())
    energy = potential.energy(state.x.flatten(0, 1)).reshape(6, 3)
    torch.testing.assert_close(energy, state.energy, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.replica.sort(dim=1).values, torch.arange(3).repeat(6, 1))
    members = totals["moves"].members
    drawn = [int(members[name].proposed[0]) / 6 for name in ("flow_walk", "flow_independent")]
    assert sum(drawn) == 40
    assert abs(drawn[0] - 30) < 4 * (40 * 3 / 16) ** 0.5


class Idle:
    """A user's kernel that counts its calls."""

    exact, temperatures, counts_shape = True, LADDER, (3,)

    def __init__(self, name="idle"):
        self.name, self.calls = name, 0

    def __call__(self, state, generator):
        self.calls += 1
        return state, KernelInfo.zero(self.counts_shape)

    settings = state_dict = dict

    def load_state_dict(self, content):
        pass


def test_kernels_need_no_base_class(sampler):
    idle = Idle()
    sampler([idle]).run(2, progress=False)
    assert idle.calls == 2


def test_members_draw_by_their_weights():
    members = [Idle(name) for name in "abc"]
    kernel, generator = OneOf(members, [1, 2, 5]), torch.Generator().manual_seed(4)
    for _ in range(4000):
        kernel(None, generator)
    for member, p in zip(members, (0.125, 0.25, 0.625), strict=True):
        assert abs(member.calls - 4000 * p) < 4 * (4000 * p * (1 - p)) ** 0.5


def test_members_are_tuned_and_recorded(sampler):
    made = sampler(n_walkers=100)
    sigma = made.tune(60, target_acceptance=0.4)
    names = {"moves.flow_walk", "one_of_on_0_2.one_of.flow_walk", "hmc_on_1.hmc"}
    names |= {"flow_crank_nicolson"}
    assert sigma.keys() == names
    assert made.choices()["sigma"] == {name: value.tolist() for name, value in sigma.items()}
    assert made.choices()["kernel_flows"].keys() >= {"moves.flow_walk", "swaps.swap_steered"}
    walk = made.kernels["moves"].members[0]
    assert torch.equal(walk.sigma, sigma["moves.flow_walk"])
    assert bool((walk.sigma != 0.3).all())
    made.run(60, progress=False)
    rate = made.totals["moves"].members["flow_walk"].acceptance
    assert bool(((rate - 0.4).abs() < 0.1).all()), rate


def test_resume_is_the_same_bit_by_bit(sampler, tmp_path):

    whole = sampler()
    whole.tune(12)
    whole.run(9, output=tmp_path / "whole", checkpoint_interval=4, progress=False)
    first = sampler()
    first.tune(12)
    first.run(5, output=tmp_path / "cut", progress=False)
    again = sampler(seed=99).resume(tmp_path / "cut")
    again.run(4, output=tmp_path / "cut", progress=False)
    assert torch.equal(again.state.x, whole.state.x)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses_other_members(sampler, flow, potential, tmp_path):
    def made(weights=None, n_steps=1, inner=flow):
        walk = FlowWalk(inner, potential, LADDER, n_steps=n_steps)
        return sampler([OneOf([walk, FlowIndependence(flow, potential, LADDER)], weights)])

    made().run(1, output=tmp_path / "run", progress=False)
    for other in ({"weights": [1, 2]}, {"n_steps": 2}):
        with pytest.raises(ValueError, match="expected the kernels that the run was started with"):
            made(**other).resume(tmp_path / "run")
    with pytest.raises(ValueError, match="expected the kernel_flows that the run was started"):
        made(inner=TemperatureSteerableFlow(1, 2, 1, (4,), seed=5)).resume(tmp_path / "run")
    made([2, 2]).resume(tmp_path / "run")


def test_arguments_of_mixtures_are_checked(flow, potential, sampler):
    walk, same = (FlowWalk(flow, potential, LADDER) for _ in range(2))
    swap, wrong = (PlainSwap(LADDER, constant) for constant in (1, 2))
    draw = FlowIndependence(flow, potential, LADDER)
    at_ends, hot = FlowIndependence(flow, potential, ENDS), FlowWalk(flow, potential, [0.5, 0.7])
    for error, message, make, *arguments in [
        (ValueError, "kernels: expected at least one", OneOf, []),
        (TypeError, "kernels: expected kernels, got str", OneOf, ["walk"]),
        (ValueError, "kernels: expected distinct names", OneOf, [walk, same]),
        (ValueError, "expected the counts_shape of flow_walk", OneOf, [walk, swap]),
        (ValueError, "expected the temperatures of flow_walk", OneOf, [walk, at_ends]),
        (TypeError, "name: expected a string", OneOf, [walk], None, 3),
        (TypeError, "kernel: expected a kernel, got int", OnRungs, 3, LADDER),
        (ValueError, "kernel: expected temperatures of the ladder", OnRungs, hot, LADDER),
        (ValueError, r"object as flow_walk and one_of\.flow_walk", sampler, [walk, OneOf([walk])]),
        (ValueError, r"one_of\.swap_plain was made for the Boltz", sampler, [OneOf([wrong])]),
    ]:
        with pytest.raises(error, match=message):
            make(*arguments)
    for weights in ([1.0], [1, -1], [1, float("nan")], [1, "a"], [0, 1]):
        with pytest.raises(ValueError, match="weights: expected 2 positive numbers"):
            OneOf([walk, draw], weights)


def test_dynamics_without_a_domain_is_refused_beside_coordinates(potential, flow, sampler):
    bounded = TemperatureSteerableFlow(1, 2, 1, (4,))
    bounded.coordinates = torch.nn.Identity()  # as a molecule's flow has
    walk, hmc = FlowWalk(flow, potential, LADDER), CartesianHMC(potential, LADDER, 1.0)
    walk.flow = bounded
    with pytest.raises(ValueError, match=r"hmc has flow=None .* flow_walk works; .* flow=flow"):
        sampler([walk, hmc])
    with pytest.raises(ValueError, match=r"one_of\.hmc has flow=None"):
        sampler([walk, OneOf([hmc])])
    sampler([hmc, FlowWalk(flow, potential, LADDER)])  # all of R^d is the domain


class Stuck(Idle):
    """A user's kernel with a step size."""

    def __init__(self, sigma):
        super().__init__("stuck")
        self.sigma = sigma

    def __call__(self, state, generator):
        bad = torch.full((2,), float("inf"))
        metropolis(bad, bad, generator)


def test_an_invalid_walker_is_reported_with_the_kernel(sampler):
    made = sampler([Stuck(torch.ones(3))])
    with pytest.raises(ValueError, match="kernel stuck: current: expected finite log-weights"):
        made.run(1, progress=False)


def test_step_sizes_are_tensors(sampler):
    for sigma in (0.1, [0.1] * 3, None):
        with pytest.raises(TypeError, match="the attribute sigma of stuck to be a Tensor of 3"):
            sampler([Stuck(sigma)])
    for sigma in (torch.tensor(0.1), torch.zeros(3), torch.ones(2), torch.ones(3).long()):
        with pytest.raises(ValueError, match="the attribute sigma of stuck to be 3 positive"):
            sampler([Stuck(sigma)])
    stuck = Stuck(torch.ones(3))
    stuck.counts_shape = (2,)
    with pytest.raises(ValueError, match=r"stuck has step sizes, expected counts by rung \(3,\)"):
        sampler([stuck])


def test_rungs_without_proposals_are_not_tuned():
    kernel = Stuck(torch.ones(3, dtype=torch.float64))
    tuner = StepSizeTuner(kernel, 0.3)
    for _ in range(3):
        tuner.update(KernelInfo(torch.tensor([4, 0, 0]), torch.tensor([4, 0, 4])))
    up, same, down = tuner.freeze().tolist()
    assert down < same == 1.0 < up
    assert tuner.fewest_updates == 0


def test_too_few_updates_are_warned_of(sampler, flow, potential):
    walk = FlowWalk(flow, potential, LADDER)
    with pytest.warns(UserWarning, match="of flow_walk were adapted 1 times in 3 iterations"):
        sampler([Scheduled(walk, interval=10)]).tune(3)
    sampler([walk]).tune(2)
    sampler([walk]).tune(0)
