"""Internal coordinates of a molecule as a bijector.

Volume coordinates (r^3/3, -cos theta, phi) have a constant Jacobian, because
r^2 sin(theta) dr dtheta dphi = d(r^3/3) d(-cos theta) dphi: with them the steering condition of
temperature-steerable flows (arXiv:2012.00429, eq. 4) holds for the whole molecule. Polar
coordinates (r, theta, phi) have the log-determinant sum 2 ln r + sum ln sin theta. Both are
relative to Cartesian volume modulo rigid motion: the square map is 3N -> 3N with the pose
(alpha, cos beta, gamma, translation) appended.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import openmm.app as app
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.chirality import is_mirrored, reference_handedness
from openmm_tsf.coordinates.config import layer_entries
from openmm_tsf.coordinates.geometry import (
    TWO_PI,
    axes_of,
    cross,
    dihedral,
    dot,
    norm,
    wrap,
)
from openmm_tsf.coordinates.hydrogen_labels import LabelledCopies, Labels, Triple
from openmm_tsf.coordinates.nerf import Placement
from openmm_tsf.coordinates.penalties import beyond_branch, hold, outside_half_circle
from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.units import NANOMETER, in_unit
from openmm_tsf.utils.tensors import check_tensor
from openmm_tsf.utils.validation import require_entry

BOND, ANGLE, TORSION, OFFSET = range(4)
METRICS = ("volume", "polar")

#: Training geometry: bonds r^3/3 (or r) below this part of the reference's are held there.
BOND_FLOOR = 0.3
#: Training geometry: |cos theta| is held below this.
COS_CEILING = 0.999


class InternalCoordinates(LabelledCopies, nn.Module):
    """Map between internal coordinates u [B, 3N-6] and Cartesian ones x [B, N, 3] in nm.

    u holds N-1 bonds, N-2 angles and N-3 dihedral angles, each in the order of the Z-matrix's rows:
    (r^3/3, -cos theta, phi) for ``"volume"``, (r, theta, phi) for ``"polar"``; nm and radians. A
    dihedral is either a primary torsion or a sibling's offset from it.

    The domain: bonds > 0, -1 < cos theta < 1, dihedrals on their branch [cut, cut + 2 pi), and at
    every tetrahedral centre the handedness of the reference positions.

    Build it with :meth:`from_topology` or :meth:`from_config`.

    Attributes
    ----------
    n_atoms, n_coordinates : int
        N and 3N-6.
    is_constant_log_det : bool
        True for volume coordinates.
    kinds : Tensor of int64 [3N-6]
        0 bond, 1 angle, 2 primary torsion, 3 sibling offset.
    names : list of str
    branch_cuts : Tensor [N-3]
        Where the branch of each dihedral begins, radians.
    """

    branch_cuts: Tensor
    handedness: Tensor
    reference_bonds: Tensor
    kinds: Tensor
    _rows: Tensor
    _handed: Tensor

    def __init__(
        self,
        zmatrix: ZMatrix,
        handedness: Tensor,
        reference_bonds: Tensor,
        branch_cuts: Tensor,
        metric: str = "volume",
        dtype: torch.dtype = torch.float64,
        equivalent: Sequence[Triple] = (),
        overlap: bool = False,
    ) -> None:
        super().__init__()
        if metric not in METRICS:
            raise ValueError(f"metric: expected 'volume' or 'polar', got {metric!r}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        self.zmatrix = zmatrix
        self.metric = metric
        self.n_atoms = zmatrix.n_atoms
        self.n_coordinates = 3 * self.n_atoms - 6
        self.is_constant_log_det = metric == "volume"
        n_bonds, n_angles = self.n_atoms - 1, self.n_atoms - 2
        self._angles = slice(n_bonds, n_bonds + n_angles)
        self._torsions = slice(n_bonds + n_angles, None)
        self._bonds = slice(0, n_bonds)
        rows = torch.as_tensor(zmatrix.rows)
        siblings = torch.as_tensor(zmatrix.siblings)[3:]
        self.placement = Placement(zmatrix)
        self.register_buffer("_rows", rows)
        self.register_buffer("handedness", handedness.to(dtype))
        self.register_buffer("_handed", handedness.nonzero()[:, 0], persistent=False)
        self.register_buffer("reference_bonds", reference_bonds.to(dtype))
        self.register_buffer("branch_cuts", branch_cuts.to(dtype))
        kinds = torch.cat(
            (
                torch.full((n_bonds,), BOND),
                torch.full((n_angles,), ANGLE),
                torch.where(siblings, OFFSET, TORSION),
            )
        )
        self.register_buffer("kinds", kinds)
        self.labelling = Labels(zmatrix.rows, handedness.tolist(), equivalent)
        self.overlap = bool(overlap) and len(self.labelling) > 0
        labels = ("bond", "angle", "torsion", "offset")
        atoms = [zmatrix.rows[1:, :2], zmatrix.rows[2:, :3], zmatrix.rows[3:, :4]]
        quartets = [quartet for block in atoms for quartet in block]
        self.names = [
            " ".join((labels[int(kind)], *(zmatrix.atom_names[i] for i in quartet)))
            for kind, quartet in zip(kinds, quartets, strict=True)
        ]

    @classmethod
    def from_topology(
        cls,
        topology: app.Topology,
        positions: Any,
        metric: str = "volume",
        dtype: torch.dtype = torch.float64,
        equivalent: Sequence[Triple] = (),
        overlap: bool = False,
    ) -> Self:
        """Coordinates of a single molecule.

        Parameters
        ----------
        topology
            OpenMM Topology with bonds.
        positions
            Reference conformation [N, 3] in nm, or a Quantity: defines the handedness and the
            default branches, which are centred on it.
        metric
            ``"volume"`` (constant Jacobian) or ``"polar"``.
        dtype
            Of all computations: torch.float64 or torch.float32.
        equivalent
            Groups of three hydrogens to relabel so that one of three equal copies of the density
            is left (:func:`openmm_tsf.systems.equivalent_hydrogens.equivalent_hydrogens`).
            Conformations in another labelling map to the same u; :meth:`place` gives them their
            labels back.
        overlap
            Let the copies overlap where one passes into the next, so that a density has no step
            there: see :meth:`log_partition`.

        Raises
        ------
        TypeError, ValueError
            As :meth:`ZMatrix.from_topology`; or if `metric` or `dtype` is another, or a
            tetrahedral centre of the reference is flat (its atoms are named).
        """
        zmatrix = ZMatrix.from_topology(topology, positions)
        reference = torch.as_tensor(
            [list(map(float, row)) for row in in_unit(positions, NANOMETER, "positions")],
            dtype=torch.float64,
        )
        n_torsions = zmatrix.n_atoms - 3
        plain = cls(
            zmatrix,
            torch.zeros(n_torsions),
            torch.ones(zmatrix.n_atoms - 1),
            torch.full((n_torsions,), -math.pi),
            "polar",
        )
        bonds, _, torsions = (part[0] for part in plain.bonds_angles_torsions(reference[None]))
        handedness = reference_handedness(zmatrix, torsions)
        return cls(
            zmatrix, handedness, bonds, torsions - math.pi, metric, dtype, equivalent, overlap
        )

    # ------------------------------------------------------------------ the door

    @property
    def dtype(self) -> torch.dtype:
        """Of all inputs and outputs."""
        return self.branch_cuts.dtype

    def _check_u(self, u: Tensor) -> None:
        check_tensor(u, "u", (self.n_coordinates,), self.branch_cuts)

    # ------------------------------------------------------------------ the domain

    def in_domain(self, u: Tensor) -> Tensor:
        """Whether each row of u [B, 3N-6] is in the domain: bool [B]. NaN is not."""
        self._check_u(u)
        bonds, angles, torsions = u[:, self._bonds], u[:, self._angles], u[:, self._torsions]
        low, high = (-1.0, 1.0) if self.is_constant_log_det else (0.0, math.pi)
        cuts, handed = self.branch_cuts, self._handed
        good = ((bonds > 0) & (bonds < math.inf)).all(-1)
        good &= ((angles > low) & (angles < high)).all(-1)
        on_branch = (torsions >= cuts) & (torsions < cuts + TWO_PI)
        if self.overlap:
            on_branch[:, self.labelling.columns[:, 0]] = True  # the labels have their own walls
        good &= on_branch.all(-1)
        good &= (torsions[:, handed].sin() * self.handedness[handed] > 0).all(-1)
        if len(self.labelling):
            good &= self.labelling.inside(torsions, cuts, self.overlap)
        return good

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Whether any tetrahedral centre of x [B, N, 3] has the wrong handedness: bool [B].

        Judged by the triple product of three substituents, labelled hydrogens included.
        """
        self._check_x(x)
        handed = self._handed
        return is_mirrored(x, self._rows[3:][handed], self.handedness[handed])

    def set_branch_cuts(self, cuts: Tensor) -> None:
        """Set where each dihedral's branch begins: [N-3] radians, in the order of u."""
        cuts = torch.as_tensor(cuts)
        if tuple(cuts.shape) != tuple(self.branch_cuts.shape):
            raise ValueError(
                f"cuts: expected shape {tuple(self.branch_cuts.shape)}, got {tuple(cuts.shape)}"
            )
        if not torch.isfinite(cuts).all():
            raise ValueError("cuts: expected finite numbers, got NaN or infinity")
        with torch.no_grad():
            self.branch_cuts.copy_(cuts)

    def fit_branch_cuts(self, angles: Tensor) -> Tensor:
        """Cut each circle at the emptiest angle of data.

        Parameters
        ----------
        angles
            Dihedrals [F, N-3] in radians, as :meth:`bonds_angles_torsions` gives them.

        Returns
        -------
        Tensor
            The new cuts [N-3], which are set.
        """
        n_torsions = len(self.branch_cuts)
        if angles.ndim != 2 or angles.shape[1] != n_torsions:
            raise ValueError(f"angles: expected shape [F, {n_torsions}], got {tuple(angles.shape)}")
        self.set_branch_cuts(self.labelling.fold_cuts(emptiest_angles(angles), angles))
        return self.branch_cuts

    # ------------------------------------------------------------------ Cartesian to internal

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bonds, cosines, sines and dihedrals on their branch, each [n, B], of x [B, N, 3]."""
        xt = x.permute(2, 1, 0).contiguous()
        atom, bonded, angle, partner = self._rows.T
        to_atom = xt[:, atom[1:]] - xt[:, bonded[1:]]
        r = norm(to_atom)
        to_angle = xt[:, angle[2:]] - xt[:, bonded[2:]]
        product = dot(to_atom[:, 1:], to_angle)
        area = norm(cross(to_atom[:, 1:], to_angle))
        length = r[1:] * norm(to_angle)
        to_partner = xt[:, partner[3:]] - xt[:, angle[3:]]
        torsion = dihedral(to_atom[:, 2:], -to_angle[:, 1:], to_partner)
        return r, product / length, area / length, wrap(torsion, self.branch_cuts[:, None])

    def bonds_angles_torsions(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bonds [B, N-1] nm, angles [B, N-2] and dihedrals [B, N-3] in radians of x [B, N, 3].

        A sibling's dihedral is its offset from the primary torsion; all are on their branch.
        """
        self._check_x(x)
        r, cos, sin, torsion = self._measure(x)
        return r.T, torch.atan2(sin, cos).T, torsion.T

    def inverse_and_log_det(self, x: Tensor, copies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Internal coordinates u [B, 3N-6] of x [B, N, 3] and log|det du/dx| [B].

        The log-determinant is -inf where x has the wrong handedness or no coordinates (coinciding
        or collinear atoms, NaN).

        Parameters
        ----------
        x
            Conformations.
        copies
            Which copy of each group of equivalent hydrogens, [B, G] as :meth:`draw_copies` draws
            them; by default the one between the walls.
        """
        self._check_x(x)
        if len(self.labelling):
            labels = self.labels(x)
            x = self.relabel(x, labels if copies is None else (labels + copies) % 3)
        r, cos, sin, torsion = self._measure(x)
        if copies is not None:
            before = TWO_PI * (copies == 2).to(torsion)
            torsion = torsion.index_add(0, self.labelling.columns[:, 0], before.T, alpha=-1)
        if self.is_constant_log_det:
            parts = (r * r * r / 3.0, -cos, torsion)
        else:
            parts = (r, torch.atan2(sin, cos), torsion)
        u = torch.cat(parts).T
        log_det = -self.log_abs_det(u)
        inside = self.in_domain(u)
        return u, torch.where(inside, log_det, torch.full_like(log_det, -math.inf))

    # ------------------------------------------------------------------ internal to Cartesian

    def log_abs_det(self, u: Tensor) -> Tensor:
        """log|det dx/du| [B] at u [B, 3N-6], whatever the branch and handedness."""
        if self.is_constant_log_det:
            return u.new_zeros(len(u))
        r, theta = u[:, self._bonds], u[:, self._angles]
        return 2.0 * r.log().sum(-1) + theta.sin().log().sum(-1)

    def _build(self, u: Tensor, rotation: Tensor | None, translation: Tensor | None) -> Tensor:
        ut = u.T
        bonds, angles = ut[self._bonds], ut[self._angles]
        if self.is_constant_log_det:
            r = torch.pow(3.0 * bonds, 1.0 / 3.0)
            minus_cos = angles
            sin = torch.sqrt((1.0 - angles) * (1.0 + angles))
        else:
            r = torch.where(bonds > 0, bonds, torch.full_like(bonds, math.nan))
            inside = (angles > 0) & (angles < math.pi)
            theta = torch.where(inside, angles, torch.full_like(angles, math.nan))
            minus_cos, sin = -theta.cos(), theta.sin()
        return self.placement(r, minus_cos, sin, ut[self._torsions], rotation, translation)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Conformations x [B, N, 3] in the canonical pose and log|det dx/du| [B] of u [B, 3N-6].

        Outside the domain the log-determinant is -inf; x is NaN where there is no geometry (a bond
        <= 0, |cos theta| > 1) and honest elsewhere.
        """
        self._check_u(u)
        x = self._build(u, None, None)
        log_det = self.log_abs_det(u)
        inside = self.in_domain(u)
        return x, torch.where(inside, log_det, torch.full_like(log_det, -math.inf))

    # ------------------------------------------------------------------ the pose

    def pose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation [B, 3, 3] (axes as columns) and translation [B, 3] of x [B, N, 3].

        The translation is the root atom's position; the first axis points along the first bond, the
        third is normal to the plane of the root's three atoms. The identity is the canonical pose.
        """
        self._check_x(x)
        first, second, third = (x[:, int(atom)].T for atom in self._rows[:3, 0])
        return torch.stack(axes_of(first, second, third)).permute(2, 1, 0), first.T

    def from_pose(self, u: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
        """Conformations x [B, N, 3] of u [B, 3N-6] in a given pose (see :meth:`pose`)."""
        self._check_u(u)
        check_tensor(rotation, "rotation", (3, 3), u)
        check_tensor(translation, "translation", (3,), u)
        if not len(u) == len(rotation) == len(translation):
            raise ValueError(
                f"u, rotation, translation: expected one batch size, got {len(u)}, "
                f"{len(rotation)}, {len(translation)}"
            )
        return self._build(u, rotation, translation)

    def place(self, u: Tensor, like: Tensor) -> Tensor:
        """Conformations [B, N, 3] with coordinates u [B, 3N-6], each in the pose of `like`.

        Equivalent hydrogens have the labels of `like` as well.
        """
        self._check_x(like, "like")
        x = self.from_pose(u, *self.pose(like))
        if not len(self.labelling):
            return x
        return self.relabel(x, (self.labels(x) - self.labels(like)) % 3)

    def move(self, x: Tensor, like: Tensor) -> Tensor:
        """Conformations x [B, N, 3] moved rigidly to the pose of `like`, and given its labels.

        As ``place(u, like)`` with the coordinates u of x, to rounding.
        """
        self._check_x(x)
        self._check_x(like, "like")
        (own, origin), (rotation, translation) = self.pose(x), self.pose(like)
        turn = own @ rotation.transpose(1, 2)
        moved = (x - origin[:, None]) @ turn + translation[:, None]
        if len(self.labelling):
            moved = self.relabel(moved, (self.labels(x) - self.labels(like)) % 3)
        return moved

    # ------------------------------------------------------------------ training only

    def regularise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Move u [B, 3N-6] to where geometry is finite; say how far outside it was.

        For training only: never for samples, whose proposals outside the domain are rejected.

        Returns
        -------
        u : Tensor [B, 3N-6]
            Bonds held above 0.3 of the reference's coordinate, |cos theta| below 0.999; the rest
            as it came.
        penalty : Tensor [B]
            Sum of squared violations: bonds relative to the reference's, cosines, dihedrals beyond
            their branch and offsets outside the half circle of their handedness in radians. Zero
            with zero gradient inside, continuously differentiable.
        """
        self._check_u(u)
        bonds, angles, torsions = u[:, self._bonds], u[:, self._angles], u[:, self._torsions]
        limit, scale = COS_CEILING, self.reference_bonds
        if self.is_constant_log_det:
            scale, low, high = scale**3 / 3.0, -limit, limit
        else:
            low, high = math.acos(limit), math.acos(-limit)
        bonds, short = hold(bonds / scale, BOND_FLOOR, math.inf)
        angles, straight = hold(angles, low, high)
        handed = self._handed
        penalty = (
            short
            + straight
            + beyond_branch(torsions, self.branch_cuts)
            + outside_half_circle(torsions[:, handed], self.handedness[handed])
        )
        if len(self.labelling):
            penalty = penalty + self.labelling.penalty(torsions, self.branch_cuts)
        return torch.cat((bonds * scale, angles, torsions), dim=1), penalty

    def forward_regularised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Finite conformations x [B, N, 3] for any finite u [B, 3N-6], and a penalty [B].

        Training only; see :meth:`regularise`.
        """
        kept, penalty = self.regularise(u)
        return self._build(kept, None, None), penalty

    # ------------------------------------------------------------------ keeping it

    def to_config(self) -> dict[str, Any]:
        """Plain numbers, strings and lists from which :meth:`from_config` rebuilds this."""
        return {
            "zmatrix": self.zmatrix.to_config(),
            "metric": self.metric,
            "dtype": str(self.dtype).removeprefix("torch."),
            "handedness": self.handedness.tolist(),
            "reference_bonds": self.reference_bonds.tolist(),
            "branch_cuts": self.branch_cuts.tolist(),
            "equivalent": self.labelling.triples,
            "overlap": self.overlap,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_config`; needs no Topology.

        Raises
        ------
        ValueError
            If an entry is missing or not what :meth:`to_config` could have written.
        """
        zmatrix = ZMatrix.from_config(require_entry(config, "zmatrix", dict))
        return cls(zmatrix, **layer_entries(config, zmatrix.n_atoms))
