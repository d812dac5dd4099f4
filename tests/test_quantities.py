"""Every public number or array with a unit: plain, as a quantity, as a scalar of numpy or torch.

A quantity is converted, one of another dimension is refused by the name of the argument.
"""

import json
import math

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch
from openmm import Vec3

import openmm_tsf as tsf
from openmm_tsf import kernels, units
from openmm_tsf.analysis import importance_profile
from openmm_tsf.analysis.ensemble_checks import energy_ratio, heat_capacity
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.potentials import GaussianWell, MixedDoubleWell
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import MDSettings, SamplingSettings
from tests.support.exact_tree import POSITIONS
from tests.support.number_cases import (
    DYNAMICS,
    N_FRAMES,
    SCALARS,
    Subject,
    assert_alike,
    generator,
    plain,
    rows,
)

MILLIKELVIN = unit.milli * unit.kelvin
SPEED = unit.angstrom / unit.femtosecond
STIFFNESS = unit.kilocalorie_per_mole / unit.angstrom**2


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(tmp_path_factory.mktemp("numbers"))


def k(value):
    """Kelvin, one or several, as a quantity in millikelvin."""
    return unit.Quantity((1000 * np.asarray(value)).tolist(), MILLIKELVIN)


CARTESIAN = (kernels.CartesianHMC, kernels.CartesianMALA)
MASSES = [12.0, 1.0, 14.0, 1.0, 16.0, 1.0, 12.0]
SPEEDS = 0.1 * np.arange(84.0).reshape(2, 2, 7, 3)
ANGLES = np.linspace(-3.0, 3.0, 4 * N_FRAMES).reshape(N_FRAMES, 4)
TEMPERATURE = k(300.0), unit.nanometer
TOY_TEMPERATURE = k(1.0), unit.nanometer
LADDER = k([300.0, 400.0]), unit.picosecond
PER_FEMTOSECOND = 0.0005 / unit.femtosecond
DALTONS = (1e-3 * np.array(MASSES)) * unit.kilogram / unit.mole
CHARGE = unit.elementary_charge

#: What is called, the argument's name, a plain value, the same as a quantity in another unit, and a
#: unit of another dimension.
WITH_UNIT = [
    ("MDSettings", lambda s, v: MDSettings(temperature=v), "temperature", 300.0, *TEMPERATURE),
    ("MDSettings", lambda s, v: MDSettings(timestep=v), "timestep", 0.002, 2 * unit.femtosecond,
     unit.kelvin),
    ("MDSettings", lambda s, v: MDSettings(friction=v), "friction", 0.5, PER_FEMTOSECOND,
     unit.picosecond),
    ("MDSettings in minutes", lambda s, v: MDSettings(friction=v), "friction", 2.0,
     (2 * 6e13) / unit.minute, unit.dimensionless),
    ("SamplingSettings", lambda s, v: SamplingSettings(temperatures=v), "temperatures",
     [300.0, 400.0], *LADDER),
    ("FitSettings", lambda s, v: tsf.FitSettings(temperatures=v), "temperatures", [300.0, 400.0],
     *LADDER),
    ("FrameSource", lambda s, v: FrameSource("x.dcd", v), "temperature", 300.0, *TEMPERATURE),
    ("RunOptions", lambda s, v: RunOptions(checkpoint_seconds=v), "checkpoint_seconds", 120.0,
     2 * unit.minute, unit.kelvin),
    ("fit", lambda s, v: s.fitted(checkpoint_seconds=v), "checkpoint_seconds", 120.0,
     2 * unit.minute, unit.kelvin),
    ("sampler.run", lambda s, v: s.toy_sampler().run(1, checkpoint_seconds=v, progress=False),
     "checkpoint_seconds", 120.0, 2 * unit.minute, unit.kelvin),
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, timestep=v), "timestep", 0.002,
       2 * unit.femtosecond, unit.nanometer) for kind in (*DYNAMICS, *CARTESIAN)],
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, friction=v), "friction", 0.5,
       PER_FEMTOSECOND, unit.picosecond) for kind in DYNAMICS],
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, masses=v), "masses", MASSES,
       DALTONS, unit.nanometer) for kind in (*DYNAMICS, *CARTESIAN)],
    *[(kind.__name__, lambda s, v, kind=kind: s.kernel(kind, temperatures=v), "temperatures",
       [300.0, 400.0], *LADDER) for kind in (*DYNAMICS, *CARTESIAN)],
    ("CartesianHMC by rung", lambda s, v: s.kernel(kernels.CartesianHMC, timestep=v), "timestep",
     [0.001, 0.002], [1, 2] * unit.femtosecond, unit.nanometer),
    ("default_kernels", lambda s, v: s.of_sequence(masses=v), "masses", MASSES, DALTONS, CHARGE),
    ("default_kernels", lambda s, v: s.of_sequence(temperatures=v), "temperatures",
     [300.0, 400.0], *LADDER),
    ("SequenceSettings", lambda s, v: s.of_sequence(settings={"local_timestep": v}), "timestep",
     0.002, 2 * unit.femtosecond, unit.nanometer),
    ("SequenceSettings", lambda s, v: s.of_sequence(settings={"local_friction": v}), "friction",
     0.5, PER_FEMTOSECOND, unit.picosecond),
    ("FlowWalk", lambda s, v: kernels.FlowWalk(*s.toys, v).temperatures, "temperatures",
     [300.0, 400.0], *LADDER),
    ("FlowWalk", lambda s, v: kernels.FlowWalk(*s.toys, s.ladder, round_trip_tolerance=v)
     .settings(), "round_trip_tolerance", 1e-6, 1e-5 * unit.angstrom, unit.kelvin),
    ("PlainSwap", lambda s, v: kernels.PlainSwap((300.0, 400.0), v).kt, "boltzmann_constant",
     units.KB, unit.MOLAR_GAS_CONSTANT_R, unit.kelvin),
    ("OnRungs", lambda s, v: kernels.OnRungs(kernels.PlainSwap([300.0, 400.0], 1.0), v)
     .temperatures, "temperatures", [300.0, 400.0], *LADDER),
    ("WhitenedCoordinates", lambda s, v: kernels.WhitenedCoordinates(
        kernels.WhitenedCoordinates.identity(2).whitening, None, v).reference_temperature,
     "reference_temperature", 300.0, *TEMPERATURE),
    ("ParallelTempering", lambda s, v: tsf.ParallelTempering(
        None, s.toy_flow, v, 2, potential=s.well, seed=1).temperatures, "temperatures",
     [300.0, 400.0], *LADDER),
    ("set_positions", lambda s, v: s.started(x=v), "x", np.tile(POSITIONS, (2, 2, 1, 1)),
     np.tile(10 * POSITIONS, (2, 2, 1, 1)) * unit.angstrom, unit.kelvin),
    ("set_positions", lambda s, v: s.started(velocities=v), "velocities", SPEEDS,
     1e-2 * SPEEDS * SPEED, unit.nanometer),
    ("MolecularSystem", lambda s, v: tsf.MolecularSystem(s.system, s.topology, v).positions,
     "positions", POSITIONS, 10 * POSITIONS * unit.angstrom, unit.kelvin),
    ("InternalCoordinates", lambda s, v: tsf.InternalCoordinates.from_topology(s.topology, v)
     .branch_cuts, "positions", POSITIONS, 10 * POSITIONS * unit.angstrom, unit.kelvin),
    ("set_branch_cuts", lambda s, v: s.cuts(v), "cuts", [-math.pi / 2, 0.0, math.pi, 1.0],
     [-90.0, 0.0, 180.0, 180 / math.pi] * unit.degree, unit.nanometer),
    ("fit_branch_cuts", lambda s, v: s.fitted_cuts(v), "angles", ANGLES,
     np.degrees(ANGLES) * unit.degree, unit.nanometer),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames, v).temperature, "temperature", 300.0,
     *TEMPERATURE),
    ("MDDataset", lambda s, v: tsf.MDDataset(v, 300, s.molecule).positions, "positions",
     POSITIONS[None], 10 * POSITIONS[None] * unit.angstrom, unit.kelvin),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames[:3], 300, energies=v).energies, "energies",
     [4.184, 0.0, -8.368], [1.0, 0.0, -2.0] * unit.kilocalorie_per_mole, unit.nanometer),
    ("MDDataset", lambda s, v: tsf.MDDataset(s.frames[:3], 300, energies=v).energies, "energies",
     [1.0, 0.0, -2.0], [1000, 0.0, -2000] * unit.joule / unit.mole, unit.joule),
    ("from_system", lambda s, v: tsf.TorchPotential.from_system(s.system, positions=v)
     .agreement[0].energy_error < 1e-10, "positions", POSITIONS, 10 * POSITIONS * unit.angstrom,
     unit.kelvin),
    ("set_global_parameter", lambda s, v: s.parameter(v), None, 418.4, 1.0 * STIFFNESS, None),
    ("flow", lambda s, v: tsf.TemperatureSteerableFlow(1, 1, 1, (4,), v).reference_temperature,
     "reference_temperature", 300.0, *TEMPERATURE),
    ("flow.sample", lambda s, v: s.flow.sample(3, v, generator()), "temperature", 300.0,
     *TEMPERATURE),
    ("flow.sample_prior", lambda s, v: s.flow.sample_prior(2, v, generator()), "temperature",
     [300.0, 400.0], k([300.0, 400.0]), unit.nanometer),
    ("flow.log_prob", lambda s, v: s.flow.log_prob(*s.flow.sample(2, 300, generator())[:2], v),
     "temperature", 300.0, *TEMPERATURE),
    ("draw_weighted", lambda s, v: draw_weighted(*s.toys, v, 3, generator()), "temperature", 1.0,
     *TOY_TEMPERATURE),
    ("run.energies", lambda s, v: s.run.energies(v), "temperature", 1.0, *TOY_TEMPERATURE),
    ("run.mean_energy", lambda s, v: s.run.mean_energy(v).value, "temperature", 1.0,
     *TOY_TEMPERATURE),
    ("run.heat_capacity", lambda s, v: s.run.heat_capacity(v).value, "temperature", 1.0,
     *TOY_TEMPERATURE),
    ("run.r_hat", lambda s, v: s.run.r_hat("energy", v), "temperature", 1.0, *TOY_TEMPERATURE),
    ("run.beta", lambda s, v: s.run.beta(v), "temperature", 1.5, k(1.5), unit.nanometer),
    ("run.thermodynamics", lambda s, v: s.run.thermodynamics(v), "temperatures", 1.5, k(1.5),
     unit.nanometer),
    ("run.thermodynamics", lambda s, v: s.run.thermodynamics(v), "temperatures", [1.2, 1.5],
     k([1.2, 1.5]), unit.nanometer),
    ("GaussianWell", lambda s, v: GaussianWell(torch.eye(2)).mean_energy(v), "temperature", 1.5,
     k(1.5), unit.nanometer),
    ("DoubleWell", lambda s, v: s.well.probability_positive(v), "temperature", 1.5, k(1.5),
     unit.nanometer),
    ("MixedDoubleWell", lambda s, v: MixedDoubleWell.random(2, 0).entropy(v), "temperature", 1.5,
     k(1.5), unit.nanometer),
    ("importance_thermodynamics", lambda s, v: s.weighted(temperature=v), "temperature", 300.0,
     *TEMPERATURE),
    ("importance_thermodynamics", lambda s, v: s.weighted(boltzmann_constant=v),
     "boltzmann_constant", units.KB, unit.MOLAR_GAS_CONSTANT_R, unit.kelvin),
    ("importance_thermodynamics", lambda s, v: s.weighted(energy=v), "energy",
     np.arange(50) * 4.184, np.arange(50) * unit.kilocalorie_per_mole, unit.kelvin),
    ("importance_profile", lambda s, v: importance_profile(s.log_weights, v, 300.0, 6)
     .probability, "angles", np.linspace(-3, 3, 50),
     np.degrees(np.linspace(-3, 3, 50)) * unit.degree, unit.kelvin),
    ("torus_histogram", lambda s, v: tsf.statistics.torus_histogram(v, np.zeros(50), 6), "phi",
     np.linspace(-3, 3, 50), np.degrees(np.linspace(-3, 3, 50)) * unit.degree, unit.kelvin),
    ("heat_capacity", lambda s, v: heat_capacity(v, 300.0, units.KB).value, "energy",
     4.184 * np.arange(40.0).reshape(20, 2),
     np.arange(40.0).reshape(20, 2) * unit.kilocalorie_per_mole, unit.kelvin),
    ("energy_ratio", lambda s, v: energy_ratio(v, s.energy + 0.1, (1.0, 0.9)).value, "low",
     4.184 * np.cos(np.arange(200.0)).reshape(50, 4),
     np.cos(np.arange(200.0)).reshape(50, 4) * unit.kilocalorie_per_mole, unit.kelvin),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "value", "quantity", "wrong"), rows(WITH_UNIT))
def test_numbers_with_a_unit(subject, call, name, value, quantity, wrong):
    expected = plain(call(subject, value))
    assert_alike(expected, plain(call(subject, quantity)))
    if isinstance(value, float):
        for convert in SCALARS.values():
            got = plain(call(subject, convert(value)))
            json.dumps(got)
            if float(np.float32(value)) == value:
                assert_alike(expected, got)
        scalar = quantity.value_in_unit(quantity.unit)
        for convert in (np.float64, np.asarray):
            assert_alike(expected, plain(call(subject, convert(scalar) * quantity.unit)))
    else:
        array = np.asarray(value)
        for same in (torch.from_numpy(array.copy()), array, array.tolist(), tuple(array.tolist())):
            assert_alike(expected, plain(call(subject, same)))
        in_rows = [row * quantity.unit for row in np.asarray(quantity.value_in_unit(quantity.unit))]
        for nested in (in_rows, tuple(in_rows)):
            assert_alike(expected, plain(call(subject, nested)))
    if wrong is not None:
        plain_numbers = value if isinstance(value, float) else np.asarray(value)
        bad = [unit.Quantity(plain_numbers, wrong)]
        if not isinstance(value, float):
            bad.append([unit.Quantity(row, wrong) for row in np.asarray(value)])
        for refused in bad:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected a quantity in "):
                call(subject, refused)


def test_frames_as_lists_of_quantities(subject):
    """As they come from ``[state.getPositions() for state in states]``."""
    vectors = [[Vec3(*row) for row in frame] for frame in 10 * subject.frames[:3]]
    frames = [unit.Quantity(frame, unit.angstrom) for frame in vectors]
    with_units = [[Vec3(*(x * unit.angstrom for x in atom)) for atom in f] for f in vectors]
    arrays = [10 * frame * unit.angstrom for frame in subject.frames[:3]]
    tensors = [torch.from_numpy(frame.copy()) for frame in subject.frames[:3]]
    of_objects = np.empty((3, 7, 3), dtype=object)
    for index in np.ndindex(of_objects.shape):
        of_objects[index] = 10 * subject.frames[index] * unit.angstrom
    for given in (frames, tuple(frames), with_units, arrays, tensors, of_objects):
        dataset = tsf.MDDataset(given, 300 * unit.kelvin, subject.molecule)
        np.testing.assert_allclose(dataset.positions, subject.frames[:3], rtol=1e-12)
    context = openmm.Context(subject.system, openmm.VerletIntegrator(0.001))
    states = []
    for frame in subject.frames[:3]:
        context.setPositions(frame)
        states.append(context.getState(positions=True, energy=True))
    energies = [state.getPotentialEnergy() for state in states]
    dataset = tsf.MDDataset([state.getPositions() for state in states], 300, energies=energies)
    np.testing.assert_allclose(dataset.positions, subject.frames[:3], rtol=1e-6)
    expected = subject.potential.energy(torch.from_numpy(subject.frames[:3]))
    np.testing.assert_allclose(dataset.energies, expected, rtol=1e-3)
    for wrong in ([states[0].getPositions(), 1 * unit.kelvin], [*frames[:2], energies]):
        with pytest.raises(TypeError, match="positions: expected a quantity in nanometer"):
            tsf.MDDataset(wrong, 300)


def test_a_list_may_hold_quantities_of_several_units():
    temperatures = [300 * unit.kelvin, 4e5 * MILLIKELVIN, np.float32(500), torch.tensor(600.0)]
    assert units.as_temperatures(temperatures) == (300.0, 400.0, 500.0, 600.0)
    assert units.as_temperatures(t for t in temperatures) == (300.0, 400.0, 500.0, 600.0)
    assert all(type(t) is float for t in units.as_temperatures(temperatures))
    with pytest.raises(TypeError, match=r"temperatures: expected a sequence .* got array\(300"):
        units.as_temperatures(np.array(300.0))


def test_arrays_in_reverse_are_taken_like_others():
    """Frames backwards in time, or a slice of every second: torch takes no negative strides."""
    frames = np.random.default_rng(1).normal(size=(6, 2, 3))
    for view in (frames[::-1], frames[:, ::-1], frames[::-2, :, ::-1], frames[::2]):
        dataset = tsf.MDDataset(view, temperature=300.0)
        np.testing.assert_array_equal(dataset.positions.numpy(), view)
        array = units.as_array(view * unit.nanometer, unit.angstrom, "x")
        np.testing.assert_array_equal(torch.from_numpy(array), 10 * view)


def test_pressures_are_taken_as_a_context_takes_them():
    system = openmm.System()
    system.addParticle(1.0)
    force = openmm.CustomExternalForce("p*x^2")
    force.addGlobalParameter("p", 1.0)
    force.addParticle(0, [])
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001))
    potential = tsf.TorchPotential.from_system(system)
    for value in (2 * unit.atmosphere, 30 * unit.degree, 5 * STIFFNESS, np.float32(0.5)):
        context.setParameter("p", value)
        potential.set_global_parameter("p", value)
        assert potential.global_parameters["p"] == context.getParameter("p")


def test_quantities_of_tensors_are_no_tensors(subject):
    """Their unit must not be dropped: a Quantity hands out its value's attributes."""
    x, momenta, _ = subject.flow.sample(2, 300, generator())
    for call in (
        lambda q: subject.flow.log_prob(q, momenta, 300),
        lambda q: subject.flow.inverse_and_log_det(q, momenta),
        lambda q: subject.potential.energy(q),
        lambda q: subject.in_openmm.energy_and_forces(q),
        lambda q: subject.layer.inverse_and_log_det(q),
    ):
        with pytest.raises(TypeError, match=r"^x: expected a .*torch\.Tensor, got Quantity"):
            call(unit.Quantity(x, unit.angstrom))
