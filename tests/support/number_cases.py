"""Arguments of every public function that takes numbers, and what is called with them."""

import dataclasses

import numpy as np
import openmm
import openmm.unit as unit
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf import kernels, units
from openmm_tsf.analysis import importance_thermodynamics
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.potentials import DoubleWell
from tests.support.exact_cases import the_tree, tree_flow
from tests.support.exact_tree import POSITIONS

N_FRAMES = 400
DYNAMICS = (kernels.TorchLangevin, kernels.OpenMMLangevin)

#: As scalars that are not Python's. float16 and int8 hold the values below.
SCALARS = {
    "numpy scalar": lambda value: np.asarray(value)[()],
    "small numpy scalar": lambda value: small(value)[()],
    "array": np.asarray,
    "small array": lambda value: small(value),
    "tensor": lambda value: torch.tensor(value, device="cpu", dtype=tensor_dtype(value)),
}


def small(value):
    kinds = {bool: np.bool_, int: np.int32, float: np.float32}
    return np.asarray(value, dtype=kinds[type(value)])


def tensor_dtype(value):
    return {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]


def generator():
    return torch.Generator(device="cpu").manual_seed(1)


class Subject:
    """What the functions below are called on: a molecule of seven atoms and model potentials."""

    def __init__(self, folder):
        tree = the_tree()
        self.system, self.topology, self.positions = tree.system(), tree.topology, POSITIONS
        self.masses = tree.system_masses = np.array(
            [self.system.getParticleMass(i).value_in_unit(unit.amu) for i in range(7)]
        )
        self.molecule = tsf.MolecularSystem(self.system, self.topology, POSITIONS)
        self.potential = self.molecule.potential()
        self.in_openmm = self.molecule.potential("openmm", platform="Reference", n_contexts=1)
        self.flow = tree_flow("tsf-volume")
        self.layer = tsf.InternalCoordinates.from_topology(self.topology, POSITIONS)
        noise = torch.randn(N_FRAMES, 7, 3, dtype=torch.float64, generator=generator())
        self.frames = POSITIONS + 1e-3 * noise.numpy()
        self.well = DoubleWell(0.1, -1.0, 0.3)
        self.toy_flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
        self.toys = self.toy_flow, self.well
        self.ladder = (1.0, 2.0)
        sampler = self.toy_sampler()
        sampler.run(8, folder / "run", progress=False)
        self.run = tsf.load_run(folder / "run")
        random = np.random.default_rng(1)
        self.energy, self.log_weights = random.normal(size=(50, 4)), random.normal(size=50)
        self.folder = folder

    def toy_sampler(self, **changes):
        walk = kernels.FlowWalk(*self.toys, self.ladder)
        arguments = {"n_walkers": 4, "kernels": [walk], "potential": self.well, "seed": 1}
        sampler = tsf.ParallelTempering(None, self.toy_flow, self.ladder, **arguments | changes)
        zeros = torch.zeros(sampler.n_walkers, 2, 1, dtype=torch.float64)
        sampler.set_positions(zeros)
        return sampler

    def sampler(self):
        swap = kernels.PlainSwap((300.0, 400.0), units.KB)
        arguments = {"n_walkers": 2, "kernels": [swap], "potential": self.potential, "seed": 1}
        return tsf.ParallelTempering(self.molecule, self.flow, (300.0, 400.0), **arguments)

    def started(self, x=None, velocities=None):
        sampler = self.sampler()
        sampler.set_positions(np.tile(POSITIONS, (2, 2, 1, 1)) if x is None else x, velocities)
        state = sampler.state
        return (state.x, state.velocities, state.energy)

    def weighted(self, **changes):
        arguments = {"temperature": 300.0, "boltzmann_constant": units.KB}
        arguments |= {"log_weights": self.log_weights, "energy": self.energy[:, 0]}
        estimate = importance_thermodynamics(**arguments | changes)
        return (estimate.temperature, *estimate.energy, *estimate.heat_capacity)

    def fitted(self, **changes):
        frames = self.well.sample(100, 1.0, generator())
        sizes = {"n_steps": 1, "batch_size": 4, "kl_batch_size": 4, "n_validation_draws": 4}
        settings = tsf.FitSettings(**sizes)
        flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
        arguments = {"settings": settings, "progress": False, "seed": 5} | changes
        return tsf.fit(flow, tsf.MDDataset(frames, 1.0), self.well, **arguments).best.score

    def parameter(self, value):
        system = openmm.System()
        system.addParticle(1.0)
        system.addParticle(1.0)
        force = openmm.CustomBondForce("k*r^2")
        force.addGlobalParameter("k", 1.0)
        force.addBond(0, 1, [])
        system.addForce(force)
        potential = tsf.TorchPotential.from_system(system)
        potential.set_global_parameter("k", value)
        return potential.global_parameters

    def cuts(self, cuts):
        self.layer.set_branch_cuts(cuts)
        return self.layer.branch_cuts.clone()

    def fitted_cuts(self, angles):
        return self.layer.fit_branch_cuts(angles).clone()

    def kernel(self, kind, **changes):
        arguments = {"temperatures": (300.0, 400.0), "masses": self.masses}
        potential = self.in_openmm if kind is kernels.OpenMMLangevin else self.potential
        kernel = kind(potential, **arguments | changes)
        sizes = kernel.sigma if hasattr(kernel, "sigma") else kernel.timestep
        width = kernel.velocity_width(torch.ones(1, dtype=torch.float64))
        if hasattr(kernel, "close"):
            kernel.close()
        return kernel.settings(), sizes, width, kernel.temperatures

    def of_sequence(self, **changes):
        arguments = {"temperatures": (300.0, 400.0), "masses": self.masses}
        settings = kernels.SequenceSettings(**changes.pop("settings", {}))
        sequence = kernels.default_kernels(
            self.in_openmm, self.flow, settings=settings, **arguments | changes
        )
        for scheduled in sequence:
            if hasattr(scheduled.kernel, "close"):
                scheduled.kernel.close()
        return [(entry.interval, entry.kernel.settings()) for entry in sequence]


def plain(result):
    """What was returned as lists of numbers, which JSON can hold as they are."""
    if isinstance(result, (torch.Tensor, np.ndarray)):
        return result.tolist()
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return plain(to_plain_data(result))
    if isinstance(result, dict):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [plain(value) for value in result]
    return result


def flat(value):
    """The numbers in a plain result in order, all else as it is."""
    if isinstance(value, dict):
        return flat(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [value]


def assert_alike(one, other):
    one, other = flat(one), flat(other)
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        if isinstance(first, float) and not isinstance(second, str):
            assert second == pytest.approx(first, rel=1e-9, abs=1e-12, nan_ok=True)
        else:
            assert first == second


def rows(table):
    return [pytest.param(*row[1:], id=f"{row[0]}-{row[2]}") for row in table]
