"""OpenMMPotential: agreement with a Context, autograd, non-finite input, lifetimes."""

import logging
import multiprocessing
import os
import pickle
import warnings
from contextlib import ExitStack

import numpy as np
import openmm
import pytest
import torch

from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.potentials.platforms import available_platforms
from openmm_tsf.units import KB
from tests.support import torch_cases as cases

PLATFORMS = [name for name in ("Reference", "CPU") if name in available_platforms()]


@pytest.fixture(scope="module")
def potential(molecule):
    with OpenMMPotential(molecule.system, "Reference", n_contexts=1) as shared:
        yield shared


@pytest.fixture
def new(molecule):
    """Opens potentials of the molecule, by default with one Context on the Reference platform."""
    with ExitStack() as stack:

        def open_potential(platform: str = "Reference", n_contexts: int = 1) -> OpenMMPotential:
            return stack.enter_context(OpenMMPotential(molecule.system, platform, None, n_contexts))

        yield open_potential


@pytest.mark.parametrize("platform", PLATFORMS)
def test_agrees_with_a_context(molecule, new, platform):
    x = cases.conformations(molecule, 5)
    energies, forces = cases.context_values(
        cases.reference_context(molecule.system, platform=platform), x
    )
    potential = new(platform)
    got_energies, got_forces = potential.energy_and_forces(x)
    alone = potential.energy(x)
    rtol, atol = (0.0, 0.0) if platform == "Reference" else (1e-5, 0.01)
    for got, expected in ((got_energies, energies), (got_forces, forces), (alone, energies)):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert not got_energies.requires_grad
    assert potential.boltzmann_constant == KB
    assert potential.event_shape == (22, 3)


def test_gradient_is_minus_the_force(molecule, potential):
    x = cases.conformations(molecule, 3).requires_grad_()
    _, forces = potential.energy_and_forces(x.detach())
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * potential.energy(x)).sum(), x)
    torch.testing.assert_close(gradient, -weights[:, None, None] * forces, rtol=0.0, atol=0.0)


def test_gradient_is_the_finite_difference(molecule, potential):
    x = cases.conformations(molecule, 1)[0]
    directions = torch.from_numpy(np.random.default_rng(1).normal(size=(8, molecule.n_atoms, 3)))
    step = 1e-6
    ends = torch.stack([x + step * directions, x - step * directions])
    up, down = potential.energy(ends.flatten(0, 1)).unflatten(0, (2, 8))
    leaf = x[None].clone().requires_grad_()
    potential.energy(leaf).sum().backward()
    along = (directions * leaf.grad).sum(dim=(1, 2))
    torch.testing.assert_close((up - down) / (2 * step), along, rtol=1e-5, atol=1e-3)


def test_second_derivative_raises(molecule, potential):
    x = cases.conformations(molecule, 2).requires_grad_()
    for weight in (1.0, 2.0):
        weights = torch.full((2,), weight, dtype=torch.float64, requires_grad=True)
        energies = weights * potential.energy(x)
        (gradient,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            gradient.square().sum().backward()
    # A constant weight must not turn the second derivative into a silent zero.
    (gradient,) = torch.autograd.grad(potential.energy(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad((gradient**2).sum() + (x**2).sum(), x)


def test_forces_are_computed_only_for_a_gradient(molecule, new, monkeypatch):
    with_forces = []
    original = openmm.Context.getState

    def spy(self: openmm.Context, **options: bool) -> openmm.State:
        with_forces.append(options.get("forces", False))
        return original(self, **options)

    potential = new()
    monkeypatch.setattr(openmm.Context, "getState", spy)
    x = cases.conformations(molecule, 1)
    potential.energy(x)
    with torch.no_grad():
        potential.energy(x.requires_grad_())
    assert with_forces == [False, False]
    potential.energy(x)
    assert with_forces == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_follows_the_input(molecule, potential, dtype):
    x = torch.tensor(molecule.positions)[None].to(dtype)
    exact, exact_forces = potential.energy_and_forces(x.double())
    leaf = x.clone().requires_grad_()
    energies = potential.energy(leaf)
    energies.sum().backward()
    assert energies.dtype == dtype
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(energies, exact.to(dtype))
    torch.testing.assert_close(leaf.grad, -exact_forces.to(dtype))


def test_overflow_of_the_result_is_not_finite(molecule, new):
    x = 100.0 * cases.conformations(molecule, 1)  # stretched bonds: about 1e9 kJ/mol
    potential = new()
    assert potential.energy(x).isfinite().all()
    energies, forces = potential.energy_and_forces(x.half())
    assert energies.tolist() == [torch.inf]
    assert not forces.any()
    assert potential.n_non_finite == 1


def test_non_contiguous_input_is_read_right(molecule, potential):
    x = cases.conformations(molecule, 4)
    strided = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)[::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(potential.energy(strided), potential.energy(x)[::2], rtol=0, atol=0)


@pytest.mark.parametrize("n_contexts", [1, 2])
def test_empty_batch(new, n_contexts):
    x = torch.empty(0, 22, 3, dtype=torch.float32, requires_grad=True)
    potential = new(n_contexts=n_contexts)
    energies, forces = potential.energy_and_forces(x)
    assert (energies.shape, forces.shape, energies.dtype) == ((0,), (0, 22, 3), torch.float32)
    potential.energy(x).sum().backward()
    assert x.grad.shape == (0, 22, 3)
    assert potential.n_evaluations == 0


@pytest.mark.parametrize("platform", PLATFORMS)
def test_non_finite_rows_are_the_same_on_every_platform(molecule, new, platform):
    x, bad = cases.degenerate(cases.conformations(molecule, 1)[0])
    potential = new(platform)
    cases.check_degenerate(potential, x, bad)
    assert (potential.n_evaluations, potential.n_non_finite) == (24, 18)
    assert potential.energy(x[:1]).isfinite().all()


class LimitedContext(openmm.Context):
    """Raises a device error beyond 5 nm; always once `lost`."""

    lost = False

    def setPositions(self, positions: np.ndarray) -> None:
        if self.lost or np.abs(positions).max() > 5.0:
            raise openmm.OpenMMException("Error launching kernel: device unavailable")
        super().setPositions(positions)


def test_exceptions_are_infinite_only_if_the_conformation_is_at_fault(molecule, new, monkeypatch):
    monkeypatch.setattr(openmm, "Context", LimitedContext)
    good, potential = cases.conformations(molecule, 1), new()
    with pytest.raises(openmm.OpenMMException, match="device unavailable"):
        potential.energy(good + 10.0)  # no conformation has worked yet
    assert potential.energy(torch.cat([good, good + 10.0])).isfinite().tolist() == [True, False]
    assert potential.n_non_finite == 1
    monkeypatch.setattr(LimitedContext, "lost", True)
    with pytest.raises(openmm.OpenMMException, match="device unavailable"):
        potential.energy(good)


def test_two_contexts_equal_one(molecule, new):
    x = cases.conformations(molecule, 67)
    x[5] = torch.nan
    one, two = new(), new(n_contexts=2)
    for rows in (1, 2, 3, 67):
        expected, got = one.energy_and_forces(x[:rows]), two.energy_and_forces(x[:rows])
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0)
    assert (one.n_evaluations, one.n_non_finite) == (two.n_evaluations, two.n_non_finite)
    assert two.n_contexts == 2


def test_an_exception_in_a_thread_is_raised(molecule, new, monkeypatch):
    x, potential = cases.conformations(molecule, 40), new(n_contexts=2)
    potential.energy(x)
    monkeypatch.setattr(openmm.State, "getPotentialEnergy", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        potential.energy(x)
    monkeypatch.undo()
    assert potential.energy(x).isfinite().all()


def test_pickle_copies_the_system_and_the_choice(molecule):
    x = cases.conformations(molecule, 2)
    with OpenMMPotential(molecule.system, "CPU", {"Threads": 1}, n_contexts=2) as potential:
        expected = potential.energy(x)
        with pickle.loads(pickle.dumps(potential)) as copy:
            assert (copy.n_evaluations, copy.n_contexts) == (0, 2)
            assert (copy.platform_name, copy.platform_properties) == ("CPU", {"Threads": "1"})
            torch.testing.assert_close(copy.energy(x), expected)
    with pytest.raises(RuntimeError, match="closed"):
        pickle.dumps(potential)


def _energies_in_child(potential, x):
    with potential:
        return potential.energy(torch.from_numpy(x)).tolist()


def test_spawned_process(molecule, potential):
    x = cases.conformations(molecule, 2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(_energies_in_child, (potential, x.numpy()))
        pool.close()
        pool.join()
    assert got == potential.energy(x).tolist()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_child_gets_an_error_and_ends(molecule):
    x = cases.conformations(molecule, 1)
    potential = OpenMMPotential(molecule.system, "CPU", n_contexts=2)
    potential.energy(x)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        child = os.fork()
    if child == 0:
        try:
            potential.energy(x)
            sender.send("no error")
        except RuntimeError as error:
            potential.close()
            del potential  # must not wait for the parent's threads
            sender.send(str(error))
        finally:
            os._exit(0)
    assert receiver.poll(10.0), "the forked child hangs"
    message = receiver.recv()
    os.waitpid(child, 0)
    assert "spawn" in message
    assert str(child) in message
    assert potential.energy(x).isfinite().all()
    potential.close()


def test_closing(molecule):
    x, platform = cases.conformations(molecule, 1), openmm.Platform.getPlatform("Reference")
    with OpenMMPotential(molecule.system, platform, n_contexts=2) as potential:
        assert potential.platform_name == "Reference"
        context = potential.make_context(openmm.VerletIntegrator(0.001))
        potential.energy(x)
    potential.close()
    for use in (
        lambda: potential.energy(x),
        lambda: potential.energy_and_forces(x),
        lambda: potential.make_context(openmm.VerletIntegrator(0.001)),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    assert potential.n_evaluations == 1
    assert "closed" in repr(potential)
    context.setPositions(x[0].numpy())
    context.getIntegrator().step(1)


def test_make_context_has_the_same_platform(molecule):
    with OpenMMPotential(molecule.system, "CPU", {"Threads": "1"}, n_contexts=1) as potential:
        context = potential.make_context(openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.001))
        platform = context.getPlatform()
        assert platform.getName() == "CPU"
        assert platform.getPropertyValue(context, "Threads") == "1"
        with pytest.raises(TypeError, match="integrator: expected"):
            potential.make_context("verlet")


def test_the_system_is_copied(molecule):
    x = cases.conformations(molecule, 1)
    system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(molecule.system))
    before = openmm.XmlSerializer.serialize(system)
    with OpenMMPotential(system, "Reference", n_contexts=1) as potential:
        expected = potential.energy(x)
        context = potential.make_context(openmm.VerletIntegrator(0.001))
        context.setPositions(x[0].numpy())
        assert openmm.XmlSerializer.serialize(system) == before
        for index in reversed(range(system.getNumForces())):
            system.removeForce(index)
        torch.testing.assert_close(potential.energy(x), expected, rtol=0.0, atol=0.0)
        torch.testing.assert_close(pickle.loads(pickle.dumps(potential)).energy(x), expected)


def test_measured_choice_is_readable_and_logged(molecule, caplog):
    caplog.set_level(logging.INFO, logger="openmm_tsf")
    with OpenMMPotential(molecule.system) as potential:
        assert potential.platform_name in available_platforms()
        assert potential.n_contexts >= 1
        assert potential.energy(cases.conformations(molecule, 3)).isfinite().all()
        assert potential.n_evaluations == 3  # the measurement is not counted
        choice = potential.platform_name, potential.platform_properties, potential.n_contexts
        with OpenMMPotential(molecule.system, *choice) as again:
            assert again.platform_properties == potential.platform_properties
    text = caplog.text
    assert all(name in text for name in PLATFORMS)
    assert f"chose {potential.platform_name}" in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("Quantum",), ValueError, r"platform: .*Reference.*'Quantum'"),
        ((3,), TypeError, "platform: expected a name"),
        (("CPU", {"Cores": "1"}), ValueError, r"platform_properties: .*Threads.*'Cores'"),
        (("CPU", {"Threads": 1.5}), TypeError, "str, int or bool for Threads"),
        (("CPU", {"Threads": "all"}), ValueError, "positive number of Threads"),
        (("CPU", "Threads"), TypeError, "expected a mapping"),
        ((None, {"Threads": "1"}), ValueError, "expected a platform to go with"),
        ((None, None, 0), ValueError, "n_contexts: expected an integer of at least 1, got 0"),
        ((None, None, True), ValueError, "n_contexts: expected an integer"),
    ],
)
def test_wrong_options(molecule, options, error, message):
    with pytest.raises(error, match=message):
        OpenMMPotential(molecule.system, *options)


def test_a_periodic_system():
    force = openmm.NonbondedForce()
    force.addParticle(0.0, 0.1, 0.0)
    force.setNonbondedMethod(openmm.NonbondedForce.PME)
    with pytest.raises(ValueError, match="no periodic box, but NonbondedForce"):
        OpenMMPotential(cases.system_of(force, n=1))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        *((torch.zeros(*shape), ValueError) for shape in ((22, 3), (1, 21, 3), (1, 66))),
        *((x, TypeError) for x in (torch.zeros(1, 22, 3, dtype=torch.int64), np.zeros((1, 22, 3)))),
    ],
)
def test_wrong_positions(potential, x, error):
    for method in (potential.energy, potential.energy_and_forces):
        with pytest.raises(error, match="x: expected"):
            method(x)
