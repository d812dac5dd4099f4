"""When a kernel is applied, and the default sequence of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.base import Kernel
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowWalk, SteerableMap
from openmm_tsf.sampling.kernels.langevin_openmm import DynamicsPotential, OpenMMLangevin
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.pairing import Scheme
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap
from openmm_tsf.utils.validation import check_int

SWAPS = ("plain", "steered", "both")


@dataclass(frozen=True)
class Scheduled:
    """Apply a kernel `repeats` times in every `interval`-th iteration.

    The schedule is fixed beforehand and does not depend on the walkers, so the sequence is as
    exact as its members.

    Raises
    ------
    ValueError
        If a number is below 1.
    """

    kernel: Kernel
    interval: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        for name, value in (("interval", self.interval), ("repeats", self.repeats)):
            check_int(value, name)


def kernels_by_name(
    schedule: Sequence[Scheduled], temperatures: tuple[float, ...]
) -> dict[str, Kernel]:
    """The kernels of a schedule, made for this ladder and with distinct names.

    Raises
    ------
    TypeError, ValueError
        If they are not.
    """
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
    *,
    n_flow_independent: int = 1,
    n_flow_walk: int = 4,
    sigma: Any = 0.1,
    swap: str = "both",
    swap_scheme: Scheme = "even_odd",
    local_interval: int = 10,
    local_steps: int = 20,
    local_timestep: Any = 0.001,
    local_friction: Any = 1.0,
    local_metropolized: bool = True,
) -> list[Scheduled]:
    """The default sequence: flow independence, flow walks, now and then dynamics, swaps.

    All members are exact, unless ``local_metropolized=False``. Why both kinds of swap: on alanine
    dipeptide (300, 424.26, 600 K, a flow of the default size) round trips per second of one core
    were 4 with plain swaps, 12 with steered ones and 18 with both, and replicas forgot their rung
    in 10.8, 5.9 and 3.3 iterations.

    Parameters
    ----------
    potential, flow, temperatures
        What the kernels work on.
    masses
        [N] amu; None (no dynamics) for potentials that are not molecules.
    n_flow_independent, n_flow_walk
        Proposals in each iteration, which share one draw of the momenta and one inverse of the
        flow; 0 leaves the kernel out.
    sigma
        Step size of the walk before tuning.
    swap
        ``"plain"``, ``"steered"`` (through the flow) or ``"both"``; with one rung there is none.
    swap_scheme
        Which rungs trade: see :class:`openmm_tsf.sampling.kernels.pairing.Pairing`. With
        ``"even_odd"`` and both kinds of swap, one takes the even and the other the odd pairs, in
        turns.
    local_interval
        A Langevin leg every so many iterations; 0 for none.
    local_steps, local_timestep, local_friction, local_metropolized
        The leg: steps, ps, 1/ps, exact or not. It is a :class:`OpenMMLangevin` where the potential
        opens OpenMM Contexts, and a :class:`TorchLangevin` otherwise.

    Raises
    ------
    ValueError
        If `swap` is none of these.
    """
    if swap not in SWAPS:
        raise ValueError(f"swap: expected one of {SWAPS}, got {swap!r}")
    sequence: list[Scheduled] = []
    if n_flow_independent:
        draw = FlowIndependence(flow, potential, temperatures, n_steps=n_flow_independent)
        sequence.append(Scheduled(draw))
    if n_flow_walk:
        walk = FlowWalk(flow, potential, temperatures, sigma, n_steps=n_flow_walk)
        sequence.append(Scheduled(walk))
    if masses is not None and local_interval:
        # OpenMM takes the steps itself where it can; everybody else's walkers step as one batch.
        leg: Kernel
        leg_settings: dict[str, Any] = {
            "n_steps": local_steps,
            "timestep": local_timestep,
            "friction": local_friction,
            "metropolized": local_metropolized,
        }
        if isinstance(potential, DynamicsPotential):
            leg = OpenMMLangevin(potential, temperatures, masses, flow, **leg_settings)
        else:
            leg = TorchLangevin(potential, temperatures, masses, flow, **leg_settings)
        sequence.append(Scheduled(leg, interval=local_interval))
    if len(temperatures) > 1 and swap != "steered":
        plain = PlainSwap(temperatures, potential.boltzmann_constant, swap_scheme)
        sequence.append(Scheduled(plain))
    if len(temperatures) > 1 and swap != "plain":
        steered = SteeredSwap(flow, potential, temperatures, swap_scheme)
        if swap == "both":
            # One call ahead: with even-odd pairs a replica can climb two rungs an iteration,
            # and the steered swap does not take back what the plain one did.
            steered.load_state_dict({"calls": 1})
        sequence.append(Scheduled(steered))
    return sequence
