"""Systems with conformations, and the comparison of a potential with OpenMM's Reference platform.

Everything is built offline, from what OpenMM and openmmtools ship.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from typing import Any

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import torch
from torch import Tensor

from openmm_tsf.potentials import Potential, TorchPotential
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from tests.support.molecules import capped, capped_stretch, force_field

NAMES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL"
AMINO_ACIDS = tuple(NAMES.split())
PROTEINS = {"amber14": "amber14-all.xml", "amber19": "amber19-all.xml"}
SOLVENTS = ("hct", "obc1", "obc2", "gbn", "gbn2")
N_PARTICLES = 9  # of the Systems of single Forces
WIDTHS = (0.002, 0.005, 0.01, 0.02)  # nm, of the Gaussian perturbations


@dataclass(frozen=True)
class Case:
    """A System and conformations [B, N, 3] of it, in nm."""

    system: openmm.System
    x: Tensor


def reference_context(
    system: openmm.System,
    parameters: Mapping[str, float] | None = None,
    platform: str = "Reference",
) -> openmm.Context:
    """Return a Context with global parameters set, on the Reference platform by default."""
    integrator = openmm.VerletIntegrator(0.001)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform(platform))
    for name, value in (parameters or {}).items():
        context.setParameter(name, value)
    return context


def context_values(
    context: openmm.Context, x: Tensor, groups: Iterable[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return energies [B] and forces [B, N, 3] of conformations, one by one in a Context."""
    included = -1 if groups is None else set(groups)
    energies, forces = [], []
    for row in x.detach().numpy():
        context.setPositions(row)
        state = context.getState(energy=True, forces=True, groups=included)
        energies.append(state.getPotentialEnergy()._value)
        forces.append(torch.from_numpy(state.getForces(asNumpy=True)._value))
    return torch.tensor(energies, dtype=torch.float64), torch.stack(forces)


def reference_values(
    system: openmm.System,
    x: Tensor,
    parameters: Mapping[str, float] | None = None,
    groups: Iterable[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return energies [B] and forces [B, N, 3] on the Reference platform."""
    return context_values(reference_context(system, parameters), x, groups)


def errors(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Return the largest errors of energies and forces over the conformations.

    Energies: relative, to 1 kJ/mol where the energy is smaller than that. Forces: relative to the
    largest component of the conformation's force (to 1 kJ/(mol nm) where that is smaller).
    """
    scale = expected[0].abs().clamp(min=1.0)
    force_scale = expected[1].abs().amax(dim=(1, 2)).clamp(min=1.0)
    energy = (got[0] - expected[0]).abs() / scale
    force = (got[1] - expected[1]).abs().amax(dim=(1, 2)) / force_scale
    # Two NaNs do not agree.
    return tuple(float(error.nan_to_num(nan=torch.inf).max()) for error in (energy, force))


def assert_agrees(
    potential: Potential,
    system: openmm.System,
    x: Tensor,
    parameters: Mapping[str, float] | None = None,
) -> None:
    """Assert that energies, forces and the energy's gradient are the Reference platform's."""
    expected = reference_values(system, x, parameters)
    assert expected[0].isfinite().all(), "the case itself: OpenMM's energies are not finite"
    assert expected[1].isfinite().all(), "the case itself: OpenMM's forces are not finite"
    assert expected[1].any(), "the case itself: OpenMM's forces are all zero"
    got = potential.energy_and_forces(x)
    leaf = x.clone().requires_grad_()
    energies = potential.energy(leaf)
    (gradient,) = torch.autograd.grad(energies.sum(), leaf)
    for name, values in (
        ("energy_and_forces", got),
        ("energy and its gradient", (energies.detach(), -gradient)),
    ):
        assert values[0].dtype == values[1].dtype == x.dtype
        assert (values[0].shape, values[1].shape) == (x.shape[:1], x.shape)
        energy, force = errors(values, expected)
        assert energy <= 1e-10, f"{name}: relative error of energies {energy:.2e}"
        assert force <= 1e-8, f"{name}: relative error of forces {force:.2e}"
    torch.testing.assert_close(potential.energy(x), got[0], rtol=1e-13, atol=1e-9)


def hessians(system: openmm.System, x: Tensor, coordinates: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Return rows [n, 3N] of the Hessian at `x` [N, 3]: TorchPotential's, and those of OpenMM.

    The latter are differences of forces with two step widths, extrapolated to fourth order.
    """
    leaf = x[None].clone().requires_grad_()
    energy = TorchPotential.from_system(system).energy(leaf).sum()
    (gradient,) = torch.autograd.grad(energy, leaf, create_graph=True)
    context, got, rows = reference_context(system), [], []
    for coordinate in coordinates:
        (row,) = torch.autograd.grad(gradient.view(-1)[coordinate], leaf, retain_graph=True)
        got.append(row.flatten())
        differences = []
        for step in (1e-5, 2e-5):
            ends = x.repeat(2, 1, 1)
            ends.view(2, -1)[:, coordinate] += torch.tensor([step, -step], dtype=x.dtype)
            _, (up, down) = context_values(context, ends)
            differences.append((down - up).flatten() / (2 * step))
        rows.append((4 * differences[0] - differences[1]) / 3)
    return torch.stack(got), torch.stack(rows)


def perturbed(positions: np.ndarray, seed: int, widths: Iterable[float] = WIDTHS) -> Tensor:
    """Return positions with Gaussian noise of each width in nm, [len(widths), N, 3]."""
    rng = np.random.default_rng(seed)
    rows = [positions + rng.normal(scale=width, size=positions.shape) for width in widths]
    return torch.from_numpy(np.stack(rows))


def conformations(molecule: MolecularSystem, n: int, seed: int = 0) -> Tensor:
    """[n, N, 3]: the reference positions with noise of 0.01 nm."""
    noise = np.random.default_rng(seed).normal(0.0, 0.01, size=(n, molecule.n_atoms, 3))
    return torch.from_numpy(molecule.positions + noise)


def degenerate(good: Tensor) -> tuple[Tensor, Tensor]:
    """Return alanine dipeptides [8, 22, 3], `good` first and last, and which are not finite."""
    x = good.repeat(8, 1, 1)
    x[1, 3, 1] = torch.nan
    x[2, 0, 0] = -torch.inf
    x[3, 0] = x[3, 21]  # not bonded to each other
    x[4, 7] = x[4, 16]
    x[5] = 0.0
    x[6] *= 1e200
    return x, torch.tensor([False, *[True] * 6, False])


def check_degenerate(potential: Potential, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Assert that bad rows are +inf without force or gradient, and counted; return the values."""
    before = potential.n_evaluations, potential.n_non_finite
    energies, forces = potential.energy_and_forces(x)
    counted = potential.n_evaluations - before[0], potential.n_non_finite - before[1]
    assert counted == (len(x), int(bad.sum()))
    assert torch.equal(energies == torch.inf, bad)
    assert torch.equal(potential.energy(x) == torch.inf, bad)
    leaf = x.clone().requires_grad_()
    # 0 * inf and inf weights: a gradient of NaN at the bad rows must not be propagated.
    potential.energy(leaf).square().sum().backward()
    assert leaf.grad.isfinite().all()
    for values in (forces, leaf.grad):
        assert torch.equal(values.any(dim=2).any(dim=1), ~bad)
    return energies, forces


def cluster(
    n_conformations: int = 6, n: int = N_PARTICLES, seed: int = 0, closest: float = 0.12
) -> Tensor:
    """Return random conformations [B, n, 3] of particles, none closer than `closest` nm."""
    rng = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    while len(chosen) < n_conformations:
        x: list[np.ndarray] = []
        while len(x) < n:
            position = rng.uniform(0.0, 0.45, size=3)
            if all(np.linalg.norm(position - other) > closest for other in x):
                x.append(position)
        chosen.append(np.array(x))
    return torch.from_numpy(np.stack(chosen))


def system_of(*forces: openmm.Force, n: int = N_PARTICLES) -> openmm.System:
    """Return a System of `n` particles with these Forces, which it owns then."""
    system = openmm.System()
    for _ in range(n):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    return system


def minimised_and_dynamics(
    system: openmm.System, positions: np.ndarray, seed: int, n_frames: int = 4
) -> Tensor:
    """Return [4 + n_frames, N, 3]: perturbed minima, and frames of dynamics at 600 K."""
    integrator = openmm.LangevinMiddleIntegrator(600.0, 5.0, 0.001)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatform("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    minimum = _positions(context)
    context.setVelocitiesToTemperature(600.0, seed)
    frames = []
    for _ in range(n_frames):
        integrator.step(200)
        frames.append(_positions(context))
    dynamics = torch.from_numpy(np.array(frames).reshape(n_frames, *minimum.shape))
    return torch.cat([perturbed(minimum, seed), dynamics])


def _positions(context: openmm.Context) -> np.ndarray:
    return np.array(context.getState(positions=True).getPositions(asNumpy=True)._value)


def build(topology: app.Topology, protein: str, solvent: str | None, **options: Any) -> Any:
    """Return a System without cutoff and constraints; `solvent` None is vacuum."""
    names = [PROTEINS[protein]] + ([] if solvent is None else [f"implicit/{solvent}.xml"])
    return force_field(*names).createSystem(
        topology, nonbondedMethod=app.NoCutoff, constraints=None, **options
    )


@cache
def conformations_of(residue: str) -> Tensor:
    """Return conformations [8, N, 3] of the capped residue, from vacuum."""
    topology, positions = capped(residue)
    return minimised_and_dynamics(build(topology, "amber14", None), positions, seed=7)


def dipeptide(residue: str, protein: str, solvent: str | None, **options: Any) -> Case:
    """Return ACE-X-NME in a force field."""
    system = build(capped(residue)[0], protein, solvent, **options)
    return Case(system, conformations_of(residue))


@cache
def peptide(protein: str, solvent: str | None) -> Case:
    """Return twelve residues of the protein with caps."""
    topology, positions = capped_stretch(24, 12)
    x = minimised_and_dynamics(build(topology, "amber14", None), positions, seed=3, n_frames=1)
    return Case(build(topology, protein, solvent), x[[0, 2, 4]])


@cache
def alanine_frames() -> Tensor:
    """Return [8, 22, 3]: four frames of the shipped dynamics at 600 K, four perturbed minima."""
    molecule = alanine_dipeptide()
    folder = files("openmm_tsf.data")
    with as_file(folder / "ala2_600K.dcd") as dcd, as_file(folder / "ala2.pdb") as pdb:
        frames = mdtraj.load(str(dcd), top=str(pdb), stride=10_000).xyz.astype(np.float64)
    minima = minimised_and_dynamics(molecule.system, molecule.positions, seed=5, n_frames=0)
    return torch.cat([torch.from_numpy(frames), minima])


@cache
def alanine_case(name: str) -> Case:
    """Return alanine dipeptide: ``default``, openmmtools' ``implicit`` or ``vacuum``."""
    if name == "default":
        return Case(alanine_dipeptide().system, alanine_frames())
    from openmmtools import testsystems

    build_case = getattr(testsystems, f"AlanineDipeptide{name.capitalize()}")
    return Case(build_case(constraints=None).system, alanine_frames())
