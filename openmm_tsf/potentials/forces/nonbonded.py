"""Coulomb, Lennard-Jones and OpenMM's built-in generalised Born model, without cutoffs."""

from collections.abc import Mapping
from typing import Any, cast

import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_tsf.potentials.forces.base import NotCovered, Term
from openmm_tsf.potentials.forces.geometry import AllPairs, Frame

#: 1 / (4 pi epsilon_0) in kJ nm / (mol e^2): OpenMM's value, SimTKOpenMMRealType.h.
COULOMB = 138.93545764438198


class NonbondedTerm(Term):
    """Coulomb and Lennard-Jones over all pairs, exceptions and parameter offsets included."""

    def __init__(self, force: openmm.NonbondedForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__()
        if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
            raise NotCovered(force, "a cutoff (a nonbondedMethod other than NoCutoff)")
        names = [force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())]
        first, second = pairs.first, pairs.second
        n_pairs = len(first)
        charge, length, energy = unit.elementary_charge, unit.nanometer, unit.kilojoule_per_mole

        # Particles: [3, N] of charge, sigma, epsilon; offsets: [parameter, 3, N].
        particles = torch.zeros(3, n_atoms, dtype=torch.float64)
        for i in range(n_atoms):
            q, s, e = force.getParticleParameters(i)
            particles[:, i] = torch.tensor(
                [q.value_in_unit(charge), s.value_in_unit(length), e.value_in_unit(energy)],
                dtype=torch.float64,
            )
        particle_offsets = torch.zeros(len(names), 3, n_atoms, dtype=torch.float64)
        for index in range(force.getNumParticleParameterOffsets()):
            name, i, *scales = force.getParticleParameterOffset(index)
            particle_offsets[names.index(name), :, i] += _plain(scales)

        # Exceptions: product of charges, sigma, epsilon, by row of the pair list.
        is_exception = torch.zeros(n_pairs, dtype=torch.bool)
        exceptions = torch.zeros(3, n_pairs, dtype=torch.float64)
        exception_offsets = torch.zeros(len(names), 3, n_pairs, dtype=torch.float64)
        row_of = []
        for index in range(force.getNumExceptions()):
            i, j, qq, s, e = force.getExceptionParameters(index)
            row = int(pairs.number(torch.tensor(i), torch.tensor(j)))
            row_of.append(row)
            is_exception[row] = True
            exceptions[:, row] = torch.tensor(
                [qq.value_in_unit(charge**2), s.value_in_unit(length), e.value_in_unit(energy)],
                dtype=torch.float64,
            )
        for index in range(force.getNumExceptionParameterOffsets()):
            name, which, *scales = force.getExceptionParameterOffset(index)
            exception_offsets[names.index(name), :, row_of[which]] += _plain(scales)

        self.parameter_names = tuple(names)
        self.has_offsets = bool(particle_offsets.any() or exception_offsets.any())
        for name, value in {
            "rows": pairs.rows_of_dense(),
            "first": first,
            "second": second,
            "is_exception": is_exception[:, None],
            "particles": particles,
            "particle_offsets": particle_offsets,
            "exceptions": exceptions[:, :, None],
            "exception_offsets": exception_offsets[:, :, :, None],
        }.items():
            self.register_buffer(name, value)
        constant = self._coefficients(self.particles, self.exceptions)
        for name, value in zip(("coulomb", "twelve", "six"), constant, strict=True):
            self.register_buffer(name, value)
        # Pairs that never interact may be anywhere, at the same place too: they are moved apart.
        silent = is_exception & (exceptions[0] == 0) & (exceptions[2] == 0)
        silent &= (exception_offsets == 0).flatten(0, 1).all(dim=0)
        padded = torch.cat([silent.double(), torch.zeros(1, dtype=torch.float64)])
        self.register_buffer("apart", padded[self.rows][:, :, None])

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
    apart: Tensor

    def _coefficients(self, particles: Tensor, exceptions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [N, N, 1] of 1/r, 1/r^12 and -1/r^6 (Lorentz-Berthelot), half for each
        order of a pair."""
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

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        coefficients = self.coulomb, self.twelve, self.six
        if self.has_offsets:
            particles, exceptions = self.particles, self.exceptions
            for index, name in enumerate(self.parameter_names):
                particles = particles + parameters[name] * self.particle_offsets[index]
                exceptions = exceptions + parameters[name] * self.exception_offsets[index]
            coefficients = self._coefficients(particles, exceptions)
        r = frame.dense_distances + self.apart
        return cast(Tensor, _CoulombLennardJones.apply(r, *coefficients))


class _CoulombLennardJones(torch.autograd.Function):
    """Sums [B] over pairs [N, N, B]; the derivative in closed form, differentiable in turn."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, coulomb: Tensor, twelve: Tensor, six: Tensor) -> Tensor:
        ctx.save_for_backward(r, coulomb, twelve, six)
        inverse = 1 / r
        sixth = _sixth_power(inverse)
        return _sum_pairs(coulomb * inverse + (twelve * sixth - six) * sixth)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        r, coulomb, twelve, six = ctx.saved_tensors
        inverse = 1 / r
        sixth = _sixth_power(inverse)
        slope = coulomb * inverse + (12 * twelve * sixth - 6 * six) * sixth
        return -grads[0] * slope * inverse, None, None, None


def _sixth_power(x: Tensor) -> Tensor:
    square = x * x
    return square * square * square


def _sum_pairs(values: Tensor) -> Tensor:
    """Sums [B] of [N, N, B]."""
    return values.flatten(0, 1).sum(dim=0)


def _plain(quantities: list[object]) -> Tensor:
    """Scales of an offset as numbers; OpenMM gives them bare or with units by version."""
    return torch.tensor(
        [
            q.value_in_unit_system(unit.md_unit_system) if unit.is_quantity(q) else float(q)  # type: ignore[attr-defined, arg-type]
            for q in quantities
        ],
        dtype=torch.float64,
    )


class GBSAOBCTerm(Term):
    """Generalised Born of Onufriev, Bashford and Case (OBC2) with OpenMM's surface-area term."""

    def __init__(self, force: openmm.GBSAOBCForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__()
        if force.getNonbondedMethod() != openmm.GBSAOBCForce.NoCutoff:
            raise NotCovered(force, "a cutoff (a nonbondedMethod other than NoCutoff)")
        rows = [force.getParticleParameters(i) for i in range(force.getNumParticles())]
        charge = torch.tensor(
            [q.value_in_unit(unit.elementary_charge) for q, _, _ in rows], dtype=torch.float64
        )
        radius = torch.tensor(
            [r.value_in_unit(unit.nanometer) for _, r, _ in rows], dtype=torch.float64
        )
        scale = torch.tensor([s for _, _, s in rows], dtype=torch.float64)
        own = radius - 0.009
        other = scale * own
        inverse = 1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric()
        gamma = force.getSurfaceAreaEnergy().value_in_unit(
            unit.kilojoule_per_mole / unit.nanometer**2
        )
        for name, value in {
            "inverse_radius": 1 / radius,
            "own": own,
            "other": other,
            # 4 pi gamma (r + probe)^2 r^6, to be divided by B^6.
            "surface": 4 * torch.pi * gamma * (radius + 0.14) ** 2 * radius**6,
        }.items():
            self.register_buffer(name, value[:, None])
        # Half for each order of a pair, which is what an atom has with itself, too.
        charges = -0.5 * COULOMB * inverse * charge[:, None] * charge
        self.register_buffer("charges", charges[:, :, None])
        # What the diagonal of the pair distances, which is 1, adds to an atom's sum.
        itself = _overlap(torch.ones(n_atoms, 1, dtype=torch.float64), self.own, self.other)
        self.register_buffer("itself", itself)

    inverse_radius: Tensor
    own: Tensor
    other: Tensor
    charges: Tensor
    surface: Tensor
    itself: Tensor

    def born_radii(self, frame: Frame) -> Tensor:
        """Born radii [N, B] in nm."""
        overlaps = _Overlaps.apply(frame.dense_distances, self.own[:, None], self.other[None])
        psi = 0.5 * self.own * (overlaps - self.itself)
        tanh = torch.tanh(psi * (1.0 + psi * (-0.8 + psi * 4.85)))
        return 1 / (1 / self.own - tanh * self.inverse_radius)

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        born = self.born_radii(frame)
        surface = (self.surface * _sixth_power(1 / born)).sum(dim=0)
        off_diagonal = frame.pairs.off_diagonal
        polar = _Polarisation.apply(frame.dense_distances, born, self.charges, off_diagonal)
        return cast(Tensor, polar) + surface


def _bounds(r: Tensor, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse bounds of the integral over an atom's sphere; equal where it lies inside `own`."""
    return 1 / torch.maximum(own, (r - other).abs()), 1 / torch.maximum(own, r + other)


def _overlap(r: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Integral of 1/r^4 over the sphere of radius `other` at r, outside the one of radius `own`
    (Hawkins, Cramer, Truhlar 1995), times 2 / pi."""
    low, up = _bounds(r, own, other)
    inverse = 1 / r
    # The last term is there if the other sphere swallows `own`; otherwise it is 0.
    return (
        (low - up) * (1 - 0.25 * (up + low) * (r - other * other * inverse))
        + 0.5 * inverse * (up / low).log()
        + 2 * (1 / own - 1 / torch.maximum(own, other - r))
    )


class _Overlaps(torch.autograd.Function):
    """Sums [N, B] of overlaps over each atom's partners, from distances [N, N, B].

    Where the bounds depend on r, what they add to the derivative cancels.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, own: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(r, own, other)
        return _overlap(r, own, other).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        r, own, other = ctx.saved_tensors
        low, up = _bounds(r, own, other)
        inverse = 1 / (r * r)
        slope = 0.25 * (up - low) * (up + low) * (1 + other * other * inverse)
        slope = slope - 0.5 * inverse * (up / low).log()
        return grads[0][:, None] * slope, None, None


class _Polarisation(torch.autograd.Function):
    """Still's energy, sums [B] over pairs [N, N, B], the atoms themselves on the diagonal."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, born: Tensor, charges: Tensor, off_diagonal: Tensor) -> Tensor:
        ctx.save_for_backward(r, born, charges, off_diagonal)
        square = r * r * off_diagonal
        product = born[:, None] * born[None]
        reach = square + product * torch.exp(-0.25 * square / product)
        return _sum_pairs(charges * reach.rsqrt())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        r, born, charges, off_diagonal = ctx.saved_tensors
        square = r * r * off_diagonal
        product = born[:, None] * born[None]
        quarter = 0.25 * square / product
        damping = torch.exp(-quarter)
        inverse = (square + product * damping).rsqrt()
        share = grads[0] * charges * (inverse * inverse * inverse)
        per_product = share * damping * (1 + quarter)
        return (
            share * (0.25 * damping - 1) * r * off_diagonal,
            -(per_product * born[None]).sum(dim=1),
            None,
            None,
        )
