"""A list of pairs of atoms: what a pair knows of its atoms, and sums over an atom's pairs."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from openmm_tsf.potentials.forces.geometry import AllPairs, Difference, Frame, Gather, norm


class PairList(nn.Module):
    """M pairs of atoms, of which the first is particle 1.

    Parameters
    ----------
    first, second
        The atoms [M]; a pair may occur more than once, an atom never pairs with itself.
    pairs
        All pairs of the atoms.
    """

    def __init__(self, first: Tensor, second: Tensor, pairs: AllPairs) -> None:
        super().__init__()
        n_atoms = pairs.n_atoms
        rows = pairs.number(first, second)
        everything = torch.equal(rows, torch.arange(n_atoms * (n_atoms - 1) // 2))
        self.shape = (len(first),)
        self.first = Gather(first, n_atoms)
        self.second = Gather(second, n_atoms)
        self.difference = None if everything else Difference(first, second, n_atoms)
        if everything:
            pairs.prepare_list()

    def distances(self, frame: Frame) -> Tensor:
        """Distances [M, B]."""
        return frame.distances if self.difference is None else norm(self.difference(frame.x))

    def select(self, values: Tensor, particle: int) -> Tensor:
        """Values [M, B] of particle 1 or 2, from those of the atoms [N, B]."""
        half: Tensor = (self.first if particle == 1 else self.second)(values)
        return half


class OrderedPairs(nn.Module):
    """Every pair twice, with either atom as particle 1, and sums over its partners.

    Without exclusions the arrangement is [N - 1, N]: column i has the pairs of atom i, of which row
    k is with atom i + k (modulo N), so that sums over partners are sums over rows. With exclusions
    it is [2, M]: the M pairs i < j that are left, and the same with their atoms exchanged.

    Parameters
    ----------
    excluded
        Pairs (low, high) that are left out.
    pairs
        All pairs of the atoms.
    """

    rows: Tensor
    once: Tensor
    again: Tensor

    def __init__(self, excluded: set[tuple[int, int]], pairs: AllPairs) -> None:
        super().__init__()
        n_atoms = pairs.n_atoms
        self.pairs: PairList | None = None
        if excluded:
            low, high = all_but(excluded, n_atoms)
            self.pairs = PairList(low, high, pairs)
            first, second = torch.stack([low, high]), torch.stack([high, low])
        else:
            first = torch.arange(n_atoms).expand(max(0, n_atoms - 1), n_atoms)
            second = (first + torch.arange(1, n_atoms)[:, None]) % n_atoms
            pairs.prepare_list()
            rows = pairs.number(first, second).flatten()
            places = torch.argsort(rows, stable=True).reshape(-1, 2)
            self.register_buffer("rows", rows)
            self.register_buffer("once", places[:, 0].contiguous())
            self.register_buffer("again", places[:, 1].contiguous())
        self.shape = tuple(first.shape)
        self.first = None if self.pairs is None else Gather(first.reshape(-1), n_atoms)
        self.second = Gather(second.reshape(-1), n_atoms)

    def distances(self, frame: Frame) -> Tensor:
        """Distances, [N - 1, N, B] or, the same for both orders, [M, B]."""
        if self.pairs is not None:
            return self.pairs.distances(frame)
        distances = _Spread.apply(frame.distances, self.rows, self.once, self.again)
        return cast(Tensor, distances).unflatten(0, self.shape)

    def select(self, values: Tensor, particle: int) -> Tensor:
        """Values [*shape, B] of particle 1 or 2, from those of the atoms [N, B]."""
        if particle == 1 and self.first is None:
            return values.unsqueeze(0)
        gather = self.first if particle == 1 and self.first is not None else self.second
        selected: Tensor = gather(values)
        return selected.unflatten(0, self.shape)

    def sum_over_partners(self, values: Tensor) -> Tensor:
        """Sums [N, B] over each atom's partners, its pairs' values broadcasting to [*shape, B]."""
        values = values.expand(*self.shape, values.shape[-1] if values.ndim else 1)
        return values.sum(dim=0) if self.first is None else self.first.collect(values.flatten(0, 1))


class _Spread(torch.autograd.Function):
    """Values of pairs [P, B] to both orders of each pair [2 P, B]: a gather..."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, once: Tensor, again: Tensor) -> Tensor:
        ctx.save_for_backward(rows, once, again)
        return values.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Fold.apply(grads[0], *ctx.saved_tensors), None, None, None


class _Fold(torch.autograd.Function):
    """...and its transpose, two gathers."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, once: Tensor, again: Tensor) -> Tensor:
        ctx.save_for_backward(rows, once, again)
        return values.index_select(0, once) + values.index_select(0, again)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Spread.apply(grads[0], *ctx.saved_tensors), None, None, None


def all_but(excluded: set[tuple[int, int]], n_atoms: int) -> tuple[Tensor, Tensor]:
    """Atoms [M] and [M] of the pairs i < j that are not among the excluded (low, high)."""
    first, second = torch.triu_indices(n_atoms, n_atoms, 1)
    if excluded:
        codes = torch.tensor([low * n_atoms + high for low, high in excluded])
        keep = ~torch.isin(first * n_atoms + second, codes)
        first, second = first[keep], second[keep]
    return first, second
