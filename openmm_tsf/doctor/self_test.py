"""A few seconds that show whether potentials and flows compute the right numbers here."""

import logging
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

#: Largest deviations from the Reference platform: energies in kJ/mol, forces relative to the
#: largest. OpenMM's other platforms compute in single precision, torch in double.
_SINGLE = (0.02, 1e-4)
_DOUBLE = (1e-7, 1e-8)
_ROUND_TRIP = 1e-6  # nm
_NOISE = 0.005  # nm
_RATE_SECONDS = 0.1
_STEP = 1e-5  # nm


@dataclass(frozen=True)
class Figure:
    """A number and what it may be at most."""

    what: str
    value: float
    limit: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.value:.1e}{self.unit} (at most {self.limit:.0e})"


@dataclass(frozen=True)
class Check:
    """One line of the self-test.

    Attributes
    ----------
    name
        What was tested.
    figures
        Numbers with their limits.
    problem
        Why the check could not be made.
    rate
        Energies with forces per second, of a potential.
    """

    name: str
    figures: tuple[Figure, ...] = ()
    problem: str | None = None
    rate: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it was made and all figures are within their limits; NaN is not."""
        return self.problem is None and all(f.value <= f.limit for f in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.name,
            "ok": self.ok,
            # JSON has no NaN and no infinity.
            "figures": {
                f.what: {
                    "value": f.value if abs(f.value) < float("inf") else None,
                    "limit": f.limit,
                }
                for f in self.figures
            },
            "problem": self.problem,
            "evaluations_per_second": self.rate,
        }

    def __str__(self) -> str:
        parts = [self.problem] if self.problem else [str(figure) for figure in self.figures]
        if self.rate is not None:
            parts.append(f"{self.rate:.0f} evaluations/s")
        return f"{'ok' if self.ok else 'FAILED':<7}{self.name}: {', '.join(parts)}"


def self_test(platforms: Sequence[str]) -> list[Check]:
    """Potentials, coordinates and an untrained flow, on perturbed alanine dipeptide.

    Parameters
    ----------
    platforms
        OpenMM platforms to compare with Reference.
    """
    checks: list[Check] = []
    for force_field in FORCE_FIELDS:
        try:
            molecule = _molecule(force_field)
        except Exception as error:
            checks.append(Check(force_field, problem=brief(error)))
            continue
        checks += _potentials(molecule, force_field, platforms)
        checks.append(_made(f"{force_field} internal coordinates", _coordinates, molecule))
        checks.append(_made(f"{force_field} untrained flow", _flow, molecule))
    return checks


def _molecule(force_field: str) -> MolecularSystem:
    logger = logging.getLogger("pymbar")  # announces itself where openmmtools imports it
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return alanine_dipeptide(force_field)
    finally:
        logger.setLevel(before)


def brief(error: BaseException) -> str:
    """An error in one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."


def _made(name: str, function: Callable[..., Check], *arguments: Any) -> Check:
    """The check, or the one that says why it could not be made."""
    try:
        return function(name, *arguments)
    except Exception as error:
        return Check(name, problem=brief(error))


def _perturbed(molecule: MolecularSystem, n: int) -> Tensor:
    noise = torch.randn(
        (n, molecule.n_atoms, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return torch.tensor(molecule.positions) + _NOISE * noise


def _potentials(molecule: MolecularSystem, label: str, platforms: Sequence[str]) -> list[Check]:
    x = _perturbed(molecule, 8)
    name = f"{label} Reference"
    try:
        with OpenMMPotential(molecule.system, "Reference", n_contexts=1) as reference:
            exact = reference.energy_and_forces(x)
            first = _made(name, _slope, reference, x, exact[1])
    except Exception as error:
        return [Check(name, problem=brief(error))]

    def on(platform: str) -> Callable[[], Potential]:
        return lambda: OpenMMPotential(molecule.system, platform, n_contexts=1)

    def torch_potential() -> Potential:
        return TorchPotential.from_system(molecule.system, positions=molecule.positions)

    others = [(p, on(p), _SINGLE) for p in platforms if p != "Reference"]
    others.append(("TorchPotential", torch_potential, _DOUBLE))
    return [first] + [
        _made(f"{label} {kind}", _agreement, build, x, exact, limits)
        for kind, build, limits in others
    ]


def _slope(name: str, potential: Potential, x: Tensor, forces: Tensor) -> Check:
    """Reference has nothing to be compared with but itself: forces with differences of energies."""
    direction = forces / forces.flatten(1).norm(dim=1)[:, None, None]
    up, down = (potential.energy(x + sign * _STEP * direction) for sign in (1, -1))
    expected = -forces.flatten(1).norm(dim=1)
    error = float(((up - down) / (2 * _STEP) / expected - 1).abs().max())
    figure = Figure("forces as the slope of the energy", error, 1e-4)
    return Check(name, (figure,), rate=_rate(potential, x))


def _agreement(
    name: str,
    build: Callable[[], Potential],
    x: Tensor,
    exact: tuple[Tensor, Tensor],
    limits: tuple[float, float],
) -> Check:
    with build() as potential:
        energies, forces = potential.energy_and_forces(x)
        energy_error = float((energies - exact[0]).abs().max())
        force_error = float((forces - exact[1]).abs().max() / exact[1].abs().max())
        return Check(
            name,
            (
                Figure("energies", energy_error, limits[0], " kJ/mol"),
                Figure("forces", force_error, limits[1]),
            ),
            rate=_rate(potential, x),
        )


def _rate(potential: Potential, x: Tensor) -> float:
    batch, count = x.repeat(8, 1, 1), 0
    potential.energy_and_forces(batch)
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < _RATE_SECONDS:
        potential.energy_and_forces(batch)
        count += len(batch)
    return count / spent


def _coordinates(name: str, molecule: MolecularSystem) -> Check:
    layer = InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    x = _perturbed(molecule, 64)
    u, inverse = layer.inverse_and_log_det(x)
    _, forward = layer.forward_and_log_det(u)
    there_and_back = float((layer.place(u, like=x) - x).abs().max())
    return Check(
        name,
        (
            Figure("there and back", there_and_back, _ROUND_TRIP, " nm"),
            Figure("log-determinants' sum", float((forward + inverse).abs().max()), 1e-8),
        ),
    )


@torch.no_grad()
def _flow(name: str, molecule: MolecularSystem) -> Check:
    frames = MDDataset(_perturbed(molecule, 256), 600.0, molecule)
    flow = TemperatureSteerableFlow.from_dataset(frames, n_blocks=2, seed=1)
    v = flow.sample_prior(32, 300.0, torch.Generator().manual_seed(2))
    (x, momenta), forward = flow.forward_and_log_det(v)
    back, inverse = flow.inverse_and_log_det(x, momenta)
    (again, _), _ = flow.forward_and_log_det(back)
    return Check(
        name,
        (
            Figure("there and back", float((again - x).abs().max()), _ROUND_TRIP, " nm"),
            Figure("log-determinants' sum", float((forward + inverse).abs().max()), 1e-8),
            # What makes it steerable: the Jacobian is the same everywhere.
            Figure("log-determinants' spread", float(forward.max() - forward.min()), 1e-7),
        ),
    )
