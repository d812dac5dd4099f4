"""Frames of constrained dynamics, and rounded ones, are refused; right ones are not."""

import mdtraj
import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.systems.dataset import MDDataset
from tests.support.chain import CONSTANT, chain_of, dynamics
from tests.support.refusals import cases, refused


@pytest.fixture(scope="module")
def chain():
    return chain_of()


@pytest.fixture(scope="module")
def frames(chain):
    return dynamics(chain, 400.0)


@cases(
    ("bonds", "custom", "decimals", "message"),
    [
        ("one bond", [2], False, None, r"but 1 of 4 keep their length, .*: MOL1-C2 and MOL1-C3\."),
        ("all bonds", [0, 1, 2, 3], False, None, r"but 4 of 4 .*MOL1-C3; \.\.\.\. The first has"),
        ("in a PDB file", [0, 3], False, 4, r"but 2 of 4 .*at 400 K expected about 4\.1e-03 nm"),
        ("without a harmonic term", [1, 2], True, None, r"but 2 of 4 .* expected about 1\.5e-03"),
    ],
)
def test_constrained_bonds(bonds, custom, decimals, message):
    chain = chain_of(custom=custom)
    x = dynamics(chain, 400.0, constrained=bonds)
    if decimals is not None:
        x = x.round(decimals)
    with refused(ValueError, rf"positions: expected bonds that vibrate, {message}"):
        MDDataset(x, 400, chain)


def test_a_part_of_the_frames_is_constrained(chain, frames):
    """Two files, one of which is of dynamics with constraints: the bond's lengths in all vary."""
    x = np.concatenate([frames, dynamics(chain, 400.0, constrained=[2])])
    for order in (x, x[::-1].copy()):
        with refused(ValueError, "but 1 of 4 keep their length, .*: MOL1-C2 and MOL1-C3"):
            MDDataset(order, 400, chain)


def test_frames_of_every_step_vibrate(chain):
    x = dynamics(chain, 400.0, steps_per_frame=1, n_frames=1000)
    MDDataset(x, 400, chain)


@pytest.mark.parametrize("custom", [False, True])
def test_vibrating_bonds(custom):
    chain = chain_of(custom=custom)
    x = dynamics(chain, 150.0, timestep=0.002, mass_of_ends=4.0)
    assert len(MDDataset(x.round(4), 150, chain)) == len(x)


def test_few_conformations_are_not_judged(chain, frames):
    rigid = dynamics(chain, 400.0, constrained=[0, 1])
    MDDataset(rigid[:9], 400, chain)
    turn = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    MDDataset(np.concatenate([rigid[:3], rigid[:3] @ turn + 0.3] * 20), 400, chain)
    MDDataset(np.repeat(frames[:1].round(3), 50, axis=0), 400, chain)


@cases(
    ("change", "spacing"),
    [
        ("nm", lambda x: x.round(3), "0.001"),
        ("coarse", lambda x: x.round(2), "0.01"),
        ("shifted", lambda x: x.round(3) - x.mean(axis=1, keepdims=True), "0.001"),
        ("float32 in Angstrom, far away", lambda x: single(x.round(3) + 20.0), "0.001"),
        ("a quantity", lambda x: (10 * x).round(1) * unit.angstrom, "0.01"),
    ],
)
def test_positions_on_a_grid(chain, frames, change, spacing):
    message = rf"in 300 of 300 frames all are multiples of {spacing} nm"
    with refused(ValueError, message):
        MDDataset(change(frames), 400, chain)


def single(x):
    return (10 * x).astype(np.float32).astype(np.float64) / 10


def test_other_frames_are_on_no_grid(chain, frames):
    for x in (frames, frames.round(4), single(frames.round(4)), single(frames + 100.0)):
        MDDataset(x, 400, chain)
    mixed = np.concatenate([frames, frames[:20].round(3)])
    with refused(ValueError, "in 20 of 320 frames all are multiples of 0.001 nm"):
        MDDataset(mixed, 400, chain)


def test_rounded_files(molecule, tmp_path):
    """The numbers are judged, whatever the format that they come in."""
    x = MDDataset.shipped(molecule, stride=2000).positions.numpy()
    exact = mdtraj.Trajectory(x.astype(np.float32), molecule.mdtraj_topology)
    rounded = mdtraj.Trajectory(x.round(3).astype(np.float32), molecule.mdtraj_topology)
    for ending in ("trr", "nc", "dcd"):
        rounded.save(str(tmp_path / f"rounded.{ending}"))
        with refused(ValueError, "multiples of 0.001 nm"):
            MDDataset.load(tmp_path / f"rounded.{ending}", molecule, 600)
        exact.save(str(tmp_path / f"exact.{ending}"))
        assert len(MDDataset.load(tmp_path / f"exact.{ending}", molecule, 600)) == 20
    exact.save_pdb(str(tmp_path / "exact.pdb"))
    assert len(MDDataset.load(tmp_path / "exact.pdb", molecule, 600)) == 20


def test_constants_of_several_terms_add_up(chain, frames):
    """A bond with two terms is as stiff as both."""
    system = openmm.XmlSerializer.clone(chain.system)
    stiff = openmm.HarmonicBondForce()
    stiff.addBond(0, 1, 0.15, 1e4 * CONSTANT)
    system.addForce(stiff)
    molecule = tsf.MolecularSystem(system, chain.topology, chain.positions)
    x = torch.tensor(frames)
    bond = x[:, 1] - x[:, 0]
    x[:, 0] = x[:, 1] - 0.15 * bond / bond.norm(dim=1, keepdim=True)
    x[:, 0] += 4e-5 * torch.randn(len(x), 3, generator=torch.Generator().manual_seed(1))
    MDDataset(x, 400, molecule)
    with refused(ValueError, "but 1 of 4 keep"):
        MDDataset(x, 400, chain)


def test_soft_bonds_vary_as_much_as_their_constants_say():
    """Their own dynamics at 600 K has bonds of less than half the length, and far longer ones."""
    for constant in (2e3, 1e4):
        soft = chain_of(constant=constant)
        x = dynamics(soft, 600.0)
        lengths = np.linalg.norm(x[:, 1:] - x[:, :-1], axis=2)
        assert lengths.max() > 2 * lengths.min()
        MDDataset(x, 600, soft)
    torn = x.copy()
    torn[7, 0] -= 0.5
    with refused(ValueError, "but 1 of 300 frames have others; the first is frame 7"):
        MDDataset(torn, 600, soft)


def test_a_weak_harmonic_term_beside_another_term(frames):
    """The weak term alone would let the bond vary far more."""
    system = openmm.XmlSerializer.clone(chain_of(custom=True).system)
    weak = openmm.HarmonicBondForce()
    for bond in range(4):
        weak.addBond(bond, bond + 1, 0.15, 100.0)
    system.addForce(weak)
    chain = chain_of()
    molecule = tsf.MolecularSystem(system, chain.topology, chain.positions)
    MDDataset(frames, 400, molecule)
    with refused(ValueError, "but 4 of 4 keep their length"):
        MDDataset(dynamics(chain, 400.0, constrained=[0, 1, 2, 3]).round(4), 400, molecule)


def test_atoms_may_meet_where_nothing_keeps_them_apart(chain, frames):
    x = frames.copy()
    x[4, 4] = x[4, 1] + [0.0, 0.02, 0.0]
    x[4, 3] = x[4, [2, 4]].mean(axis=0)
    x[4, 3, 2] += 0.14
    MDDataset(x, 400, chain)
    system = openmm.XmlSerializer.clone(chain.system)
    repulsion = openmm.CustomNonbondedForce("1e-9/r^12")
    for _ in range(chain.n_atoms):
        repulsion.addParticle([])
    system.addForce(repulsion)
    molecule = tsf.MolecularSystem(system, chain.topology, chain.positions)
    with refused(ValueError, "0.03 nm apart, but in 1 of 300 frames .* MOL1-C1 and MOL1-C4"):
        MDDataset(x, 400, molecule)
