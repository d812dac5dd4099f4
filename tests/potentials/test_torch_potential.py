"""TorchPotential as an object: batches, derivatives, non-finite input, copies, checks, threads."""

import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor

from openmm_tsf.potentials import TorchPotential, torch_potential
from openmm_tsf.potentials.blocks import block_threads, eager_block_size, replace_non_finite
from openmm_tsf.potentials.evaluation import BatchEvaluator
from openmm_tsf.potentials.forces.bonded import HarmonicBondTerm
from openmm_tsf.potentials.forces.custom_bonded import CustomBondTerm
from openmm_tsf.potentials.verification import Disagreement
from openmm_tsf.units import KB
from openmm_tsf.utils.threads import torch_threads
from tests.support.torch_cases import cluster, conformations, errors, reference_values, system_of
from tests.support.torch_zoo import custom, everything, scaled_bond


@pytest.fixture(scope="module")
def shared(molecule):
    return TorchPotential.from_system(molecule.system)


@pytest.fixture(scope="module")
def small():
    return TorchPotential.from_system(small_system())


def small_system() -> openmm.System:
    """Five particles, charges and radii, a bond, an angle and a torsion."""
    bond, angle = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
    torsion = openmm.PeriodicTorsionForce()
    bond.addBond(0, 1, 0.2, 50.0)
    angle.addAngle(0, 1, 2, 1.9, 3.0)
    torsion.addTorsion(0, 1, 2, 3, 2, 0.4, 1.5)
    pair, born = openmm.NonbondedForce(), openmm.GBSAOBCForce()
    for i in range(5):
        pair.addParticle(0.1 * (i - 2), 0.12, 0.2)
        born.addParticle(0.1 * (i - 2), 0.15, 0.8)
    return system_of(bond, angle, torsion, pair, born, n=5)


def bonded_pair(k: float = 1000.0) -> openmm.System:
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.1, k)
    spring = custom("External", "0.5*strength*(x^2+y^2+z^2)", "", (0, []), strength=3.0)
    return system_of(bond, spring, n=2)


def test_what_it_says_it_is(shared, small):
    assert shared.event_shape == (22, 3)
    assert shared.boltzmann_constant == KB
    assert (shared.dtype, shared.device) == (torch.float64, torch.device("cpu"))
    assert "22 atoms" in repr(shared)
    assert "GBSAOBCForce" in repr(shared)
    assert not shared.is_compiled
    assert shared.compile_seconds == 0.0
    assert small.global_parameters == {}
    assert [item.index for item in small.agreement] == [0, 1, 2, 3, 4]
    assert all(item.energy_error < 1e-12 for item in small.agreement)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(22, 3, dtype=torch.float64), ValueError, r"x: expected shape \[B, \(22, 3\)"),
        (torch.zeros(2, 21, 3, dtype=torch.float64), ValueError, r"x: expected shape .*21"),
        (torch.zeros(2, 22, 3, dtype=torch.float32), ValueError, "x: expected torch.float64.*32"),
        (torch.zeros(2, 22, 3, dtype=torch.int64), TypeError, "x: expected a floating-point"),
        (np.zeros((2, 22, 3)), TypeError, "x: expected a floating-point.*ndarray"),
        (torch.zeros(2, 22, 3, dtype=torch.float64, device="meta"), ValueError, "x: .*on meta"),
    ],
    ids=["no batch", "atoms", "float32", "integers", "numpy", "device"],
)
def test_wrong_positions(shared, x, error, text):
    for evaluate in (shared.energy, shared.energy_and_forces):
        with pytest.raises(error, match=text):
            evaluate(x)


def test_evaluations_are_counted(small):
    x, before = cluster(3, n=5), small.n_evaluations
    small.energy(x)
    small.energy_and_forces(x[:2])
    small.energy(x[:0])
    assert small.n_evaluations == before + 5
    leaf = x.clone().requires_grad_()
    small.energy(leaf).sum().backward()  # its forces are computed with the energy
    assert small.n_evaluations == before + 8
    assert small.n_non_finite == 0


@pytest.mark.parametrize("n", [0, 1])
def test_none_and_one(shared, molecule, n):
    x = conformations(molecule, n).requires_grad_()
    energy = shared.energy(x)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    energies, forces = shared.energy_and_forces(x)
    assert (energy.shape, gradient.shape) == ((n,), (n, 22, 3))
    assert not energies.requires_grad
    assert not forces.requires_grad
    torch.testing.assert_close(energy.detach(), energies, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(gradient, -forces, rtol=0.0, atol=0.0)


def test_results_do_not_depend_on_blocks(shared, molecule):
    """Rows are the same to rounding, whatever the rest of their batch."""
    x = conformations(molecule, 203)
    energies, forces = shared.energy_and_forces(x)
    scale = float(forces.abs().max())
    little = TorchPotential.from_system(molecule.system, memory=2**20)
    sizes = [eager_block_size(22, p.dtype, p.device, p.memory) for p in (little, shared)]
    assert sizes[0] < sizes[1]
    for got in (
        little.energy_and_forces(x),
        tuple(map(torch.cat, zip(*[shared.energy_and_forces(r) for r in x.split(7)], strict=True))),
    ):
        torch.testing.assert_close(got[0], energies, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(got[1], forces, rtol=0.0, atol=1e-12 * scale)


def test_results_do_not_depend_on_threads(shared, molecule):
    x = conformations(molecule, 500)
    with torch_threads(2):
        two = shared.energy_and_forces(x)
        assert block_threads(molecule.n_atoms, shared.device) == 2
    with torch_threads(1):
        one = shared.energy_and_forces(x)
    assert all(map(torch.equal, one, two))


def test_strides_do_not_matter(shared, molecule):
    x = conformations(molecule, 6)
    energies, forces = shared.energy_and_forces(x)
    batch_last = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    every_other = torch.repeat_interleave(x, 2, dim=0)[::2]
    part = torch.cat([x, x], dim=2)[..., 3:]
    for view in (batch_last, every_other, part):
        assert all(map(torch.equal, shared.energy_and_forces(view), (energies, forces)))
        leaf = view.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(shared.energy(leaf).sum(), leaf)
        assert torch.equal(gradient, -forces)
    same = shared.energy_and_forces(x[:1].expand(6, -1, -1))
    assert same[1].shape == x.shape
    torch.testing.assert_close(same[0], energies[:1].expand(6), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(same[1][-1], forces[0], rtol=1e-12, atol=1e-9)
    one = x[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(shared.energy(one.expand(6, -1, -1)).sum(), one)
    torch.testing.assert_close(gradient[0], -6 * forces[0], rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("memory", [2**20, 2**24])
def test_blocks_fit_the_memory(memory):
    size = eager_block_size(22, torch.float64, torch.device("cpu"), memory)
    assert size >= 1
    assert size == 1 or 80 * size * 22**2 * 8 <= memory


def test_gradients_by_finite_differences(small):
    x = cluster(2, n=5).requires_grad_()
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda y: weights * small.energy(y), (x,), atol=1e-4)
    assert torch.autograd.gradgradcheck(
        lambda y: 1e-3 * small.energy(y), (x,), atol=1e-3, rtol=1e-3
    )


def test_gradients_through_what_comes_before(small):
    """A chain rule of second order: scaled positions, a weight that needs a gradient itself."""
    x = cluster(2, n=5)
    scale = torch.tensor(1.01, dtype=torch.float64, requires_grad=True)

    def value(s: Tensor) -> Tensor:
        return (s * small.energy(s * x)).sum()

    (first,) = torch.autograd.grad(value(scale), scale, create_graph=True)
    (second,) = torch.autograd.grad(first, scale)
    h = 1e-4
    values = [float(value(scale.detach() + k * h)) for k in (-2, -1, 0, 1, 2)]
    one = (values[0] - 8 * values[1] + 8 * values[3] - values[4]) / (12 * h)
    two = (-values[0] + 16 * values[1] - 30 * values[2] + 16 * values[3] - values[4]) / (12 * h**2)
    assert first.item() == pytest.approx(one, rel=1e-6)
    assert second.item() == pytest.approx(two, rel=1e-5)


def test_no_graph_without_need(small):
    x = cluster(2, n=5).requires_grad_()
    with torch.no_grad():
        assert not small.energy(x).requires_grad
    assert not small.energy(x.detach()).requires_grad
    assert small.energy(x).requires_grad
    energies, forces = small.energy_and_forces(x)
    assert not energies.requires_grad
    assert not forces.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 0.0], ids=str)
def test_rows_that_are_not_finite(bad):
    """+inf and zero force, counted; 0.0 puts all particles of a row on one point."""
    potential, x = TorchPotential.from_system(small_system()), cluster(6, n=5)
    clean = potential.energy_and_forces(x)
    where = torch.tensor([1, 4])
    good = torch.tensor([0, 2, 3, 5])
    poisoned = x.clone()
    poisoned[where] = bad if bad == 0.0 else poisoned[where]
    poisoned[where, 2, 1] = bad
    assert potential.n_non_finite == 0
    energies, forces = potential.energy_and_forces(poisoned)
    assert potential.n_non_finite == 2
    assert energies[where].tolist() == [torch.inf] * 2
    assert not forces[where].any()
    assert torch.equal(energies[good], clean[0][good])
    assert torch.equal(forces[good], clean[1][good])
    assert torch.equal(potential.energy(poisoned), energies)

    leaf = poisoned.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(potential.energy(leaf).sum(), leaf, create_graph=True)
    assert not gradient[where].any()
    torch.testing.assert_close(gradient[good].detach(), -forces[good], rtol=1e-12, atol=1e-9)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert not second[where].any()
    alone = x[good].clone().requires_grad_()
    (first,) = torch.autograd.grad(potential.energy(alone).sum(), alone, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), alone)
    torch.testing.assert_close(second[good], expected, rtol=1e-12, atol=1e-9)


def test_a_bad_weight_of_a_bad_row(small):
    """exp(-U) and the like have gradients of NaN where U is infinite: they must not get through."""
    x = cluster(2, n=5)
    x[0, 0, 0] = torch.nan
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad((0.0 * small.energy(leaf)).sum(), leaf)
    assert not gradient[0].any()
    assert gradient.isfinite().all()


def test_global_parameters():
    potential, x = TorchPotential.from_system(bonded_pair()), cluster(3, n=2)
    assert potential.global_parameters == {"strength": 3.0}
    for strength in (3.0, -1.5, 0.0):
        potential.set_global_parameter("strength", strength)
        expected = reference_values(bonded_pair(), x, {"strength": strength})
        assert max(errors(potential.energy_and_forces(x), expected)) < 1e-12
        potential.check()
    with pytest.raises(ValueError, match=r"name: expected a global parameter \(strength\), got 'k"):
        potential.set_global_parameter("k", 1.0)


def test_pickle(small):
    original = TorchPotential.from_system(everything(), force_groups=[1, 3], memory=2**24)
    original.set_global_parameter("k", 7.0)
    x = cluster()
    original.energy(x)
    with pickle.loads(pickle.dumps(original)) as copy:
        assert (copy.n_evaluations, copy.memory, copy.force_groups) == (0, 2**24, (1, 3))
        assert copy.global_parameters == original.global_parameters
        assert copy.agreement == original.agreement
        assert all(map(torch.equal, copy.energy_and_forces(x), original.energy_and_forces(x)))


def _energies(potential: TorchPotential, x: np.ndarray) -> np.ndarray:
    return potential.energy(torch.from_numpy(x)).numpy()


@pytest.mark.slow
def test_another_process(small):
    x = cluster(3, n=5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(_energies, (small, x.numpy()))
    assert torch.equal(torch.from_numpy(got), small.energy(x))


def test_after_closing():
    with TorchPotential.from_system(bonded_pair()) as potential:
        x = cluster(3, n=2)
        before = potential.energy(x)
    potential.close()
    assert torch.equal(potential.energy(x), before)


def test_check_again(shared, molecule):
    names = [force.getName() for force in molecule.system.getForces()]
    for positions, n in (
        (None, 2),
        (molecule.positions, 3),
        (molecule.positions * openmm.unit.nanometer, 1),
        (conformations(molecule, 3).numpy(), 1),
    ):
        agreement = shared.check(positions, n_conformations=n, seed=5)
        assert [item.name for item in agreement] == names
        assert all(item.n_finite >= 1 for item in agreement)
    assert shared.agreement == agreement


def test_a_tolerance_that_is_too_small(molecule):
    with pytest.raises(Disagreement, match=r"Force \d\) differs from OpenMM's Reference"):
        TorchPotential.from_system(molecule.system, tolerance=(1e-20, 1e-20))
    assert issubclass(Disagreement, ValueError)


BOND = (HarmonicBondTerm, bonded_pair, r"system: HarmonicBondForce \(Force 0\) differs")


@pytest.mark.parametrize(
    ("term", "build", "message", "factor", "dtype"),
    [
        (*BOND, 1 + 1e-8, torch.float64),
        (*BOND, math.nan, torch.float64),
        (*BOND, 1.0001, torch.float32),
        # What the present value of a parameter switches off.
        (CustomBondTerm, scaled_bond, r"CustomBondForce.*at lam=0.2", -3, torch.float64),
    ],
)
def test_a_wrong_term_is_found(monkeypatch, term, build, message, factor, dtype):
    right = term.energy
    monkeypatch.setattr(term, "energy", lambda *a: factor * right(*a))
    with pytest.raises(Disagreement, match=message):
        TorchPotential.from_system(build(), dtype=dtype)


def test_nothing_to_compare_with():
    pair = openmm.NonbondedForce()
    for _ in range(2):
        pair.addParticle(1.0, 0.2, 0.0)
    potential = TorchPotential.from_system(system_of(pair, n=2))
    with pytest.raises(Disagreement, match="finite at none of 1 conformations; give positions"):
        potential.check(np.zeros((1, 2, 3)))


def test_single_precision(shared, molecule):
    single = TorchPotential.from_system(molecule.system, dtype=torch.float32)
    x = conformations(molecule, 8)
    energies, forces = single.energy_and_forces(x.float())
    assert energies.dtype == forces.dtype == torch.float32
    double = energies.double(), forces.double()
    assert max(errors(double, shared.energy_and_forces(x))) < 1e-3


COMPILED = """
import logging
import openmm, torch
from tests.potentials.test_torch_potential import bonded_pair, cluster
from openmm_tsf.potentials import TorchPotential, torch_potential

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
torch.set_num_threads(1)
eager = TorchPotential.from_system(bonded_pair())
potential = TorchPotential.from_system(bonded_pair(), compile=True)
x = cluster(300, n=2)
assert not potential.is_compiled
potential.energy(x[:10])
assert not potential.is_compiled and potential.compile_seconds == 0.0, "compiled for ten rows"
"""


def run_compiled(code: str, tmp_path: Path, **environment: str) -> str:
    """Run code in a new process, with an empty compiler cache; return its log."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED + code],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_without_a_compiler(tmp_path):
    """One warning with the reason, the right energies, and no second attempt."""
    log = run_compiled(
        """
for _ in range(2):
    torch.testing.assert_close(potential.energy(x), eager.energy(x), rtol=1e-14, atol=0)
    for got, expected in zip(potential.energy_and_forces(x), eager.energy_and_forces(x)):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-9)
    assert not potential.is_compiled
    seconds = potential.compile_seconds
assert potential.compile_seconds == seconds
""",
        tmp_path,
        CXX="/nonexistent/c++",
    )
    assert log.count("WARNING") == 1
    assert "not compiled, evaluating eagerly: No working C++ compiler" in log
    assert "/nonexistent/c++" in log


@pytest.mark.slow
def test_compiled_object(tmp_path):
    """Parameters change without a new program, threads too; the disk cache serves a second one."""
    log = run_compiled(
        """
def same(one, other):
    torch.testing.assert_close(one.energy(x), other.energy(x), rtol=1e-12, atol=1e-10)
    for got, expected in zip(one.energy_and_forces(x), other.energy_and_forces(x)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-9)

same(potential, eager)
assert potential.is_compiled
seconds = potential.compile_seconds
for strength in (-2.0, 0.0):
    for one in (potential, eager):
        one.set_global_parameter("strength", strength)
    same(potential, eager)
torch.set_num_threads(2)
same(potential, eager)
bad = x.clone()
bad[7, 0, 0] = torch.nan
energies, forces = potential.energy_and_forces(bad)
assert energies[7] == torch.inf and not forces[7].any() and potential.n_non_finite == 1
assert torch.equal(energies[8:], potential.energy_and_forces(x)[0][8:])
assert potential.compile_seconds == seconds, "compiled again"
stiffer = TorchPotential.from_system(bonded_pair(2000.0), compile=True)
same(stiffer, TorchPotential.from_system(bonded_pair(2000.0)))
assert stiffer.compile_seconds < 0.5 * seconds, "not from the cache"
empty = TorchPotential.from_system(bonded_pair(), compile=True, force_groups=[9])
assert not empty.energy_and_forces(x)[1].any()
""",
        tmp_path,
    )
    assert "WARNING" not in log


def test_threads_share_one_evaluator_in_single_precision(monkeypatch):
    """Threads that share a batch call at once; two evaluators would be compiled twice, at once."""
    potential, made = TorchPotential.from_system(small_system()), []
    n_threads = 4
    barrier = threading.Barrier(n_threads)

    class Slow(BatchEvaluator):
        def __init__(self, *arguments):
            made.append(self)
            time.sleep(0.05)
            super().__init__(*arguments)

    monkeypatch.setattr(torch_potential, "BatchEvaluator", Slow)
    x = torch.randn(3, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def evaluate(_):
        barrier.wait()
        return potential.single_precision_forces(x)

    with ThreadPoolExecutor(n_threads) as pool:
        results = list(pool.map(evaluate, range(n_threads)))
    assert len(made) == 1
    assert all(torch.equal(forces, results[0][1]) for _, forces in results)
    assert potential.n_evaluations == 3 * n_threads


def test_finite_rows_whose_sum_overflows_are_kept():
    energies, forces = torch.full((4,), 3e38), torch.full((4, 2, 3), 3e38)
    assert replace_non_finite(energies, forces) == 0
    assert bool((energies == 3e38).all() and (forces == 3e38).all())
    energies[0], energies[1], forces[2, 0, 0] = torch.inf, -torch.inf, torch.nan
    assert replace_non_finite(energies, forces) == 3
    assert energies[:3].isposinf().all()
    assert energies[3] == 3e38
    assert not forces[:3].any()
    assert bool((forces[3] == 3e38).all())
