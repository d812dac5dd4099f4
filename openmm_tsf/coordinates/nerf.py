"""Cartesian positions from bonds, angles and dihedrals, one level of the tree at a time.

The natural extension reference frame method (J. Comput. Chem. 26, 1063, 2005) on frames that are
passed down the tree (no vector products, no normalisation), for all atoms of a level together.
"""

import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.geometry import Frame, next_frame, norm
from openmm_tsf.coordinates.zmatrix import ZMatrix
from openmm_tsf.utils.geometry import cross, dot


class Placement(nn.Module):
    """Places the atoms of a Z-matrix; holds index buffers only.

    A level's frames are kept only for its carriers, the rows that other atoms are bonded to, which
    come first in their level.
    """

    _siblings: Tensor
    _primaries: Tensor
    _order: Tensor

    def __init__(self, zmatrix: ZMatrix) -> None:
        super().__init__()
        rows, levels = zmatrix.rows, zmatrix.levels
        row_of = {int(atom): index for index, atom in enumerate(rows[:, 0])}
        vertex = int(rows[1, 0])
        bonded_to = {int(row[1]) for row in rows[3:]}
        #: Per level: first row, one past the last, number of carriers.
        self._levels: list[tuple[int, int, int]] = []
        #: Per level: whether any carrier takes its plane from a neighbour in the same level.
        self._has_near_anchors: list[bool] = []
        #: Per level: whether any carrier takes its plane from an atom beyond a linear group.
        self._has_distant_anchors: list[bool] = []
        start = 3
        while start < len(rows):
            level = int(levels[start])
            stop = start + int((levels == level).sum())
            carriers = sum(int(rows[i, 0]) in bonded_to for i in range(start, stop))
            parents = torch.tensor(
                # In the level above; the root triple is level 0.
                [row_of[int(row[1])] - self._first_row(level - 1) for row in rows[start:stop]],
                dtype=torch.int64,
                device="cpu",
            )
            number = len(self._levels)
            self.register_buffer(f"_parents_{number}", parents, persistent=False)
            anchors = self._anchors(zmatrix, row_of, start, start + carriers)
            near = [(carrier, anchor - start) for carrier, anchor in anchors if anchor >= start]
            distant = [pair for pair in anchors if pair[1] < start]
            self._has_near_anchors.append(bool(near))
            self._has_distant_anchors.append(bool(distant))
            for kind, anchored in (("near", near), ("distant", distant)):
                if anchored:
                    carrier, anchor = torch.tensor(anchored, dtype=torch.int64, device="cpu").T
                    self.register_buffer(f"_{kind}_carriers_{number}", carrier, persistent=False)
                    self.register_buffer(f"_{kind}_anchors_{number}", anchor, persistent=False)
            self._levels.append((start, stop, carriers))
            start = stop
        # A sibling rotates with its primary torsion. At the root's middle atom the primary is the
        # third atom, which defines the plane.
        rotating = [
            (index - 3, row_of[int(row[3])] - 3)
            for index, row in enumerate(rows)
            if zmatrix.siblings[index] and int(row[1]) != vertex
        ]
        pairs = torch.tensor(rotating, dtype=torch.int64, device="cpu").reshape(-1, 2)
        self.register_buffer("_siblings", pairs[:, 0], persistent=False)
        self.register_buffer("_primaries", pairs[:, 1], persistent=False)
        order = torch.tensor(
            [row_of[atom] for atom in range(len(rows))], dtype=torch.int64, device="cpu"
        )
        self.register_buffer("_order", order, persistent=False)

    def _first_row(self, level: int) -> int:
        return 0 if level == 0 else self._levels[level - 1][0]

    @staticmethod
    def _anchors(
        zmatrix: ZMatrix, row_of: dict[int, int], start: int, stop: int
    ) -> list[tuple[int, int]]:
        """Carriers whose primary torsion starts from another atom than their angle partner, and it.

        Carriers are counted from `start`; of the other atom, it is the row.
        """
        pairs = []
        for row in zmatrix.rows[3:][~zmatrix.siblings[3:]]:
            carrier, partner = row_of[int(row[1])], int(row[3])
            if start <= carrier < stop and partner != zmatrix.rows[carrier, 2]:
                pairs.append((carrier - start, row_of[partner]))
        return pairs

    def forward(
        self,
        r: Tensor,
        minus_cos: Tensor,
        sin: Tensor,
        torsions: Tensor,
        pose: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return positions [B, N, 3] in nm.

        `r` are bonds [N-1, B], `minus_cos` and `sin` of the angles [N-2, B], `torsions` primary
        torsions and sibling offsets [N-3, B]. `pose` is as :meth:`InternalCoordinates.pose` returns
        it, by default the canonical one.
        """
        if pose is None:
            batch = r.shape[-1]
            axes = torch.eye(3, dtype=r.dtype, device=r.device)[:, :, None].expand(3, 3, batch)
            origin = torch.zeros(3, 1, batch, dtype=r.dtype, device=r.device)
        else:
            axes, origin = pose[0].permute(2, 1, 0), pose[1].T[:, None]
        e1, e2, e3 = (axis[:, None] for axis in axes)
        phi = torsions.index_add(0, self._siblings, torsions[self._primaries])
        cos_phi, sin_phi = phi.cos(), phi.sin()

        # The root triple: its frames point along the bonds outwards from the middle atom.
        one = torch.ones_like(r[:1])
        last = next_frame((e1, e2, e3), minus_cos[:1], sin[:1], one, torch.zeros_like(one))
        second = origin + r[0] * e1
        position = torch.cat((origin, second, second + r[1] * last[0]), dim=1)
        frame: Frame = (
            torch.cat((-e1, e1, last[0]), dim=1),
            torch.cat((e2, e2, last[1]), dim=1),
            torch.cat((-e3, e3, last[2]), dim=1),
        )
        positions = [position]
        for number, (start, stop, carriers) in enumerate(self._levels):
            parents = getattr(self, f"_parents_{number}")
            torsion, angle = slice(start - 3, stop - 3), slice(start - 2, stop - 2)
            above: Frame = (frame[0][:, parents], frame[1][:, parents], frame[2][:, parents])
            below = next_frame(
                above, minus_cos[angle], sin[angle], cos_phi[torsion], sin_phi[torsion]
            )
            position = position[:, parents] + r[start - 1 : stop - 1] * below[0]
            positions.append(position)
            frame = (below[0], below[1][:, :carriers], below[2][:, :carriers])
            if self._has_near_anchors[number]:
                towards = below[0][:, getattr(self, f"_near_anchors_{number}")]
                frame = _turn(frame, getattr(self, f"_near_carriers_{number}"), towards)
            if self._has_distant_anchors[number]:
                carriers = getattr(self, f"_distant_carriers_{number}")
                anchor = torch.cat(positions, dim=1)[:, getattr(self, f"_distant_anchors_{number}")]
                frame = _turn(frame, carriers, anchor - position[:, carriers])
        return torch.cat(positions, dim=1)[:, self._order].permute(2, 1, 0).contiguous()


def _turn(frame: Frame, carriers: Tensor, towards: Tensor) -> Frame:
    """Rotate carriers' frames about e1, so that e2 is on the side of directions [3, n, B]."""
    e1, e2, e3 = frame
    axis = e1[:, carriers]
    side = towards - dot(axis, towards) * axis
    side = side / norm(side)
    return (e1, e2.index_copy(1, carriers, side), e3.index_copy(1, carriers, cross(axis, side)))
