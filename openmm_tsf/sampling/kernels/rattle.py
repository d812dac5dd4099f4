"""RATTLE: steps and velocities of a batch on the manifold of constrained distances."""

from typing import NamedTuple

import torch
from torch import Tensor

from openmm_tsf.coordinates.constraints import Constraints
from openmm_tsf.utils.devices import DeviceConstants

#: Distances are solved to this deviation in nm ...
TOLERANCE = 1e-12
#: ... and a step is reversible if the reverse step ends at most so far from its start, in nm.
REVERSIBLE = 1e-9
_MOST_ITERATIONS = 20


class OnManifold(NamedTuple):
    """What steps need of B positions that satisfy the constraints.

    Their vectors in C groups of k, [C, k, 3, B], and the inverse of Z in these [C, k, k, B].
    """

    vectors: Tensor
    inverse: Tensor


class Rattle(DeviceConstants):
    """Steps x' = x + h v + M^-1 sum_i lambda_i grad r_i(x) with r_i(x') = d_i, all rows at once.

    The multipliers lambda come from Newton's method with the matrix Z at x, for every group of
    constraints that share atoms, in the space of the constrained vectors: they are small, where the
    molecule is not. The velocity along the step is projected onto the tangent space at x' (Andersen
    1983). A step without forces is symplectic and, where the equations are solved by the same
    multipliers backwards, reversible. They need not be: another solution may be nearer to the
    starting point of the way back (Zappa, Holmes-Cerfon and Goodman 2018; Lelievre, Rousset and
    Stoltz 2019). Every step is therefore reversed, without an energy, and fails where it does not
    return.

    Parameters
    ----------
    constraints
        Distances and masses.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.coordinates.constraints import Constraints
    >>> from openmm_tsf.sampling.kernels.rattle import Rattle
    >>> rattle = Rattle(Constraints([[0, 1]], [0.1], [12.0, 1.0]))
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]]], dtype=torch.float64)
    >>> v = torch.tensor([[[0.0, 0.0, 0.0], [3.0, 2.0, 0.0]]], dtype=torch.float64)
    >>> at = rattle.locate(x)
    >>> v = rattle.project(v, at)
    >>> bool(v[0, 0, 0].isclose(v[0, 1, 0]))
    True
    >>> x, v, at, solved = rattle.step(x, v, at, 0.002)
    >>> bool(solved), bool((x[0, 1] - x[0, 0]).norm().isclose(torch.tensor(0.1).double()))
    (True, True)
    """

    def __init__(self, constraints: Constraints) -> None:
        groups = constraints.groups
        # All groups have one size here; the smaller are filled up with vectors of length 0, from
        # atom 0 to itself, whose multipliers are 0.
        size = max(3, *(indices.shape[1] for indices, _ in groups))
        count = sum(len(indices) for indices, _ in groups)
        self._pairs = torch.zeros(count, size, 2, dtype=torch.int64, device="cpu")
        self._coupling = torch.zeros(count, size, size, dtype=torch.float64, device="cpu")
        self._lengths = torch.zeros(count, size, 1, dtype=torch.float64, device="cpu")
        first = 0
        for indices, coupling in groups:
            rows, k = slice(first, first + len(indices)), indices.shape[1]
            self._pairs[rows, :k] = constraints.pairs[indices].cpu()
            self._coupling[rows, :k, :k] = coupling.to("cpu", torch.float64)
            self._lengths[rows, :k, 0] = constraints.lengths[indices].to("cpu", torch.float64)
            first += len(indices)
        self._filling = torch.diag_embed(self._lengths[..., 0] == 0).unsqueeze(-1).double()
        inverse_masses = constraints.inverse_masses.to("cpu", torch.float64)
        n_atoms = len(inverse_masses)
        vectors = torch.arange(count * size, dtype=torch.int64, device="cpu")
        # From forces along the vectors to accelerations of the atoms.
        self._to_atoms = torch.zeros(n_atoms, count * size, dtype=torch.float64, device="cpu")
        for end, sign in ((0, 1.0), (1, -1.0)):
            atoms = self._pairs[..., end].flatten()
            self._to_atoms[atoms, vectors] += sign * inverse_masses[atoms]

    def _vectors(self, x: Tensor) -> Tensor:
        """Return the vectors [C, k, 3, B] of x [B, N, 3] from second to first atoms."""
        by_atom = x.permute(1, 2, 0).contiguous()
        pairs = self.on_device("_pairs", x.device)
        return by_atom[pairs[..., 0]] - by_atom[pairs[..., 1]]

    def _accelerations(self, forces: Tensor) -> Tensor:
        """Return the accelerations [B, N, 3] by forces [C, k, 3, B] along the vectors."""
        rows = forces.reshape(-1, 3 * forces.shape[-1])
        by_atom = self.on_device("_to_atoms", forces.device) @ rows
        return by_atom.reshape(len(by_atom), 3, -1).permute(2, 0, 1)

    def locate(self, x: Tensor) -> OnManifold:
        """Return what steps need of positions x [B, N, 3] in nm."""
        vectors = self._vectors(x)
        coupling, filling = (self.on_device(name, x.device) for name in ("_coupling", "_filling"))
        products = (vectors[:, :, None] * vectors[:, None]).sum(dim=3)
        return OnManifold(vectors, _inverse(coupling[..., None] * products + filling))

    def project(self, v: Tensor, at: OnManifold) -> Tensor:
        """Return velocities [B, N, 3] without their components along the constraints.

        The projection is orthogonal in the metric of the masses, so that of Maxwell-Boltzmann
        velocities it leaves those of the tangent space.
        """
        rates = (at.vectors * self._vectors(v)).sum(dim=2)
        return v - self._accelerations(_apply(at.inverse, rates)[:, :, None] * at.vectors)

    def _solve(self, at: OnManifold, unconstrained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forces and vectors [C, k, 3, B] at the end of a step, and which rows [B] have them.

        A group that is solved stays as it is, so that no row depends on the others.
        """
        device, forces = unconstrained.device, torch.zeros_like(unconstrained)
        coupling, lengths = (self.on_device(name, device) for name in ("_coupling", "_lengths"))
        squares, allowed = lengths.square(), 2 * TOLERANCE * lengths
        vectors, multipliers = unconstrained, unconstrained.new_zeros(at.inverse[:, 0].shape)
        for iteration in range(_MOST_ITERATIONS + 1):
            error = vectors.square().sum(dim=2) - squares
            solved = (error.abs() <= allowed).all(dim=1, keepdim=True)
            done = device.type == "cpu" and bool(solved.all())
            if done or iteration == _MOST_ITERATIONS:
                break
            change = 0.5 * _apply(at.inverse, error)
            multipliers = multipliers - change.masked_fill(solved, 0.0)
            forces = multipliers[:, :, None] * at.vectors
            vectors = unconstrained + (coupling @ forces.flatten(2)).reshape(forces.shape)
        return forces, vectors, solved.flatten(0, 1).all(dim=0)

    def step(
        self, x: Tensor, v: Tensor, at: OnManifold, timestep: Tensor | float
    ) -> tuple[Tensor, Tensor, OnManifold, Tensor]:
        """Take a step without forces from x with tangent velocities v, both [B, N, 3].

        Returns positions, tangent velocities, what further steps need there, and which rows [B]
        were solved and are reversible; the others stay where they are. `timestep` is a number or
        [B, 1, 1], in ps.
        """
        wide = timestep.flatten() if isinstance(timestep, Tensor) else timestep
        forces, _, solved = self._solve(at, at.vectors + wide * self._vectors(v))
        shift = self._accelerations(forces)
        x_end = x + (timestep * v + shift)
        end = self.locate(x_end)
        v_end = self.project(v + shift / timestep, end)
        _, back, solved_back = self._solve(end, end.vectors - wide * self._vectors(v_end))
        # Solved both ways, as it must be for the reverse step to be accepted.
        solved = solved & self.is_reversible(back, at.vectors, solved_back)
        if x.device.type == "cpu" and bool(solved.all()):
            return x_end, v_end, end, solved
        end = OnManifold(*(torch.where(solved, new, old) for new, old in zip(end, at, strict=True)))
        row = solved[:, None, None]
        return torch.where(row, x_end, x), torch.where(row, v_end, v), end, solved

    def is_reversible(self, back: Tensor, vectors: Tensor, solved: Tensor) -> Tensor:
        """Return which rows [B] were solved and return to their vectors, both [C, k, 3, B]."""
        return solved & ((back - vectors).abs().flatten(0, 2).amax(dim=0) <= REVERSIBLE)


def _apply(matrices: Tensor, values: Tensor) -> Tensor:
    """Return matrices [C, k, k, B] times values [C, k, B]."""
    return (matrices * values[:, None]).sum(dim=2)


def _inverse(z: Tensor) -> Tensor:
    """Return the inverses of symmetric matrices [C, k, k, B]; of singular ones not finite."""
    if z.shape[1] > 3:
        return torch.linalg.inv_ex(z.permute(0, 3, 1, 2)).inverse.permute(0, 2, 3, 1).contiguous()
    cofactors = torch.linalg.cross(z.roll(-1, 1), z.roll(-2, 1), dim=2)
    determinants = (z[:, 0] * cofactors[:, 0]).sum(dim=1)
    return cofactors / determinants[:, None, None]
