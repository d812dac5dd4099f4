"""Internal coordinates of a molecule as a bijector.

Volume coordinates (r^3/3, -cos theta, phi) have a constant Jacobian, because
r^2 sin(theta) dr dtheta dphi = d(r^3/3) d(-cos theta) dphi: with them the steering condition of
temperature-steerable flows (arXiv:2012.00429, eq. 4) holds for the whole molecule. Polar
coordinates (r, theta, phi) have the log-determinant sum 2 ln r + sum ln sin theta. Both are
relative to Cartesian volume modulo rigid motion: the square map is 3N -> 3N with the pose
(alpha, cos beta, gamma, translation) appended.

Bonds of fixed length are no coordinates. The measure is then prod_i delta(r_i - d_i) dx, for
``"stiff"``, or |Z|^(1/2) times that, for ``"rigid"``, which is the measure of constrained dynamics:
see :mod:`openmm_tsf.coordinates.constraints`. With it 1/2 ln|Z| is a part of the log-determinant,
so that whatever is exact with a log-determinant is exact with constraints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import openmm.app as app
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.bond_graph import BondGraph, Triple
from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.chirality import Chirality
from openmm_tsf.coordinates.config import parse_layer_config
from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.coordinates.geometry import TWO_PI, wrap
from openmm_tsf.coordinates.hydrogen_labels import HydrogenLabels
from openmm_tsf.coordinates.measures import bonds_angles_dihedrals
from openmm_tsf.coordinates.nerf import Placement
from openmm_tsf.coordinates.regularised import RegularisedCoordinates
from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.units import RADIAN, as_array
from openmm_tsf.utils.tensors import check_tensor
from openmm_tsf.utils.validation import check_choice, require_entry

METRICS = ("volume", "polar")
#: The sine of a reference angle below which the dihedral is rounding.
_UNDEFINED = 1e-4


class InternalCoordinates(RegularisedCoordinates, nn.Module):
    """Map between internal coordinates u [B, d] and Cartesian positions x [B, N, 3] in nm.

    u holds N-1 bonds, N-2 angles and N-3 dihedral angles, each in the order of the Z-matrix's rows:
    (r^3/3, -cos theta, phi) for ``"volume"``, (r, theta, phi) for ``"polar"``; nm and radians. A
    dihedral is either a primary torsion or a sibling's offset from it. The K bonds that are
    constrained are left out: d = 3N-6-K.

    The domain: bonds > 0, -1 <= cos theta < 1 (theta < pi for ``"polar"``), dihedrals on their
    branch [cut, cut + 2 pi), and at every tetrahedral centre the handedness of the reference
    positions (:mod:`openmm_tsf.coordinates.chirality`). Build the map with :meth:`from_topology`.

    Attributes
    ----------
    n_atoms, n_coordinates : int
        N and d.
    metric, measure, is_constant_log_det
        ``"volume"`` or ``"polar"``; ``"rigid"`` or ``"stiff"``; True for ``"volume"``, unless
        constraints have the measure ``"rigid"``.
    constraints
        The constrained bonds, or None.
    kinds, names
        The kind of each coordinate, int64 [d] (0 bond, 1 angle, 2 primary torsion, 3 sibling
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
    _linear: Tensor
    _free: Tensor
    _lengths: Tensor

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
        constraints: Constraints | None = None,
        measure: str = "rigid",
    ) -> None:
        super().__init__()
        metric = check_choice(metric, "metric", METRICS)
        self.measure = check_choice(measure, "measure", MEASURES)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected torch.float64 or torch.float32, got {dtype}")
        self.zmatrix, self.metric = zmatrix, metric
        self._is_volume = metric == "volume"
        self._has_metric_factor = constraints is not None and measure == "rigid"
        self.is_constant_log_det = self._is_volume and not self._has_metric_factor
        self.n_atoms = zmatrix.n_atoms
        is_free, kinds = np.ones(len(zmatrix.coordinate_kinds), bool), zmatrix.coordinate_kinds
        self.constraints = constraints
        if constraints is not None:
            # Its own copy, of which the dtype and the device are those of the layer.
            self.constraints = Constraints.from_config(constraints.to_config(), self.n_atoms)
            self.constraints.to(dtype)
            lengths = constraints.lengths_of_bonds(zmatrix.rows[1:, :2], zmatrix.atom_names)
            is_free[: self.n_atoms - 1] = lengths == 0
            fixed = torch.tensor(lengths, dtype=dtype, device="cpu")
            self.register_buffer("_lengths", fixed, persistent=False)
        free = torch.from_numpy(np.flatnonzero(is_free[: self.n_atoms - 1]))
        self.register_buffer("_free", free, persistent=False)
        self.n_coordinates = int(is_free.sum())
        self.names = [
            n for n, is_one in zip(zmatrix.coordinate_names, is_free, strict=True) if is_one
        ]
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
            "kinds", torch.as_tensor(kinds[is_free], dtype=torch.int64, device="cpu")
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
        constraints: Constraints | None = None,
        measure: str = "rigid",
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
        constraints, measure
            Bonds of fixed length, which are left out of u
            (:attr:`openmm_tsf.MolecularSystem.constraints`), and the measure with them:
            ``"rigid"``, that of constrained dynamics, or ``"stiff"``, without |Z|^(1/2).

        Raises
        ------
        TypeError, ValueError
            As :meth:`ZMatrix.from_topology`; or if a tetrahedral centre of the reference is flat,
            or a constraint is not one of the bonds that the coordinates have.
        """
        pairs = [] if constraints is None else constraints.pairs.tolist()
        graph = BondGraph.from_topology(topology, positions, pairs)
        zmatrix = ZMatrix.from_graph(graph)
        rows = torch.as_tensor(zmatrix.rows, dtype=torch.int64, device="cpu")
        reference = torch.tensor(graph.positions, dtype=torch.float64, device="cpu")[None]
        bonds, _, sin, torsions = (v[:, 0] for v in bonds_angles_dihedrals(reference, rows))
        # An atom in line with its bond has any dihedral.
        torsions = torch.where(sin[1:] < _UNDEFINED, 0.0, torsions)
        # Rounding decides between 180 and -180 degrees of a flat molecule: one of the two.
        torsions = torch.where(torsions < 1e-6 - math.pi, torsions + 2 * math.pi, torsions)
        is_handed = torch.as_tensor(zmatrix.tetrahedral, dtype=torch.bool, device="cpu")[3:]
        handedness = torch.where(is_handed, torsions.sin().sign(), 0.0)
        chirality = Chirality.from_reference(graph.centres, graph.positions, graph.names)
        layers = zmatrix, handedness, bonds, torsions - math.pi, chirality
        return cls(*layers, metric, dtype, equivalent, overlap, constraints, measure)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all inputs and outputs."""
        return self.branch_cuts.dtype

    def _check_u(self, u: Tensor) -> None:
        check_tensor(u, "u", (self.n_coordinates,), self.branch_cuts)

    def _split(self, u: Tensor, dim: int = 1) -> Sequence[Tensor]:
        """Bonds, angles and dihedrals of u."""
        return u.split((len(self._free), self.n_atoms - 2, self.n_atoms - 3), dim)

    def in_domain(self, u: Tensor) -> Tensor:
        """Whether each row of u [B, d] is in the domain: bool [B]. NaN is not."""
        self._check_u(u)
        return self._in_domain(u, self._build(u))

    def _in_domain(self, u: Tensor, x: Tensor) -> Tensor:
        """Whether u, whose conformations are x in any pose, is in the domain: bool [B]."""
        bonds, angles, torsions = self._split(u)
        cuts = self.branch_cuts
        inside = ((bonds > 0) & (bonds < math.inf)).all(-1)
        if self._is_volume:
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
        """Internal coordinates u [B, d] of x [B, N, 3] and log|det du/dx| [B].

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
        if self.constraints is not None:
            r = r[self._free]
        if self._is_volume:
            parts = (r * r * r / 3.0, -cos, torsions)
        else:
            parts = (r, torch.atan2(sin, cos), torsions)
        u = torch.cat(parts).T
        return u, self._inside_only(u, x, -self.log_abs_det(u, x))

    def log_abs_det(self, u: Tensor, x: Tensor | None = None) -> Tensor:
        """log|det dx/du| [B] at u [B, d], whatever the branch and handedness.

        `x` [B, N, 3] are conformations of u in any pose, where they are known.
        """
        total = u.new_zeros(len(u))
        if not self._is_volume:
            r, theta, _ = self._split(u)
            total = 2.0 * r.log().sum(-1) + theta.sin().log().sum(-1)
        if self.constraints is None:
            return total
        total = total + 2.0 * self.constraints.lengths.log().sum()
        if not self._has_metric_factor:
            return total
        return total + self.constraints.half_log_metric(self._build(u) if x is None else x)

    def _inside_only(self, u: Tensor, x: Tensor, log_det: Tensor) -> Tensor:
        """`log_det` [B] where u, whose conformations are x, is in the domain, -inf elsewhere."""
        return torch.where(self._in_domain(u, x), log_det, torch.full_like(log_det, -math.inf))

    def _build(self, u: Tensor, pose: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Conformations of u in a pose, by default the canonical one; NaN without a geometry."""
        bonds, angles, torsions = self._split(u.T, dim=0)
        if self._is_volume:
            r = torch.pow(3.0 * bonds, 1.0 / 3.0)
            minus_cos = angles
            sin = torch.sqrt((1.0 - angles) * (1.0 + angles))
        else:
            r = torch.where(bonds > 0, bonds, torch.full_like(bonds, math.nan))
            inside = (angles > 0) & (angles < math.pi)
            theta = torch.where(inside, angles, torch.full_like(angles, math.nan))
            minus_cos, sin = -theta.cos(), theta.sin()
        if self.constraints is not None:
            r = self._lengths[:, None].expand(-1, len(u)).index_copy(0, self._free, r)
        return self.placement(r, minus_cos, sin, torsions, pose)

    def forward_and_log_det(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Conformations x [B, N, 3] in the canonical pose and log|det dx/du| [B] of u [B, d].

        Outside the domain the log-determinant is -inf; x is NaN where there is no geometry (a bond
        <= 0, |cos theta| > 1) and correct elsewhere.
        """
        self._check_u(u)
        x = self._build(u)
        return x, self._inside_only(u, x, self.log_abs_det(u, x))

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
            **self._constraints_config(),
        }

    def _constraints_config(self) -> dict[str, Any]:
        """The entries of constraints; none without, as in files from before there were any."""
        if self.constraints is None:
            return {}
        return {"constraints": self.constraints.to_config(), "measure": self.measure}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Rebuild a layer from what :meth:`to_config` returned; ValueError for anything else."""
        zmatrix = ZMatrix.from_config(require_entry(config, "zmatrix", dict))
        return cls(zmatrix, **parse_layer_config(config, zmatrix.n_atoms))
