"""Arguments of kernels that are refused, by name."""

import pytest

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.sampling.kernels.cartesian import CartesianHMC
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.kernels.flow import FlowWalk
from openmm_tsf.sampling.kernels.langevin_torch import TorchLangevin
from openmm_tsf.sampling.kernels.latent import LatentHMC, LatentMALA
from openmm_tsf.sampling.kernels.multiple_try import FlowMultipleTry
from openmm_tsf.sampling.kernels.schedule import Scheduled
from openmm_tsf.sampling.kernels.steered_swap import SteeredSwap
from openmm_tsf.sampling.kernels.swap import PlainSwap

LADDER = (0.5, 1.0, 2.0)
NAN, INF = float("nan"), float("inf")
POSITIVE = "expected a finite, positive number"
#: Kernel, argument, values, error, message after the argument's name.
TABLE = [
    (FlowWalk, "flow", [None], TypeError, "expected a flow, got NoneType"),
    (FlowWalk, "sigma", ["a", None], TypeError, "expected"),
    (FlowWalk, "sigma", [[0.1, 0.2]], ValueError, "expected one number or 3"),
    (FlowWalk, "sigma", [-0.1], ValueError, "expected positive"),
    (LatentMALA, "sigma", [-1.0], ValueError, "expected positive"),
    (FlowWalk, "n_steps", [0, 1.5, True], ValueError, "expected an integer of at least 1"),
    (FlowWalk, "round_trip_interval", ["a", 2.5], ValueError, "expected"),
    (FlowWalk, "round_trip_walkers", [True], ValueError, "expected"),
    (FlowWalk, "round_trip_tolerance", ["a"], TypeError, "expected"),
    (FlowWalk, "round_trip_tolerance", [0.0], ValueError, "expected"),
    (FlowWalk, "name", [3], TypeError, "expected"),
    (FlowCrankNicolson, "beta", [1.0, 1, [0.5, 0.5, 1.5]], ValueError, "expected numbers below 1"),
    (FlowCrankNicolson, "beta", [0.0, -0.5, NAN], ValueError, "expected positive"),
    (FlowCrankNicolson, "beta", [[0.1, 0.2]], ValueError, "expected one number or 3"),
    (FlowCrankNicolson, "share", [0.0, 1.1, NAN], ValueError, "expected"),
    (FlowCrankNicolson, "share", ["a"], TypeError, "expected one number"),
    (FlowMultipleTry, "n_tries", [0, True, 1.5], ValueError, "expected an integer of at least 1"),
    (LatentHMC, "jitter", ["x"], TypeError, "expected one number"),
    (LatentHMC, "jitter", [1.0], ValueError, "expected a number"),
    (LatentHMC, "n_leapfrog", [0], ValueError, "expected an integer"),
    (SteeredSwap, "name", [""], TypeError, "expected"),
    (SteeredSwap, "n_steps", [2], TypeError, "a steered swap proposes once"),
    (SteeredSwap, "scheme", ["odd_even", []], ValueError, "expected"),
    (SteeredSwap, "scheme", [[(0, 3)], [(0, 1), (1, 0)], [(0, 0)]], ValueError, "expected"),
    (SteeredSwap, "scheme", [5, [1, 2], [(0, 1, 2)], [(0.0, 1.0)]], TypeError, "expected pairs"),
    (SteeredSwap, "first_pairs", ["second"], ValueError, "expected one of even, odd"),
    (PlainSwap, "scheme", ["neighbours"], ValueError, "expected one of"),
    (PlainSwap, "scheme", [5], TypeError, "expected pairs"),
    (PlainSwap, "boltzmann_constant", [0, -1, NAN, INF, "a", None], ValueError, POSITIVE),
    (CartesianHMC, "persistence", ["a"], TypeError, "expected"),
    (CartesianHMC, "persistence", [1.0], ValueError, r"expected a number in \[0, 1\)"),
    (CartesianHMC, "masses", ["a"], TypeError, "expected"),
    (CartesianHMC, "timestep", ["a"], TypeError, "expected"),
    (CartesianHMC, "timestep", [[0.001] * 2], ValueError, r"expected one number or 3, got \(2,\)"),
    (CartesianHMC, "name", [None], TypeError, "expected"),
    (CartesianHMC, "flow", [3], TypeError, "expected"),
    (CartesianHMC, "n_steps", [0, True], ValueError, "expected an integer of at least 1"),
    (CartesianHMC, "timestep", [0.0, NAN], ValueError, "expected"),
    (TorchLangevin, "n_steps", [0, True], ValueError, "expected an integer of at least 1"),
    (TorchLangevin, "timestep", [0.0, NAN, -1], ValueError, "expected"),
    (TorchLangevin, "timestep", [[0.1, 0.1, 0.1]], TypeError, "expected"),
    (TorchLangevin, "friction", ["a"], TypeError, "expected"),
    (TorchLangevin, "friction", [NAN], ValueError, "expected"),
    (TorchLangevin, "friction", [-1.0], ValueError, "expected a non-negative rate"),
    (TorchLangevin, "integrator", ["euler"], ValueError, "expected one of .*baoab.*, got 'euler'"),
]


def make(kind, **settings):
    flow, potential = TemperatureSteerableFlow(1, 2, 1, (4,)), DoubleWell(0.1, -1.0, 0.3)
    if issubclass(kind, PlainSwap):
        return kind(LADDER, **{"boltzmann_constant": 1, **settings})
    if issubclass(kind, DynamicsKernel):
        return kind(potential, LADDER, **{"masses": 1.0, **settings})
    return kind(settings.pop("flow", flow), potential, LADDER, **settings)


@pytest.mark.parametrize(
    ("kind", "name", "value", "error", "message"),
    [(kind, name, value, *rest) for kind, name, values, *rest in TABLE for value in values],
)
def test_kernels_refuse(kind, name, value, error, message):
    make(kind)
    with pytest.raises(error, match=f"^{name}: {message}"):
        make(kind, **{name: value})


def test_baoab_is_not_metropolised():
    with pytest.raises(ValueError, match="metropolized: expected False"):
        make(TorchLangevin, integrator="baoab", metropolized=True)


@pytest.mark.parametrize("interval", [0, True])
def test_intervals_are_integers(interval):
    with pytest.raises(ValueError, match="interval: expected an integer"):
        Scheduled(make(PlainSwap), interval=interval)
