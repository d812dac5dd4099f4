"""The labelled copies of a configuration that equivalent hydrogens make."""

import math

import torch
from torch import Tensor

from openmm_tsf.coordinates.door import check_tensor
from openmm_tsf.coordinates.geometry import TWO_PI, dihedral, wrap
from openmm_tsf.coordinates.hydrogen_labels import Labels


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

    def log_window(self, u: Tensor, tau: Tensor) -> Tensor:
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

    def log_window_of(self, x: Tensor, tau: Tensor) -> Tensor:
        """:meth:`log_window` [B] of the copies whose conformations, as built, are x [B, N, 3].

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
        """Which copy each x [B, N, 3] is taken for, [B, G], and :meth:`log_window` of it [B].

        Copies are drawn by their shares.
        """
        self._check_x(x)
        x = self.relabel(x, self.labels(x))
        torsions, primary = self._group_torsions(x), self.labelling.columns[:, 0]
        start = wrap(torsions[:, primary], self.branch_cuts[primary])
        torsions = torsions.index_copy(1, primary, start)
        copies = self.labelling.draw(torsions, self.branch_cuts, tau, generator)
        return copies, self.log_window_of(self.relabel(x, copies), tau)
