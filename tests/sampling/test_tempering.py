"""The loop: doors, tuning, schedule, interrupts, and resuming bit by bit."""

import math
import shutil
import signal

import numpy as np
import openmm.unit as unit
import pytest
import torch

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.metropolis import metropolis
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling import recorder as recording
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    PlainSwap,
    Scheduled,
    default_kernels,
)
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB
from tests.support.exact_tree import POSITIONS, ExactTree

LADDER = (300.0, 420.0, 600.0)


@pytest.fixture(scope="module")
def tree():
    return ExactTree()


@pytest.fixture(scope="module")
def molecule(tree):
    return MolecularSystem(tree.system(), tree.topology, POSITIONS)


@pytest.fixture(scope="module")
def potential(tree):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=1) as potential:
        yield potential


@pytest.fixture(scope="module")
def flow(tree):
    return tree.flow("tsf", "volume", 0.3)


@pytest.fixture
def make(molecule, potential, flow, tree):
    """A sampler with all kinds of kernels; two with the same seed do the same."""

    def make(seed=3, n_walkers=4, temperatures=LADDER, **settings):
        settings = {"local_interval": 2, **settings}
        kernels = default_kernels(potential, flow, temperatures, molecule.masses, **settings)
        return ParallelTempering(
            molecule, flow, temperatures, n_walkers, kernels, potential, seed=seed
        )

    return make


# -- the Metropolis rule -----------------------------------------------------------------------


def test_metropolis_takes_extremes():
    current = torch.zeros(7, dtype=torch.float64)
    inf, nan = float("inf"), float("nan")
    proposed = torch.tensor([1e300, -1e300, nan, inf, -inf, 0.0, 800.0], dtype=torch.float64)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        accepted, non_finite = metropolis(current, proposed, generator)
        assert accepted.tolist() == [True, False, False, False, False, True, True]
        assert non_finite.tolist() == [False, False, True, True, True, False, False]


def test_metropolis_has_the_right_probability():
    n = 100_000
    current = torch.full((n,), 3.0, dtype=torch.float64)
    accepted, _ = metropolis(current, current - 0.7, torch.Generator().manual_seed(1))
    p = np.exp(-0.7)
    assert abs(float(accepted.double().mean()) - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_metropolis_draws_the_same_numbers_whatever_the_values():
    after = []
    for value in (0.0, float("nan")):
        generator = torch.Generator().manual_seed(2)
        metropolis(torch.zeros(5), torch.full((5,), value), generator)
        after.append(generator.get_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_metropolis_refuses_a_walker_that_cannot_be_there(bad):
    current = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match=r"current: expected finite .* row 1"):
        metropolis(current, torch.zeros(2), torch.Generator())


def test_metropolis_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="proposed: expected log-weights of shape"):
        metropolis(torch.zeros(3), torch.zeros(3, 1), torch.Generator())


# -- doors -------------------------------------------------------------------------------------


def test_doors(molecule, potential, flow, tree):
    def sampler(ladder=LADDER, n_walkers=2, **more):
        return ParallelTempering(molecule, flow, ladder, n_walkers, potential=potential, **more)

    for ladder in ([300, 300], [600, 300], []):
        with pytest.raises(ValueError, match="temperatures"):
            sampler(ladder)
    for n_walkers in (0, 1.5, True):
        with pytest.raises(ValueError, match="n_walkers: expected an integer"):
            sampler(n_walkers=n_walkers)
    walk = FlowWalk(flow, potential, LADDER)
    with pytest.raises(ValueError, match="kernels: flow_walk was made for the temperatures"):
        sampler((300.0, 600.0), kernels=[walk])
    with pytest.raises(ValueError, match="distinct names, got 'flow_walk' twice"):
        sampler(kernels=[walk, FlowWalk(flow, potential, LADDER)])
    with pytest.raises(ValueError, match="kernels: expected at least one"):
        sampler(kernels=[])
    with pytest.raises(TypeError, match="kernels: expected kernels, got str"):
        sampler(kernels=["flow_walk"])
    with pytest.raises(ValueError, match="interval: expected an integer"):
        Scheduled(walk, interval=0)
    with pytest.raises(ValueError, match="potential: expected one where molecule is None"):
        ParallelTempering(None, flow, LADDER, 2)
    with pytest.raises(ValueError, match=r"flow: expected configurations of shape \(7, 3\)"):
        ParallelTempering(
            molecule, TemperatureSteerableFlow(3, 2, 1, (4,)), LADDER, 2, potential=potential
        )
    with pytest.raises(ValueError, match="scheme: expected one of"):
        PlainSwap(LADDER, KB, "neighbours")
    with pytest.raises(ValueError, match="sigma: expected"):
        FlowWalk(flow, potential, LADDER, [0.1, 0.2])
    with pytest.raises(ValueError, match="sigma: expected positive"):
        FlowWalk(flow, potential, LADDER, -0.1)
    assert ParallelTempering(None, flow, LADDER, 2, [walk], potential).seed >= 0


@pytest.mark.parametrize("constant", [0, -1, float("nan"), float("inf"), "a", None])
def test_a_boltzmann_constant_is_positive(constant):
    with pytest.raises(ValueError, match="boltzmann_constant: expected a finite, positive number"):
        PlainSwap(LADDER, constant)


def test_kernels_of_another_boltzmann_constant_are_refused(molecule, potential, flow):
    for kernel in (PlainSwap(LADDER, 0.001), PlainSwap(LADDER, KB / 4.184)):
        with pytest.raises(ValueError, match="swap_plain was made for the Boltzmann constant"):
            ParallelTempering(molecule, flow, LADDER, 2, [kernel], potential)
    toy = DoubleWell(0.1, -1.0, 0.3)
    walk = FlowWalk(TemperatureSteerableFlow(1, 2, 1, (4,)), toy, LADDER)
    walk.potential = potential  # k_B is compared through the potential, too
    with pytest.raises(ValueError, match="flow_walk was made for the Boltzmann constant"):
        ParallelTempering(None, walk.flow, LADDER, 2, [walk], toy)


def test_kernels_of_another_energy_are_refused():
    flow = TemperatureSteerableFlow(1, 2, 1, (4,))
    own, other = DoubleWell(0.1, -1.0, 0.3), DoubleWell(0.1, -1.1, 0.3)
    walk = FlowWalk(flow, other, [1.0, 2.0])
    sampler = ParallelTempering(None, flow, [1.0, 2.0], 5, [walk], own, seed=1)
    with pytest.raises(ValueError, match="the potential of flow_walk gives walker 0 the energy"):
        sampler.set_positions(torch.ones(5, 2, 1))
    with pytest.raises(RuntimeError, match="call set_positions"):
        sampler.run(1, progress=False)
    walk.potential = DoubleWell(0.1, -1.0, 0.3)  # another object for the same energy
    sampler.set_positions(torch.ones(5, 2, 1))
    sampler.run(1, progress=False)


def test_the_flows_inside_kernels_are_the_runs(molecule, potential, flow, tree, tmp_path):
    def sampler(inner):
        walk = FlowWalk(inner, potential, LADDER)
        return ParallelTempering(molecule, flow, LADDER, 2, [walk], potential, seed=1)

    first = sampler(tree.flow("tsf", "volume", 0.2))
    first.run(1, output=tmp_path / "run", progress=False)
    sampler(tree.flow("tsf", "volume", 0.2)).resume(tmp_path / "run")
    with pytest.raises(ValueError, match="expected the kernel_flows that the run was started"):
        sampler(flow).resume(tmp_path / "run")
    with torch.no_grad():
        next(first.kernels["flow_walk"].flow.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="output: the kernel_flows changed"):
        first.run(1, output=tmp_path / "run", progress=False)


def test_a_flow_of_another_molecule_is_refused(molecule, potential, tree):
    other = tree.flow("tsf", "volume", 0.1)
    other.fingerprint = "of another"
    with pytest.raises(ValueError, match="flow: it was made for another System or Topology"):
        ParallelTempering(molecule, other, LADDER, 2, potential=potential)


def test_walkers_must_start_well(make, tree):
    sampler = make(n_walkers=2)
    generator = torch.Generator().manual_seed(4)
    good = tree.sample(6, 300.0, generator).reshape(2, 3, 7, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, 3, 7, 3\)"):
        sampler.set_positions(good[0])
    bad = good.clone()
    bad[1, 2, 4, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 6 .* non-finite energy.*walker 1 at 600.00 K"):
        sampler.set_positions(bad)
    mirrored = good.clone()
    mirrored[0, 1, :, 0] *= -1
    with pytest.raises(ValueError, match=r"outside the flow's domain .*walker 0 at 420.00 K"):
        sampler.set_positions(mirrored)
    with pytest.raises(ValueError, match=r"velocities: expected shape \(2, 3, 7, 3\)"):
        sampler.set_positions(good, good[:1])
    sampler.set_positions(good)
    assert torch.equal(sampler.state.x, good)
    assert sampler.state.replica.tolist() == [[0, 1, 2]] * 2


def test_default_start_and_one_rung(make, tree):
    sampler = make(temperatures=(450.0,), n_walkers=120)
    state = sampler.state
    assert bool((state.energy == state.energy[0, 0]).all())
    assert float(state.energy[0, 0]) < 30.0
    kinetic = tree.masses[:, None] * state.velocities[:, 0] ** 2 / (KB * 450.0)
    assert abs(float(kinetic.mean()) - 1) < 4 * np.sqrt(2 / kinetic.numel())
    assert sampler.kernels.keys() == {"flow_independent", "flow_walk", "local"}
    sampler.run(2, progress=False)
    assert sampler.state.iteration == 2


def test_toy_potentials_need_a_start():
    potential = DoubleWell(0.1, -1.0, 0.3)
    flow = TemperatureSteerableFlow(1, 2, 1, (4,))
    sampler = ParallelTempering(None, flow, [1.0, 2.0], 5, potential=potential, seed=1)
    with pytest.raises(RuntimeError, match="call set_positions"):
        sampler.run(1, progress=False)
    sampler.set_positions(torch.zeros(5, 2, 1))
    assert sampler.run(4, save_interval=2, collect=True, progress=False).shape == (2, 5, 2, 1)
    assert sampler.run(0, collect=True, progress=False).shape == (0, 5, 2, 1)


# -- the loop ----------------------------------------------------------------------------------


def test_schedule_counts_and_reporters(make, flow, potential):
    sampler = make()
    seen = []

    class Reporter:
        interval = 3

        def __call__(self, owner, state):
            assert owner is sampler
            seen.append(state.iteration)

    sampler.reporters.append(Reporter())
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
    assert totals["swap_steered"].proposed.tolist() == [12, 16]  # the other way round
    assert potential.n_evaluations - before - 12 == sum(t.n_evaluations for t in totals.values())
    assert sampler.exact
    sampler.reporters.append(lambda owner, state: None)
    with pytest.raises(TypeError, match="reporters: expected an interval"):
        sampler.run(1, progress=False)


@pytest.mark.parametrize(
    ("swap", "names"),
    [("plain", ["swap_plain"]), ("steered", ["swap_steered"]),
     ("both", ["swap_plain", "swap_steered"])],
)  # fmt: skip
def test_the_default_sequence(potential, flow, swap, names):
    kernels = default_kernels(
        potential, flow, LADDER, swap=swap, n_flow_independent=2, n_flow_walk=5,
        swap_scheme="random_pairs",
    )  # fmt: skip
    assert [entry.kernel.name for entry in kernels] == ["flow_independent", "flow_walk", *names]
    assert {(entry.interval, entry.repeats) for entry in kernels} == {(1, 1)}
    assert [entry.kernel.settings().get("n_steps") for entry in kernels[:2]] == [2, 5]
    for entry in kernels[2:]:
        assert entry.kernel.settings()["scheme"] == "random_pairs"
    kernels = default_kernels(
        potential, flow, LADDER, swap=swap, n_flow_independent=0, n_flow_walk=0
    )
    assert [entry.kernel.name for entry in kernels] == names
    assert default_kernels(potential, flow, [300.0], swap=swap)[2:] == []


def test_the_kind_of_swap_is_checked(potential, flow):
    with pytest.raises(ValueError, match=r"swap: expected one of .*, got 'neural'"):
        default_kernels(potential, flow, LADDER, swap="neural")


def test_same_seed_same_samples(make):
    results = [make(seed=seed).run(3, collect=True, progress=False) for seed in (5, 5, 6)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_tuning_reaches_the_target_and_freezes(make, tree):
    sampler = make(n_walkers=50, local_interval=0)
    generator = torch.Generator().manual_seed(7)
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


# -- interruptions and resuming ----------------------------------------------------------------


def everything(path):
    """All numbers of a run, joined over its segments, and the DCDs' frames as bytes."""
    parts = [dict(np.load(file)) for file in sorted((path / "segments").iterdir())]
    joined = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("energy", "replica", "iteration", "dihedrals")
    }
    for name in parts[0]:
        if name.startswith(("accepted_", "proposed_")) or name in (
            "rejected_non_finite",
            "mirror_images",
            "n_evaluations",
        ):
            joined[name] = sum(part[name] for part in parts)
    for dcd in sorted(path.glob("*.dcd")):
        joined[dcd.name] = np.frombuffer(dcd.read_bytes(), dtype=np.uint8)
    return joined


def assert_same_run(first, second):
    one, two = everything(first), everything(second)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


def resumed(make, path):
    return make(seed=99).resume(path)  # nothing but the checkpoint decides


@pytest.fixture
def reference(make, tmp_path):
    """Tuned, then seven iterations in one go."""
    sampler = make()
    sampler.tune(4)
    sampler.run(7, output=tmp_path / "whole", checkpoint_interval=3, progress=False)
    return tmp_path / "whole"


def test_resume_is_the_same_bit_by_bit(make, tmp_path, reference):
    path = tmp_path / "cut"
    sampler = make()
    sampler.tune(4)
    sampler.run(4, output=path, checkpoint_interval=3, progress=False)
    again = resumed(make, path)
    assert again.seed == 3
    assert again.state.iteration == 8
    again.run(3, output=path, checkpoint_interval=2, progress=False)
    assert_same_run(reference, path)


def test_a_killed_run_goes_on_from_its_checkpoint(make, tmp_path, reference):
    path = tmp_path / "killed"
    sampler = make()
    sampler.tune(4)
    sampler.run(2, output=path, progress=False)
    shutil.copy(path / "checkpoint.pt", tmp_path / "saved.pt")
    sampler.run(2, output=path, progress=False)
    # As if the process had died between the second segment and its checkpoint, in mid-frame.
    shutil.copy(tmp_path / "saved.pt", path / "checkpoint.pt")
    (path / "segments" / "segment_000002.npz").write_bytes(b"half")
    with open(path / "T420.00K.dcd", "ab") as file:
        file.write(b"half a frame")
    resumed(make, path).run(5, output=path, progress=False)
    assert_same_run(reference, path)


def test_a_run_killed_before_its_first_segment_can_resume(make, tmp_path, reference):
    path = tmp_path / "early"
    sampler = make()
    sampler.tune(4)
    sampler.run(0, output=path, progress=False)
    resumed(make, path).run(7, output=path, progress=False)
    assert_same_run(reference, path)


def test_checkpoints_by_the_clock_change_nothing(make, tmp_path, reference, monkeypatch):
    path = tmp_path / "slow"
    monkeypatch.setattr(recording, "CHECKPOINT_SHARE", math.inf)
    sampler = make()
    sampler.tune(4)
    sampler.run(4, output=path, checkpoint_seconds=0.0, progress=False)
    assert len(list((path / "segments").iterdir())) == 4
    resumed(make, path).run(3, output=path, progress=False)
    assert_same_run(reference, path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_everything_and_are_raised(make, tmp_path, reference, number):
    path = tmp_path / "interrupted"
    sampler = make()
    sampler.tune(4)

    class PressCtrlC:
        interval = 7

        def __call__(self, owner, state):
            signal.raise_signal(number)

    sampler.reporters.append(PressCtrlC())
    with pytest.raises(KeyboardInterrupt):
        sampler.run(50, output=path, progress=False)
    assert sampler.state.iteration == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(everything(path)["iteration"]) == 3
    resumed(make, path).run(4, output=path, progress=False)
    assert_same_run(reference, path)


def test_an_error_in_a_kernel_costs_only_its_iteration(make, tmp_path, reference):
    path = tmp_path / "failed"
    sampler = make()
    sampler.tune(4)
    place = [entry.kernel.name for entry in sampler.schedule].index("swap_plain")
    swap = sampler.schedule[place].kernel
    calls = []

    class Failing:
        def __getattr__(self, name):
            return getattr(swap, name)

        def __call__(self, state, generator):
            calls.append(1)
            new = swap(state, generator)
            if len(calls) == 4:
                raise MemoryError("out of memory")
            return new

    sampler.schedule[place] = Scheduled(Failing())
    with pytest.raises(MemoryError):
        sampler.run(7, output=path, progress=False)
    assert sampler.state.iteration == 7
    sampler.schedule[place] = Scheduled(swap)
    sampler.run(4, output=path, progress=False)  # the same object can go on, too
    assert_same_run(reference, path)


def test_resume_refuses_another_sampler(make, molecule, potential, flow, tree, reference):
    with pytest.raises(ValueError, match="expected the run's n_walkers, 4, got 5"):
        make(n_walkers=5).resume(reference)
    with pytest.raises(ValueError, match="expected the run's temperatures"):
        make(temperatures=(300.0, 600.0)).resume(reference)
    with pytest.raises(ValueError, match="expected the kernels that the run was started with"):
        make(n_flow_walk=3).resume(reference)
    other = tree.flow("tsf", "volume", 0.2)
    kernels = default_kernels(potential, other, LADDER, molecule.masses, local_interval=2)
    with pytest.raises(ValueError, match="expected the flow that the run was started with"):
        ParallelTempering(molecule, other, LADDER, 4, kernels, potential).resume(reference)
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        make().resume(reference / "nowhere")
    with pytest.raises(ValueError, match="save_interval: this run was started with 1, got 2"):
        make().resume(reference).run(1, output=reference, save_interval=2, progress=False)


def test_resume_warns_of_another_platform(make, molecule, flow, tree, reference):
    with OpenMMPotential(tree.system(), platform="Reference", n_contexts=2) as potential:
        kernels = default_kernels(potential, flow, LADDER, molecule.masses, local_interval=2)
        sampler = ParallelTempering(molecule, flow, LADDER, 4, kernels, potential)
        with pytest.warns(UserWarning, match="not the same bit by bit"):
            sampler.resume(reference)
        kernels[2].kernel.close()


def test_a_changed_sampler_does_not_append(make, molecule, potential, tree, tmp_path):
    path = tmp_path / "changed"
    sampler = make()
    sampler.run(2, output=path, progress=False)
    sampler.run(1, output=path, progress=False)  # unchanged: goes on
    sampler.tune(0)
    sampler.run(1, output=path, progress=False)
    sigma = sampler.kernels["flow_walk"].sigma.clone()
    sampler.tune(3)
    with pytest.raises(ValueError, match=r"output: the sigma changed since .* write to a new one"):
        sampler.run(1, output=path, progress=False)
    sampler.kernels["flow_walk"].sigma = sigma
    sampler.run(1, output=path, progress=False)
    again = make().resume(path)
    again.tune(3)
    with pytest.raises(ValueError, match="output: the sigma changed"):
        again.run(1, output=path, progress=False)

    trained = tree.flow("tsf", "volume", 0.3)
    kernels = default_kernels(potential, trained, LADDER, local_interval=0)
    sampler = ParallelTempering(molecule, trained, LADDER, 2, kernels, potential, seed=1)
    sampler.run(1, output=tmp_path / "trained", progress=False)
    with torch.no_grad():
        next(trained.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="output: the flow changed"):
        sampler.run(1, output=tmp_path / "trained", progress=False)
    sampler.run(1, output=tmp_path / "new", progress=False)


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
    state, generator = make(temperatures=(300.0,)).state, torch.Generator().manual_seed(0)
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
    with pytest.raises(RuntimeError, match="local: this Langevin leg is closed"):
        sampler.run(2, progress=False)


def test_flow_independence_alone_is_a_sampler(molecule, potential, flow):
    sampler = ParallelTempering(
        molecule, flow, [500.0], 3, [FlowIndependence(flow, potential, [500.0])], potential, 1
    )
    sampler.run(2, progress=False)
    assert list(sampler.totals) == ["flow_independent"]


def test_a_damaged_run_is_refused(make, reference):
    (reference / "segments" / "segment_000001.npz").unlink()
    with pytest.raises(ValueError, match="segment 1 is missing"):
        make().resume(reference)
    writer = RunWriter(reference, make().molecule, LADDER, 4)
    with pytest.raises(ValueError, match="expected 1000 frames, the file is shorter"):
        writer.dcds[0].cut_back(1000)
