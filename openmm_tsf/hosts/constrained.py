"""Replicas that a host keeps where bonds are constrained: their manifold, and velocities on it.

Constrained dynamics samples positions from exp(-U/kT) |Z|^(1/2) on the manifold (the measure
``"rigid"``, see :mod:`openmm_tsf.coordinates.constraints`), and velocities, given the positions,
from exp(-K/kT) on its tangent space. A move through a flow leads to another tangent space. The
velocities there are drawn from that distribution, so that the joint one remains; where a move is
rejected they stay.
"""

from typing import Any, Self

import torch
from torch import Generator, Tensor

from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.sampling.kernels.rattle import Rattle
from openmm_tsf.systems.constrained import LARGEST_DEVIATION
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB


class ConstrainedReplicas:
    """Projects replicas onto the manifold of constraints, and draws velocities there.

    Parameters
    ----------
    constraints
        Distances, and the masses of all atoms.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.coordinates.constraints import Constraints
    >>> from openmm_tsf.hosts.constrained import ConstrainedReplicas
    >>> from openmm_tsf.utils.random import seeded_generator
    >>> bond = ConstrainedReplicas(Constraints([[0, 1]], [0.1], [12.0, 1.0]))
    >>> x = torch.tensor([[[0.0, 0.0, 0.0], [0.100001, 0.0, 0.0]]], dtype=torch.float64)
    >>> x = bond.project(x, "x")
    >>> round(float(x[0, 1, 0] - x[0, 0, 0]), 9)
    0.1
    >>> v = bond.draw_velocities(x, [300.0], seeded_generator(1))
    >>> bool(v[0, 0, 0].isclose(v[0, 1, 0]))
    True
    """

    def __init__(self, constraints: Constraints) -> None:
        # A copy in float64 on the CPU, where hosts have their positions; a flow's may be elsewhere.
        self.constraints = Constraints.from_config(constraints.to_config(), constraints.n_atoms)
        self._masses = 1 / self.constraints.inverse_masses
        self._rattle = Rattle(self.constraints)

    @classmethod
    def from_flow(cls, flow: Any) -> Self | None:
        """Return those of a flow's coordinates; None without constraints."""
        constraints = _constraints_of(flow)
        return None if constraints is None else cls(constraints)

    def project(self, x: Tensor, name: str) -> Tensor:
        """Return x [n, N, 3] in nm, `name` in messages, with distances constrained to rounding.

        Rows that are not finite stay as they are.

        Raises
        ------
        ValueError
            If distances are further from their values than constrained dynamics leaves them.
        """
        finite = x.isfinite().flatten(1).all(dim=1)
        if not bool(finite.any()):
            return x
        deviations = self.constraints.deviations(x[finite]).abs() / self.constraints.lengths
        if (largest := float(deviations.max())) > LARGEST_DEVIATION:
            raise ValueError(
                f"{name}: expected constrained distances to {LARGEST_DEVIATION:g} of them, got one "
                f"that is off by {largest:.2g}; minimise the energy or run dynamics before moves "
                "through the flow, with an integrator.setConstraintTolerance of 1e-5 or below"
            )
        projected = x.clone()
        projected[finite] = self.constraints.project(x[finite])
        return projected

    def draw_velocities(self, x: Tensor, temperatures: Any, generator: Generator) -> Tensor:
        """Draw velocities [n, N, 3] in nm/ps, on the CPU, at positions x [n, N, 3] in nm.

        From the Maxwell-Boltzmann distribution on the tangent space, at `temperatures` [n] in K:
        Gaussian velocities, projected in the metric of the masses.
        """
        kt = KB * torch.as_tensor(temperatures, dtype=torch.float64, device=generator.device)
        shape = (1, *x.shape)
        v = maxwell_boltzmann(shape, kt, self._masses, generator)[0].to(x.device)
        return self._rattle.project(v, self._rattle.locate(x))


def check_constraints(molecule: MolecularSystem, flow: Any) -> None:
    """Refuse (ValueError) a flow with other constraints than the molecule's, or not "rigid".

    The masses are a part of them: they enter the distribution of positions.
    """
    expected, given = molecule.constraints, _constraints_of(flow)
    if expected is None and given is None:
        return
    numbers = [0 if c is None else c.n_constraints for c in (expected, given)]
    if expected is None or given is None:
        raise ValueError(
            f"flow: expected one for the {numbers[0]} constraints of the host's System, got one "
            f"for {numbers[1]}; constrained bonds are left out by a flow, and only these"
        )
    one, other = expected.to_config(), given.to_config()
    for name in ("pairs", "lengths", "masses"):
        if one[name] != other[name]:
            raise ValueError(
                f"flow: expected the constraints of the host's System, got one with other {name}: "
                "where bonds are constrained, all of these enter the distribution"
            )
    check_rigid(getattr(flow.coordinates, "measure", MEASURES[0]), "flow")


def check_rigid(measure: str, name: str) -> None:
    """Refuse (ValueError) another measure than that of constrained dynamics."""
    if measure != MEASURES[0]:
        raise ValueError(
            f"{name}: expected the measure 'rigid', which a host's constrained dynamics samples, "
            f"got {measure!r}"
        )


def _constraints_of(flow: Any) -> Constraints | None:
    """Return the constraints of a flow's coordinates."""
    constraints = getattr(getattr(flow, "coordinates", None), "constraints", None)
    return constraints if isinstance(constraints, Constraints) else None
