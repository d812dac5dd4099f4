"""Constrained distances of a molecule, and the metric of their manifold.

Dynamics with constraints r_i = d_i samples positions from exp(-U/kT) |Z|^(1/2) prod_i
delta(r_i - d_i) dx with Z_ij = sum_k (1/m_k) d_k r_i . d_k r_j (Fixman, PNAS 71, 3050 (1974);
Ciccotti, Lelievre and Vanden-Eijnden, CPAM 61, 371 (2008)). Constraints that share no atom do not
couple, so that Z has a block for each group of constraints that do: one for the hydrogens of each
heavy atom.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import openmm
import openmm.unit as unit
import torch
from torch import Tensor, nn

from openmm_tsf.utils.tensors import check_tensor
from openmm_tsf.utils.validation import require_array

#: Of positions: that of constrained dynamics, or without |Z|^(1/2), the limit of stiff bonds.
MEASURES = ("rigid", "stiff")
#: Steps of Newton's method within which frames of constrained dynamics are projected.
_MOST_STEPS = 20
#: Numbers in the matrices of one batch of frames to project.
_BATCH_NUMBERS = 2**23


class CoupledConstraints(NamedTuple):
    """Groups of k constraints that share atoms: all C groups of one size.

    `indices` [C, k] are rows of the pairs; `coupling` [C, k, k] are the sums of +-1/m over the
    atoms that two constraints share, by which Z_ij = coupling_ij e_i . e_j for unit vectors e.
    """

    indices: Tensor
    coupling: Tensor


class Constraints(nn.Module):
    """Distances that are constrained, with the masses that enter the metric of their manifold.

    Parameters
    ----------
    pairs
        The constrained pairs of atoms, int [K, 2], each once.
    lengths
        Their distances [K] in nm.
    masses
        The masses of all atoms [N] in amu; those of constrained atoms are above zero.

    Attributes
    ----------
    pairs, lengths, inverse_masses
        int64 [K, 2], [K] in nm and [N] in 1/amu; buffers, which ``.to`` moves and converts.
    n_constraints : int
        K.

    Raises
    ------
    ValueError
        If pairs are of one atom, of atoms that are not there, or the same; if lengths or masses are
        not above zero, or not as many.

    Examples
    --------
    A rigid trimer of equal masses, bent by an angle theta: |Z| = (4 - cos^2 theta) / m^2.

    >>> import math, torch
    >>> from openmm_tsf.coordinates.constraints import Constraints
    >>> trimer = Constraints([[0, 1], [1, 2]], lengths=[0.1, 0.1], masses=[12.0, 12.0, 12.0])
    >>> x = torch.tensor([[[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.1, 0.0]]], dtype=torch.float64)
    >>> math.isclose(trimer.half_log_metric(x).exp(), 2.0 / 12.0)
    True
    >>> trimer.deviations(x)
    tensor([[0., 0.]], dtype=torch.float64)
    """

    pairs: Tensor
    lengths: Tensor
    inverse_masses: Tensor

    def __init__(self, pairs: Any, lengths: Any, masses: Any) -> None:
        super().__init__()
        atoms = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        distances, weights = (np.asarray(v, dtype=np.float64).ravel() for v in (lengths, masses))
        _check(atoms, distances, weights)
        self._config: dict[str, Any] = {
            "pairs": atoms.tolist(), "lengths": distances.tolist(), "masses": weights.tolist()
        }  # fmt: skip
        inverse = np.divide(1.0, weights, out=np.zeros_like(weights), where=weights > 0)
        self.register_buffer("pairs", torch.from_numpy(atoms.copy()), persistent=False)
        self.register_buffer("lengths", torch.from_numpy(distances.copy()), persistent=False)
        self.register_buffer("inverse_masses", torch.from_numpy(inverse), persistent=False)
        groups = _coupled_groups(atoms)
        self._sizes = sorted({len(group) for group in groups})
        for size in self._sizes:
            indices = np.array([group for group in groups if len(group) == size])
            coupling = _coupling(atoms[indices], inverse)
            self.register_buffer(f"_indices_{size}", torch.from_numpy(indices), persistent=False)
            self.register_buffer(f"_coupling_{size}", torch.from_numpy(coupling), persistent=False)

    @classmethod
    def from_system(cls, system: openmm.System) -> Self:
        """Return the constraints of a System, in its order."""
        terms = [system.getConstraintParameters(i) for i in range(system.getNumConstraints())]
        n_atoms = system.getNumParticles()
        return cls(
            [[first, second] for first, second, _ in terms],
            [length.value_in_unit(unit.nanometer) for *_, length in terms],
            [system.getParticleMass(atom).value_in_unit(unit.amu) for atom in range(n_atoms)],
        )

    @property
    def n_constraints(self) -> int:
        """The number of constraints K."""
        return len(self.pairs)

    @property
    def n_atoms(self) -> int:
        """The number of atoms N."""
        return len(self.inverse_masses)

    @property
    def groups(self) -> list[CoupledConstraints]:
        """The constraints by groups that share atoms, one item for each size of groups."""
        return [
            CoupledConstraints(getattr(self, f"_indices_{k}"), getattr(self, f"_coupling_{k}"))
            for k in self._sizes
        ]

    def _vectors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances [B, K] and unit vectors [B, K, 3] from the second atoms to the first."""
        vectors = x[:, self.pairs[:, 0]] - x[:, self.pairs[:, 1]]
        r = vectors.norm(dim=-1)
        return r, vectors / r[..., None]

    def half_log_metric(self, x: Tensor) -> Tensor:
        """Return 1/2 ln|det Z| [B] of conformations x [B, N, 3] in nm; Z is in 1/amu.

        Differentiable to any order.
        """
        check_tensor(x, "x", (self.n_atoms, 3), self.lengths)
        _, units = self._vectors(x)
        total = x.new_zeros(len(x))
        for indices, coupling in self.groups:
            e = units[:, indices]  # [B, C, k, 3]
            total = total + _log_det(coupling * (e @ e.transpose(-1, -2))).sum(-1)
        return 0.5 * total

    def deviations(self, x: Tensor) -> Tensor:
        """Return distances minus their constrained values [B, K] in nm of x [B, N, 3]."""
        check_tensor(x, "x", (self.n_atoms, 3), self.lengths)
        return self._vectors(x)[0] - self.lengths

    @torch.no_grad()
    def project(self, x: Tensor) -> Tensor:
        """Return x [B, N, 3] in nm moved onto the manifold along mass-weighted constraint forces.

        As SHAKE does, with Newton's method and to rounding. For frames near the manifold: those of
        constrained dynamics, and files in single precision.

        Raises
        ------
        ValueError
            If the distances of a conformation do not converge to their constrained values.
        """
        check_tensor(x, "x", (self.n_atoms, 3), self.lengths)
        numbers = max(sum(int(coupling.numel()) for _, coupling in self.groups), 1)
        parts = x.split(max(_BATCH_NUMBERS // numbers, 1))
        return torch.cat([self._project(part) for part in parts])

    def _project(self, x: Tensor) -> Tensor:
        _, directions = self._vectors(x)
        first, second = self.pairs.unbind(1)
        tolerance = 16 * torch.finfo(x.dtype).eps
        for _ in range(_MOST_STEPS):
            r, units = self._vectors(x)
            deviations = r - self.lengths
            # Coordinates are rounded relative to their own size, not to that of the distance.
            allowed = tolerance * (self.lengths + x.abs().amax(dim=(1, 2))[:, None])
            if bool((deviations.abs() <= allowed).all()):
                return x
            multipliers = torch.zeros_like(deviations)
            for indices, coupling in self.groups:
                e, e0 = units[:, indices], directions[:, indices]
                matrix = coupling * (e @ e0.transpose(-1, -2))
                solution, _ = torch.linalg.solve_ex(matrix, deviations[:, indices][..., None])
                multipliers[:, indices] = solution[..., 0]
            forces = multipliers[..., None] * directions
            moved = torch.zeros_like(x).index_add_(1, first, forces)
            moved.index_add_(1, second, forces, alpha=-1)
            x = x - self.inverse_masses[:, None] * moved
        worst = float(torch.nan_to_num(deviations.abs(), nan=torch.inf).max())
        raise ValueError(
            "x: expected conformations near the constrained distances, but for one of them they "
            f"do not converge (off by {worst:.3g} nm after {_MOST_STEPS} steps)"
        )

    def lengths_of_bonds(self, bonds: np.ndarray, atom_names: Sequence[str]) -> np.ndarray:
        """Return the constrained length in nm of each bond [n, 2], 0 where it has none: [n].

        A constraint that is not one of the bonds is a ValueError that names its atoms.
        """
        if self.n_atoms != len(atom_names):
            expected = f"those of {len(atom_names)} atoms"
            raise ValueError(f"constraints: expected {expected}, got {self.n_atoms}")
        row_of = {frozenset(pair): row for row, pair in enumerate(bonds.tolist())}
        lengths = np.zeros(len(bonds))
        for pair, length in zip(self._config["pairs"], self._config["lengths"], strict=True):
            if frozenset(pair) not in row_of:
                names = " and ".join(atom_names[atom] for atom in pair)
                raise ValueError(
                    f"constraints: expected bonds of the coordinates, got {names}, which closes a "
                    "ring or is no bond; build the System with constraints=HBonds or None"
                )
            lengths[row_of[frozenset(pair)]] = length
        return lengths

    def is_same_as(self, other: "Constraints | None") -> bool:
        """Whether both are of the same atoms, lengths and masses to 1e-9, in any order."""
        if other is None or other.n_atoms != self.n_atoms:
            return False
        (pairs, numbers), (others, other_numbers) = self._by_pair(), other._by_pair()
        return np.array_equal(pairs, others) and np.allclose(numbers, other_numbers, 1e-9, 0.0)

    def _by_pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sorted pairs [K, 2], and the length and both masses of each [K, 3]."""
        pairs = np.sort(np.array(self._config["pairs"], dtype=np.int64).reshape(-1, 2), axis=1)
        order, masses = np.lexsort(pairs.T), np.array(self._config["masses"])
        numbers = np.column_stack([self._config["lengths"], masses[pairs]])
        return pairs[order], numbers[order]

    def to_config(self) -> dict[str, Any]:
        """Return lists from which :meth:`from_config` rebuilds the constraints."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], n_atoms: int) -> Self:
        """Rebuild constraints from :meth:`to_config`; ValueError for anything else."""
        pairs = require_array(config, "pairs", "i", -1, 2)
        lengths = require_array(config, "lengths", "if", len(pairs))
        return cls(pairs, lengths, require_array(config, "masses", "if", n_atoms))


def _check(pairs: np.ndarray, lengths: np.ndarray, masses: np.ndarray) -> None:
    n_atoms = len(masses)
    if len(lengths) != len(pairs):
        raise ValueError(f"lengths: expected {len(pairs)}, one for each pair, got {len(lengths)}")
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError(f"lengths: expected numbers above zero, got {lengths.tolist()}")
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < n_atoms):
        raise ValueError(f"pairs: expected atoms from 0 to {n_atoms - 1}, got {pairs.tolist()}")
    if (pairs[:, 0] == pairs[:, 1]).any():
        raise ValueError("pairs: expected two different atoms in each, got an atom twice")
    if len(np.unique(np.sort(pairs, axis=1), axis=0)) < len(pairs):
        raise ValueError("pairs: expected each pair once, got one twice")
    if not np.isfinite(masses).all() or (masses < 0).any() or (masses[pairs] <= 0).any():
        raise ValueError("masses: expected constrained atoms with a mass, got one without")


def _coupled_groups(pairs: np.ndarray) -> list[list[int]]:
    """Return the constraints, as rows of `pairs`, in groups that atoms connect."""
    group_of: dict[int, list[int]] = {}
    for row, (first, second) in enumerate(pairs.tolist()):
        one, two = group_of.get(first, []), group_of.get(second, [])
        merged = sorted({*one, *two, row})
        for other in merged:
            group_of |= dict.fromkeys(pairs[other].tolist(), merged)
    unique = {id(group): group for group in group_of.values()}
    return sorted(unique.values())


def _coupling(pairs: np.ndarray, inverse_masses: np.ndarray) -> np.ndarray:
    """Return the coupling [C, k, k] of groups of pairs [C, k, 2]."""
    total = np.zeros((*pairs.shape[:2], pairs.shape[1]))
    for one, two, sign in ((0, 0, 1.0), (1, 1, 1.0), (0, 1, -1.0), (1, 0, -1.0)):
        atoms = pairs[:, :, one]
        is_shared = atoms[:, :, None] == pairs[:, None, :, two]
        total += sign * is_shared * inverse_masses[atoms][:, :, None]
    return total


def _log_det(z: Tensor) -> Tensor:
    """Return ln|det| [...] of symmetric matrices [..., k, k]."""
    size = z.shape[-1]
    if size > 3:
        return torch.linalg.slogdet(z).logabsdet
    if size == 1:
        return z[..., 0, 0].log()
    minor = z[..., 0, 0] * z[..., 1, 1] - z[..., 0, 1] * z[..., 1, 0]
    if size == 2:
        return minor.log()
    cofactors = torch.linalg.cross(z[..., 1, :], z[..., 2, :], dim=-1)
    return (z[..., 0, :] * cofactors).sum(-1).log()
