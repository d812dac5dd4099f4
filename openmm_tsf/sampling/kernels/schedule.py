"""When a kernel is applied, and the default sequence of kernels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from openmm_tsf.potentials.base import HasSinglePrecision, Potential
from openmm_tsf.sampling.kernels.base import Kernel, SteerableMap, device_of_map
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk
from openmm_tsf.sampling.kernels.langevin_openmm import DynamicsPotential, OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.pairing import Scheme
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import check_bool, check_choice, check_fields, check_int

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scheduled:
    """A kernel with its schedule: `repeats` applications every `interval` iterations.

    The schedule does not depend on the walkers, so a sequence is as exact as its members.

    Parameters
    ----------
    kernel
        The kernel.
    interval, repeats
        Iterations from one application to the next, from iteration 0 on; applications in each.

    Examples
    --------
    >>> from openmm_tsf.sampling.kernels import PlainSwap, Scheduled
    >>> swap = PlainSwap((1.0, 2.0), boltzmann_constant=1.0)
    >>> Scheduled(swap, interval=10).repeats
    1
    """

    kernel: Kernel
    interval: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        check_fields(self, interval=check_int, repeats=check_int)


@dataclass(frozen=True)
class SequenceSettings:
    """Settings of :func:`default_kernels`.

    Parameters
    ----------
    n_flow_independent, n_flow_crank_nicolson, n_flow_walk
        The numbers of proposals in each iteration, 0 for none.
    beta, sigma
        The step sizes of Crank-Nicolson steps and of the walk before tuning.
    swap
        ``"plain"``, ``"steered"`` (through the flow) or ``"both"``; with one rung there is none.
    swap_scheme
        Which rungs exchange: see :class:`openmm_tsf.sampling.kernels.pairing.Pairing`.
    local_interval, local_steps, local_timestep, local_friction, local_metropolized
        Langevin dynamics: iterations between two applications (0 for none), steps, ps, 1/ps, and
        whether it is exact. The time step is for hydrogens of 4 amu
        (``MolecularSystem.dynamics_masses``), or constrained bonds to them.

    Examples
    --------
    >>> from openmm_tsf.sampling.kernels import SequenceSettings
    >>> SequenceSettings(n_flow_walk=1, swap="steered").local_interval
    2
    """

    n_flow_independent: int = 1
    n_flow_crank_nicolson: int = 0
    n_flow_walk: int = 4
    beta: Any = 0.5
    sigma: Any = 0.1
    swap: str = "both"
    swap_scheme: Scheme = "even_odd"
    local_interval: int = 2
    local_steps: int = 25
    local_timestep: Any = 0.002
    local_friction: Any = 1.0
    local_metropolized: bool = True

    def __post_init__(self) -> None:
        check_count = partial(check_int, least=0)
        check_fields(
            self,
            n_flow_independent=check_count,
            n_flow_crank_nicolson=check_count,
            n_flow_walk=check_count,
            swap=partial(check_choice, allowed=("plain", "steered", "both")),
            local_interval=check_count,
            local_metropolized=check_bool,
        )


def kernels_by_name(
    schedule: Sequence[Scheduled], temperatures: tuple[float, ...]
) -> dict[str, Kernel]:
    """Return the kernels of a schedule by name; all for this ladder, with distinct names."""
    named: dict[str, Kernel] = {}
    for kernel in (entry.kernel for entry in schedule):
        if not isinstance(kernel, Kernel):
            raise TypeError(f"kernels: expected kernels, got {type(kernel).__name__}")
        if kernel.temperatures != temperatures:
            raise ValueError(
                f"kernels: {kernel.name} was made for the temperatures {kernel.temperatures}, "
                f"expected {temperatures}"
            )
        if named.setdefault(kernel.name, kernel) is not kernel:
            raise ValueError(f"kernels: expected distinct names, got {kernel.name!r} twice")
    if not named:
        raise ValueError("kernels: expected at least one, got none")
    return named


def default_kernels(
    potential: Potential,
    flow: SteerableMap,
    temperatures: Any,
    masses: Any = None,
    settings: SequenceSettings | None = None,
) -> list[Scheduled]:
    """Return the default sequence: dynamics, proposals through the flow, swaps.

    All members are exact, unless ``local_metropolized=False``. Why both kinds of swap: on alanine
    dipeptide (300, 424.26, 600 K, a flow of the default size) round trips per second of one core
    were 4 with plain swaps, 12 with steered ones and 18 with both, and the correlation time of a
    replica's rung was 10.8, 5.9 and 3.3 iterations. A basin that the flow draws far too rarely is
    entered and left by dynamics and by plain swaps alone: with few of either, its population at the
    lower rungs is wrong without a sign of it.

    Parameters
    ----------
    potential, flow, temperatures
        The target of the kernels. Dynamics is :class:`OpenMMLangevin` where the potential opens
        OpenMM Contexts, and :class:`TorchLangevin` otherwise and for molecules with constraints.
    masses
        [N] amu; None (no dynamics) for potentials that are not molecules.
    settings
        The defaults of :class:`SequenceSettings` if None.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    >>> settings = tsf.kernels.SequenceSettings(n_flow_walk=2, swap="plain")
    >>> sequence = tsf.kernels.default_kernels(
    ...     DoubleWell(0.1, -1.0, 0.3), flow, (1.0, 2.0), settings=settings
    ... )
    >>> [scheduled.kernel.name for scheduled in sequence]
    ['flow_independent', 'flow_walk', 'swap_plain']
    """
    chosen = SequenceSettings() if settings is None else settings
    temperatures = as_temperatures(temperatures)
    sequence: list[Scheduled] = []
    # Kernels through the flow follow each other, so that one inverse of the flow serves them all.
    if masses is not None and chosen.local_interval:
        numbers = (chosen.local_steps, chosen.local_timestep, chosen.local_friction)
        parts = (potential, temperatures, masses, flow, *numbers, chosen.local_metropolized)
        # With constraints RATTLE in torch, whose steps are checked to be reversible.
        constrained = getattr(flow.coordinates, "constraints", None) is not None
        by_openmm = isinstance(potential, DynamicsPotential) and not constrained
        kind: Any = OpenMMLangevin if by_openmm else TorchLangevin
        device = device_of_map(flow)
        if by_openmm and device.type != "cpu":
            logger.warning(
                "dynamics by OpenMM's Contexts, one walker after the other, although the flow is "
                "on %s; a TorchPotential there runs all of them as one batch",
                device,
            )
        if isinstance(potential, HasSinglePrecision) and potential.dtype == torch.float64:
            kind = partial(kind, single_precision=chosen.local_metropolized)
        sequence.append(Scheduled(kind(*parts), interval=chosen.local_interval))
    if n_steps := chosen.n_flow_independent:
        independent = FlowIndependence(flow, potential, temperatures, n_steps=n_steps)
        sequence.append(Scheduled(independent))
    if n_steps := chosen.n_flow_crank_nicolson:
        step = FlowCrankNicolson(flow, potential, temperatures, chosen.beta, n_steps=n_steps)
        sequence.append(Scheduled(step))
    if n_steps := chosen.n_flow_walk:
        walk = FlowWalk(flow, potential, temperatures, chosen.sigma, n_steps=n_steps)
        sequence.append(Scheduled(walk))
    if len(temperatures) > 1 and chosen.swap != "plain":
        # Beside a plain swap the other pairs: a replica can then climb two rungs an iteration, and
        # the steered swap does not reverse the plain one.
        first = "odd" if chosen.swap == "both" else "even"
        swap = SteeredSwap(flow, potential, temperatures, chosen.swap_scheme, first_pairs=first)
        sequence.append(Scheduled(swap))
    if len(temperatures) > 1 and chosen.swap != "steered":
        constant, scheme = potential.boltzmann_constant, chosen.swap_scheme
        sequence.append(Scheduled(PlainSwap(temperatures, constant, scheme)))
    return sequence
