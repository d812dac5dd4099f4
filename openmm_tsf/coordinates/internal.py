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

from openmm_tsf.coordinates.bond_graph import BondGraph, Triple
from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.coordinates.config import parse_layer_config
from openmm_tsf.coordinates.geometry import TWO_PI, wrap
from openmm_tsf.coordinates.hydrogen_labels import HydrogenLabels, LabelledCopies
from openmm_tsf.coordinates.measures import bonds_angles_dihedrals, pose_of
from openmm_tsf.coordinates.nerf import Placement
from openmm_tsf.coordinates.penalties import branch_penalty, clamp_bonds_and_angles
from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.units import RADIAN, as_array
from openmm_tsf.utils.tensors import check_tensor
from openmm_tsf.utils.validation import check_choice, require_entry

METRICS = ("volume", "polar")
#: The sine of a reference angle below which the dihedral is rounding.
_UNDEFINED = 1e-4


class InternalCoordinates(LabelledCopies, nn.Module):
    """Map between internal coordinates u [B, 3N-6] and Cartesian positions x [B, N, 3] in nm.

    u holds N-1 bonds, N-2 angles and N-3 dihedral angles, each in the order of the Z-matrix's rows:
    (r^3/3, -cos theta, phi) for ``"volume"``, (r, theta, phi) for ``"polar"``; nm and radians. A
    dihedral is either a primary torsion or a sibling's offset from it.

    The domain: bonds > 0, -1 <= cos theta < 1 (theta < pi for ``"polar"``), dihedrals on their
    branch [cut, cut + 2 pi), and at every tetrahedral centre the handedness of the reference
    positions (:mod:`openmm_tsf.coordinates.chirality`). Build the map with :meth:`from_topology`.

    Attributes
    ----------
    n_atoms, n_coordinates : int
        N and 3N-6.
    metric, is_constant_log_det
        ``"volume"`` or ``"polar"``; True for ``"volume"``.
    kinds, names
        The kind of each coordinate, int64 [3N-6] (0 bond, 1 angle, 2 primary torsion, 3 sibling
        offset), and its kind and atoms as text.
    branch_cuts : Tensor [N-3]
        Where the branch of each dihedral begins, radians.
    handedness : Tensor [N-3]
        The sign of each sibling's offset at a tetrahedral centre in the reference, 0 elsewhere.
    chirality
        The tetrahedral centres and their handedness.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> layer = tsf.InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    >>> x = torch.tensor(molecule.positions)[None]
    >>> u, log_det = layer.inverse_and_log_det(x)
    >>> u.shape, float(log_det) == 0.0  # the Jacobian of volume coordinates is constant
    (torch.Size([1, 60]), True)
    >>> torch.allclose(layer.place(u, like=x), x)
    True
    """

    branch_cuts: Tensor
    handedness: Tensor
    reference_bonds: Tensor
    kinds: Tensor
    _rows: Tensor
    _linear: Tensor

    def __init__(
        self,
        zmatrix: ZMatrix,
        handedness: Tensor,
        reference_bonds: Tensor,
        branch_cuts: Tensor,
        chirality: Chirality,
        metric: str = "volume",
        dtype: torch.dtype = torch.float64,
        equivalent: Sequence[Triple] = (),
        overlap: bool = False,
    ) -> None:
        super().__init__()
        metric = check_choice(metric, "metric", METRICS)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        self.zmatrix, self.metric = zmatrix, metric
        self.is_constant_log_det = metric == "volume"
        self.n_atoms = zmatrix.n_atoms
        self.n_coordinates = 3 * self.n_atoms - 6
        self.names = zmatrix.coordinate_names
        self.placement = Placement(zmatrix)
        self.register_buffer(
            "_rows", torch.as_tensor(zmatrix.rows, dtype=torch.int64, device="cpu")
        )
        self.register_buffer("handedness", handedness.to(dtype))
        self.register_buffer("reference_bonds", reference_bonds.to(dtype))
        linear = torch.as_tensor(zmatrix.linear, dtype=torch.bool, device="cpu")[2:]
        self.register_buffer("_linear", linear, persistent=False)
        self.register_buffer("branch_cuts", branch_cuts.to(dtype))
        self.register_buffer(
            "kinds", torch.as_tensor(zmatrix.coordinate_kinds, dtype=torch.int64, device="cpu")
        )
        self.labelling = HydrogenLabels(zmatrix.rows, handedness.tolist(), equivalent)
        self.chirality = chirality.averaged_over(self.labelling.triples).to(dtype)
        self.overlap = bool(overlap) and len(self.labelling) > 0

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
        """Return the coordinates of a single molecule.

        Parameters
        ----------
        topology, positions
            OpenMM Topology with bonds, and a reference conformation [N, 3] in nm (or a Quantity),
            which defines the handedness and the default branches, centred on it.
        metric, dtype
            ``"volume"`` (constant Jacobian) or ``"polar"``; torch.float64 or torch.float32.
        equivalent
            Groups of three hydrogens to relabel so that one of three equal copies of the density
            is left (:func:`openmm_tsf.systems.equivalent_hydrogens.equivalent_hydrogens`).
            Conformations with other labels map to the same u; :meth:`place` restores the labels.
        overlap
            Let neighbouring copies overlap, so that a density has no step at their boundary: see
            :meth:`log_partition`.

        Raises
        ------
        TypeError, ValueError
            As :meth:`ZMatrix.from_topology`; or if a tetrahedral centre of the reference is flat.
        """
        graph = BondGraph.from_topology(topology, positions)
        zmatrix = ZMatrix.from_graph(graph)
        rows = torch.as_tensor(zmatrix.rows, dtype=torch.int64, device="cpu")
        reference = torch.tensor(graph.positions, dtype=torch.float64, device="cpu")[None]
        bonds, _, sin, torsions = (v[:, 0] for v in bonds_angles_dihedrals(reference, rows))
        # An atom in line with its bond has any dihedral.
        torsions = torch.where(sin[1:] < _UNDEFINED, 0.0, torsions)
        is_handed = torch.as_tensor(zmatrix.tetrahedral, dtype=torch.bool, device="cpu")[3:]
        handedness = torch.where(is_handed, torsions.sin().sign(), 0.0)
        chirality = Chirality.from_reference(graph.centres, graph.positions, graph.names)
        layers = zmatrix, handedness, bonds, torsions - math.pi, chirality
        return cls(*layers, metric, dtype, equivalent, overlap)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all inputs and outputs."""
        return self.branch_cuts.dtype

    def _check_u(self, u: Tensor) -> None:
        check_tensor(u, "u", (self.n_coordinates,), self.branch_cuts)

    def _split(self, u: Tensor, dim: int = 1) -> Sequence[Tensor]:
        """Bonds, angles and dihedrals of u."""
        return u.split((self.n_atoms - 1, self.n_atoms - 2, self.n_atoms - 3), dim)

    def in_domain(self, u: Tensor) -> Tensor:
        """Whether each row of u [B, 3N-6] is in the domain: bool [B]. NaN is not."""
        self._check_u(u)
        return self._in_domain(u, self._build(u))

    def _in_domain(self, u: Tensor, x: Tensor) -> Tensor:
        """Whether u, whose conformations are x in any pose, is in the domain: bool [B]."""
        bonds, angles, torsions = self._split(u)
        cuts = self.branch_cuts
        inside = ((bonds > 0) & (bonds < math.inf)).all(-1)
        if self.is_constant_log_det:
            inside &= ((angles > -1.0) & (angles <= 1.0)).all(-1)
        else:
            inside &= ((angles > 0.0) & (angles < math.pi)).all(-1)
        on_branch = (torsions >= cuts) & (torsions < cuts + TWO_PI)
        if self.overlap:
            on_branch[:, self.labelling.columns[:, 0]] = True  # checked with the labels below
        inside &= on_branch.all(-1)
        inside &= ~self.chirality.is_mirrored(x.detach())
        if len(self.labelling):
            inside &= self.labelling.in_domain(torsions, cuts, self.overlap)
        return inside

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Whether any tetrahedral centre of x [B, N, 3] has the wrong handedness: bool [B].

        Judged by its four substituents, labelled hydrogens included.
        """
        self._check_x(x)
        return self.chirality.is_mirrored(x)

    def set_branch_cuts(self, cuts: Any) -> None:
        """Set where each dihedral's branch begins: [N-3] radians (or a Quantity), as in u."""
        cuts = torch.from_numpy(as_array(cuts, RADIAN, "cuts"))
        if tuple(cuts.shape) != tuple(self.branch_cuts.shape):
            expected = tuple(self.branch_cuts.shape)
            raise ValueError(f"cuts: expected shape {expected}, got {tuple(cuts.shape)}")
        if not torch.isfinite(cuts).all():
            raise ValueError("cuts: expected finite numbers, got NaN or infinity")
        with torch.no_grad():
            self.branch_cuts.copy_(cuts)

    def fit_branch_cuts(self, angles: Any) -> Tensor:
        """Set the branch cuts to the emptiest angles of data, and return them [N-3].

        `angles` are dihedrals [F, N-3] in radians (or a Quantity), as
        :meth:`bonds_angles_torsions` returns them.
        """
        angles = torch.from_numpy(as_array(angles, RADIAN, "angles")).to(self.branch_cuts)
        n_torsions = len(self.branch_cuts)
        if angles.ndim != 2 or angles.shape[1] != n_torsions:
            raise ValueError(f"angles: expected shape [F, {n_torsions}], got {tuple(angles.shape)}")
        self.set_branch_cuts(self.labelling.fit_cuts(emptiest_angles(angles), angles))
        return self.branch_cuts

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bonds, cosines, sines and dihedrals on their branch, each [n, B], of x [B, N, 3]."""
        r, cos, sin, torsions = bonds_angles_dihedrals(x, self._rows)
        return r, cos, sin, wrap(torsions, self.branch_cuts[:, None])

    def bonds_angles_torsions(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bonds [B, N-1] nm, angles [B, N-2] and dihedrals [B, N-3] in radians of x [B, N, 3].

        A sibling's dihedral is its offset from the primary torsion; all are on their branch.
        """
        self._check_x(x)
        r, cos, sin, torsions = self._measure(x)
        return r.T, torch.atan2(sin, cos).T, torsions.T

    def inverse_and_log_det(self, x: Tensor, copies: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Internal coordinates u [B, 3N-6] of x [B, N, 3] and log|det du/dx| [B].

        The log-determinant is -inf where x has the wrong handedness or no coordinates (coinciding
        or collinear atoms, NaN). `copies` [B, G] are which copies of the groups of equivalent
        hydrogens to take, as :meth:`draw_copies` draws them; by default those with label 0.
        """
        self._check_x(x)
        if len(self.labelling):
            labels = self.labels(x)
            x = self.relabel(x, labels if copies is None else (labels + copies) % 3)
        r, cos, sin, torsions = self._measure(x)
        if copies is not None:
            before = TWO_PI * (copies == 2).to(torsions)
            torsions = torsions.index_add(0, self.labelling.columns[:, 0], before.T, alpha=-1)
        if self.is_constant_log_det:
            parts = (r * r * r / 3.0, -cos, torsions)
        else:
            parts = (r, torch.atan2(sin, cos), torsions)
        u = torch.cat(parts).T
        return u, self._inside_only(u, x, -self.log_abs_det(u))

    def log_abs_det(self, u: Tensor) -> Tensor:
        """log|det dx/du| [B] at u [B, 3N-6], whatever the branch and handedness."""
        if self.is_constant_log_det:
            return u.new_zeros(len(u))
        r, theta, _ = self._split(u)
        return 2.0 * r.log().sum(-1) + theta.sin().log().sum(-1)

    def _inside_only(self, u: Tensor, x: Tensor, log_det: Tensor) -> Tensor:
        """`log_det` [B] where u, whose conformations are x, is in the domain, -inf elsewhere."""
        return torch.where(self._in_domain(u, x), log_det, torch.full_like(log_det, -math.inf))

    def _build(self, u: Tensor, pose: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Conformations of u in a pose, by default the canonical one; NaN without a geometry."""
        bonds, angles, torsions = self._split(u.T, dim=0)
        if self.is_constant_log_det:
            r = torch.pow(3.0 * bonds, 1.0 / 3.0)
            minus_cos = angles
            sin = torch.sqrt((1.0 - angles) * (1.0 + angles))
        else:
            r = torch.where(bonds > 0, bonds, torch.full_like(bonds, math.nan))
            inside = (angles > 0) & (angles < math.pi)
            theta = torch.where(inside, angles, torch.full_like(angles, math.nan))
            minus_cos, sin = -theta.cos(), theta.sin()
        return self.placement(r, minus_cos, sin, torsions, pose)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Conformations x [B, N, 3] in the canonical pose and log|det dx/du| [B] of u [B, 3N-6].

        Outside the domain the log-determinant is -inf; x is NaN where there is no geometry (a bond
        <= 0, |cos theta| > 1) and correct elsewhere.
        """
        self._check_u(u)
        x = self._build(u)
        return x, self._inside_only(u, x, self.log_abs_det(u))

    def pose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation [B, 3, 3] (axes as columns) and translation [B, 3] of x [B, N, 3].

        The translation is the root atom's position; the first axis points along the first bond, the
        third is normal to the plane of the root's three atoms. The identity is the canonical pose.
        """
        self._check_x(x)
        return pose_of(x, self._rows)

    def from_pose(self, u: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
        """Conformations x [B, N, 3] of u [B, 3N-6] in a given pose (see :meth:`pose`)."""
        self._check_u(u)
        check_tensor(rotation, "rotation", (3, 3), u)
        check_tensor(translation, "translation", (3,), u)
        if not len(u) == len(rotation) == len(translation):
            sizes = f"{len(u)}, {len(rotation)}, {len(translation)}"
            raise ValueError(f"u, rotation, translation: expected one batch size, got {sizes}")
        return self._build(u, (rotation, translation))

    def place(self, u: Tensor, like: Tensor) -> Tensor:
        """Conformations [B, N, 3] with coordinates u [B, 3N-6], each in the pose of `like`.

        Equivalent hydrogens have the labels of `like` as well.
        """
        self._check_x(like, "like")
        x = self.from_pose(u, *self.pose(like))
        return self._match_labels(x, x, like)

    def match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        """Move conformations x [B, N, 3] rigidly to the pose of `like`, and give them its labels.

        As ``place(u, like)`` with the coordinates u of x, to rounding.
        """
        self._check_x(like, "like")
        rotations, translations = self.pose(torch.cat([x, like]))
        (axes, rotation), (origin, translation) = rotations.chunk(2), translations.chunk(2)
        moved = (x - origin[:, None]) @ (axes @ rotation.transpose(1, 2)) + translation[:, None]
        return self._match_labels(moved, x, like)

    def _match_labels(self, moved: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """Give `moved`, which has the labels of x, those of `like`."""
        if not len(self.labelling):
            return moved
        labels, wanted = self.labels(torch.cat([x, like])).chunk(2)
        return self.relabel(moved, (labels - wanted) % 3)

    def regularise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Clamp u [B, 3N-6] to where the geometry is finite; return a penalty for the violation.

        For training only: proposals of a sampler outside the domain are rejected. Bonds are clamped
        to 0.3 of the reference's coordinate or more, |cos theta| to 0.999 or less. The penalty [B]
        is the sum of squared violations: bonds relative to the reference's, cosines (relative to
        0.01 where a group is linear), dihedrals beyond their branch in radians, and centres that
        are mirrored (1 for a mirror image). Zero with zero gradient inside, continuously
        differentiable.
        """
        clamped, penalty = self.clamp(u)
        return clamped, penalty + self.chirality.penalty(self._build(clamped))

    def clamp(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`regularise`, without the penalty for handedness, which takes conformations."""
        self._check_u(u)
        bonds, angles, torsions = self._split(u)
        cuts, reference = self.branch_cuts, (self.reference_bonds, self._linear)
        bonds, angles, penalty = clamp_bonds_and_angles(bonds, angles, *reference, self.metric)
        penalty = penalty + branch_penalty(torsions, cuts)
        if len(self.labelling):
            penalty = penalty + self.labelling.penalty(torsions, cuts)
        return torch.cat((bonds, angles, torsions), dim=1), penalty

    def forward_regularised(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Conformations x [B, N, 3] and penalty [B] of :meth:`regularise`, finite for any u."""
        clamped, penalty = self.clamp(u)
        x = self._build(clamped)
        return x, penalty + self.chirality.penalty(x)

    def to_config(self) -> dict[str, Any]:
        """Return numbers, strings and lists from which :meth:`from_config` rebuilds this."""
        return {
            "zmatrix": self.zmatrix.to_config(),
            "metric": self.metric,
            "dtype": str(self.dtype).removeprefix("torch."),
            "handedness": self.handedness.tolist(),
            "chirality": self.chirality.to_config(),
            "reference_bonds": self.reference_bonds.tolist(),
            "branch_cuts": self.branch_cuts.tolist(),
            "equivalent": self.labelling.triples,
            "overlap": self.overlap,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Rebuild a layer from what :meth:`to_config` returned; ValueError for anything else."""
        zmatrix = ZMatrix.from_config(require_entry(config, "zmatrix", dict))
        return cls(zmatrix, **parse_layer_config(config, zmatrix.n_atoms))
