"""TorchPotential in inference mode, autocast and forks, with zeros, big Systems, bad arguments."""

import os
import pickle

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor

from openmm_tsf.potentials import OpenMMPotential, TorchPotential
from openmm_tsf.potentials.energy_function import SystemEnergy
from openmm_tsf.potentials.expressions.parser import ExpressionError
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.pairs import AllPairs
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.threads import torch_threads
from tests.support.torch_cases import system_of
from tests.support.torch_zoo import scaled_bond


def chain(n_atoms: int, length: float = 0.1) -> openmm.System:
    """Particles in a row, bonded."""
    bonds = openmm.HarmonicBondForce()
    for i in range(1, n_atoms):
        bonds.addBond(i - 1, i, length, 1000.0)
    return system_of(bonds, n=n_atoms)


def scattered(n: int, n_atoms: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, 0.2, (n, n_atoms, 3)))


@pytest.mark.parametrize("system", [chain(3), scaled_bond(1.0), alanine_dipeptide().system])
def test_inference_mode(system):
    n_atoms = system.getNumParticles()
    potential = TorchPotential.from_system(system)
    x = scattered(40, n_atoms)
    energies, forces = potential.energy_and_forces(x)
    for threads in (1, 2):
        with torch_threads(threads), torch.inference_mode():
            for given in (x, x.clone()):
                got = potential.energy_and_forces(given)
                assert all(map(torch.equal, got, (energies, forces)))
                torch.testing.assert_close(potential.energy(given), energies)
            inference_tensor = x.clone()
    assert torch.equal(potential.energy_and_forces(inference_tensor)[1], forces)
    with torch.inference_mode():
        TorchPotential.from_system(system)  # with its check


def test_autocast_does_not_cost_digits():
    molecule = alanine_dipeptide()
    potential = TorchPotential.from_system(molecule.system, dtype=torch.float32)
    x = torch.tensor(molecule.positions[None], dtype=torch.float32)
    _, forces = potential.energy_and_forces(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(potential.energy_and_forces(x)[1], forces)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_after_threads():
    potential = TorchPotential.from_system(chain(5))
    x = scattered(60_000, 5)
    with torch_threads(2):
        potential.energy_and_forces(x)
    child = os.fork()
    if child == 0:  # pragma: no cover (the other process)
        potential.energy_and_forces(x[:10])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_construction_grows_no_faster_than_the_pairs():
    pairs = AllPairs(500)
    pairs.prepare_list()
    for module in (SystemEnergy(chain(500)), pairs):
        assert sum(buffer.numel() for buffer in module.buffers()) < 8 * 500**2


def test_too_large_for_the_memory():
    with pytest.raises(ValueError, match=r"memory: expected at least \d+ bytes, which one conf"):
        TorchPotential.from_system(chain(300), memory=2**20)


def test_blocks_too_small_to_fuse_are_not_compiled(caplog):
    potential = TorchPotential.from_system(chain(120), compile=True, memory=2**24)
    assert "not compiled" in caplog.text
    energies = potential.energy(scattered(300, 120))
    assert not potential.is_compiled
    assert energies.isfinite().all()


@pytest.mark.parametrize("length", [0.0, 0.1])
def test_a_bond_of_no_length(length):
    """A tether in its minimum, or two atoms at the same place: no force, as in OpenMM."""
    system = chain(2, length)
    x = torch.zeros(1, 2, 3, dtype=torch.float64)
    energies, forces = TorchPotential.from_system(system).energy_and_forces(x)
    expected = OpenMMPotential(system, "Reference").energy_and_forces(x)
    torch.testing.assert_close(energies, expected[0], rtol=1e-14, atol=0.0)
    assert torch.equal(forces, expected[1])
    potential = TorchPotential.from_system(system)
    assert potential.check(np.zeros((1, 2, 3)))[0].n_finite == 1


def test_gradients_use_the_parameters_of_the_energy():
    potential = TorchPotential.from_system(scaled_bond(1.0))
    x = scattered(1, 2).requires_grad_()
    energy = potential.energy(x).sum()
    potential.set_global_parameter("lam", 2.0)
    (gradient,) = torch.autograd.grad(energy, x, retain_graph=True)
    (with_graph,) = torch.autograd.grad(energy, x, create_graph=True)
    torch.testing.assert_close(with_graph, gradient, rtol=1e-12, atol=1e-12)


def test_a_parameter_that_switches_a_force_off():
    assert TorchPotential.from_system(scaled_bond(0.0)).agreement[0].n_finite


def test_errors_travel_between_processes():
    system = chain(3)
    system.addForce(openmm.GayBerneForce())
    with pytest.raises(NotCovered) as caught:
        TorchPotential.from_system(system)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is NotCovered
    assert str(copy) == str(caught.value)
    error = ExpressionError("a+", 2, "nothing")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float64 or torch.float32, "),
        ({"memory": 2**19}, ValueError, "memory: expected at least 1048576 bytes, got 524288"),
        ({"memory": None}, ValueError, "memory: expected at least"),
        ({"memory": float("nan")}, ValueError, "memory: expected at least"),
        ({"tolerance": 1e-5}, ValueError, "tolerance: expected two positive numbers"),
        ({"tolerance": (-1.0, 1.0)}, ValueError, "tolerance: expected two positive numbers"),
        ({"tolerance": (float("inf"), 1.0)}, ValueError, "tolerance: expected two positive"),
        ({"force_groups": [32]}, ValueError, r"force_groups: expected integers .* got \[32\]"),
        ({"force_groups": []}, ValueError, "force_groups: expected integers"),
        ({"force_groups": 3.5}, ValueError, "force_groups: expected integers"),
        ({"force_groups": [True]}, ValueError, "force_groups: expected integers"),
        ({"compile": "yes"}, TypeError, "compile: expected True or False, got 'yes'"),
        ({"device": "nowhere"}, ValueError, "device: expected a torch device, got 'nowhere'"),
        ({"device": 3.5}, ValueError, "device: expected a torch device"),
        ({"positions": "x"}, ValueError, "positions: expected numbers"),
        ({"positions": np.zeros((4, 3))}, ValueError, r"positions: expected shape \(3, 3\)"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        TorchPotential.from_system(chain(3), **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"n_conformations": 0}, "n_conformations: expected an integer of at least 1, got 0"),
        ({"n_conformations": 2.5}, "n_conformations: expected an integer"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"tolerance": (1e-3, 0.0)}, "tolerance: expected two positive numbers"),
        ({"tolerance": (1e-3,)}, "tolerance: expected two positive numbers"),
        ({"positions": np.zeros((4, 3))}, r"positions: expected shape \(2, 3\).*got \(4, 3\)"),
        ({"positions": np.full((2, 3), np.nan)}, "positions: expected finite numbers"),
        ({"positions": np.zeros((0, 2, 3))}, "positions: expected shape"),
    ],
)
def test_wrong_arguments_of_check(arguments, text):
    potential = TorchPotential.from_system(scaled_bond(1.0), force_groups=[np.int64(0)])
    with pytest.raises(ValueError, match=text):
        potential.check(**arguments)


def test_wrong_values_of_a_parameter():
    potential = TorchPotential.from_system(scaled_bond(1.0))
    for value in (None, "2", float("nan"), True):
        with pytest.raises(ValueError, match="value: expected a finite number"):
            potential.set_global_parameter("lam", value)


class TestPotentialOfAMolecule:
    """MolecularSystem.potential."""

    def test_kinds(self):
        molecule = alanine_dipeptide()
        assert isinstance(molecule.potential(), TorchPotential)
        assert isinstance(molecule.potential(platform="Reference"), OpenMMPotential)
        assert isinstance(molecule.potential(kind="openmm", n_contexts=1), OpenMMPotential)
        with pytest.raises(ValueError, match=r"kind: expected 'auto', .*, got 'x'"):
            molecule.potential(kind="x")
        with pytest.raises(TypeError, match=r"options: .* for torch, got platform"):
            molecule.potential(kind="torch", platform="Reference")
        with pytest.raises(TypeError, match=r"options: .* for OpenMM, got compile"):
            molecule.potential(kind="openmm", compile=True)

    def test_what_torch_does_not_cover(self, caplog):
        molecule = alanine_dipeptide()
        system = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(molecule.system))
        force = openmm.CustomCompoundBondForce(2, "distance(p1, p2)")
        force.addBond([0, 1], [])
        system.addForce(force)
        other = MolecularSystem(system, molecule.topology, molecule.positions)
        with caplog.at_level("INFO", logger="openmm_tsf"):
            assert isinstance(other.potential(compile=True), OpenMMPotential)
        assert "CustomCompoundBondForce" in caplog.text
        with pytest.raises(NotCovered, match="CustomCompoundBondForce"):
            other.potential(kind="torch")
