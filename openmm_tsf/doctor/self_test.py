"""A quick test that potentials, coordinates and flows compute the right numbers."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials import OpenMMPotential, Potential, TorchPotential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem

FORCE_FIELDS = ("amber99sbildn-obc2", "ff96-obc1")

#: The largest accepted deviations from the Reference platform: of energies in kJ/mol, and of forces
#: relative to the largest force. OpenMM's other platforms compute in single precision, torch in
#: double.
_SINGLE_PRECISION = (0.02, 1e-4)
_DOUBLE_PRECISION = (1e-7, 1e-8)
_ROUND_TRIP = 1e-6  # nm
_NOISE = 0.005  # nm
_STEP = 1e-5  # nm
#: The duration of a measurement of the speed of a potential.
RATE_SECONDS = 0.1


@dataclass(frozen=True)
class Deviation:
    """An error that was measured, and the largest accepted one."""

    name: str
    value: float
    limit: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1e}{self.unit} (at most {self.limit:.0e})"


@dataclass(frozen=True)
class SelfTestResult:
    """The result of one test: errors with their limits, or the reason why it could not be run.

    `rate` is the number of energies with forces per second of a potential.
    """

    name: str
    deviations: tuple[Deviation, ...] = ()
    problem: str | None = None
    rate: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the test was run and all deviations are within their limits; NaN is not."""
        return self.problem is None and all(d.value <= d.limit for d in self.deviations)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return {
            "name": self.name,
            "ok": self.ok,
            "figures": {  # JSON has neither NaN nor infinity
                d.name: {"value": d.value if math.isfinite(d.value) else None, "limit": d.limit}
                for d in self.deviations
            },
            "problem": self.problem,
            "evaluations_per_second": self.rate,
        }

    def __str__(self) -> str:
        parts = [self.problem] if self.problem else list(map(str, self.deviations))
        if self.rate is not None:
            parts.append(f"{self.rate:.0f} evaluations/s")
        return f"{'ok' if self.ok else 'FAILED':<7}{self.name}: {', '.join(parts)}"


def self_test(platforms: Sequence[str]) -> list[SelfTestResult]:
    """Test potentials, coordinates and an untrained flow on perturbed alanine dipeptide.

    Energies of the OpenMM `platforms` are compared with those of Reference.
    """
    results: list[SelfTestResult] = []
    for force_field in FORCE_FIELDS:
        try:
            molecule = _build_molecule(force_field)
        except Exception as error:
            results.append(SelfTestResult(force_field, problem=summarize_error(error)))
            continue
        results += _test_potentials(molecule, force_field, platforms)
        name = f"{force_field} internal coordinates"
        results.append(_run_test(name, _test_coordinates, molecule))
        results.append(_run_test(f"{force_field} untrained flow", _test_flow, molecule))
    return results


def _build_molecule(force_field: str) -> MolecularSystem:
    logger = logging.getLogger("pymbar")  # logs a banner when openmmtools imports it
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return alanine_dipeptide(force_field)
    finally:
        logger.setLevel(level)


def summarize_error(error: BaseException) -> str:
    """Return the type and message of an error in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def _run_test(name: str, test: Callable[..., SelfTestResult], *arguments: Any) -> SelfTestResult:
    try:
        return test(name, *arguments)
    except Exception as error:
        return SelfTestResult(name, problem=summarize_error(error))


def _perturbed_positions(molecule: MolecularSystem, n: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(1)
    noise = torch.randn(
        (n, molecule.n_atoms, 3), generator=generator, dtype=torch.float64, device="cpu"
    )
    return torch.tensor(molecule.positions, dtype=torch.float64, device="cpu") + _NOISE * noise


def _test_potentials(
    molecule: MolecularSystem, label: str, platforms: Sequence[str]
) -> list[SelfTestResult]:
    x = _perturbed_positions(molecule, 8)
    name = f"{label} Reference"
    try:
        with OpenMMPotential(molecule.system, "Reference", n_contexts=1) as reference:
            exact = reference.energy_and_forces(x)
            first = _run_test(name, _compare_with_differences, reference, x, exact[1])
    except Exception as error:
        return [SelfTestResult(name, problem=summarize_error(error))]

    def on(platform: str) -> Callable[[], Potential]:
        return lambda: OpenMMPotential(molecule.system, platform, n_contexts=1)

    def torch_potential() -> Potential:
        return TorchPotential.from_system(molecule.system, positions=molecule.positions)

    others = [(p, on(p), _SINGLE_PRECISION) for p in platforms if p != "Reference"]
    others.append(("TorchPotential", torch_potential, _DOUBLE_PRECISION))
    return [first] + [
        _run_test(f"{label} {name}", _compare_with_reference, build, x, exact, limits)
        for name, build, limits in others
    ]


def _compare_with_differences(
    name: str, potential: Potential, x: Tensor, forces: Tensor
) -> SelfTestResult:
    """Compare forces with differences of energies, for lack of another reference."""
    direction = forces / forces.flatten(1).norm(dim=1)[:, None, None]
    up, down = (potential.energy(x + sign * _STEP * direction) for sign in (1, -1))
    expected = -forces.flatten(1).norm(dim=1)
    error = float(((up - down) / (2 * _STEP) / expected - 1).abs().max())
    deviation = Deviation("forces and the gradient of the energy", error, 1e-4)
    return SelfTestResult(name, (deviation,), rate=_measure_rate(potential, x))


def _compare_with_reference(
    name: str,
    build: Callable[[], Potential],
    x: Tensor,
    exact: tuple[Tensor, Tensor],
    limits: tuple[float, float],
) -> SelfTestResult:
    with build() as potential:
        energies, forces = potential.energy_and_forces(x)
        energy_error = float((energies - exact[0]).abs().max())
        force_error = float((forces - exact[1]).abs().max() / exact[1].abs().max())
        deviation = Deviation("energies", energy_error, limits[0], " kJ/mol")
        deviations = (deviation, Deviation("forces", force_error, limits[1]))
        return SelfTestResult(name, deviations, rate=_measure_rate(potential, x))


def _measure_rate(potential: Potential, x: Tensor) -> float:
    batch, count = x.repeat(8, 1, 1), 0
    potential.energy_and_forces(batch)
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < RATE_SECONDS:
        potential.energy_and_forces(batch)
        count += len(batch)
    return count / seconds


def _test_coordinates(name: str, molecule: MolecularSystem) -> SelfTestResult:
    layer = InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    x = _perturbed_positions(molecule, 64)
    u, inverse = layer.inverse_and_log_det(x)
    _, forward = layer.forward_and_log_det(u)
    x_again = layer.place(u, like=x)
    return SelfTestResult(name, _round_trip(x_again - x, forward + inverse))


def _round_trip(difference: Tensor, log_det_sum: Tensor) -> tuple[Deviation, ...]:
    return (
        Deviation("round trip", float(difference.abs().max()), _ROUND_TRIP, " nm"),
        Deviation("log-determinants' sum", float(log_det_sum.abs().max()), 1e-8),
    )


@torch.no_grad()
def _test_flow(name: str, molecule: MolecularSystem) -> SelfTestResult:
    frames = MDDataset(_perturbed_positions(molecule, 256), 600.0, molecule)
    flow = TemperatureSteerableFlow.from_dataset(frames, n_blocks=2, seed=1, check=False)
    v = flow.sample_prior(32, 300.0, torch.Generator(device="cpu").manual_seed(2))
    (x, momenta), forward = flow.forward_and_log_det(v)
    v_again, inverse = flow.inverse_and_log_det(x, momenta)
    (x_again, _), _ = flow.forward_and_log_det(v_again)
    # A steerable flow has a constant Jacobian determinant.
    spread = Deviation("log-determinants' spread", float(forward.max() - forward.min()), 1e-7)
    return SelfTestResult(name, (*_round_trip(x_again - x, forward + inverse), spread))
