"""Pairs of atoms: all of them, lists of some, ordered pairs; and the batch that pairs belong to."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from openmm_tsf.potentials.forces.geometry import Difference, Gather, LinearMap, norm


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
        # Atoms at the same point have no direction: no force between them.
        weight = (g + g.transpose(0, 1)) / (r + (r == 0))
        gradient = [(weight * (c[:, None] - c[None])).sum(dim=1) for c in x.unbind(0)]
        return torch.stack(gradient), None


class AllPairs(nn.Module):
    """All pairs of N atoms: dense [N, N], and i < j in the order of ``torch.triu_indices``.

    The list of pairs i < j is large, and few Systems need it: see :meth:`prepare_list`.
    """

    diagonal: Tensor
    off_diagonal: Tensor

    def __init__(self, n_atoms: int) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.first, self.second = torch.triu_indices(
            n_atoms, n_atoms, 1, dtype=torch.int64, device="cpu"
        )
        self.difference: Difference | None = None
        diagonal = torch.eye(n_atoms, dtype=torch.float64, device="cpu")[:, :, None]
        self.register_buffer("diagonal", diagonal)
        self.register_buffer("off_diagonal", 1 - diagonal)

    def row_numbers(self, i: Tensor, j: Tensor) -> Tensor:
        """Return the rows [M] of pairs of atoms, in either order, in the list of pairs i < j."""
        low, high = torch.minimum(i, j), torch.maximum(i, j)
        return low * (2 * self.n_atoms - low - 1) // 2 + high - low - 1

    def prepare_list(self) -> None:
        """Prepare the distances of pairs i < j."""
        if self.difference is None:
            self.difference = Difference(self.first, self.second, self.n_atoms)

    def dense_row_numbers(self) -> Tensor:
        """Return the rows [N, N] of all ordered pairs; one past the last row on the diagonal."""
        atoms = torch.arange(self.n_atoms, dtype=torch.int64, device="cpu")
        i, j = torch.meshgrid(atoms, atoms, indexing="ij")
        past_last = self.n_atoms * (self.n_atoms - 1) // 2
        return torch.where(i == j, past_last, self.row_numbers(i, j))

    def forward(self, x: Tensor) -> Tensor:
        """Return the distances [P, B] of pairs i < j, from positions [3, N, B]."""
        if self.difference is None:
            raise RuntimeError("the list of pairs i < j was not prepared")
        return norm(self.difference(x))

    def dense(self, x: Tensor) -> Tensor:
        """Return the distances [N, N, B] of positions [3, N, B], with 1 on the diagonal."""
        return cast(Tensor, _DenseDistances.apply(x, self.diagonal))


class Batch:
    """Conformations [3, N, B] in nm, whose distances are computed once for all terms."""

    def __init__(self, x: Tensor, pairs: AllPairs) -> None:
        self.x = x
        self.pairs = pairs
        self._distances: Tensor | None = None
        self._dense: Tensor | None = None

    @property
    def distances(self) -> Tensor:
        """The distances [P, B] of all pairs i < j, in nm."""
        if self._distances is None:
            self._distances = self.pairs(self.x)
        return self._distances

    @property
    def dense_distances(self) -> Tensor:
        """The distances [N, N, B] of all ordered pairs, in nm; 1 on the diagonal.

        Faster than :attr:`distances` where a term sums over every partner of an atom: no gathers,
        and the derivative is one sum over the second index.
        """
        if self._dense is None:
            self._dense = self.pairs.dense(self.x)
        return self._dense


class PairList(nn.Module):
    """M pairs of different atoms, `first` being particle 1; a pair may occur more than once."""

    def __init__(self, first: Tensor, second: Tensor, pairs: AllPairs) -> None:
        super().__init__()
        n_atoms = pairs.n_atoms
        rows = pairs.row_numbers(first, second)
        every = torch.arange(n_atoms * (n_atoms - 1) // 2, dtype=torch.int64, device="cpu")
        is_complete = torch.equal(rows, every)
        self.shape = (len(first),)
        self.first = Gather(first, n_atoms)
        self.second = Gather(second, n_atoms)
        self.difference = None if is_complete else Difference(first, second, n_atoms)
        if is_complete:
            pairs.prepare_list()

    def distances(self, batch: Batch) -> Tensor:
        """Return the distances [M, B]."""
        return batch.distances if self.difference is None else norm(self.difference(batch.x))

    def select(self, values: Tensor, particle: int) -> Tensor:
        """Return the values [M, B] of particle 1 or 2, from those of the atoms [N, B]."""
        selected: Tensor = (self.first if particle == 1 else self.second)(values)
        return selected


class OrderedPairs(nn.Module):
    """Every pair twice, with either atom as particle 1, and sums over an atom's partners.

    Without exclusions the shape is [N - 1, N]: column i has the pairs of atom i, of which row k is
    with atom i + k (modulo N), so that sums over partners are sums over rows. With `excluded` pairs
    (low, high) it is [2, M]: the M pairs i < j that are left, and the same with atoms exchanged.
    """

    rows: Tensor
    first_use: Tensor
    second_use: Tensor

    def __init__(self, excluded: set[tuple[int, int]], pairs: AllPairs) -> None:
        super().__init__()
        n_atoms = pairs.n_atoms
        self.pairs: PairList | None = None
        if excluded:
            low, high = included_pairs(excluded, n_atoms)
            self.pairs = PairList(low, high, pairs)
            first, second = torch.stack([low, high]), torch.stack([high, low])
        else:
            first = torch.arange(n_atoms, dtype=torch.int64, device="cpu").expand(
                max(0, n_atoms - 1), n_atoms
            )
            second = (
                first + torch.arange(1, n_atoms, dtype=torch.int64, device="cpu")[:, None]
            ) % n_atoms
            pairs.prepare_list()
            rows = pairs.row_numbers(first, second).flatten()
            uses = torch.argsort(rows, stable=True).reshape(-1, 2)
            self.register_buffer("rows", rows)
            self.register_buffer("first_use", uses[:, 0].contiguous())
            self.register_buffer("second_use", uses[:, 1].contiguous())
        self.shape = tuple(first.shape)
        self.first = None if self.pairs is None else Gather(first.reshape(-1), n_atoms)
        self.second = Gather(second.reshape(-1), n_atoms)

    def distances(self, batch: Batch) -> Tensor:
        """Return the distances, [N - 1, N, B] or, the same for both orders, [M, B]."""
        if self.pairs is not None:
            return self.pairs.distances(batch)
        distances = LinearMap.apply(batch.distances, self._both_orders, self._sum_of_orders)
        return cast(Tensor, distances).unflatten(0, self.shape)

    def _both_orders(self, values: Tensor) -> Tensor:
        """Return the values [2 P, B] of both orders of each pair, from those of pairs [P, B]."""
        return values.index_select(0, self.rows)

    def _sum_of_orders(self, values: Tensor) -> Tensor:
        """Return the transpose of `_both_orders`, in two gathers."""
        return values.index_select(0, self.first_use) + values.index_select(0, self.second_use)

    def select(self, values: Tensor, particle: int) -> Tensor:
        """Return the values [*shape, B] of particle 1 or 2, from those of the atoms [N, B]."""
        if particle == 1 and self.first is None:
            return values.unsqueeze(0)
        gather = self.first if particle == 1 and self.first is not None else self.second
        selected: Tensor = gather(values)
        return selected.unflatten(0, self.shape)

    def sum_over_partners(self, values: Tensor) -> Tensor:
        """Return the sums [N, B] over each atom's partners of values [*shape, B]."""
        values = values.expand(*self.shape, values.shape[-1] if values.ndim else 1)
        return values.sum(dim=0) if self.first is None else self.first.collect(values.flatten(0, 1))


def included_pairs(excluded: set[tuple[int, int]], n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return the atoms [M] and [M] of the pairs i < j that are not excluded (low, high)."""
    first, second = torch.triu_indices(n_atoms, n_atoms, 1, dtype=torch.int64, device="cpu")
    if excluded:
        codes = torch.tensor(
            [low * n_atoms + high for low, high in excluded], dtype=torch.int64, device="cpu"
        )
        keep = ~torch.isin(first * n_atoms + second, codes)
        first, second = first[keep], second[keep]
    return first, second
