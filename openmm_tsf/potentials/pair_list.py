"""A list of pairs of atoms: what a pair knows of its atoms, and sums over an atom's pairs."""

import torch
from torch import Tensor, nn

from openmm_tsf.potentials.batch_geometry import AllPairs, Frame, Gather


class PairList(nn.Module):
    """M pairs of atoms, of which the first is particle 1.

    *Ordered* values are [2, M, B]: each pair as it stands, then with its atoms exchanged. What
    depends on the distance alone stays [M, B] and is computed once for both.

    Parameters
    ----------
    first, second
        The atoms [M]; a pair may occur more than once, an atom never pairs with itself.
    pairs
        All pairs of the atoms.
    ordered
        Whether ordered values will be asked for.
    """

    def __init__(
        self, first: Tensor, second: Tensor, pairs: AllPairs, *, ordered: bool = False
    ) -> None:
        super().__init__()
        n_atoms = pairs.n_atoms
        n_pairs = n_atoms * (n_atoms - 1) // 2
        rows = pairs.number(first, second)
        everything = torch.equal(rows, torch.arange(n_pairs))
        self.n_pairs = len(first)
        self.rows = None if everything else Gather(rows, n_pairs)
        self.first = Gather(first, n_atoms)
        self.second = Gather(second, n_atoms)
        self.one = Gather(torch.cat([first, second]), n_atoms) if ordered else None
        self.two = Gather(torch.cat([second, first]), n_atoms) if ordered else None

    def distances(self, frame: Frame) -> Tensor:
        """Distances [M, B]."""
        return frame.distances if self.rows is None else self.rows(frame.distances)

    def select(self, values: Tensor, particle: int, *, ordered: bool = False) -> Tensor:
        """Values [M, B], or ordered [2, M, B], of particle 1 or 2, from the atoms' [N, B]."""
        if not ordered:
            half: Tensor = (self.first if particle == 1 else self.second)(values)
            return half
        gather = self.one if particle == 1 else self.two
        assert gather is not None
        return gather(values).unflatten(-2, (2, self.n_pairs))

    def sum_over_second(self, values: Tensor) -> Tensor:
        """Sums [N, B] over the partners of each atom of ordered values [2, M, B] or less."""
        assert self.one is not None
        batch = values.shape[-1] if values.ndim else 1
        return self.one.collect(values.expand(2, self.n_pairs, batch).flatten(0, 1))


def all_but(excluded: set[tuple[int, int]], n_atoms: int) -> tuple[Tensor, Tensor]:
    """Atoms [M] and [M] of the pairs i < j that are not among the excluded (low, high)."""
    first, second = torch.triu_indices(n_atoms, n_atoms, 1)
    if excluded:
        codes = torch.tensor([low * n_atoms + high for low, high in excluded])
        keep = ~torch.isin(first * n_atoms + second, codes)
        first, second = first[keep], second[keep]
    return first, second
