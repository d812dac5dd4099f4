"""Equivalent hydrogens: a methyl group turned by a third is the same molecule with other labels.

A force field does not tell a methyl group's three hydrogens apart, so the density has three equal
copies per group. The coordinate layer can work on one of them: it relabels the hydrogens so that,
going round from the branch cut, the primary one comes first. A flow then has one mode to learn
where there were three. The labels of a configuration are kept beside it, as its pose is.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.geometry import TWO_PI, dihedral, wrap
from openmm_tsf.utils.tensors import check_tensor

logger = logging.getLogger(__name__)

Triple = tuple[int, int, int]

#: Of the overlap of a group's copies, in nats per squared radian at T_ref: copies share what lies
#: within about 0.1 rad of a wall.
OVERLAP_STIFFNESS = 50.0
#: Perturbation (nm) and number of conformations on which the energy's invariance is checked.
_PERTURBATION, _N_CHECKS = 0.004, 3
#: Largest change of the energy, relative to its size, that still is rounding.
_TOLERANCE = 1e-9


class Labels(nn.Module):
    """Labels of groups of three equivalent atoms: which of each comes first, round from the cut.

    Parameters
    ----------
    rows
        The Z-matrix's rows [N, 4].
    handedness
        Of its dihedrals [N-3]: +1, -1, or 0.
    triples
        Groups of equivalent atoms. Those that are not a primary torsion with two siblings of
        opposite handedness (groups at the root) are left out.
    """

    columns: Tensor
    atoms: Tensor

    def __init__(
        self, rows: np.ndarray, handedness: Sequence[float], triples: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        found = [(list(t), _columns(rows, handedness, t)) for t in triples]
        columns = [c for _, c in found if c is not None]
        self.triples = [t for t, c in found if c is not None]
        # Of each group [G, 3]: dihedral columns (primary, next, last counterclockwise) and atoms.
        index = torch.tensor(columns, dtype=torch.int64).reshape(-1, 3)
        self.register_buffer("columns", index, persistent=False)
        self.register_buffer("atoms", torch.as_tensor(rows)[3:, 0][index], persistent=False)

    def __len__(self) -> int:
        return len(self.triples)

    def inside(self, torsions: Tensor, cuts: Tensor, overlap: bool = False) -> Tensor:
        """Whether every group has label 0 and no gap of half a turn: bool [B].

        With all three gaps below pi the handedness is the same whichever atom comes first. With
        `overlap` one atom may be beyond a wall: the first before the cut, or the last behind it.
        """
        _, following, last = self.columns.T
        gap = torsions[:, last] - torsions[:, following]
        first, second, third = self._round_from_cut(torsions, cuts)
        if overlap:
            good = (second >= 0) & (second < TWO_PI) & ((first >= 0) | (third < TWO_PI))
        else:
            good = (first >= 0) & (third < TWO_PI)
        return (good & (gap.sin() > 0)).all(-1)

    def _round_from_cut(self, torsions: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Angles [B, G] from the cut to the three atoms, counterclockwise, primary first."""
        primary, following, last = self.columns.T
        first = torsions[:, primary] - cuts[primary]
        second, third = (first + torch.remainder(torsions[:, c], TWO_PI) for c in (following, last))
        return first, second, third

    def log_overlap(self, torsions: Tensor, cuts: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the window's numerator and of its denominator, each [B].

        A configuration with atoms at angles 0 <= t1 < t2 < t3 < 2 pi from the cut has three copies
        with neighbouring labels: its own, one where t1 comes last (t1 beyond the upper wall) and
        one where t3 comes first (2 pi - t3 before the lower one). Their windows are in proportion
        1 : exp(-q t1^2) : exp(-q (2 pi - t3)^2), q = 50/tau, and sum to one: a partition of unity.
        Copies add up over groups.

        Parameters
        ----------
        torsions, cuts
            Dihedrals [B, N-3] of a copy, not wrapped, and cuts [N-3].
        tau
            T/T_ref [B].
        """
        first, second, third = self._round_from_cut(torsions, cuts)
        before, behind = first < 0, third >= TWO_PI
        low = torch.where(before, second, torch.where(behind, third - TWO_PI, first))
        high = TWO_PI - torch.where(before, first + TWO_PI, torch.where(behind, second, third))
        stiffness = (OVERLAP_STIFFNESS / tau)[:, None]
        beyond = first.clamp(max=0).square() + (third - TWO_PI).clamp(min=0).square()
        terms = (torch.zeros_like(low), -stiffness * low.square(), -stiffness * high.square())
        every = torch.logsumexp(torch.stack(terms), 0)
        return (-stiffness * beyond).sum(-1), every.sum(-1)

    def draw(
        self, torsions: Tensor, cuts: Tensor, tau: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Which copy of each group, drawn by the window: [B, G], 0 own, 1 t1 last, 2 t3 first.

        Parameters
        ----------
        torsions
            Dihedrals [B, N-3] of configurations of label 0.
        """
        first, _, third = self._round_from_cut(torsions, cuts)
        stiffness = (OVERLAP_STIFFNESS / tau)[:, None]
        down = torch.exp(-stiffness * first.square())
        up = torch.exp(-stiffness * (TWO_PI - third).square())
        drawn = torch.rand(first.shape, generator=generator, dtype=torch.float64).to(first)
        drawn = drawn * (1 + down + up) - 1
        return (drawn >= 0).long() + (drawn >= down).long()

    def penalty(self, torsions: Tensor, cuts: Tensor) -> Tensor:
        """Sum of squared violations [B] of :meth:`inside` in radians^2: for training only."""
        _, following, last = self.columns.T
        gap = torch.remainder(torsions[:, last] - torsions[:, following], TWO_PI)
        beyond = torch.relu(self._round_from_cut(torsions, cuts)[2] - TWO_PI)
        return (beyond.square() + torch.relu(gap - 0.5 * TWO_PI).square()).sum(-1)

    def of(self, torsions: Tensor, cuts: Tensor) -> Tensor:
        """Which atom comes first, [B, G]: 0 primary, 1 next, 2 last; of dihedrals [B, N-3]."""
        offsets = torsions[:, self.columns]
        primary = offsets[:, :, :1]
        offsets = torch.cat([torch.zeros_like(primary), offsets[:, :, 1:]], dim=-1)
        start = primary - cuts[self.columns[:, :1]]
        return torch.remainder(start + offsets, TWO_PI).argmin(-1)

    def turn(self, x: Tensor, shift: Tensor) -> Tensor:
        """Relabel x [B, N, 3]: atom i of a group takes the position of i + shift [B, G] (mod 3)."""
        order = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        thirds = torch.arange(3, device=x.device)
        source = self.atoms.expand(len(x), -1, -1).gather(2, (thirds + shift[:, :, None]) % 3)
        order[:, self.atoms.flatten()] = source.flatten(1)
        return x.gather(1, order[:, :, None].expand(-1, -1, 3))

    def fold_cuts(self, cuts: Tensor, angles: Tensor) -> Tensor:
        """Cuts [N-3] with each group's at the emptiest angle of all its atoms in data [F, N-3]."""
        cuts = cuts.clone()
        for primary, following, last in self.columns.tolist():
            start = angles[:, primary]
            every = torch.cat([start, start + angles[:, following], start + angles[:, last]])
            cuts[primary] = emptiest_angles(every[:, None])[0]
        return cuts


def _columns(
    rows: np.ndarray, handedness: Sequence[float], triple: Sequence[int]
) -> list[int] | None:
    """Dihedral columns (primary, next, last) of three equivalent atoms, counterclockwise."""
    by_atom = {int(row[0]): number for number, row in enumerate(rows[3:])}
    if any(atom not in by_atom for atom in triple):
        return None
    columns = [by_atom[atom] for atom in triple]
    primary = [c for c in columns if int(rows[3 + c][3]) not in triple]
    following = [c for c in columns if c not in primary and handedness[c] > 0]
    last = [c for c in columns if c not in primary and handedness[c] < 0]
    if not len(primary) == len(following) == len(last) == 1:
        return None
    return [primary[0], following[0], last[0]]


class LabelledCopies:
    """What :class:`InternalCoordinates` knows of labels; it provides what is declared here.

    Attributes
    ----------
    labelling
        The groups of equivalent hydrogens.
    overlap
        Whether copies overlap where one passes into the next.
    """

    n_atoms: int
    labelling: Labels
    overlap: bool
    branch_cuts: Tensor
    _rows: Tensor
    _torsions: slice

    def _check_x(self, x: Tensor, name: str = "x") -> None:
        check_tensor(x, name, (self.n_atoms, 3), self.branch_cuts)

    def labels(self, x: Tensor) -> Tensor:
        """Which third of the circle each group of equivalent hydrogens is in: [B, G], 0 to 2.

        ``relabel(x, labels(x))`` has labels 0, which is where the coordinates live.
        """
        self._check_x(x)
        return self.labelling.of(self._group_torsions(x), self.branch_cuts)

    def _group_torsions(self, x: Tensor) -> Tensor:
        """Dihedrals [B, N-3] of the groups of equivalent hydrogens; zeros elsewhere."""
        columns = self.labelling.columns.flatten()
        xt = x.permute(2, 1, 0)
        atom, bonded, angle, partner = (xt[:, atoms] for atoms in self._rows[3:][columns].T)
        torsions = x.new_zeros(len(x), len(self.branch_cuts))
        torsions[:, columns] = dihedral(atom - bonded, bonded - angle, partner - angle).T
        return torsions

    def relabel(self, x: Tensor, shift: Tensor) -> Tensor:
        """x [B, N, 3] with each group's hydrogens turned by shift [B, G] thirds."""
        return self.labelling.turn(x, shift)

    @property
    def log_multiplicity(self) -> float:
        """ln of the number of labelled copies of each u: G ln 3."""
        return len(self.labelling) * math.log(3.0)

    def log_partition(self, u: Tensor, tau: Tensor) -> Tensor:
        """ln of the share [B] that the copy u [B, 3N-6] has of its configuration.

        With walls between the copies a density on u ends at a step, which no smooth flow meets and
        beyond which its draws are lost. With `overlap` a copy fades out beyond its walls instead,
        by as much as the next one fades in (:meth:`Labels.log_overlap`); shares of all copies of a
        configuration sum to one. So p(x) w(u) is a density on copies whose marginal is p(x), and
        which copy a configuration is taken for is drawn by its shares (:meth:`draw_copies`), just
        as momenta are. Zero (one copy has all) without `overlap`.

        Parameters
        ----------
        u
            Coordinates in the domain.
        tau
            T/T_ref [B]. The share's numerator steers as a Boltzmann factor does; its denominator,
            which differs from one within 0.3 rad of a wall only, does not.
        """
        if not self.overlap:
            return u.new_zeros(len(u))
        beyond, every = self.log_overlap(u, tau)
        return beyond - every

    def log_overlap(self, u: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """ln of the numerator and of the denominator of the share of u [B, 3N-6], each [B]."""
        return self.labelling.log_overlap(u[:, self._torsions], self.branch_cuts, tau)

    def log_partition_of(self, x: Tensor, tau: Tensor) -> Tensor:
        """:meth:`log_partition` [B] of the copies whose conformations, as built, are x [B, N, 3].

        The primary hydrogen need not come first: the labels of x tell which copy it is.
        """
        self._check_x(x)
        torsions, primary = self._group_torsions(x), self.labelling.columns[:, 0]
        copies = (-self.labelling.of(torsions, self.branch_cuts)) % 3
        before = TWO_PI * (copies == 2).to(x)
        turned = wrap(torsions[:, primary], self.branch_cuts[primary]) - before
        beyond, every = self.labelling.log_overlap(
            torsions.index_copy(1, primary, turned), self.branch_cuts, tau
        )
        return beyond - every

    def draw_copies(
        self, x: Tensor, tau: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which copy each x [B, N, 3] is taken for, [B, G], and :meth:`log_partition` of it [B].

        Copies are drawn by their shares.
        """
        self._check_x(x)
        x = self.relabel(x, self.labels(x))
        torsions, primary = self._group_torsions(x), self.labelling.columns[:, 0]
        start = wrap(torsions[:, primary], self.branch_cuts[primary])
        torsions = torsions.index_copy(1, primary, start)
        copies = self.labelling.draw(torsions, self.branch_cuts, tau, generator)
        return copies, self.log_partition_of(self.relabel(x, copies), tau)
