"""The System's forces tell the temperature of frames; mirror images are refused."""

import logging
import re

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.systems.configurational_temperature import measure_temperature
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.frame_ensemble import check_energies, check_ensemble
from openmm_tsf.systems.mean_torques import measure_torques
from openmm_tsf.training import FitSettings
from openmm_tsf.utils.topology import bonds_of
from openmm_tsf.workflow.train import train
from tests.support.chain import CONSTANT, ZIGZAG, chain_of, dynamics
from tests.support.molecules import graph_molecule
from tests.support.refusals import cases, refused

#: Of the corners of a hexagon.
ANGLES = np.arange(6) * np.pi / 3


@pytest.fixture(scope="module")
def chain():
    return chain_of()


@pytest.fixture(scope="module")
def frames(chain):
    return torch.tensor(dynamics(chain, 400.0, n_frames=600))


def test_temperature_of_harmonic_oscillators():
    """Exact samples of two bonds: <|grad U|^2> / <laplacian U> = kT, within the error it states."""
    chain = chain_of()
    system = openmm.XmlSerializer.clone(chain.system)
    while system.getNumForces():
        system.removeForce(0)
    springs = openmm.CustomExternalForce("500*(x^2+y^2+16*z^2)")
    for atom in range(chain.n_atoms):
        springs.addParticle(atom, [])
    system.addForce(springs)
    molecule = tsf.MolecularSystem(system, chain.topology, chain.positions)
    kt, generator = tsf.TorchPotential.boltzmann_constant * 350.0, torch.Generator().manual_seed(3)
    width = (kt / torch.tensor([1000.0, 1000.0, 16000.0], dtype=torch.float64)).sqrt()
    x = width * torch.randn(4000, chain.n_atoms, 3, generator=generator, dtype=torch.float64)
    measured = measure_temperature(molecule, x)
    assert abs(measured.kelvin - 350.0) < 4 * measured.error < 60
    assert measure_temperature(molecule, x[:31]) is None
    assert measure_temperature(molecule, x) == measured  # no chance


def test_temperature_of_dynamics(chain, frames, molecule):
    measured = measure_temperature(chain, frames)
    assert abs(measured.kelvin - 400.0) < 4 * measured.error < 100
    shipped = measure_temperature(molecule, MDDataset.shipped(molecule, stride=100).positions)
    assert abs(shipped.kelvin - 600.0) < 4 * shipped.error < 100
    check_ensemble(chain, frames, 400.0)


def diatomic():
    system, bond = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(2):
        system.addParticle(12.0)
    bond.addBond(0, 1, 0.15, CONSTANT)
    system.addForce(bond)
    return tsf.MolecularSystem(system, *graph_molecule([(0, 1)], ZIGZAG[:2], "CC"))


def test_few_frames_of_few_atoms_are_not_refused():
    """Exact samples of one vibration: by chance they may have less than half the energy."""
    molecule, generator = diatomic(), torch.Generator().manual_seed(5475)  # the worst of 40,000
    kt = tsf.TorchPotential.boltzmann_constant * 300.0
    noise = torch.randn(32, generator=generator, dtype=torch.float64)
    x = torch.zeros(32, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = 0.15 + (kt / CONSTANT) ** 0.5 * noise
    measured = measure_temperature(molecule, x)
    assert 300 - measured.kelvin > 6 * measured.error
    check_ensemble(molecule, x, 300.0)


def test_frames_without_any_force():
    """All in the minimum: of 0 K, with an error of 0 K."""
    x = torch.zeros(40, 2, 3, dtype=torch.float64)
    x[:, 1, 0] = 0.15
    with refused(ValueError, r"they are of 0 \+- 0 K"):
        check_ensemble(diatomic(), x, 300.0)


@cases(
    ("change", "temperature", "kelvin"),
    [
        ("a colder rung", {}, 250.0, "(3|4)[0-9][0-9]"),
        ("a hotter rung", {}, 600.0, "(3|4)[0-9][0-9]"),
        ("degrees Celsius", {}, 127.0, "(3|4)[0-9][0-9]"),
        ("longer bonds", {"length": 0.155}, 400.0, r"\d+"),
        ("stiffer bonds", {"constant": 2.0 * CONSTANT}, 400.0, "[0-9]+"),
    ],
)
def test_other_temperatures_and_force_fields(frames, change, temperature, kelvin):
    message = (
        f"temperature: expected frames of {temperature:g} K, but by this System's forces they are "
        rf"of ({kelvin}) \+- \d+ K"
    )
    with refused(ValueError, message):
        check_ensemble(chain_of(**change), frames, temperature)


def test_minimised_frames(chain):
    """Conformations that are nearly at rest, as a minimiser or a search leaves them."""
    x = torch.tensor(dynamics(chain, 8.0, n_frames=100))
    MDDataset(x, 400, chain)
    with refused(ValueError, "minimised or not equilibrated"):
        check_ensemble(chain, x, 400.0)


def test_small_deviations_are_a_warning(chain, frames, caplog):
    many = torch.tensor(dynamics(chain, 400.0, n_frames=1200))
    with caplog.at_level(logging.WARNING, logger="openmm_tsf"):
        check_ensemble(chain, many, 400.0)
        assert not caplog.records
        check_ensemble(chain, many, 440.0)
    (record,) = caplog.records
    assert "expected frames of 440 K" in record.getMessage()
    with refused(ValueError, "expected frames of 500 K"):
        check_ensemble(chain, many, 500.0)


def test_other_torsions_are_a_warning(chain, frames, caplog):
    """Stiff terms, and with them the configurational temperature, are the same."""
    with caplog.at_level(logging.WARNING, logger="openmm_tsf"):
        check_ensemble(chain, frames, 400.0)
        assert not caplog.records
        check_ensemble(chain_of(barrier=6.0), frames, 400.0)
    (record,) = caplog.records
    assert "torques, but about MOL1-C" in record.getMessage()
    deviation = measure_torques(chain_of(barrier=6.0), frames, 400.0)
    assert deviation.n_errors > 8
    assert measure_torques(chain, frames, 400.0).n_errors < 4
    assert measure_torques(chain, frames[:319], 400.0) is None


def test_another_solvent_is_a_warning(molecule, caplog):
    """The shipped frames are of implicit solvent."""
    system = openmm.XmlSerializer.clone(molecule.system)
    names = [type(force).__name__ for force in system.getForces()]
    system.removeForce(names.index("GBSAOBCForce"))
    vacuum = tsf.MolecularSystem(system, molecule.topology, molecule.positions)
    with caplog.at_level(logging.WARNING, logger="openmm_tsf"):
        MDDataset.shipped(vacuum, stride=20)
    (record,) = caplog.records
    assert "or solvent" in record.getMessage()


def test_rings_and_ends_do_not_turn(molecule):
    """Seven bonds of alanine dipeptide have atoms beyond both ends; none has in a ring."""
    x = MDDataset.shipped(molecule, stride=100).positions
    assert measure_torques(molecule, x, 600.0).n_errors < 5
    ring = np.array([[np.cos(a), np.sin(a), 0.1 * (-1) ** k] for k, a in enumerate(ANGLES)])
    topology, positions = graph_molecule([(i, (i + 1) % 6) for i in range(6)], 0.14 * ring)
    system = openmm.System()
    for _ in range(6):
        system.addParticle(12.0)
    benzene = tsf.MolecularSystem(system, topology, positions)
    assert measure_torques(benzene, torch.zeros(400, 6, 3), 300.0) is None


def test_frames_without_a_temperature(chain):
    """Free particles have no forces; there is nothing to compare."""
    system = openmm.System()
    for _ in range(chain.n_atoms):
        system.addParticle(12.0)
    free = tsf.MolecularSystem(system, chain.topology, chain.positions)
    x = torch.tensor(dynamics(chain, 400.0, n_frames=50))
    assert measure_temperature(free, x) is None
    check_ensemble(free, x, 300.0)


def test_forces_that_jump_are_not_judged(chain):
    """Bonds in a V-shaped well: the second derivative is a delta function."""
    system = openmm.XmlSerializer.clone(chain.system)
    bonds = openmm.CustomBondForce("3000*abs(r-0.15)")
    for bond in range(4):
        bonds.addBond(bond, bond + 1, [])
    system.removeForce(0)
    system.addForce(bonds)
    kinked = tsf.MolecularSystem(system, chain.topology, chain.positions)
    x = torch.tensor(dynamics(kinked, 300.0, timestep=0.0005))
    assert measure_temperature(kinked, x) is None
    check_ensemble(kinked, x, 300.0)


def test_files_and_datasets_are_judged_before_training(molecule, tmp_path):
    hot = MDDataset.shipped(molecule, stride=100)
    trajectory = mdtraj.Trajectory(hot.positions.numpy(), molecule.mdtraj_topology)
    trajectory.save_dcd(str(tmp_path / "hot.dcd"))
    with refused(ValueError, r"expected frames of 300 K, .* they are of [56]\d\d \+-"):
        MDDataset.load(tmp_path / "hot.dcd", molecule, 300)
    assert len(MDDataset.load(tmp_path / "hot.dcd", molecule, 600)) == len(hot)
    made = MDDataset(hot.positions, 300, molecule)
    with refused(ValueError, "expected frames of 300 K"):
        train(made, tmp_path / "flow", fit_settings=FitSettings(n_steps=2))
    assert not (tmp_path / "flow").exists()


def test_mirror_images(molecule, tmp_path):
    x = MDDataset.shipped(molecule, stride=2000).positions.numpy()
    some = x.copy()
    some[5:8] *= [1.0, -1.0, 1.0]
    for name, frames, message in (
        ("all", -x, r"20 of 20 frames .* the first is frame 0, at .*ALA2-CA"),
        ("some", some, r"3 of 20 frames .* the first is frame 5, at .*ALA2-CA"),
    ):
        path = tmp_path / f"{name}.nc"
        trajectory = mdtraj.Trajectory(frames.astype(np.float32), molecule.mdtraj_topology)
        trajectory.save(str(path))
        with refused(ValueError, f"positions: expected the handedness .* {message}"):
            MDDataset.load(path, molecule, 600)


def test_exchanged_hydrogens_are_another_handedness_and_named(molecule):
    frames = MDDataset.shipped(molecule, stride=400).positions.clone()
    frames[:, [11, 12]] = frames[:, [12, 11]]  # of the side chain
    with pytest.raises(ValueError, match=r"at ALA2-CB: .* hydrogens of a group .* same order"):
        check_ensemble(molecule, frames, 600.0)


@pytest.fixture(scope="module")
def shipped(molecule):
    return MDDataset.shipped(molecule).positions


def of_force_field(molecule, *files):
    """The shipped molecule with another force field or solvent."""
    system = app.ForceField(*files).createSystem(molecule.topology)
    return tsf.MolecularSystem(system, molecule.topology, molecule.positions)


@pytest.mark.slow
def test_another_model_of_the_same_solvent_is_a_warning(molecule, shipped, caplog):
    """0.2 kT apart; frames of OBC2 went through as those of GBn2 without a word."""
    other = of_force_field(molecule, "amber99sbildn.xml", "implicit/gbn2.xml")
    check_ensemble(other, shipped, 600.0)
    (record,) = caplog.records
    assert "standard errors: another force field" in record.getMessage()
    assert re.search(r"deviate by 0\.[1-3]\d kT, ([6-9]|1\d) standard", record.getMessage())


def test_another_force_field_is_a_warning(molecule, shipped, caplog):
    check_ensemble(of_force_field(molecule, "amber14-all.xml", "implicit/obc2.xml"),
                   shipped[::20], 600.0)  # fmt: skip
    (record,) = caplog.records
    assert "another force field" in record.getMessage()


def test_right_frames_are_neither_refused_nor_warned_of(molecule, shipped, caplog):
    """Blocks and strides of the shipped frames; and 600 K is told from 500 K, 660 K and 700 K."""
    blocks = [shipped[k : k + 320] for k in range(0, 40_000, 14_000)]
    strides = [shipped[k::125] for k in range(0, 125, 50)]
    few = [shipped[k : k + 2600 : 65] for k in range(0, 40_000, 2600)]
    assert len(blocks + strides + few) > 20
    for x in (*blocks, *strides, *few):
        check_ensemble(molecule, x, 600.0)
    assert not caplog.records
    for kelvin in (500.0, 660.0, 700.0):
        with refused(ValueError, f"expected frames of {kelvin:g} K, but .* of [56][0-9][0-9] "):
            check_ensemble(molecule, shipped[::40], kelvin)


def test_long_time_steps_do_not_heat_heavy_atoms_that_move_with_their_hydrogens(molecule):
    """Hydrogens farther from their heavy atoms along the bonds, as leapfrog has them."""
    x = MDDataset.shipped(molecule, stride=40).positions.clone()
    elements = [atom.element.symbol for atom in molecule.topology.atoms()]
    for a, b in bonds_of(molecule.topology).tolist():
        if "H" not in (elements[a], elements[b]):
            continue
        heavy, light = (a, b) if elements[b] == "H" else (b, a)
        bond = x[:, light] - x[:, heavy]
        length = bond.norm(dim=1, keepdim=True)
        x[:, light] += bond / length * 0.15 * (length - length.mean())  # a third more energy
    whole = measure_temperature(molecule, x)
    heavy = measure_temperature(molecule, x, 1000, with_hydrogens=True)
    assert whole.kelvin - 600 > 60
    assert abs(heavy.kelvin - 600) < 4 * heavy.error < 60


def test_energies_of_another_force_field(molecule, shipped):
    """Those that come with the frames; kinetic energies included; of other frames."""
    x = shipped[::400]
    other = of_force_field(molecule, "amber99sbildn.xml", "implicit/gbn2.xml")
    right = MDDataset(x, 600.0, molecule).with_energies(molecule.potential()).energies
    check_energies(molecule, x, right + 0.02)
    check_energies(molecule, x[:1], right[:1])
    wrong = MDDataset(x, 600.0, other).with_energies(other.potential()).energies
    for energies in (wrong, right + 300.0, right / 4.184, right.flip(0)):
        with refused(ValueError, "energies: expected the potential energies of the frames by"):
            check_energies(molecule, x, energies)
    dataset = MDDataset(x, 600.0, molecule, energies=wrong, name="given")
    with refused(ValueError, "another force field or unit"):
        tsf.TemperatureSteerableFlow.from_dataset(dataset)
