"""Configurations that walkers start from: checks, velocities, a minimised conformation."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
import torch
from torch import Generator, Tensor

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies
from openmm_tsf.sampling.kernels.base import SteerableMap, device_of_map
from openmm_tsf.sampling.kernels.dynamics import mass_per_coordinate
from openmm_tsf.sampling.kernels.langevin_openmm import DynamicsPotential
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.constrained import project_frames
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import NANOMETER, PICOSECOND, as_array
from openmm_tsf.utils.devices import describe_device

logger = logging.getLogger(__name__)

_FIELDS = {"x", "velocities", "energy", "replica", "iteration"}


def starting_state(
    x: Any,
    velocities: Any,
    n_walkers: int,
    temperatures: tuple[float, ...],
    flow: SteerableMap,
    potential: Potential,
    molecule: MolecularSystem | None = None,
) -> WalkerState:
    """Return walkers at configurations x [W, R, *event]; see `TemperingChain.set_positions`."""
    shape = (n_walkers, len(temperatures), *potential.event_shape)
    device = device_of_map(flow)
    x = torch.from_numpy(as_array(x, NANOMETER, "x")).clone().to(device)
    if tuple(x.shape) != shape:
        raise ValueError(f"x: expected shape {shape}, got {tuple(x.shape)}")
    flat = x.flatten(0, 1)
    if molecule is not None and molecule.constraints is not None:
        flat = project_frames(molecule.constraints, molecule.topology, flat.cpu(), "x").to(device)
        x = flat.reshape(shape)
    with torch.no_grad():
        energy = energies.energy(potential, flat)
        momenta = torch.zeros(len(flat), flow.n_momenta, dtype=flow.dtype, device=device)
        _, log_det = flow.inverse_and_log_det(flat.to(flow.dtype), momenta)
        log_det = log_det.masked_fill(flow.is_mirror_image(flat.to(flow.dtype)), -torch.inf)
    for what, values in (
        ("a non-finite energy", energy),
        ("a point outside the flow's domain (a mirror image, or not computable)", log_det),
    ):
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if len(bad):
            walker, rung = divmod(int(bad[0]), len(temperatures))
            raise ValueError(
                f"x: {len(bad)} of {len(flat)} configurations start at {what}, "
                f"the first is walker {walker} at {temperatures[rung]:.2f} K"
            )
    if velocities is not None:
        speeds = as_array(velocities, NANOMETER / PICOSECOND, "velocities")
        velocities = torch.from_numpy(speeds).clone().to(device)
        if tuple(velocities.shape) != shape:
            raise ValueError(f"velocities: expected shape {shape}, got {tuple(velocities.shape)}")
        if not bool(torch.isfinite(velocities).all()):
            raise ValueError("velocities: expected finite numbers, got NaN or infinity")
    replica = torch.arange(shape[1], dtype=torch.int64, device=device).repeat(shape[0], 1)
    return WalkerState(x, velocities, energy.reshape(shape[:2]), replica)


def with_velocities(
    state: WalkerState,
    temperatures: tuple[float, ...],
    potential: Potential,
    masses: Tensor,
    generator: Generator,
) -> WalkerState:
    """Draw velocities of the walkers from the Maxwell-Boltzmann distribution of every rung."""
    kt = potential.boltzmann_constant * torch.tensor(
        temperatures, dtype=torch.float64, device=state.x.device
    )
    return state.evolve(velocities=maxwell_boltzmann(tuple(state.x.shape), kt, masses, generator))


def restored_state(
    content: Any, n_walkers: int, n_rungs: int, potential: Potential, device: torch.device
) -> WalkerState:
    """Return the walkers of a checkpoint, on a device."""
    if not isinstance(content, dict) or content.keys() != _FIELDS:
        raise ValueError(f"checkpoint: expected walkers with {', '.join(sorted(_FIELDS))}")
    event, pair = tuple(potential.event_shape), (n_walkers, n_rungs)
    shapes = {"x": (*pair, *event), "velocities": (*pair, *event), "energy": pair, "replica": pair}
    for name, shape in shapes.items():
        value, dtype = content[name], torch.int64 if name == "replica" else torch.float64
        if name == "velocities" and value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype != dtype:
            raise ValueError(f"checkpoint: expected {name} as {dtype} of shape {list(shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"checkpoint: expected finite {name}")
    if not isinstance(content["iteration"], int) or content["iteration"] < 0:
        raise ValueError(f"checkpoint: expected a count of iterations, got {content['iteration']}")
    rungs = torch.arange(n_rungs, dtype=torch.int64, device="cpu")
    if not bool((content["replica"].sort(dim=1).values == rungs).all()):
        raise ValueError("checkpoint: expected each replica once in every walker")
    state = WalkerState.from_state_dict(content).to(device)
    with torch.no_grad():
        energy = energies.energy(potential, state.x.flatten(0, 1)).reshape(pair)
    # A platform of single precision may continue the run of another one.
    wrong = ~((energy - state.energy).abs() <= 0.1 + 1e-4 * state.energy.abs())
    if bool(wrong.any()):
        raise ValueError(
            f"checkpoint: {int(wrong.sum())} of {wrong.numel()} energies are not those of their "
            "configurations; it is damaged, or of another System"
        )
    return state


def check_generator(content: Mapping[str, Any], generator: Generator) -> None:
    """Refuse the state of another kind of generator; warn of another device of the same kind."""
    before, now = content.get("generator_device", "cpu"), generator.device.type
    if before != now:
        raise ValueError(
            f"device: this run draws its random numbers on {before!r}, whose generator cannot be "
            f"continued on {now!r}; resume it with device={before!r}"
        )
    described = content.get("device", before)
    if described != (device := describe_device(generator.device)):
        logger.warning("continued on %s: samples up to here are of %s", device, described)


def maxwell_boltzmann(
    shape: tuple[int, ...], kt: Tensor, masses: Any, generator: Generator
) -> Tensor:
    """Draw velocities [W, R, *event] in nm/ps at kT [R] in kJ/mol, for masses in amu."""
    mass = mass_per_coordinate(masses, shape[2:]).to(kt.device)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=kt.device)
    return noise * (kt.reshape(-1, *(1,) * mass.ndim) / mass).sqrt()


def minimised(potential: Potential, molecule: MolecularSystem) -> np.ndarray:
    """Return positions [N, 3] in nm after at most 200 steps of OpenMM's local minimiser.

    Constrained distances have their values.
    It runs in a Context of the potential if that makes any, otherwise in one of the molecule's
    System: on the CPU platform, with one thread so that the result is reproducible.
    """
    integrator = openmm.VerletIntegrator(0.001)
    if isinstance(potential, DynamicsPotential):
        context = potential.make_context(integrator)
    else:
        # Not Reference: it takes minutes for a peptide of ten residues with a CustomGBForce.
        platform = openmm.Platform.getPlatformByName("CPU")
        properties = {"Threads": "1", "DeterministicForces": "true"}
        context = openmm.Context(molecule.system, integrator, platform, properties)
    context.setPositions(molecule.positions)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    state = context.getState(getPositions=True)
    x = np.asarray(state.getPositions(asNumpy=True)._value)
    if molecule.constraints is None:
        return x
    return molecule.constraints.project(torch.from_numpy(x)[None])[0].numpy()
