"""The sampler: arguments, start, tuning and schedule."""

import numpy as np
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.schedule import SequenceSettings, default_kernels
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.units import KB
from openmm_tsf.utils.random import seeded_generator
from tests.sampling.conftest import LADDER


def test_arguments_are_checked(tree_molecule, potential, flow, tree):
    walk, same = (FlowWalk(flow, potential, LADDER) for _ in range(2))
    good = {"molecule": tree_molecule, "flow": flow, "temperatures": LADDER, "n_walkers": 2}
    good["potential"] = potential
    two_rungs, on_r3 = (300.0, 600.0), TemperatureSteerableFlow(3, 2, 1, (4,))
    for message, changes in (
        *(("temperatures", {"temperatures": ladder}) for ladder in ([300, 300], [600, 300], [])),
        *(("n_walkers: expected an integer", {"n_walkers": n}) for n in (0, 1.5, True)),
        (
            "kernels: flow_walk was made for the temp",
            {"temperatures": two_rungs, "kernels": [walk]},
        ),
        ("distinct names, got 'flow_walk' twice", {"kernels": [walk, same]}),
        ("kernels: expected at least one", {"kernels": []}),
        ("potential: expected one where mol", {"molecule": None, "potential": None}),
        (r"flow: expected configurations of shape \(7, 3\)", {"flow": on_r3}),
    ):
        with pytest.raises(ValueError, match=message):
            ParallelTempering(**good | changes)
    with pytest.raises(TypeError, match="kernels: expected kernels, got str"):
        ParallelTempering(**good, kernels=["flow_walk"])
    with pytest.raises(TypeError, match="flow: expected a flow, got NoneType"):
        ParallelTempering(**good | {"flow": None})
    assert ParallelTempering(None, flow, LADDER, 2, [walk], potential).seed >= 0


def test_kernels_of_another_boltzmann_constant_are_refused(tree_molecule, potential, flow):
    for constant in (0.001, KB / 4.184):
        kernels = [PlainSwap(LADDER, constant)]
        with pytest.raises(ValueError, match="swap_plain was made for the Boltzmann constant"):
            ParallelTempering(tree_molecule, flow, LADDER, 2, kernels, potential)
    toy = DoubleWell(0.1, -1.0, 0.3)
    walk = FlowWalk(TemperatureSteerableFlow(1, 2, 1, (4,)), toy, LADDER)
    walk.potential = potential  # k_B is compared through the potential, too
    with pytest.raises(ValueError, match="flow_walk was made for the Boltzmann constant"):
        ParallelTempering(None, walk.flow, LADDER, 2, [walk], toy)


def test_kernels_of_another_energy_are_refused():
    flow, potential = TemperatureSteerableFlow(1, 2, 1, (4,)), DoubleWell(0.1, -1.0, 0.3)
    walk = FlowWalk(flow, DoubleWell(0.1, -1.1, 0.3), [1.0, 2.0])
    sampler = ParallelTempering(None, flow, [1.0, 2.0], 5, [walk], potential, seed=1)
    with pytest.raises(ValueError, match="the potential of flow_walk gives walker 0 the energy"):
        sampler.set_positions(torch.ones(5, 2, 1))
    with pytest.raises(RuntimeError, match="call set_positions"):
        sampler.run(1, progress=False)
    walk.potential = DoubleWell(0.1, -1.0, 0.3)  # another object for the same energy
    sampler.set_positions(torch.ones(5, 2, 1))
    sampler.run(1, progress=False)


def test_other_flows_inside_kernels_are_refused(tree_molecule, potential, flow, tree, tmp_path):
    def sampler(inner):
        walk = FlowWalk(inner, potential, LADDER)
        return ParallelTempering(tree_molecule, flow, LADDER, 2, [walk], potential, seed=1)

    first = sampler(tree.flow("tsf", "volume", 0.2))
    first.run(1, output=tmp_path / "run", progress=False)
    sampler(tree.flow("tsf", "volume", 0.2)).resume(tmp_path / "run")
    with pytest.raises(ValueError, match="expected the kernel_flows that the run was started"):
        sampler(flow).resume(tmp_path / "run")
    with torch.no_grad():
        next(first.kernels["flow_walk"].flow.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="output: the kernel_flows changed"):
        first.run(1, output=tmp_path / "run", progress=False)


def test_a_flow_of_another_molecule_is_refused(tree_molecule, potential, tree):
    other = tree.flow("tsf", "volume", 0.1)
    other.fingerprint = "of another"
    with pytest.raises(ValueError, match="flow: it was made for another System or Topology"):
        ParallelTempering(tree_molecule, other, LADDER, 2, potential=potential)


def test_walkers_must_start_in_the_domain(make, tree):
    sampler = make(n_walkers=2)
    good = tree.sample(6, 300.0, seeded_generator(4)).reshape(2, 3, 7, 3)
    bad, mirrored = good.clone(), good.clone()
    bad[1, 2, 4, 0] = float("nan")
    mirrored[0, 1, :, 0] *= -1
    for message, *start in (
        (r"x: expected shape \(2, 3, 7, 3\)", good[0]),
        (r"1 of 6 .* non-finite energy.*walker 1 at 600.00 K", bad),
        (r"outside the flow's domain .*walker 0 at 420.00 K", mirrored),
        (r"velocities: expected shape \(2, 3, 7, 3\)", good, good[:1]),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.set_positions(*start)
    sampler.set_positions(good)
    assert torch.equal(sampler.state.x, good)
    assert sampler.state.replica.tolist() == [[0, 1, 2]] * 2


def test_default_start_and_one_rung(make, tree):
    sampler = make(ladder=(450.0,), n_walkers=120)
    state = sampler.state
    assert bool((state.energy == state.energy[0, 0]).all())
    assert float(state.energy[0, 0]) < 30.0
    kinetic = tree.masses[:, None] * state.velocities[:, 0] ** 2 / (KB * 450.0)
    assert abs(float(kinetic.mean()) - 1) < 4 * np.sqrt(2 / kinetic.numel())
    assert sampler.kernels.keys() == {"flow_independent", "flow_walk", "local"}
    sampler.run(2, progress=False)
    assert sampler.state.iteration == 2


def test_toy_potentials_need_a_start():
    potential, flow = DoubleWell(0.1, -1.0, 0.3), TemperatureSteerableFlow(1, 2, 1, (4,))
    sampler = ParallelTempering(None, flow, [1.0, 2.0], 5, potential=potential, seed=1)
    with pytest.raises(RuntimeError, match="call set_positions"):
        sampler.run(1, progress=False)
    sampler.set_positions(torch.zeros(5, 2, 1))
    assert sampler.run(4, save_interval=2, collect=True, progress=False).shape == (2, 5, 2, 1)
    assert sampler.run(0, collect=True, progress=False).shape == (0, 5, 2, 1)


def test_schedule_counts_and_reporters(make, flow, potential):
    sampler = make()
    seen = []

    def reporter(owner, state):
        assert owner is sampler
        seen.append(state.iteration)

    reporter.interval = 3
    sampler.reporters.append(reporter)
    before = potential.n_evaluations
    positions = sampler.run(7, collect=True, progress=False)
    assert seen == [3, 6]
    assert positions.shape == (7, 4, 3, 7, 3)
    assert torch.equal(positions[-1], sampler.state.x)
    totals = sampler.totals
    assert totals["flow_independent"].proposed.tolist() == [28, 28, 28]
    assert totals["flow_walk"].proposed.tolist() == [112, 112, 112]
    assert totals["local"].proposed.tolist() == [16, 16, 16]  # iterations 0, 2, 4, 6
    assert totals["swap_plain"].proposed.tolist() == [16, 12]  # even and odd calls
    assert totals["swap_steered"].proposed.tolist() == [12, 16]  # odd pairs first
    assert potential.n_evaluations - before - 12 == sum(t.n_evaluations for t in totals.values())
    assert sampler.exact
    sampler.reporters.append(lambda owner, state: None)
    with pytest.raises(TypeError, match="reporters: expected an interval"):
        sampler.run(1, progress=False)


@pytest.mark.parametrize("swap", ["plain", "steered", "both"])
def test_the_default_sequence(potential, flow, swap):
    names = ["swap_steered", "swap_plain"] if swap == "both" else [f"swap_{swap}"]
    counts = {"n_flow_independent": 2, "n_flow_walk": 5}
    settings = SequenceSettings(swap=swap, swap_scheme="random_pairs", **counts)
    kernels = default_kernels(potential, flow, LADDER, settings=settings)
    assert [entry.kernel.name for entry in kernels] == ["flow_independent", "flow_walk", *names]
    assert {(entry.interval, entry.repeats) for entry in kernels} == {(1, 1)}
    assert [entry.kernel.settings().get("n_steps") for entry in kernels[:2]] == [2, 5]
    for entry in kernels[2:]:
        assert entry.kernel.settings()["scheme"] == "random_pairs"
    settings = SequenceSettings(swap=swap, n_flow_independent=0, n_flow_walk=0)
    kernels = default_kernels(potential, flow, LADDER, settings=settings)
    assert [entry.kernel.name for entry in kernels] == names
    one_rung = default_kernels(potential, flow, [300.0], settings=SequenceSettings(swap=swap))
    assert one_rung[2:] == []


def test_the_kind_of_swap_is_checked():
    with pytest.raises(ValueError, match=r"swap: expected one of .*, got 'neural'"):
        SequenceSettings(swap="neural")


def test_same_seed_same_samples(make):
    results = [make(seed=seed).run(3, collect=True, progress=False) for seed in (5, 5, 6)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_tuning_reaches_the_target_and_freezes(make, tree):
    sampler = make(n_walkers=50, local_interval=0)
    generator = seeded_generator(7)
    starts = [tree.sample(50, temperature, generator) for temperature in LADDER]
    sampler.set_positions(torch.stack(starts, dim=1))
    sigma = sampler.tune(80, target_acceptance=0.4)["flow_walk"]
    assert len(set(sigma.tolist())) == 3
    sampler.run(20, progress=False)
    acceptance = sampler.totals["flow_walk"].acceptance
    assert bool(((acceptance - 0.4).abs() < 0.06).all()), acceptance
    assert torch.equal(sampler.kernels["flow_walk"].sigma, sigma)
    with pytest.raises(ValueError, match="target_acceptance: expected a number between"):
        sampler.tune(10, target_acceptance=1.0)


def test_tuning_for_no_iterations_changes_nothing(make):
    sampler = make()
    before = sampler.kernels["flow_walk"].sigma.clone()
    assert torch.equal(sampler.tune(0)["flow_walk"], before)
    assert sampler.state.iteration == 0
    with pytest.raises(ValueError, match="n_iterations: expected an integer of at least 0, got -1"):
        sampler.tune(-1)


@pytest.mark.parametrize("scheme", ["even_odd", "random_pairs"])
def test_one_rung_has_nothing_to_swap(make, scheme):
    swap = PlainSwap([300.0], KB, scheme)
    state, generator = make(ladder=(300.0,)).state, seeded_generator(0)
    for _ in range(3):
        after, info = swap(state, generator)
        assert info.accepted.shape == info.proposed.shape == swap.counts_shape
        assert int(info.proposed.sum()) == 0
        assert torch.equal(after.x, state.x)


def test_walkers_start_at_quantities(make):
    plain, sampler = make(), make()
    x, v = plain.state.x, plain.state.velocities
    metre_per_second = unit.meter / unit.second
    sampler.set_positions(10 * x.numpy() * unit.angstrom, 1000 * v.numpy() * metre_per_second)
    torch.testing.assert_close(sampler.state.x, x)
    torch.testing.assert_close(sampler.state.velocities, v)
    with pytest.raises(TypeError, match="velocities: expected a quantity in nanometer/picosecond"):
        sampler.set_positions(x, v.numpy() * unit.nanometer)


def test_a_sampler_frees_its_contexts(make):
    with make() as sampler:
        sampler.run(1, progress=False)
    sampler.close()
    with pytest.raises(RuntimeError, match="local: this kernel of Langevin dynamics is closed"):
        sampler.run(2, progress=False)


def test_flow_independence_alone_is_a_sampler(tree_molecule, potential, flow):
    kernels = [FlowIndependence(flow, potential, [500.0])]
    sampler = ParallelTempering(tree_molecule, flow, [500.0], 3, kernels, potential, 1)
    sampler.run(2, progress=False)
    assert list(sampler.totals) == ["flow_independent"]
