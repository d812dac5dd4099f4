"""Differences, distances, angles and dihedrals of whole batches, with derivatives everywhere.

Arrays are [..., atoms or terms, B]: with the batch last every operation runs over contiguous
memory. Sums over an atom's terms are matrix products or gathers, in the derivatives too: no atomic
additions, so forces are deterministic.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from openmm_tsf.utils.geometry import cross, dot

Map = Callable[[Tensor], Tensor]

#: Terms per atom up to which sums over an atom's terms are products with the incidence matrix.
#: Beyond, each atom's terms are gathered: the matrix grows faster than the number of terms.
_MAX_TERMS_OF_MATRIX = 16


class LinearMap(torch.autograd.Function):
    """A linear map; its derivative is the transposed map, whose derivative is the map again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, apply: Map, transpose: Map) -> Tensor:
        ctx.maps = transpose, apply
        return apply(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return LinearMap.apply(grads[0], *ctx.maps), None, None


class _TermSums(nn.Module):
    """Sums over an atom's signed terms, in the form that suits their number.

    Term ``terms[k]`` belongs to atom ``atoms[k]`` with sign ``signs[k]``; `shape` is (n_atoms,
    n_terms).
    """

    members: Tensor | None
    weight: Tensor

    def __init__(self, atoms: Tensor, terms: Tensor, signs: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        n_atoms, n_terms = shape
        if n_terms <= _MAX_TERMS_OF_MATRIX * n_atoms:
            matrix = torch.zeros(n_atoms, n_terms, dtype=torch.float64, device="cpu")
            self.register_buffer("members", None)
            self.register_buffer(
                "weight", matrix.index_put_((atoms, terms), signs, accumulate=True)
            )
            return
        # Each atom's terms in a row, padded with term 0 at weight 0.
        order = torch.argsort(atoms, stable=True)
        counts = torch.bincount(atoms, minlength=n_atoms)
        row = atoms[order]
        number = torch.arange(len(order), dtype=torch.int64, device="cpu")
        column = number - (counts.cumsum(0) - counts)[row]
        members = torch.zeros(n_atoms, int(counts.max()), dtype=torch.int64, device="cpu")
        weight = torch.zeros(*members.shape, 1, dtype=torch.float64, device="cpu")
        members[row, column] = terms[order]
        weight[row, column, 0] = signs[order]
        self.register_buffer("members", members)
        self.register_buffer("weight", weight)

    def sum_terms(self, terms: Tensor) -> Tensor:
        """Return the sums [..., n_atoms, B] of the terms [..., M, B] of each atom."""
        if self.members is None:
            return self.weight @ terms
        rows = terms.index_select(-2, self.members.flatten()).unflatten(-2, self.members.shape)
        return (rows * self.weight).sum(dim=-2)


class Gather(_TermSums):
    """Values of atoms, term by term, and sums over terms, atom by atom; each other's transpose.

    `index` holds the atom of each of M terms.
    """

    index: Tensor

    def __init__(self, index: Sequence[int] | Tensor, n_atoms: int) -> None:
        atoms = torch.as_tensor(index, dtype=torch.int64, device="cpu").reshape(-1)
        n_terms = len(atoms)
        plus = torch.ones(n_terms, dtype=torch.float64, device="cpu")
        terms = torch.arange(n_terms, dtype=torch.int64, device="cpu")
        super().__init__(atoms, terms, plus, (n_atoms, n_terms))
        self.register_buffer("index", atoms)

    def forward(self, values: Tensor) -> Tensor:
        """Return the values [..., M, B] of the terms, from those of the atoms [..., n_atoms, B]."""
        return cast(Tensor, LinearMap.apply(values, self._select, self.sum_terms))

    def collect(self, terms: Tensor) -> Tensor:
        """Return the sums [..., n_atoms, B] over the terms [..., M, B] of each atom."""
        return cast(Tensor, LinearMap.apply(terms, self.sum_terms, self._select))

    def _select(self, values: Tensor) -> Tensor:
        return values.index_select(-2, self.index)


class Difference(_TermSums):
    """Vectors x[second] - x[first] between M pairs of atoms."""

    first: Tensor
    second: Tensor

    def __init__(
        self, first: Sequence[int] | Tensor, second: Sequence[int] | Tensor, n_atoms: int
    ) -> None:
        one = torch.as_tensor(first, dtype=torch.int64, device="cpu").reshape(-1)
        two = torch.as_tensor(second, dtype=torch.int64, device="cpu").reshape(-1)
        n_terms = len(one)
        plus = torch.ones(n_terms, dtype=torch.float64, device="cpu")
        terms = torch.arange(n_terms, dtype=torch.int64, device="cpu").repeat(2)
        atoms = torch.cat([two, one])
        super().__init__(atoms, terms, torch.cat([plus, -plus]), (n_atoms, n_terms))
        self.register_buffer("first", one)
        self.register_buffer("second", two)

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors [3, M, B] from positions [3, n_atoms, B]."""
        return cast(Tensor, LinearMap.apply(x, self._subtract, self.sum_terms))

    def _subtract(self, x: Tensor) -> Tensor:
        return x.index_select(-2, self.second) - x.index_select(-2, self.first)


class _Length(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        length = dot(vectors, vectors).sqrt()
        ctx.save_for_backward(vectors, length)
        return length

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        vectors, length = ctx.saved_tensors
        return vectors * (grads[0] / (length + (length == 0)))


def norm(vectors: Tensor) -> Tensor:
    """Return the lengths [M, B] of vectors [3, M, B]; the derivative at 0 is 0, as in OpenMM."""
    return cast(Tensor, _Length.apply(vectors))


class _VectorAngle(torch.autograd.Function):
    """The angle between two vectors, with its derivative in closed form, again differentiable."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        # Not acos: atan2 is accurate next to 0 and pi.
        return torch.atan2(norm(cross(a, b)), dot(a, b))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        normal = cross(a, b)
        # A straight angle has no plane to bend in: no force, as in OpenMM.
        square = dot(normal, normal)
        weight = grads[0] * torch.where(square == 0, 1.0, square).rsqrt()
        return cross(a, normal) * (weight / dot(a, a)), cross(normal, b) * (weight / dot(b, b))


class _VectorDihedral(torch.autograd.Function):
    """Cosine and sine of the dihedral of three consecutive vectors."""

    @staticmethod
    def forward(ctx: Any, b1: Tensor, b2: Tensor, b3: Tensor) -> tuple[Tensor, Tensor]:
        normal = cross(b2, b3)
        sine, cosine = norm(b2) * dot(b1, normal), dot(cross(b1, b2), normal)
        inverse = torch.rsqrt(sine * sine + cosine * cosine)
        cosine, sine = cosine * inverse, sine * inverse
        ctx.save_for_backward(b1, b2, b3, cosine, sine)
        return cosine, sine

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b1, b2, b3, cosine, sine = ctx.saved_tensors
        gradient = grads[1] * cosine - grads[0] * sine  # dE/dphi
        one, two = cross(b1, b2), cross(b2, b3)
        square = dot(b2, b2)
        length = square.sqrt()
        per_one = gradient * length / dot(one, one)
        per_two = gradient * length / dot(two, two)
        middle = one * (-per_one * dot(b1, b2) / square) - two * (per_two * dot(b3, b2) / square)
        return one * per_one, middle, two * per_two


class Angle(nn.Module):
    """Angles [M, B] in radians at the middle atom of triples [M, 3]."""

    def __init__(self, triples: Tensor, n_atoms: int) -> None:
        super().__init__()
        self.one = Difference(triples[:, 1], triples[:, 0], n_atoms)
        self.two = Difference(triples[:, 1], triples[:, 2], n_atoms)

    def forward(self, x: Tensor) -> Tensor:
        """Return the angles [M, B] of positions [3, n_atoms, B]."""
        return cast(Tensor, _VectorAngle.apply(self.one(x), self.two(x)))


class Dihedral(nn.Module):
    """Dihedrals [M, B] in (-pi, pi], IUPAC sign as in OpenMM, of quadruples [M, 4]."""

    def __init__(self, quadruples: Tensor, n_atoms: int) -> None:
        super().__init__()
        self.one = Difference(quadruples[:, 0], quadruples[:, 1], n_atoms)
        self.two = Difference(quadruples[:, 1], quadruples[:, 2], n_atoms)
        self.three = Difference(quadruples[:, 2], quadruples[:, 3], n_atoms)

    def cos_sin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [M, B] of the dihedrals of positions [3, n_atoms, B]."""
        vectors = self.one(x), self.two(x), self.three(x)
        return cast(tuple[Tensor, Tensor], _VectorDihedral.apply(*vectors))

    def forward(self, x: Tensor) -> Tensor:
        """Return the dihedrals [M, B] of positions [3, n_atoms, B]."""
        cosine, sine = self.cos_sin(x)
        return torch.atan2(sine, cosine)
