"""Coulomb, Lennard-Jones and OpenMM's built-in generalised Born model, without cutoffs."""

from collections.abc import Mapping

import openmm
import torch
from openmm import unit
from torch import Tensor

from openmm_tsf.potentials.batch_geometry import AllPairs, Frame, Gather
from openmm_tsf.potentials.terms import NotCovered, Term

#: 1 / (4 pi epsilon_0) in kJ nm / (mol e^2): OpenMM's value, SimTKOpenMMRealType.h.
COULOMB = 138.93545764438198


class NonbondedTerm(Term):
    """Coulomb and Lennard-Jones over all pairs, exceptions and parameter offsets included."""

    rows: Tensor
    charge: Tensor
    sigma: Tensor
    epsilon: Tensor
    is_exception: Tensor

    def __init__(self, force: openmm.NonbondedForce, n_atoms: int, pairs: AllPairs) -> None:
        super().__init__()
        if force.getNonbondedMethod() != openmm.NonbondedForce.NoCutoff:
            raise NotCovered(force, "a cutoff (a nonbondedMethod other than NoCutoff)")
        names = [force.getGlobalParameterName(i) for i in range(force.getNumGlobalParameters())]
        first, second = pairs.difference.first, pairs.difference.second
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

        # Pairs that never interact are left out.
        silent = (exceptions[0] == 0) & (exceptions[2] == 0)
        silent &= (exception_offsets == 0).all(dim=0).all(dim=0)
        rows = (~(is_exception & silent)).nonzero().flatten()
        self.parameter_names = tuple(names)
        self.has_offsets = bool(particle_offsets.any() or exception_offsets.any())
        self.rows_of_pairs = Gather(rows, n_pairs)
        self.register_buffer("is_exception", is_exception[rows, None])
        self.register_buffer("first", first[rows])
        self.register_buffer("second", second[rows])
        self.register_buffer("particles", particles)
        self.register_buffer("particle_offsets", particle_offsets)
        self.register_buffer("exceptions", exceptions[:, rows, None])
        self.register_buffer("exception_offsets", exception_offsets[:, :, rows, None])
        constant = self._pair_parameters(particles, self.exceptions)
        for name, value in zip(("coulomb", "twelve", "six"), constant, strict=True):
            self.register_buffer(name, value)

    first: Tensor
    second: Tensor
    particles: Tensor
    particle_offsets: Tensor
    exceptions: Tensor
    exception_offsets: Tensor
    coulomb: Tensor
    twelve: Tensor
    six: Tensor

    def _pair_parameters(
        self, particles: Tensor, exceptions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [P, 1] of 1/r, 1/r^12 and -1/r^6 (Lorentz-Berthelot)."""
        one, two = particles[:, self.first, None], particles[:, self.second, None]
        qq = torch.where(self.is_exception, exceptions[0], one[0] * two[0])
        sigma = torch.where(self.is_exception, exceptions[1], 0.5 * (one[1] + two[1]))
        epsilon = torch.where(self.is_exception, exceptions[2], (one[2] * two[2]).sqrt())
        six = 4 * epsilon * sigma**6
        return COULOMB * qq, six * sigma**6, six

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        coulomb, twelve, six = self.coulomb, self.twelve, self.six
        if self.has_offsets:
            particles, exceptions = self.particles, self.exceptions
            for index, name in enumerate(self.parameter_names):
                particles = particles + parameters[name] * self.particle_offsets[index]
                exceptions = exceptions + parameters[name] * self.exception_offsets[index]
            coulomb, twelve, six = self._pair_parameters(particles, exceptions)
        inverse = 1 / self.rows_of_pairs(frame.distances)
        square = inverse * inverse
        sixth = square * square * square
        return (coulomb * inverse + (twelve * sixth - six) * sixth).sum(dim=0)


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
        offset_radius = radius - 0.009
        first, second = pairs.difference.first, pairs.difference.second
        i, j = (~torch.eye(n_atoms, dtype=torch.bool)).nonzero().T  # ordered pairs, by i
        self.n_atoms = n_atoms
        self.ordered = Gather(pairs.number(i, j), len(first))
        self.first = Gather(first, n_atoms)
        self.second = Gather(second, n_atoms)
        inverse = 1 / force.getSoluteDielectric() - 1 / force.getSolventDielectric()
        surface = force.getSurfaceAreaEnergy().value_in_unit(
            unit.kilojoule_per_mole / unit.nanometer**2
        )
        for name, value in {
            "radius": radius,
            "offset_radius": offset_radius,
            "own": offset_radius[i],
            "other": (scale * offset_radius)[j],
            "charges": -COULOMB * inverse * charge[first] * charge[second],
            "self_charge": -0.5 * COULOMB * inverse * charge * charge,
            # 4 pi gamma (r + probe)^2 r^6, to be divided by B^6; no radius, no surface.
            "surface": 4 * torch.pi * surface * (radius + 0.14) ** 2 * radius**6,
        }.items():
            self.register_buffer(name, value[:, None])

    radius: Tensor
    offset_radius: Tensor
    own: Tensor
    other: Tensor
    charges: Tensor
    self_charge: Tensor
    surface: Tensor

    def born_radii(self, frame: Frame) -> Tensor:
        """Born radii [N, B] in nm."""
        r = self.ordered(frame.distances)
        upper = r + self.other
        difference = r - self.other
        lower = torch.maximum(self.own, difference.abs())
        low, up = 1 / lower, 1 / upper
        inverse = 1 / r
        low2, up2 = low * low, up * up
        term = (
            low
            - up
            + 0.25 * (up2 - low2) * (r - self.other * self.other * inverse)
            + 0.5 * inverse * (lower / upper).log()
        )
        term = torch.where(self.own < -difference, term + 2 * (1 / self.own - low), term)
        term = torch.where(self.own < upper, term, 0.0)
        total = term.unflatten(0, (self.n_atoms, -1)).sum(dim=1)
        psi = 0.5 * self.offset_radius * total
        tanh = torch.tanh(psi * (1.0 + psi * (-0.8 + psi * 4.85)))
        return 1 / (1 / self.offset_radius - tanh / self.radius)

    def energy(self, frame: Frame, parameters: Mapping[str, Tensor]) -> Tensor:
        """Energies [B] in kJ/mol."""
        born = self.born_radii(frame)
        inverse = 1 / born
        third = inverse * inverse * inverse
        alone = self.self_charge * inverse + self.surface * third * third
        one, two = self.first(born), self.second(born)
        product = one * two
        square = frame.distances * frame.distances
        reach = square + product * torch.exp(-0.25 * square / product)
        return (self.charges * torch.rsqrt(reach)).sum(dim=0) + alone.sum(dim=0)
