"""Coulomb, Lennard-Jones and OpenMM's built-in generalised Born model.

With a cutoff, the terms of `cutoff` are used.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_tsf.potentials.forces.base import NotCovered, Term
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch
from openmm_tsf.units import in_unit

#: 1 / (4 pi epsilon_0) in kJ nm / (mol e^2): OpenMM's value, SimTKOpenMMRealType.h.
COULOMB = 138.93545764438198

_CHARGE = unit.elementary_charge
#: Those of GBSAOBCForce have the same numbers.
_METHODS = (openmm.NonbondedForce.NoCutoff, openmm.NonbondedForce.CutoffNonPeriodic)


class NonbondedTerm(Term):
    """Coulomb and Lennard-Jones over all pairs, exceptions and parameter offsets included."""

    def __init__(self, force: openmm.NonbondedForce, pairs: AllPairs) -> None:
        super().__init__()
        if force.getNonbondedMethod() not in _METHODS:
            raise NotCovered(force, "a nonbondedMethod other than NoCutoff and CutoffNonPeriodic")
        names = [force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())]
        particles, particle_offsets = _read_particles(force, names)
        is_exception, exceptions, exception_offsets = _read_exceptions(force, names, pairs)
        self.parameter_names = tuple(names)
        self.has_offsets = bool(particle_offsets.any() or exception_offsets.any())
        self.register(rows=pairs.dense_row_numbers(), first=pairs.first, second=pairs.second)
        self.register(particles=particles, particle_offsets=particle_offsets)
        self.register(is_exception=is_exception[:, None], exceptions=exceptions[:, :, None])
        self.register(exception_offsets=exception_offsets[:, :, :, None])
        coulomb, twelve, six = self._coefficients(self.particles, self.exceptions)
        self.register(coulomb=coulomb, twelve=twelve, six=six)
        # Pairs that never interact may be at the same point: their distances are increased.
        never = is_exception & (exceptions[0] == 0) & (exceptions[2] == 0)
        never &= (exception_offsets == 0).flatten(0, 1).all(dim=0)
        padded = torch.cat([never.double(), torch.zeros(1, dtype=torch.float64, device="cpu")])
        self.register_buffer("added_distance", padded[self.rows][:, :, None])

    rows: Tensor
    first: Tensor
    second: Tensor
    is_exception: Tensor
    particles: Tensor
    particle_offsets: Tensor
    exceptions: Tensor
    exception_offsets: Tensor
    coulomb: Tensor
    twelve: Tensor
    six: Tensor
    added_distance: Tensor

    def _coefficients(self, particles: Tensor, exceptions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coefficients [N, N, 1] of 1/r, 1/r^12 and -1/r^6 (Lorentz-Berthelot), half
        for each order of a pair."""
        one, two = particles[:, self.first, None], particles[:, self.second, None]
        qq = torch.where(self.is_exception, exceptions[0], one[0] * two[0])
        sigma = torch.where(self.is_exception, exceptions[1], 0.5 * (one[1] + two[1]))
        epsilon = torch.where(self.is_exception, exceptions[2], (one[2] * two[2]).sqrt())
        six = 4 * epsilon * sigma**6
        table = 0.5 * torch.stack([COULOMB * qq, six * sigma**6, six])
        # One more row of zeros, for the diagonal.
        padded = torch.cat([table, table.new_zeros(3, 1, 1)], dim=1)
        coulomb, twelve, six = padded[:, self.rows]
        return coulomb, twelve, six

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        coefficients = self.coulomb, self.twelve, self.six
        if self.has_offsets:
            particles, exceptions = self.particles, self.exceptions
            for index, name in enumerate(self.parameter_names):
                particles = particles + parameters[name] * self.particle_offsets[index]
                exceptions = exceptions + parameters[name] * self.exception_offsets[index]
            coefficients = self._coefficients(particles, exceptions)
        return self.sum_of_pairs(batch.dense_distances + self.added_distance, *coefficients)

    def sum_of_pairs(self, r: Tensor, *coefficients: Tensor) -> Tensor:
        """Return the energies [B] of distances [N, N, B] and the coefficients of the pairs."""
        return cast(Tensor, _CoulombLennardJones.apply(r, *coefficients))


class _CoulombLennardJones(torch.autograd.Function):
    """Sums [B] over pairs [N, N, B], with the derivative in closed form, again differentiable."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, coulomb: Tensor, twelve: Tensor, six: Tensor) -> Tensor:
        ctx.save_for_backward(r, coulomb, twelve, six)
        inverse = 1 / r
        sixth = sixth_power(inverse)
        return sum_pairs(coulomb * inverse + (twelve * sixth - six) * sixth)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        r, coulomb, twelve, six = ctx.saved_tensors
        inverse = 1 / r
        sixth = sixth_power(inverse)
        decrease = coulomb * inverse + (12 * twelve * sixth - 6 * six) * sixth
        return -grads[0] * decrease * inverse, None, None, None


def sixth_power(x: Tensor) -> Tensor:
    """Return the sixth power of x."""
    square = x * x
    return square * square * square


def sum_pairs(values: Tensor) -> Tensor:
    """Return the sums [B] of [N, N, B]."""
    return values.flatten(0, 1).sum(dim=0)


def _numbers(values: Iterable[Any], charge_unit: unit.Unit = _CHARGE) -> Tensor:
    """Return a charge (or product of charges), sigma and epsilon in internal units, [3]."""
    units = charge_unit, unit.nanometer, unit.kilojoule_per_mole
    names = "charge", "sigma", "epsilon"
    numbers = map(in_unit, values, units, names)
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64, device="cpu")


def _read_particles(force: openmm.NonbondedForce, names: list[str]) -> tuple[Tensor, Tensor]:
    """Return the particles' charge, sigma and epsilon [3, N], and offsets [parameter, 3, N]."""
    n_atoms = force.getNumParticles()
    particles = torch.zeros(3, n_atoms, dtype=torch.float64, device="cpu")
    for i in range(n_atoms):
        particles[:, i] = _numbers(force.getParticleParameters(i))
    offsets = torch.zeros(len(names), 3, n_atoms, dtype=torch.float64, device="cpu")
    for index in range(force.getNumParticleParameterOffsets()):
        name, i, *scales = force.getParticleParameterOffset(index)
        offsets[names.index(name), :, i] += _numbers(scales)
    return particles, offsets


def _read_exceptions(
    force: openmm.NonbondedForce, names: list[str], pairs: AllPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which pairs [P] are exceptions, their charge product, sigma and epsilon [3, P], and
    offsets [parameter, 3, P]."""
    n_pairs, squared = len(pairs.first), _CHARGE**2
    is_exception = torch.zeros(n_pairs, dtype=torch.bool, device="cpu")
    exceptions = torch.zeros(3, n_pairs, dtype=torch.float64, device="cpu")
    rows = []
    for index in range(force.getNumExceptions()):
        i, j, *values = force.getExceptionParameters(index)
        first, second = torch.tensor([i, j], dtype=torch.int64, device="cpu")
        row = int(pairs.row_numbers(first, second))
        rows.append(row)
        is_exception[row] = True
        exceptions[:, row] = _numbers(values, squared)
    offsets = torch.zeros(len(names), 3, n_pairs, dtype=torch.float64, device="cpu")
    for index in range(force.getNumExceptionParameterOffsets()):
        name, exception, *scales = force.getExceptionParameterOffset(index)
        offsets[names.index(name), :, rows[exception]] += _numbers(scales, squared)
    return is_exception, exceptions, offsets


class GBSAOBCTerm(Term):
    """Generalised Born of Onufriev, Bashford and Case (OBC2) with OpenMM's surface-area term."""

    def __init__(self, force: openmm.GBSAOBCForce, pairs: AllPairs) -> None:
        super().__init__()
        if force.getNonbondedMethod() not in _METHODS:
            raise NotCovered(force, "a nonbondedMethod other than NoCutoff and CutoffNonPeriodic")
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        values = [
            [q.value_in_unit(_CHARGE), r.value_in_unit(unit.nanometer), s] for q, r, s in rows
        ]
        charge, radius, scale = torch.tensor(values, dtype=torch.float64, device="cpu").T
        offset_radius = radius - 0.009
        inverse = 1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric()
        per_area = unit.kilojoule_per_mole / unit.nanometer**2
        gamma = force.getSurfaceAreaEnergy().value_in_unit(per_area)
        # 4 pi gamma (r + probe)^2 r^6, to be divided by B^6.
        surface = 4 * torch.pi * gamma * (radius + 0.14) ** 2 * radius**6
        self.register(inverse_radius=(1 / radius)[:, None], surface=surface[:, None])
        scaled_radius = scale * offset_radius
        self.register(offset_radius=offset_radius[:, None], scaled_radius=scaled_radius[:, None])
        # Half for each order of a pair, and for an atom with itself.
        charges = -0.5 * COULOMB * inverse * charge[:, None] * charge
        self.register(charges=charges[:, :, None])
        # The part of the diagonal of the pair distances, which is 1, in an atom's sum.
        one = torch.ones(len(rows), 1, dtype=torch.float64, device="cpu")
        self.register(diagonal_overlap=overlap(one, self.offset_radius, self.scaled_radius))

    inverse_radius: Tensor
    offset_radius: Tensor
    scaled_radius: Tensor
    charges: Tensor
    surface: Tensor
    diagonal_overlap: Tensor

    def overlaps(self, batch: Batch) -> Tensor:
        """Return the sums [N, B] of overlaps over each atom's partners, in 1/nm."""
        radius, scaled = self.offset_radius[:, None], self.scaled_radius[None]
        overlaps = _Overlaps.apply(batch.dense_distances, radius, scaled)
        return cast(Tensor, overlaps - self.diagonal_overlap)

    def born_radii(self, batch: Batch) -> Tensor:
        """Return the Born radii [N, B] in nm."""
        radius = self.offset_radius
        psi = 0.5 * radius * self.overlaps(batch)
        tanh = torch.tanh(psi * (1.0 + psi * (-0.8 + psi * 4.85)))
        return 1 / (1 / radius - tanh * self.inverse_radius)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        born = self.born_radii(batch)
        surface = (self.surface * sixth_power(1 / born)).sum(dim=0)
        return self.polarisation(batch, born) + surface

    def polarisation(self, batch: Batch, born: Tensor) -> Tensor:
        """Return the polarisation energies [B] for Born radii [N, B]."""
        return self.still_energy(batch, born, self.charges)

    @staticmethod
    def still_energy(batch: Batch, born: Tensor, charges: Tensor) -> Tensor:
        """Return Still's energies [B] for Born radii [N, B] and products of charges [N, N, B]."""
        off_diagonal = batch.pairs.off_diagonal
        polar = _Polarisation.apply(batch.dense_distances, born, charges, off_diagonal)
        return cast(Tensor, polar)


def _bounds(r: Tensor, radius: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse bounds of the integral over the scaled sphere; equal where it lies inside
    the sphere of `radius`."""
    return 1 / torch.maximum(radius, (r - scaled).abs()), 1 / torch.maximum(radius, r + scaled)


def overlap(r: Tensor, radius: Tensor, scaled: Tensor) -> Tensor:
    """Return the integral of 1/r^4 over the sphere of radius `scaled` at r, outside the one of
    `radius` (Hawkins, Cramer, Truhlar 1995), times 2 / pi."""
    lower, upper = _bounds(r, radius, scaled)
    inverse = 1 / r
    # The last term is zero unless the scaled sphere contains the other.
    return (
        (lower - upper) * (1 - 0.25 * (upper + lower) * (r - scaled * scaled * inverse))
        + 0.5 * inverse * (upper / lower).log()
        + 2 * (1 / radius - 1 / torch.maximum(radius, scaled - r))
    )


def overlap_derivative(r: Tensor, radius: Tensor, scaled: Tensor) -> Tensor:
    """Return the derivative of `overlap` by r.

    Where the bounds depend on r, their contributions cancel.
    """
    lower, upper = _bounds(r, radius, scaled)
    inverse = 1 / (r * r)
    derivative = 0.25 * (upper - lower) * (upper + lower) * (1 + scaled * scaled * inverse)
    return derivative - 0.5 * inverse * (upper / lower).log()


class _Overlaps(torch.autograd.Function):
    """Sums [N, B] of overlaps over each atom's partners, from distances [N, N, B]."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, radius: Tensor, scaled: Tensor) -> Tensor:
        ctx.save_for_backward(r, radius, scaled)
        return overlap(r, radius, scaled).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, None] * overlap_derivative(*ctx.saved_tensors), None, None


class _Polarisation(torch.autograd.Function):
    """Still's energy, sums [B] over pairs [N, N, B] with self-energies on the diagonal."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, born: Tensor, charges: Tensor, off_diagonal: Tensor) -> Tensor:
        ctx.save_for_backward(r, born, charges, off_diagonal)
        square = r * r * off_diagonal
        product = born[:, None] * born[None]
        f_squared = square + product * torch.exp(-0.25 * square / product)
        return sum_pairs(charges * f_squared.rsqrt())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        r, born, charges, off_diagonal = ctx.saved_tensors
        square = r * r * off_diagonal
        product = born[:, None] * born[None]
        quarter = 0.25 * square / product
        damping = torch.exp(-quarter)
        inverse = (square + product * damping).rsqrt()
        weight = grads[0] * charges * (inverse * inverse * inverse)
        per_product = weight * damping * (1 + quarter)
        return (
            weight * (0.25 * damping - 1) * r * off_diagonal,
            -(per_product * born[None]).sum(dim=1),
            None,
            None,
        )
