"""A molecule whose Boltzmann distribution is a product of one-dimensional quadratures.

Seven atoms, one bond, angle and dihedral term per row of the Z-matrix, unequal masses, one chiral
centre. In (r, theta, phi) the density is prod r^2 exp(-U(r)/kT) * prod sin(theta) exp(-U(theta)/kT)
* prod exp(-U(phi)/kT): every coordinate is independent of the others, of the pose and of the
velocities. The probability integral transform (PIT) of every coordinate is uniform, so one set of
checks serves all. (Points with a mirrored centre, which are outside the domain, make it depend on
several coordinates; at 600 K they are 3e-5 of all, far less than any check resolves.)
"""

import math

import numpy as np
import openmm
import openmm.app as app
import torch

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows import RealNVPFlow, TemperatureSteerableFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.units import KB

ATOMS = (("C0", "C"), ("C1", "C"), ("C2", "C"), ("C3", "C"), ("H4", "H"), ("F5", "F"), ("O6", "O"))
BONDS = ((0, 1), (1, 2), (2, 3), (1, 4), (1, 5), (3, 6))
MASSES = (12.0, 17.0, 6.0, 14.0, 5.0, 19.0, 9.0)  # amu, unequal and light, for quick rotation
POSITIONS = 0.15 * np.array(
    [
        [0.58, 0.58, 0.58],
        [0.0, 0.0, 0.0],
        [-0.58, -0.58, 0.58],
        [-1.4, -0.2, 1.3],
        [0.5, -0.55, -0.6],
        [-0.6, 0.55, -0.55],
        [-1.3, 0.8, 1.7],
    ]
)
GRID = 8001


class Marginal:
    """One coordinate's density on an interval, by quadrature."""

    def __init__(self, log_density, low, high):
        self.grid = np.linspace(low, high, GRID)
        with np.errstate(divide="ignore"):
            log_p = log_density(self.grid)
        p = np.exp(log_p - log_p.max())
        cdf = np.concatenate([[0.0], np.cumsum(0.5 * (p[1:] + p[:-1]))])
        self.cdf = cdf / cdf[-1]

    def pit(self, value):
        return np.interp(value, self.grid, self.cdf)

    def quantile(self, uniform):
        return np.interp(uniform, self.cdf, self.grid)


class ExactTree:
    """The molecule: topology, masses [N] amu, potential and exact samples."""

    def __init__(self):
        self.topology = app.Topology()
        residue = self.topology.addResidue("TRE", self.topology.addChain())
        elements = [(name, app.Element.getBySymbol(symbol)) for name, symbol in ATOMS]
        atoms = [self.topology.addAtom(*element, residue) for element in elements]
        for first, second in BONDS:
            self.topology.addBond(atoms[first], atoms[second])
        self.n_atoms = len(ATOMS)
        self.masses = torch.tensor(MASSES, dtype=torch.float64)
        self.polar = InternalCoordinates.from_topology(self.topology, POSITIONS, "polar")
        self.n_coordinates = self.polar.n_coordinates
        reference = torch.tensor(POSITIONS)[None]
        self.centre = self.polar.inverse_and_log_det(reference)[0][0]
        kinds = self.polar.kinds
        variety = 1 + 0.3 * torch.sin(3.0 * torch.arange(self.n_coordinates))
        table = torch.tensor([1.1e4, 100.0, 4.0, 50.0], dtype=torch.float64)
        self.k = table[kinds] * variety  # kJ/mol per nm^2, per rad^2, and in front of cosines
        self._marginals = {}
        self.k_double = torch.where(kinds == 2, 2.5, 0.0).to(torch.float64)  # second harmonic

    def term_energies(self, u):
        """Return the energy of every term [..., d] at polar coordinates u [..., d], kJ/mol."""
        away = u - self.centre
        harmonic = 0.5 * self.k * away.square()
        periodic = self.k * (1 - torch.cos(away)) + self.k_double * (1 - torch.cos(2 * u))
        return torch.where(self.polar.kinds < 2, harmonic, periodic)

    def marginals(self, temperature):
        """Return the marginal of every coordinate at a temperature, computed once."""
        if temperature not in self._marginals:
            self._marginals[temperature] = self._compute_marginals(temperature)
        return self._marginals[temperature]

    def _compute_marginals(self, temperature):
        kt = KB * temperature
        out = []
        for index, kind in enumerate(self.polar.kinds.tolist()):

            def log_density(values, index=index, kind=kind):
                u = self.centre.repeat(len(values), 1)
                u[:, index] = torch.from_numpy(values)
                log_p = -self.term_energies(u)[:, index].numpy() / kt
                if kind == 0:
                    log_p = log_p + 2 * np.log(values)
                return log_p + np.log(np.sin(values)) if kind == 1 else log_p

            centre = float(self.centre[index])
            if kind == 0:
                sd = math.sqrt(kt / float(self.k[index]))
                low, high = max(1e-4, centre - 9 * sd), centre + 9 * sd
            elif kind == 1:
                low, high = 1e-9, math.pi - 1e-9
            else:
                row = index - (2 * self.n_atoms - 3)
                low = float(self.polar.branch_cuts[row])
                high = low + 2 * math.pi
            out.append(Marginal(log_density, low, high))
        return out

    def sample_internal(self, n, temperature, generator):
        uniform = torch.rand(n, self.n_coordinates, generator=generator, dtype=torch.float64)
        columns = zip(self.marginals(temperature), uniform.numpy().T, strict=True)
        quantiles = [marginal.quantile(column) for marginal, column in columns]
        return torch.from_numpy(np.stack(quantiles, axis=1))

    def sample(self, n, temperature, generator):
        """Return independent exact samples [n, N, 3] in random poses."""
        u = self.sample_internal(n, temperature, generator)
        while not bool((inside := self.polar.in_domain(u)).all()):
            u[~inside] = self.sample_internal(int((~inside).sum()), temperature, generator)
        x, _ = self.polar.forward_and_log_det(u)
        q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator, dtype=torch.float64))
        # Uniform (Haar) only once the signs that the factorisation leaves open are removed.
        q = q * torch.diagonal(r, dim1=1, dim2=2).sign()[:, None, :]
        rotation = q * torch.linalg.det(q).sign()[:, None, None]
        shift = torch.randn(n, 1, 3, generator=generator, dtype=torch.float64)
        return x @ rotation.transpose(1, 2) + shift

    def velocities(self, n, temperature, generator):
        """Return Maxwell-Boltzmann velocities [n, N, 3], nm/ps."""
        noise = torch.randn(n, self.n_atoms, 3, generator=generator, dtype=torch.float64)
        return noise * (KB * temperature / self.masses).sqrt()[:, None]

    def pit(self, x, temperature):
        """Return PITs [n, d] of positions x [n, N, 3]: uniform and independent if x is exact."""
        u, _ = self.polar.inverse_and_log_det(x)
        columns = zip(self.marginals(temperature), u.numpy().T, strict=True)
        return np.stack([marginal.pit(column) for marginal, column in columns], axis=1)

    def system(self):
        """Return the same potential as an openmm.System."""
        system = openmm.System()
        for mass in self.masses.tolist():
            system.addParticle(mass)
        bonds, angles = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce()
        torsions = openmm.CustomTorsionForce(
            "k*(1 - cos(theta - centre)) + k_double*(1 - cos(2*theta))"
        )
        for name in ("k", "k_double", "centre"):
            torsions.addPerTorsionParameter(name)
        rows = self.polar.zmatrix.rows.tolist()
        terms = zip(self.centre.tolist(), self.k.tolist(), self.k_double.tolist(), strict=True)
        for row in rows[1:]:
            bonds.addBond(*row[:2], *next(terms)[:2])
        for row in rows[2:]:
            angles.addAngle(*row[:3], *next(terms)[:2])
        for row in rows[3:]:
            centre, k, k_double = next(terms)
            torsions.addTorsion(*row, [k, k_double, centre])
        for force in (bonds, angles, torsions):
            system.addForce(force)
        return system

    def layer(self, metric):
        """Return the layer of internal coordinates."""
        return InternalCoordinates.from_topology(self.topology, POSITIONS, metric)

    def flow(self, kind, metric, strength, seed=5, cuts_from_centre=None):
        """Return a random flow with weights of order one and a whitening of exact samples.

        Torsions without handedness are cut opposite the reference, or `cuts_from_centre` radians
        from it.
        """
        generator = torch.Generator().manual_seed(seed)
        layer = self.layer(metric)
        if cuts_from_centre is not None:
            near = self.centre[-len(layer.branch_cuts) :] + cuts_from_centre
            layer.set_branch_cuts(torch.where(layer.handedness == 0, near, layer.branch_cuts))
        frames = self.sample(4000, 500.0, generator)
        whitening = Whitening.fit(layer.inverse_and_log_det(frames)[0], layer.kinds)
        cls, m = (TemperatureSteerableFlow, 6) if kind == "tsf" else (RealNVPFlow, 0)
        flow = cls(layer.n_coordinates, m, 2, (12,), 500.0, layer, whitening, seed=seed)
        with torch.no_grad():
            for parameter in flow.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += strength * noise / max(parameter.shape[-1:] or (1,)) ** 0.5
        return flow


class TreePotential(Potential):
    """The molecule's energy in torch, kJ/mol."""

    def __init__(self, tree):
        self.tree = tree
        self.event_shape = (tree.n_atoms, 3)
        self.boltzmann_constant = KB

    def energy(self, x):
        self.check_positions(x)
        self.n_evaluations += len(x)
        r, theta, torsions = self.tree.polar.bonds_angles_torsions(x)
        return self.tree.term_energies(torch.cat([r, theta, torsions], dim=1)).sum(dim=1)

    def energy_and_forces(self, x):
        leaf = x.detach().requires_grad_()
        energy = self.energy(leaf)
        (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), -gradient


def chi2_z(chi2, dof):
    """Return the standard normal score of a chi-square value (Wilson and Hilferty 1931)."""
    return ((chi2 / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / np.sqrt(2 / (9 * dof))


def uniform_scores(pit, n_bins=20):
    """Return z values of PITs [n, d]: means, variances, histograms, all correlations together."""
    n, d = pit.shape
    centred = pit - 0.5
    counts = np.stack([np.histogram(pit[:, i], bins=n_bins, range=(0, 1))[0] for i in range(d)])
    chi2 = ((counts - n / n_bins) ** 2).sum(axis=1) / (n / n_bins)
    pairs = (12 * centred.T @ centred / np.sqrt(n))[np.triu_indices(d, 1)]
    scores = {
        "mean": centred.mean(axis=0) * np.sqrt(12 * n),
        "variance": ((centred**2).mean(axis=0) - 1 / 12) * np.sqrt(180 * n),
        "histogram": chi2_z(chi2, n_bins - 1),
    }
    if len(pairs):
        scores["correlation"] = chi2_z(np.square(pairs).sum(), len(pairs))
    return scores


def velocity_scores(tree, x, v, temperature):
    """Return z values of velocities [n, N, 3]: in lab and body frame, and with positions."""
    n = len(x)
    width = np.sqrt(KB * temperature / tree.masses.numpy())[:, None]
    lab = (v.numpy() / width).reshape(n, -1)
    rotation, _ = tree.polar.pose(x)  # to axes fixed in the molecule
    body = ((v @ rotation).numpy() / width).reshape(n, -1)
    scores = {}
    for frame, unit in (("lab", lab), ("body", body)):
        scores[f"{frame} velocity mean"] = unit.mean(axis=0) * np.sqrt(n)
        scores[f"{frame} velocity variance"] = ((unit**2).mean(axis=0) - 1) * np.sqrt(n / 2)
    dof = lab.shape[1]
    kinetic = np.square(lab).sum(axis=1)
    scores["kinetic energy"] = (kinetic.mean() - dof) * np.sqrt(n / (2 * dof))
    position = np.sqrt(12) * (tree.pit(x, temperature) - 0.5)
    for power in (1, 2):
        values = body if power == 1 else (body**2 - 1) / np.sqrt(2)
        cross = position.T @ values / np.sqrt(n)
        scores[f"position and velocity^{power}"] = chi2_z(np.square(cross).sum(), cross.size)
    within = (body.T @ body / np.sqrt(n))[np.triu_indices(dof, 1)]
    scores["velocity correlation"] = chi2_z(np.square(within).sum(), len(within))
    return scores
