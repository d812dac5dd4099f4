"""Equivalent hydrogens: a methyl group turned by a third is the same molecule with other labels.

A force field does not tell a methyl group's three hydrogens apart, so the density has three equal
copies per group. The coordinate layer can work on one of them: it relabels the hydrogens so that,
going round from the branch cut, the primary one comes first. A flow then has one mode to learn
where there were three. The labels of a configuration are kept beside it, as its pose is.
"""

import logging
from collections.abc import Sequence

import numpy as np
import openmm
import openmm.app as app
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.geometry import TWO_PI
from openmm_tsf.systems.molecule import MolecularSystem

logger = logging.getLogger(__name__)

Triple = tuple[int, int, int]

#: Of the overlap of a group's copies, in nats per squared radian at T_ref: copies share what lies
#: within about 0.1 rad of a wall.
OVERLAP_STIFFNESS = 50.0
#: Perturbation (nm) and number of conformations on which the energy's invariance is checked.
_PERTURBATION, _N_CHECKS = 0.004, 3
#: Largest change of the energy, relative to its size, that still is rounding.
_TOLERANCE = 1e-9


def methyl_hydrogens(topology: app.Topology) -> list[Triple]:
    """The three hydrogens of each carbon that has exactly three, and four neighbours."""
    neighbours: dict[int, list[app.topology.Atom]] = {a.index: [] for a in topology.atoms()}
    for first, second in topology.bonds():
        neighbours[first.index].append(second)
        neighbours[second.index].append(first)
    triples: list[Triple] = []
    for atom in topology.atoms():
        around = neighbours[atom.index]
        hydrogens = [a.index for a in around if a.element is app.element.hydrogen]
        if atom.element is app.element.carbon and len(around) == 4 and len(hydrogens) == 3:
            triples.append((hydrogens[0], hydrogens[1], hydrogens[2]))
    return triples


def equivalent_hydrogens(molecule: MolecularSystem) -> list[Triple]:
    """Methyl groups whose hydrogens the System really does not tell apart.

    Each group is turned by a third on perturbed conformations; where the energy changes by more
    than rounding, or the masses differ, the group is left out, with a warning.
    """
    integrator = openmm.VerletIntegrator(0.001)
    platform = openmm.Platform.getPlatformByName("Reference")
    system = openmm.XmlSerializer.clone(molecule.system)
    context = openmm.Context(system, integrator, platform)

    def energy(x: np.ndarray) -> float:
        context.setPositions(x)
        return float(context.getState(getEnergy=True).getPotentialEnergy()._value)

    rng = np.random.default_rng(0)
    shape = (_N_CHECKS, molecule.n_atoms, 3)
    x = molecule.positions + _PERTURBATION * rng.standard_normal(shape)
    before = [energy(frame) for frame in x]
    good: list[Triple] = []
    for triple in methyl_hydrogens(molecule.topology):
        turned = x.copy()
        turned[:, list(triple)] = x[:, list(np.roll(triple, 1))]
        after = [energy(frame) for frame in turned]
        same = np.allclose(after, before, rtol=_TOLERANCE, atol=1e-6)
        if same and len({float(molecule.masses[i]) for i in triple}) == 1:
            good.append(triple)
        else:
            logger.warning("hydrogens %s are not equivalent in this System", triple)
    return good


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
