"""Hydrogen labels: a methyl group rotated by a third is the same molecule with other labels.

A force field does not distinguish a methyl group's three hydrogens, so the density of labelled
configurations has three equal copies per group. The coordinate layer can work on one of them: it
relabels the hydrogens so that, counterclockwise from the branch cut, the primary one comes first. A
flow then has one mode to learn instead of three. Like the pose, the labels of a configuration are
not part of its internal coordinates.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.bond_graph import Triple
from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.geometry import TWO_PI
from openmm_tsf.coordinates.measures import dihedrals_of
from openmm_tsf.coordinates.penalties import half_circle_penalty
from openmm_tsf.utils.tensors import check_tensor

#: Stiffness of the partition of unity over a group's copies, in nats per squared radian at T_ref:
#: copies overlap within about 0.1 rad of their boundary.
OVERLAP_STIFFNESS = 50.0


class HydrogenLabels(nn.Module):
    """Groups of three equivalent hydrogens, and which of each comes first after the branch cut.

    Parameters
    ----------
    rows
        The Z-matrix's rows [N, 4].
    handedness
        The handedness of each of its dihedrals [N-3]: +1, -1, or 0 for none.
    triples
        Groups of equivalent atoms. A group is left out if it is not one atom placed by a primary
        torsion and two siblings placed relative to it (see :class:`ZMatrix`) with opposite
        handedness, as at the root.
    """

    columns: Tensor
    atoms: Tensor
    quartets: Tensor

    def __init__(
        self, rows: np.ndarray, handedness: Sequence[float], triples: Sequence[Triple]
    ) -> None:
        super().__init__()
        columns = [_columns(rows, handedness, triple) for triple in triples]
        kept = (t for t, c in zip(triples, columns, strict=True) if c is not None)
        self.triples = [[int(atom) for atom in triple] for triple in kept]
        # Of each group [G, 3]: dihedral columns (primary, next, last counterclockwise) and atoms.
        found = [c for c in columns if c is not None]
        index = torch.tensor(found, dtype=torch.int64, device="cpu").reshape(-1, 3)
        self.register_buffer("columns", index, persistent=False)
        quartets = torch.as_tensor(rows, dtype=torch.int64, device="cpu")[3:]
        self.register_buffer("atoms", quartets[:, 0][index], persistent=False)
        self.register_buffer("quartets", quartets[index.flatten()], persistent=False)

    def __len__(self) -> int:
        return len(self.triples)

    def dihedrals(self, x: Tensor) -> Tensor:
        """Dihedrals [B, N-3] of the groups' hydrogens in x [B, N, 3]; zeros for other atoms."""
        torsions = x.new_zeros(len(x), x.shape[1] - 3)
        torsions[:, self.columns.flatten()] = dihedrals_of(x, self.quartets).T
        return torsions

    def in_domain(self, torsions: Tensor, cuts: Tensor, overlap: bool = False) -> Tensor:
        """Whether every group has label 0 and all gaps between its atoms are below pi: bool [B].

        With such gaps their order is the same whichever atom comes first. With `overlap` one atom
        may be in the neighbouring copy: the first at an angle from the cut below zero, or the last
        at one above 2 pi.
        """
        _, following, last = self.columns.T
        second_gap = torsions[:, last] - torsions[:, following]
        gaps = (torsions[:, following], second_gap, -torsions[:, last])
        first, second, third = self._angles_from_cut(torsions, cuts)
        if overlap:
            inside = (second >= 0) & (second < TWO_PI) & ((first >= 0) | (third < TWO_PI))
        else:
            inside = (first >= 0) & (third < TWO_PI)
        for gap in gaps:
            inside = inside & (gap.sin() > 0)
        return inside.all(-1)

    def penalty(self, torsions: Tensor, cuts: Tensor) -> Tensor:
        """Sum of squared violations [B] of :meth:`in_domain` in radians^2, for training only."""
        _, following, last = self.columns.T
        gap = torch.remainder(torsions[:, last] - torsions[:, following], TWO_PI)
        beyond = torch.relu(self._angles_from_cut(torsions, cuts)[2] - TWO_PI)
        penalty = (beyond.square() + torch.relu(gap - 0.5 * TWO_PI).square()).sum(-1)
        for columns, sign in ((following, 1.0), (last, -1.0)):
            penalty = penalty + half_circle_penalty(torsions[:, columns], sign)
        return penalty

    def _angles_from_cut(self, torsions: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Angles [B, G] from the cut to the three atoms, counterclockwise, primary first."""
        primary, following, last = self.columns.T
        first = torsions[:, primary] - cuts[primary]
        second, third = (first + torch.remainder(torsions[:, c], TWO_PI) for c in (following, last))
        return first, second, third

    def log_partition_terms(
        self, torsions: Tensor, cuts: Tensor, tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ln of the numerator and of the denominator of the partition of unity, each [B].

        A configuration with atoms at angles 0 <= t1 < t2 < t3 < 2 pi from the cut has three copies
        with neighbouring labels: itself, one where t1 comes last (at 2 pi + t1) and one where t3
        comes first (at t3 - 2 pi). They are weighted
        1 : exp(-q t1^2) : exp(-q (2 pi - t3)^2), q = 50/tau, normalised to one. The logarithms are
        sums over groups. `torsions` [B, N-3] of a copy are not wrapped; tau [B].
        """
        first, second, third = self._angles_from_cut(torsions, cuts)
        before, behind = first < 0, third >= TWO_PI
        low = torch.where(before, second, torch.where(behind, third - TWO_PI, first))
        high = TWO_PI - torch.where(before, first + TWO_PI, torch.where(behind, second, third))
        stiffness = (OVERLAP_STIFFNESS / tau)[:, None]
        beyond = first.clamp(max=0).square() + (third - TWO_PI).clamp(min=0).square()
        terms = (torch.zeros_like(low), -stiffness * low.square(), -stiffness * high.square())
        log_denominator = torch.logsumexp(torch.stack(terms), 0)
        return (-stiffness * beyond).sum(-1), log_denominator.sum(-1)

    def log_weights(self, torsions: Tensor, cuts: Tensor, tau: Tensor) -> Tensor:
        """ln of the weights [B, G, 3] of each group's three copies in the partition of unity.

        Copy 0 is the configuration of label 0; in copy 1, t1 comes last; in copy 2, t3 comes first
        (:meth:`log_partition_terms`). `torsions` are dihedrals [B, N-3] with any labels.
        """
        angles = self._wrapped_angles(torsions, cuts)
        low, high = angles.amin(-1), TWO_PI - angles.amax(-1)
        stiffness = (OVERLAP_STIFFNESS / tau)[:, None]
        terms = (torch.zeros_like(low), -stiffness * low.square(), -stiffness * high.square())
        return torch.log_softmax(torch.stack(terms, -1), -1)

    def draw_copies(self, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a copy [B, G] of each group, with its weight from :meth:`log_weights`."""
        drawn = torch.rand(
            log_weights.shape[:-1],
            generator=generator,
            dtype=torch.float64,
            device=log_weights.device,
        )
        weights = log_weights.exp()
        drawn = drawn.to(weights) - weights[..., 0]
        return (drawn >= 0).long() + (drawn >= weights[..., 1]).long()

    def labels(self, torsions: Tensor, cuts: Tensor) -> Tensor:
        """Labels [B, G] of dihedrals [B, N-3]: the first atom is 0 primary, 1 next, 2 last."""
        return self._wrapped_angles(torsions, cuts).argmin(-1)

    def _wrapped_angles(self, torsions: Tensor, cuts: Tensor) -> Tensor:
        """Angles [B, G, 3] in [0, 2 pi) from the cut to the primary, next and last atom."""
        offsets = torsions[:, self.columns]
        primary = offsets[:, :, :1]
        offsets = torch.cat([torch.zeros_like(primary), offsets[:, :, 1:]], dim=-1)
        start = primary - cuts[self.columns[:, :1]]
        return torch.remainder(start + offsets, TWO_PI)

    def relabel(self, x: Tensor, shift: Tensor) -> Tensor:
        """Move atom i of each group in x [B, N, 3] to the position of i + shift [B, G] (mod 3)."""
        order = torch.arange(x.shape[1], device=x.device, dtype=torch.int64).repeat(len(x), 1)
        thirds = torch.arange(3, device=x.device, dtype=torch.int64)
        source = self.atoms.expand(len(x), -1, -1).gather(2, (thirds + shift[:, :, None]) % 3)
        order[:, self.atoms.flatten()] = source.flatten(1)
        return x.gather(1, order[:, :, None].expand(-1, -1, 3))

    def fit_cuts(self, cuts: Tensor, angles: Tensor) -> Tensor:
        """Return cuts [N-3], each group's at the emptiest angle of its atoms in data [F, N-3]."""
        cuts = cuts.clone()
        for primary, following, last in self.columns.tolist():
            start = angles[:, primary]
            pooled = torch.cat([start, start + angles[:, following], start + angles[:, last]])
            cuts[primary] = emptiest_angles(pooled[:, None])[0]
        return cuts


def _columns(rows: np.ndarray, handedness: Sequence[float], triple: Triple) -> list[int] | None:
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
    """Base class of :class:`InternalCoordinates`: its methods for hydrogen labels.

    Attributes
    ----------
    labelling
        The groups of equivalent hydrogens.
    overlap
        Whether copies overlap at their boundaries.
    """

    n_atoms: int
    labelling: HydrogenLabels
    overlap: bool
    branch_cuts: Tensor

    def _check_x(self, x: Tensor, name: str = "x") -> None:
        check_tensor(x, name, (self.n_atoms, 3), self.branch_cuts)

    def labels(self, x: Tensor) -> Tensor:
        """The label [B, G] of each group: its first hydrogen is 0 primary, 1 next, 2 last.

        ``relabel(x, labels(x))`` has labels 0, which are those of the coordinates' domain.
        """
        self._check_x(x)
        return self.labelling.labels(self.labelling.dihedrals(x), self.branch_cuts)

    def relabel(self, x: Tensor, shift: Tensor) -> Tensor:
        """Return x [B, N, 3] with each group's hydrogens rotated by shift [B, G] thirds."""
        return self.labelling.relabel(x, shift)

    @property
    def log_multiplicity(self) -> float:
        """ln of the number of labelled copies of each u: G ln 3."""
        return len(self.labelling) * math.log(3.0)

    def log_partition(self, u: Tensor, tau: Tensor) -> Tensor:
        """ln of the partition of unity [B] over hydrogen label copies, at the copies u [B, 3N-6].

        If copies are disjoint, the density of u ends abruptly at the boundary, which no smooth
        flow fits, and its draws beyond the boundary are lost. With `overlap` the weight w of a copy
        decreases smoothly beyond its boundary, by as much as that of the next increases
        (:meth:`log_partition_terms`); the weights of all copies of a configuration sum to one. So
        p(x) w(u) is a density on copies whose marginal is p(x), and a configuration's copy is drawn
        with probability w (:meth:`draw_copies`), just as momenta are drawn. Zero without `overlap`:
        one copy has all the weight.

        Parameters
        ----------
        u
            Coordinates in the domain.
        tau
            T/T_ref [B]. The numerator of w depends on tau as a Boltzmann factor does, so that it
            is steered exactly. The denominator, which is not, differs from one only within 0.3 rad
            of a boundary.
        """
        if not self.overlap:
            return u.new_zeros(len(u))
        log_numerator, log_denominator = self.log_partition_terms(u, tau)
        return log_numerator - log_denominator

    def log_partition_terms(self, u: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """ln of the numerator and of the denominator of :meth:`log_partition` at u, each [B]."""
        torsions = u[:, -len(self.branch_cuts) :]
        return self.labelling.log_partition_terms(torsions, self.branch_cuts, tau)

    def log_partition_of(self, x: Tensor, tau: Tensor) -> Tensor:
        """:meth:`log_partition` [B] of the copies whose conformations, as built, are x [B, N, 3].

        The primary hydrogen need not come first: the labels of x identify the copy.
        """
        self._check_x(x)
        torsions = self.labelling.dihedrals(x)
        copies = (-self.labelling.labels(torsions, self.branch_cuts)) % 3
        return _chosen(self.labelling.log_weights(torsions, self.branch_cuts, tau), copies)

    def draw_copies(
        self, x: Tensor, tau: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw copies [B, G] of x [B, N, 3]; return them and their :meth:`log_partition` [B]."""
        self._check_x(x)
        torsions = self.labelling.dihedrals(x)
        log_weights = self.labelling.log_weights(torsions, self.branch_cuts, tau)
        copies = self.labelling.draw_copies(log_weights, generator)
        return copies, _chosen(log_weights, copies)


def _chosen(log_weights: Tensor, copies: Tensor) -> Tensor:
    """Sums [B] over groups of the ln of the weights [B, G, 3] of copies [B, G]."""
    return log_weights.gather(-1, copies[..., None])[..., 0].sum(-1)
