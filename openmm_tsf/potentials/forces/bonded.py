"""Bonds, angles and torsions of OpenMM's standard Forces."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openmm
import torch
from openmm import unit
from torch import Tensor, nn

from openmm_tsf.potentials.expressions.tabulated import HERMITE, bicubic_data
from openmm_tsf.potentials.forces.base import Term
from openmm_tsf.potentials.forces.geometry import Angle, Difference, Dihedral, norm
from openmm_tsf.potentials.forces.pairs import AllPairs, Batch

_LENGTH, _ENERGY = unit.nanometer, unit.kilojoule_per_mole


def _atoms(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, width)


def _read(rows: list[Any], width: int, *units: unit.Unit) -> tuple[Tensor, Tensor]:
    """Return the atoms [M, width] of M groups, and their parameters [len(units), M, 1]."""
    atoms = _atoms([list(row[:width]) for row in rows], width)
    values = [[x.value_in_unit(u) for x, u in zip(r[width:], units, strict=True)] for r in rows]
    table = torch.tensor(values, dtype=torch.float64, device="cpu").reshape(-1, len(units))
    return atoms, table.T.unsqueeze(2).contiguous()


class HarmonicBondTerm(Term):
    """k (r - r0)^2 / 2."""

    length: Tensor
    k: Tensor

    def __init__(self, force: openmm.HarmonicBondForce, pairs: AllPairs) -> None:
        super().__init__()
        bonds = [force.getBondParameters(i) for i in range(force.getNumBonds())]
        atoms, (length, k) = _read(bonds, 2, _LENGTH, _ENERGY / _LENGTH**2)
        self.difference = Difference(atoms[:, 0], atoms[:, 1], pairs.n_atoms)
        self.register(length=length, k=k)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        stretch = norm(self.difference(batch.x)) - self.length
        return (0.5 * self.k * stretch * stretch).sum(dim=0)


class HarmonicAngleTerm(Term):
    """k (theta - theta0)^2 / 2."""

    theta: Tensor
    k: Tensor

    def __init__(self, force: openmm.HarmonicAngleForce, pairs: AllPairs) -> None:
        super().__init__()
        angles = [force.getAngleParameters(i) for i in range(force.getNumAngles())]
        atoms, (theta, k) = _read(angles, 3, unit.radian, _ENERGY / unit.radian**2)
        self.angle = Angle(atoms, pairs.n_atoms)
        self.register(theta=theta, k=k)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        bend = self.angle(batch.x) - self.theta
        return (0.5 * self.k * bend * bend).sum(dim=0)


class PeriodicTorsionTerm(Term):
    """k (1 + cos(n phi - phi0)), all terms of one quadruple of atoms together.

    cos(n phi) and sin(n phi) follow from cos(phi) and sin(phi) by the addition theorem, without the
    angle.
    """

    cosines: Tensor
    sines: Tensor

    def __init__(self, force: openmm.PeriodicTorsionForce, pairs: AllPairs) -> None:
        super().__init__()
        rows: dict[tuple[int, ...], int] = {}
        terms: list[tuple[int, int, float, float]] = []
        for index in range(force.getNumTorsions()):
            *atoms, n, phase, k = force.getTorsionParameters(index)
            row = rows.setdefault(tuple(atoms), len(rows))
            terms.append((row, n, phase.value_in_unit(unit.radian), k.value_in_unit(_ENERGY)))
        # Periodicities may be negative or zero: cos is even, sin odd.
        n_max = max((abs(n) for _, n, _, _ in terms), default=0)
        cosines = torch.zeros(n_max + 1, len(rows), 1, dtype=torch.float64, device="cpu")
        sines = torch.zeros_like(cosines)
        phases = torch.tensor([p for _, _, p, _ in terms], dtype=torch.float64, device="cpu")
        for (row, n, _, k), c, s in zip(terms, phases.cos(), phases.sin(), strict=True):
            cosines[0, row] += k
            cosines[abs(n), row] += k * c
            sines[abs(n), row] += k * s * (1 if n >= 0 else -1)
        self.dihedral = Dihedral(_atoms([list(atoms) for atoms in rows], 4), pairs.n_atoms)
        self.register(cosines=cosines, sines=sines)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        c, s = self.dihedral.cos_sin(batch.x)
        total = self.cosines[0].expand_as(c)
        c_n, s_n = c, s
        for n in range(1, len(self.cosines)):
            if n > 1:
                c_n, s_n = c_n * c - s_n * s, s_n * c + c_n * s
            total = total + self.cosines[n] * c_n + self.sines[n] * s_n
        return total.sum(dim=0)


class RBTorsionTerm(Term):
    """Ryckaert-Bellemans: sum of c_n cos(psi)^n, n = 0 to 5, psi = phi - 180 degrees."""

    c: Tensor

    def __init__(self, force: openmm.RBTorsionForce, pairs: AllPairs) -> None:
        super().__init__()
        torsions = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        atoms, c = _read(torsions, 4, *[_ENERGY] * 6)
        self.dihedral = Dihedral(atoms, pairs.n_atoms)
        self.register(c=c)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        cosine = -self.dihedral.cos_sin(batch.x)[0]
        total = self.c[5].expand_as(cosine)
        for n in range(4, -1, -1):
            total = total * cosine + self.c[n]
        return total.sum(dim=0)


def _periodic_derivatives(values: Tensor) -> Tensor:
    """Return derivatives [n, columns] at the knots, spaced 1, of splines through `values`."""
    n = len(values)
    matrix = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    right = torch.zeros_like(values)
    for i in range(n):
        matrix[i, i] += 4.0
        matrix[i, (i - 1) % n] += 1.0
        matrix[i, (i + 1) % n] += 1.0
        right[i] = 3.0 * (values[(i + 1) % n] - values[(i - 1) % n])
    return torch.linalg.solve(matrix, right)


def _bicubic_coefficients(energy: Tensor) -> Tensor:
    """Return the coefficients [n * n, 4, 4] of the periodic bicubic spline through energy [n, n].

    Patch n * i + j covers [i, i + 1] x [j, j + 1] in units of the spacing; the value there is
    sum_kl c[k, l] s^k t^l. Splines are along one direction, then along the other, as in OpenMM.
    """
    n = len(energy)
    d_first = _periodic_derivatives(energy)
    d_second = _periodic_derivatives(energy.T).T
    d_both = _periodic_derivatives(d_second)
    f, fx, fy, fxy = (np.pad(g, (0, 1), mode="wrap") for g in (energy, d_first, d_second, d_both))
    hermite = torch.tensor(HERMITE, dtype=torch.float64, device="cpu")
    data = torch.tensor(bicubic_data(f, fx, fy, fxy), dtype=torch.float64, device="cpu")
    return torch.einsum("ka,lb,abij->ijkl", hermite, hermite, data).reshape(n * n, 4, 4)


class CMAPTorsionTerm(Term):
    """Bicubic splines over two dihedrals."""

    coefficients: Tensor
    offset: Tensor
    size: Tensor

    def __init__(self, force: openmm.CMAPTorsionForce, pairs: AllPairs) -> None:
        super().__init__()
        sizes: list[int] = []
        starts: list[int] = []
        tables: list[Tensor] = []
        for index in range(force.getNumMaps()):
            n, energy = force.getMapParameters(index)
            values = torch.tensor(energy.value_in_unit(_ENERGY), dtype=torch.float64, device="cpu")
            starts.append(sum(s * s for s in sizes))
            sizes.append(n)
            # OpenMM's map runs over the first angle fastest.
            tables.append(_bicubic_coefficients(values.reshape(n, n).T.contiguous()))
        terms = [force.getTorsionParameters(i) for i in range(force.getNumTorsions())]
        maps = [t[0] for t in terms]
        self.dihedrals = nn.ModuleList(
            Dihedral(_atoms([list(t[1 + 4 * k : 5 + 4 * k]) for t in terms], 4), pairs.n_atoms)
            for k in range(2)
        )
        offset = torch.tensor([starts[m] for m in maps], dtype=torch.int64, device="cpu")[:, None]
        size = torch.tensor([sizes[m] for m in maps], dtype=torch.int64, device="cpu")[:, None]
        table = (
            torch.cat(tables) if tables else torch.zeros(1, 4, 4, dtype=torch.float64, device="cpu")
        )
        self.register(coefficients=table, offset=offset, size=size)

    def energy(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        cells, fractions = [], []
        for dihedral in self.dihedrals:
            angle = dihedral(batch.x)
            angle = torch.where(angle < 0, angle + 2 * torch.pi, angle)
            position = angle / (2 * torch.pi) * self.size
            # NaN is not an index: such a conformation gets cell 0 and stays NaN.
            cell = torch.nan_to_num(position.detach(), nan=0.0).floor().long()
            cell = torch.minimum(cell, self.size - 1)
            cells.append(cell)
            fractions.append(position - cell)
        c = self.coefficients[self.offset + self.size * cells[0] + cells[1]]  # [M, B, 4, 4]
        s, t = fractions
        return _cubic(_cubic(c, t[..., None]), s).sum(dim=0)


def _cubic(c: Tensor, t: Tensor) -> Tensor:
    """Return the value at t of the cubic with coefficients c [..., 4]."""
    return ((c[..., 3] * t + c[..., 2]) * t + c[..., 1]) * t + c[..., 0]
