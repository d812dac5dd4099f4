"""Differences, distances, angles and dihedrals of whole batches, the batch last.

Arrays are [..., atoms or terms, B]: every operation then runs over contiguous conformations, on
vector units and on a GPU. Sums over an atom's terms are matrix products or gathers, in the
derivatives too: no atomic additions, so forces are deterministic.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from openmm_tsf.utils.geometry import cross, dot

#: Sums over an atom's terms are a product with the incidence matrix up to so many terms per atom,
#: and gathers of each atom's terms beyond: the matrix grows faster than the number of terms.
_MATRIX_UP_TO = 16


def _register(module: nn.Module, atoms: Tensor, terms: Tensor, signs: Tensor, shape: Any) -> None:
    """Sums over an atom's signed terms, in the form that suits their number.

    Entry k says that term ``terms[k]`` belongs to ``atoms[k]``; `shape` is (atoms, terms).
    """
    n_atoms, n_terms = shape
    if n_terms <= _MATRIX_UP_TO * n_atoms:
        matrix = torch.zeros(n_atoms, n_terms, dtype=torch.float64)
        module.register_buffer("which", None)
        module.register_buffer("weight", matrix.index_put_((atoms, terms), signs, accumulate=True))
        return
    # Each atom's terms in a row, padded with term 0 at weight 0.
    order = torch.argsort(atoms, stable=True)
    counts = torch.bincount(atoms, minlength=n_atoms)
    row = atoms[order]
    column = torch.arange(len(order)) - (counts.cumsum(0) - counts)[row]
    which = torch.zeros(n_atoms, int(counts.max()), dtype=torch.int64)
    weight = torch.zeros(*which.shape, 1, dtype=torch.float64)
    which[row, column] = terms[order]
    weight[row, column, 0] = signs[order]
    module.register_buffer("which", which)
    module.register_buffer("weight", weight)


def _select(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(-2, index)


def _sum_entries(terms: Tensor, which: Tensor | None, weight: Tensor) -> Tensor:
    """Sums [..., n_atoms, B] of the terms [..., M, B] that belong to each atom."""
    if which is None:
        return weight @ terms
    return (terms.index_select(-2, which.flatten()).unflatten(-2, which.shape) * weight).sum(dim=-2)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, which: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, which, weight)
        return _select(values, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        index, which, weight = ctx.saved_tensors
        return _Collect.apply(grads[0], index, which, weight), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, index: Tensor, which: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, which, weight)
        return _sum_entries(terms, which, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        index, which, weight = ctx.saved_tensors
        return _Gather.apply(grads[0], index, which, weight), None, None, None


class Gather(nn.Module):
    """Values of atoms, term by term, and sums over terms, atom by atom; each other's transpose.

    Parameters
    ----------
    index
        The atom of each of M terms.
    n_atoms
        Number of atoms.
    """

    index: Tensor
    which: Tensor | None
    weight: Tensor

    def __init__(self, index: Sequence[int] | Tensor, n_atoms: int) -> None:
        super().__init__()
        flat = torch.as_tensor(index, dtype=torch.int64).reshape(-1)
        self.register_buffer("index", flat)
        n_terms = len(flat)
        plus = torch.ones(n_terms, dtype=torch.float64)
        _register(self, flat, torch.arange(n_terms), plus, (n_atoms, n_terms))

    def forward(self, values: Tensor) -> Tensor:
        """Values [..., M, B] of the terms, from those of the atoms [..., n_atoms, B]."""
        return cast(Tensor, _Gather.apply(values, self.index, self.which, self.weight))

    def collect(self, terms: Tensor) -> Tensor:
        """Sums [..., n_atoms, B] over the terms [..., M, B] of each atom."""
        return cast(Tensor, _Collect.apply(terms, self.index, self.which, self.weight))


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, which: Any, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first, second, which, weight)
        return _select(x, second) - _select(x, first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        first, second, which, weight = ctx.saved_tensors
        return _Undifference.apply(grads[0], first, second, which, weight), None, None, None, None


class _Undifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, terms: Tensor, first: Tensor, second: Tensor, which: Any, weight: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first, second, which, weight)
        return _sum_entries(terms, which, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Difference.apply(grads[0], *ctx.saved_tensors), None, None, None, None


class Difference(nn.Module):
    """Vectors from one atom to another: x[second] - x[first] for M pairs of atoms.

    Parameters
    ----------
    first, second
        The atoms [M].
    n_atoms
        Number of atoms.
    """

    first: Tensor
    second: Tensor
    which: Tensor | None
    weight: Tensor

    def __init__(
        self, first: Sequence[int] | Tensor, second: Sequence[int] | Tensor, n_atoms: int
    ) -> None:
        super().__init__()
        one = torch.as_tensor(first, dtype=torch.int64).reshape(-1)
        two = torch.as_tensor(second, dtype=torch.int64).reshape(-1)
        self.register_buffer("first", one)
        self.register_buffer("second", two)
        n_terms = len(one)
        plus = torch.ones(n_terms, dtype=torch.float64)
        atoms, terms = torch.cat([two, one]), torch.arange(n_terms).repeat(2)
        _register(self, atoms, terms, torch.cat([plus, -plus]), (n_atoms, n_terms))

    def forward(self, x: Tensor) -> Tensor:
        """Vectors [3, M, B] from positions [3, n_atoms, B]."""
        return cast(Tensor, _Difference.apply(x, self.first, self.second, self.which, self.weight))


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
    """Lengths [M, B] of vectors [3, M, B]; the derivative at 0 is 0, as in OpenMM."""
    return cast(Tensor, _Length.apply(vectors))


class _VectorAngle(torch.autograd.Function):
    """The angle between two vectors; the derivative in closed form, differentiable in turn."""

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
        share = grads[0] * torch.where(square == 0, 1.0, square).rsqrt()
        return (
            cross(a, normal) * (share / dot(a, a)),
            cross(normal, b) * (share / dot(b, b)),
        )


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
        slope = grads[1] * cosine - grads[0] * sine  # dE/dphi
        one, two = cross(b1, b2), cross(b2, b3)
        square = dot(b2, b2)
        length = square.sqrt()
        per_one = slope * length / dot(one, one)
        per_two = slope * length / dot(two, two)
        middle = one * (-per_one * dot(b1, b2) / square) - two * (per_two * dot(b3, b2) / square)
        return one * per_one, middle, two * per_two


class Angle(nn.Module):
    """Angles [M, B] in radians at the middle atom of triples [M, 3]."""

    def __init__(self, triples: Tensor, n_atoms: int) -> None:
        super().__init__()
        self.one = Difference(triples[:, 1], triples[:, 0], n_atoms)
        self.two = Difference(triples[:, 1], triples[:, 2], n_atoms)

    def forward(self, x: Tensor) -> Tensor:
        """Angles [M, B] of positions [3, n_atoms, B]."""
        return cast(Tensor, _VectorAngle.apply(self.one(x), self.two(x)))


class Dihedral(nn.Module):
    """Dihedrals [M, B] in (-pi, pi], IUPAC sign as in OpenMM, of quadruples [M, 4]."""

    def __init__(self, quadruples: Tensor, n_atoms: int) -> None:
        super().__init__()
        self.one = Difference(quadruples[:, 0], quadruples[:, 1], n_atoms)
        self.two = Difference(quadruples[:, 1], quadruples[:, 2], n_atoms)
        self.three = Difference(quadruples[:, 2], quadruples[:, 3], n_atoms)

    def cos_sin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [M, B] of the dihedrals."""
        return cast(
            tuple[Tensor, Tensor], _VectorDihedral.apply(self.one(x), self.two(x), self.three(x))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Dihedrals [M, B] of positions [3, n_atoms, B]."""
        cosine, sine = self.cos_sin(x)
        return torch.atan2(sine, cosine)


class _DenseDistances(torch.autograd.Function):
    """Distances of all ordered pairs; 1 on the diagonal, so that nothing divides by zero there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, diagonal: Tensor) -> Tensor:
        total = diagonal
        for c in x.unbind(0):
            d = c[:, None] - c[None]
            total = total + d * d
        r = total.sqrt()
        ctx.save_for_backward(x, r)
        return r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, r = ctx.saved_tensors
        g = grads[0]
        # Atoms at the same place have no direction to push each other in.
        share = (g + g.transpose(0, 1)) / (r + (r == 0))
        return (
            torch.stack([(share * (c[:, None] - c[None])).sum(dim=1) for c in x.unbind(0)]),
            None,
        )


class AllPairs(nn.Module):
    """All pairs of N atoms: dense [N, N], and i < j in the order of ``torch.triu_indices``.

    The latter are large, and few Systems need them: `with_list` says whether to make them now.
    """

    diagonal: Tensor
    off_diagonal: Tensor

    def __init__(self, n_atoms: int, with_list: bool = True) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.first, self.second = torch.triu_indices(n_atoms, n_atoms, 1)
        self.difference: Difference | None = None
        diagonal = torch.eye(n_atoms, dtype=torch.float64)[:, :, None]
        self.register_buffer("diagonal", diagonal)
        self.register_buffer("off_diagonal", 1 - diagonal)
        if with_list:
            self.prepare_list()

    def number(self, i: Tensor, j: Tensor) -> Tensor:
        """Row numbers [M] of pairs of atoms, in either order."""
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        return low * (2 * self.n_atoms - low - 1) // 2 + high - low - 1

    def prepare_list(self) -> None:
        """Make ready for distances of pairs i < j."""
        if self.difference is None:
            self.difference = Difference(self.first, self.second, self.n_atoms)

    def rows_of_dense(self) -> Tensor:
        """Row numbers [N, N] of all ordered pairs; one past the last row on the diagonal."""
        i, j = torch.meshgrid(*[torch.arange(self.n_atoms)] * 2, indexing="ij")
        past = self.n_atoms * (self.n_atoms - 1) // 2
        return torch.where(i == j, past, self.number(i, j))

    def forward(self, x: Tensor) -> Tensor:
        """Distances [P, B] of positions [3, N, B], pairs i < j."""
        if self.difference is None:
            raise RuntimeError("the list of pairs i < j was not prepared")
        return norm(self.difference(x))

    def dense(self, x: Tensor) -> Tensor:
        """Distances [N, N, B] of positions [3, N, B], with 1 on the diagonal."""
        return cast(Tensor, _DenseDistances.apply(x, self.diagonal))


class Frame:
    """A batch of conformations, with what several terms need computed once.

    Parameters
    ----------
    x
        Positions [3, N, B] in nm.
    pairs
        The pairs of the N atoms.
    """

    def __init__(self, x: Tensor, pairs: AllPairs) -> None:
        self.x = x
        self.pairs = pairs
        self._distances: Tensor | None = None
        self._dense: Tensor | None = None

    @property
    def distances(self) -> Tensor:
        """Distances [P, B] of all pairs i < j, nm."""
        if self._distances is None:
            self._distances = self.pairs(self.x)
        return self._distances

    @property
    def dense_distances(self) -> Tensor:
        """Distances [N, N, B] of all ordered pairs, nm; 1 on the diagonal.

        Faster than :attr:`distances` where a term sums over every partner of an atom: no gathers,
        and the derivative is one sum over the second index.
        """
        if self._dense is None:
            self._dense = self.pairs.dense(self.x)
        return self._dense
