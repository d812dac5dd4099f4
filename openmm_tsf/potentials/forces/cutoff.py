"""Cutoffs without a periodic box (CutoffNonPeriodic), as OpenMM's Reference platform has them.

Pairs beyond the cutoff do not interact. Coulomb energies of the others have a reaction field,
exceptions have neither cutoff nor reaction field. Energies jump at the cutoff unless they are
switched off before; derivatives are those on either side.
"""

from dataclasses import dataclass
from typing import Any, cast

import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.forces.nonbonded import (
    GBSAOBCTerm,
    NonbondedTerm,
    overlap,
    overlap_derivative,
    sixth_power,
    sum_pairs,
)
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch


@dataclass(frozen=True)
class Cutoff:
    """A cutoff distance, and the distance from which on energies are switched off, in nm."""

    distance: float
    switching: float | None = None

    def contains(self, r: Tensor) -> Tensor:
        """Return whether distances are within the cutoff."""
        return r <= self.distance

    def _progress(self, r: Tensor) -> tuple[Tensor, float]:
        assert self.switching is not None
        width = self.distance - self.switching
        return ((r - self.switching) / width).clamp(0.0, 1.0), width

    def switch(self, r: Tensor) -> Tensor:
        """Return the factor of an energy: 1 up to the switching distance, 0 at the cutoff."""
        t, _ = self._progress(r)
        return 1 + t * t * t * (-10 + t * (15 - 6 * t))

    def switch_derivative(self, r: Tensor) -> Tensor:
        """Return the derivative of `switch` by r."""
        t, width = self._progress(r)
        return t * t * (-30 + t * (60 - 30 * t)) / width


def read_cutoff(force: Any) -> Cutoff | None:
    """Return the cutoff of a Force, or None without one; a periodic one is NotCovered."""
    method = force.getNonbondedMethod()
    if method == force.NoCutoff:
        return None
    if method != force.CutoffNonPeriodic:
        raise NotCovered(force, "a periodic cutoff (CutoffPeriodic)")
    distance = force.getCutoffDistance().value_in_unit(unit.nanometer)
    if not getattr(force, "getUseSwitchingFunction", bool)():
        return Cutoff(distance)
    return Cutoff(distance, force.getSwitchingDistance().value_in_unit(unit.nanometer))


def nonbonded_term(force: openmm.NonbondedForce, pairs: AllPairs) -> NonbondedTerm:
    """Return the term of a NonbondedForce, with its cutoff if it has one."""
    has_cutoff = force.getNonbondedMethod() == openmm.NonbondedForce.CutoffNonPeriodic
    return (_CutoffNonbondedTerm if has_cutoff else NonbondedTerm)(force, pairs)


def gbsa_obc_term(force: openmm.GBSAOBCForce, pairs: AllPairs) -> GBSAOBCTerm:
    """Return the term of a GBSAOBCForce, with its cutoff if it has one."""
    has_cutoff = force.getNonbondedMethod() == openmm.GBSAOBCForce.CutoffNonPeriodic
    return (_CutoffGBSAOBCTerm if has_cutoff else GBSAOBCTerm)(force, pairs)


class _CutoffNonbondedTerm(NonbondedTerm):
    """Coulomb with a reaction field and Lennard-Jones up to a cutoff; exceptions without either."""

    regular: Tensor

    def __init__(self, force: openmm.NonbondedForce, pairs: AllPairs) -> None:
        super().__init__(force, pairs)
        cutoff = read_cutoff(force)
        assert cutoff is not None
        self.cutoff = cutoff
        dielectric = force.getReactionFieldDielectric()
        self.field = (dielectric - 1) / (2 * dielectric + 1) / cutoff.distance**3
        self.shift = 3 * dielectric / (2 * dielectric + 1) / cutoff.distance
        is_regular = torch.cat([~self.is_exception, torch.ones_like(self.is_exception[:1])])
        self.register(regular=is_regular[self.rows])

    def sum_of_pairs(self, r: Tensor, *coefficients: Tensor) -> Tensor:
        given = self.regular, self.cutoff, self.field, self.shift
        return cast(Tensor, _CutoffCoulombLennardJones.apply(r, *coefficients, *given))


class _CutoffCoulombLennardJones(torch.autograd.Function):
    """Sums [B] over pairs [N, N, B], with the derivative in closed form, again differentiable."""

    @staticmethod
    def forward(
        ctx: Any, r: Tensor, coulomb: Tensor, twelve: Tensor, six: Tensor, regular: Tensor,
        cutoff: Cutoff, field: float, shift: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(r, coulomb, twelve, six, regular)
        ctx.cutoff, ctx.field = cutoff, field
        inverse = 1 / r
        sixth = sixth_power(inverse)
        lennard_jones = (twelve * sixth - six) * sixth
        if cutoff.switching is not None:
            lennard_jones = lennard_jones * torch.where(regular, cutoff.switch(r), 1.0)
        electrostatic = coulomb * (inverse + torch.where(regular, field * r * r - shift, 0.0))
        interacts = cutoff.contains(r) | ~regular
        return sum_pairs(torch.where(interacts, electrostatic + lennard_jones, 0.0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        r, coulomb, twelve, six, regular = ctx.saved_tensors
        cutoff, field = ctx.cutoff, ctx.field
        inverse = 1 / r
        sixth = sixth_power(inverse)
        slope = (6 * six - 12 * twelve * sixth) * sixth * inverse
        if cutoff.switching is not None:
            energy = (twelve * sixth - six) * sixth
            switched = cutoff.switch(r) * slope + cutoff.switch_derivative(r) * energy
            slope = torch.where(regular, switched, slope)
        slope = slope - coulomb * inverse * inverse
        slope = slope + torch.where(regular, 2 * field * coulomb * r, 0.0)
        interacts = cutoff.contains(r) | ~regular
        slope = torch.where(interacts, slope, 0.0)
        return grads[0] * slope, *(None,) * 7


class _CutoffGBSAOBCTerm(GBSAOBCTerm):
    """Generalised Born up to a cutoff, where the energy of a pair is shifted to Coulomb's at it."""

    def __init__(self, force: openmm.GBSAOBCForce, pairs: AllPairs) -> None:
        super().__init__(force, pairs)
        cutoff = read_cutoff(force)
        assert cutoff is not None
        self.cutoff = cutoff

    def _inside(self, batch: Batch) -> Tensor:
        """Return 1 for pairs of different atoms within the cutoff, otherwise 0, [N, N, B]."""
        off_diagonal = batch.pairs.off_diagonal
        return off_diagonal * self.cutoff.contains(batch.dense_distances)

    def overlaps(self, batch: Batch) -> Tensor:
        radius, scaled = self.offset_radius[:, None], self.scaled_radius[None]
        inside = self._inside(batch)
        sums = _CutoffOverlaps.apply(batch.dense_distances, radius, scaled, inside)
        return cast(Tensor, sums)

    def polarisation(self, batch: Batch, born: Tensor) -> Tensor:
        inside = self._inside(batch)
        charges = self.charges * (inside + batch.pairs.diagonal)
        shift = (charges * inside).flatten(0, 1).sum(dim=0) / self.cutoff.distance
        return self.still_energy(batch, born, charges) - shift


class _CutoffOverlaps(torch.autograd.Function):
    """Sums [N, B] of overlaps over the partners `inside` [N, N, B], from distances [N, N, B]."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, radius: Tensor, scaled: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(r, radius, scaled, inside)
        return (overlap(r, radius, scaled) * inside).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        r, radius, scaled, inside = ctx.saved_tensors
        derivative = overlap_derivative(r, radius, scaled) * inside
        return grads[0][:, None] * derivative, None, None, None
