"""Conformations in a given pose: where the root of the Z-matrix is, and how it is turned."""

from abc import abstractmethod

import torch
from torch import Tensor

from openmm_tsf.coordinates.hydrogen_labels import LabelledCopies
from openmm_tsf.coordinates.measures import pose_of
from openmm_tsf.utils.tensors import check_tensor


class PosedConformations(LabelledCopies):
    """Base class of :class:`InternalCoordinates`: its methods for poses and hydrogen labels."""

    _rows: Tensor

    @abstractmethod
    def _check_u(self, u: Tensor) -> None:
        """Refuse what is not u [B, d]."""

    @abstractmethod
    def _build(self, u: Tensor, pose: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Conformations [B, N, 3] of u in a pose, by default the canonical one."""

    def pose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotation [B, 3, 3] (axes as columns) and translation [B, 3] of x [B, N, 3].

        The translation is the root atom's position; the first axis points along the first bond, the
        third is normal to the plane of the root's three atoms. The identity is the canonical pose.
        """
        self._check_x(x)
        return pose_of(x, self._rows)

    def from_pose(self, u: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
        """Conformations x [B, N, 3] of u [B, d] in a given pose (see :meth:`pose`)."""
        self._check_u(u)
        check_tensor(rotation, "rotation", (3, 3), u)
        check_tensor(translation, "translation", (3,), u)
        if not len(u) == len(rotation) == len(translation):
            sizes = f"{len(u)}, {len(rotation)}, {len(translation)}"
            raise ValueError(f"u, rotation, translation: expected one batch size, got {sizes}")
        return self._build(u, (rotation, translation))

    def place(self, u: Tensor, like: Tensor) -> Tensor:
        """Conformations [B, N, 3] with coordinates u [B, d], each in the pose of `like`.

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
