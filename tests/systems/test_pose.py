"""Energies that depend on a molecule's position or orientation: named, and refused for flows."""

import copy
from dataclasses import replace

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.sampling.kernels import TorchLangevin, WhitenedCoordinates
from openmm_tsf.systems.pose import pose_dependent_force
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.train import train
from tests.support.refusals import cases, refused

SMALL = {"n_blocks": 1, "hidden": (4,)}


def external(text, parameters=(), values=lambda index: ()):
    force = openmm.CustomExternalForce(text)
    for name in parameters:
        force.addPerParticleParameter(name)
    for index in range(22):
        force.addParticle(index, values(index))
    return force


def field(molecule):
    """A uniform field: no force on the whole of a neutral molecule, but a torque."""
    (nonbonded,) = (f for f in molecule.system.getForces() if isinstance(f, openmm.NonbondedForce))
    charges = [nonbonded.getParticleParameters(i)[0]._value for i in range(22)]
    assert abs(sum(charges)) < 1e-6
    return external("20*q*z", ["q"], lambda index: [charges[index]])


def as_variable(force, text="10*variable"):
    outer = openmm.CustomCVForce(text)
    outer.addCollectiveVariable("variable", force)
    return outer


def compound(text):
    force = openmm.CustomCompoundBondForce(2, text)
    force.addBond([0, 21])
    return force


def centroids(text):
    force = openmm.CustomCentroidBondForce(2, text)
    groups = force.addGroup(list(range(6))), force.addGroup(list(range(10, 20)))
    force.addBond(groups)
    return force


def solvent(energy):
    force = openmm.CustomGBForce()
    force.addComputedValue("I", "exp(-r)", openmm.CustomGBForce.ParticlePair)
    force.addEnergyTerm(energy, openmm.CustomGBForce.SingleParticle)
    for _ in range(22):
        force.addParticle([])
    return force


def named(force):
    force.setName("membrane")
    return force


@cases(
    ("build", "name"),
    [
        ("field on a neutral molecule", field, "CustomExternalForce"),
        ("Gaussian wall", lambda _: external("5*exp(-(z-3)^2/2)"), "CustomExternalForce"),
        ("sphere of 8 nm", lambda _: named(external("9*max(0, sqrt(x*x+y*y+z*z)-8)^2")),
         r"membrane (CustomExternalForce)"),
        ("in a variable", lambda _: as_variable(as_variable(external("x"))), "CustomCVForce"),
        ("coordinates of atoms", lambda _: compound("(z1-z2)^2"), "CustomCompoundBondForce"),
        ("coordinates of groups", lambda _: centroids("distance(g1,g2)+x1"),
         "CustomCentroidBondForce"),
        ("solvent with a depth", lambda _: solvent("I+0.1*z"), "CustomGBForce"),
    ],
)  # fmt: skip
def test_forces_that_depend_on_the_pose(molecule, build, name):
    system = copy.deepcopy(molecule.system)
    system.addForce(openmm.RGForce())
    system.addForce(build(molecule))
    found, change = pose_dependent_force(system, molecule.positions)
    assert found == name
    assert change > 0.05


def test_forces_that_do_not(molecule):
    system = copy.deepcopy(molecule.system)
    reference = molecule.positions
    others = [
        external("3"),
        as_variable(openmm.RMSDForce(reference), "1e4*variable"),
        as_variable(openmm.RMSDForce(reference), "1e4*variable^2"),
        compound("100*(distance(p1,p2)-1)^2"),
        centroids("100*distance(g1,g2)"),
        solvent("50*I"),
        as_variable(openmm.RGForce()),
    ]
    for force in others:
        system.addForce(force)
    assert pose_dependent_force(system, reference) is None
    # Also far from the origin and beyond the number of force groups.
    for _ in range(30):
        system.addForce(compound("100*distance(p1,p2)"))
    assert pose_dependent_force(system, reference + 40.0) is None
    system.addForce(external("0.2*x"))
    names, _ = pose_dependent_force(system, reference)
    assert "CustomExternalForce" in names


@pytest.fixture(scope="module")
def pulled(molecule):
    """Alanine dipeptide with one atom on a spring to a point."""
    system = copy.deepcopy(molecule.system)
    spring = openmm.CustomExternalForce("500*((x-1)^2+y^2+z^2)")
    spring.addParticle(8)
    system.addForce(spring)
    return tsf.MolecularSystem(system, molecule.topology, molecule.positions)


@pytest.fixture(scope="module")
def frames(molecule):
    return tsf.MDDataset.shipped(molecule, stride=200)


MESSAGE = "molecule: expected an energy that does not depend on position .* that of CustomExternal"


@pytest.mark.parametrize("kind", [tsf.TemperatureSteerableFlow, tsf.RealNVPFlow])
def test_flows_are_refused(pulled, frames, kind):
    with refused(ValueError, MESSAGE):
        kind.from_dataset(replace(frames, molecule=pulled), **SMALL)


def test_training_is_refused(molecule, pulled, frames):
    flow = tsf.TemperatureSteerableFlow.from_dataset(frames, **SMALL)
    both = [frames, replace(frames, molecule=pulled, temperature=300.0)]
    with molecule.potential() as potential, refused(ValueError, MESSAGE):
        tsf.fit(flow, both, potential)


def test_stages_are_refused_before_they_begin(pulled, frames, tmp_path):
    dataset, output = replace(frames, molecule=pulled), tmp_path / "out"
    flow = tmp_path / "flow.pt"
    tsf.TemperatureSteerableFlow.from_dataset(frames, **SMALL).save(flow)
    for stage in (
        lambda: run(output, molecule=pulled),
        lambda: run(output, molecule=pulled, frames=FrameSource(simulate=True)),
        lambda: train(dataset, output),
        lambda: sample(flow, output, molecule=pulled),
    ):
        with refused(ValueError, MESSAGE):
            stage()
        assert not output.exists()


def test_cartesian_kernels_sample_it_and_flows_do_not(pulled, frames):
    flow = tsf.TemperatureSteerableFlow.from_dataset(frames, **SMALL)
    flow.fingerprint = None  # made by hand
    potential, ladder = pulled.potential(), (300.0,)
    masses = torch.tensor(pulled.masses)
    with refused(ValueError, MESSAGE):
        tsf.ParallelTempering(pulled, flow, ladder, 2, potential=potential)
    layer = InternalCoordinates.from_topology(pulled.topology, pulled.positions)
    u, _ = layer.inverse_and_log_det(frames.positions)
    layers = WhitenedCoordinates(Whitening.fit(u, layer.kinds), layer, 600.0)
    dynamics = TorchLangevin(potential, ladder, masses, layers, 5)
    sampler = tsf.ParallelTempering(pulled, layers, ladder, 2, [dynamics], potential, seed=1)
    sampler.set_positions(np.broadcast_to(pulled.positions, (2, 1, 22, 3)).copy())
    sampler.run(2, progress=False)
    assert not torch.equal(sampler.state.x[0, 0], torch.tensor(pulled.positions))


def single_precision(state):
    """Energy of bonds between consecutive atoms."""
    x = state.getPositions(asNumpy=True)._value.astype(np.float32)
    lengths = np.linalg.norm(x[1:] - x[:-1], axis=1)
    energy = np.float32(1.5e5) * np.square(lengths - np.float32(0.15)).sum()
    return float(energy) * unit.kilojoule_per_mole, np.zeros(x.shape)


@pytest.mark.skipif(not hasattr(openmm, "PythonForce"), reason="needs OpenMM 8.4")
@pytest.mark.parametrize("n_atoms", [22, 140])
def test_single_precision_is_no_dependence_on_the_pose(n_atoms):
    """As of machine-learned potentials: the rounding of positions 100 nm away changes energies."""
    step = np.array([[0.12, 0.09, 0.02], [0.12, -0.09, -0.01]])
    positions = np.cumsum(np.tile(step, (n_atoms // 2, 1)), axis=0)

    system = openmm.System()
    for _ in range(n_atoms):
        system.addParticle(12.0)
    system.addForce(openmm.PythonForce(single_precision))
    assert pose_dependent_force(system, positions) is None
