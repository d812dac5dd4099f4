"""Clusters of silver atoms in effective medium theory, within a wall that keeps them together."""

import math

import torch
from torch import Tensor

from openmm_tsf.potentials.toy import ModelPotential
from openmm_tsf.units import KB
from openmm_tsf.utils.validation import check_int, check_positive

_NM_PER_BOHR, _KJ_PER_MOLE_PER_EV = 0.052917721067, 96.4853321
#: (16 π / 3)^(1/3) / 2^(1/2) as ASE rounds it: the distance of neighbours in units of s_0.
_BETA = 1.809


class SilverCluster(ModelPotential):
    """N silver atoms in effective medium theory: x [B, N, 3] in nm, U in kJ/mol, T in K.

    The potential of Jacobsen, Stoltze and Nørskov, Surf. Sci. 366, 394 (1996), with the parameters
    and the smooth cutoff of ``ase.calculators.emt``, whose zero (atoms in bulk silver) it has. With
    σ1_i = Σ_j exp[-η2 (r_ij - β s0)] θ(r_ij) and s_i = -ln(σ1_i / 12 γ1) / (β η2), it is

    U = Σ_i E0 (1 + λ s_i) exp(-λ s_i) - E0 + 6 V0 exp(-κ s_i)
    - (V0 / 2 γ2) Σ_{j≠i} exp[-κ (r_ij / β - s0)] θ(r_ij),

    θ the logistic function in the middle between third and fourth neighbours. (ASE also drops pairs
    beyond 0.588 nm, where θ is below 1e-5.) The density exp(-U/kT) of free atoms cannot be
    normalised: they evaporate. The wall, (k/2) Σ_i max(0, \\|x_i - centroid\\| - R)², is a part
    of U.

    Parameters
    ----------
    n_atoms
        N, at least 2.
    wall_radius, wall_stiffness
        R in nm and k in kJ/mol/nm². The stable isomers of Ag6 have all atoms within 0.26 nm.

    Examples
    --------
    The octahedron of Ag6, 4.22 eV above six atoms in bulk silver:

    >>> import torch
    >>> from openmm_tsf.potentials import SilverCluster
    >>> silver = SilverCluster(6)
    >>> corners = torch.cat([torch.eye(3), -torch.eye(3)]).double() * 0.193
    >>> round(silver.energy(corners[None]).item())
    407
    """

    boltzmann_constant = KB

    def __init__(
        self, n_atoms: int, wall_radius: float = 0.4, wall_stiffness: float = 5000.0
    ) -> None:
        super().__init__(check_int(n_atoms, "n_atoms", least=2), 3)
        self.wall_radius = check_positive(wall_radius, "wall_radius")
        self.wall_stiffness = check_positive(wall_stiffness, "wall_stiffness")
        self._e0, self._v0 = -2.96 * _KJ_PER_MOLE_PER_EV, 2.132 * _KJ_PER_MOLE_PER_EV
        self._s0 = 3.01 * _NM_PER_BOHR
        self._eta2, self._kappa, self._lambda = (v / _NM_PER_BOHR for v in (1.652, 2.790, 1.892))
        nearest = _BETA * self._s0
        self._cutoff = nearest * 0.5 * (math.sqrt(3.0) + 2.0)
        self._steepness = math.log(1e4 - 1.0) / (2.0 * nearest - self._cutoff)
        # Sums over the first three shells of the bulk, where s = 0 by definition.
        shells = nearest * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device="cpu").sqrt()
        counts = torch.tensor([12.0, 6.0, 24.0], dtype=torch.float64, device="cpu")
        bulk = counts.log() + torch.nn.functional.logsigmoid(self._log_odds(shells))
        self._log_density = float((bulk - self._eta2 * (shells - nearest)).logsumexp(0))
        attraction = bulk - self._kappa / _BETA * (shells - nearest)
        self._gamma2 = float(attraction.logsumexp(0).exp()) / 12.0
        i, j = torch.triu_indices(n_atoms, n_atoms, 1, dtype=torch.int64, device="cpu")
        self._first, self._second = i, j
        #: For every atom the numbers of its N - 1 pairs.
        pairs = [((i == atom) | (j == atom)).nonzero().flatten() for atom in range(n_atoms)]
        self._pairs = torch.stack(pairs)

    def _log_odds(self, r: Tensor) -> Tensor:
        return -self._steepness * (r - self._cutoff)

    def formula(self, x: Tensor) -> Tensor:
        r = self.distances(x)
        log_theta = torch.nn.functional.logsigmoid(self._log_odds(r))
        # As logarithms: an atom far from all others has s = +∞ in place of ln 0.
        terms = log_theta - self._eta2 * (r - _BETA * self._s0)
        log_sum = terms[:, self.on_device("_pairs", x.device)].logsumexp(dim=2)
        s = (self._log_density - log_sum) / (_BETA * self._eta2)
        cohesion = self._e0 * ((1.0 + self._lambda * s) * torch.exp(-self._lambda * s) - 1.0)
        atoms = cohesion + 6.0 * self._v0 * torch.exp(-self._kappa * s)
        pairs = torch.exp(log_theta - self._kappa * (r / _BETA - self._s0))
        energy = atoms.sum(dim=1) - self._v0 / self._gamma2 * pairs.sum(dim=1)
        beyond = (x - x.mean(dim=1, keepdim=True)).norm(dim=2) - self.wall_radius
        return energy + 0.5 * self.wall_stiffness * beyond.clamp(min=0.0).square().sum(dim=1)

    def distances(self, x: Tensor) -> Tensor:
        """Return the distances [B, N (N - 1) / 2] of pairs (0, 1), (0, 2), ... of x [B, N, 3]."""
        first, second = (self.on_device(name, x.device) for name in ("_first", "_second"))
        return (x[:, first] - x[:, second]).norm(dim=2)
