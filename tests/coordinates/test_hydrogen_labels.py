"""Equivalent hydrogens: detected, verified, relabelled, and sampled without bias."""

import itertools
import math

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import kernels
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens, methyl_hydrogens
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import KB

METHYLS = [(0, 2, 3), (11, 12, 13), (19, 20, 21)]  # of ACE, of the side chain, of NME


def test_groups_that_the_system_distinguishes_are_left_out(molecule):
    assert [tuple(sorted(t)) for t in methyl_hydrogens(molecule.topology)] == METHYLS
    assert [tuple(sorted(t)) for t in equivalent_hydrogens(molecule)] == METHYLS
    system = openmm.XmlSerializer.clone(molecule.system)
    system.setParticleMass(12, 2.0)  # deuterium
    force = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    charge, sigma, epsilon = force.getParticleParameters(20)
    force.setParticleParameters(20, 2 * charge, sigma, epsilon)
    other = MolecularSystem(system, molecule.topology, molecule.positions)
    assert [tuple(sorted(t)) for t in equivalent_hydrogens(other)] == METHYLS[:1]


@pytest.fixture(scope="module")
def frames(molecule):
    return MDDataset.shipped(molecule, stride=100).positions


@pytest.fixture(scope="module")
def layer(molecule, frames):
    equivalent, reference = equivalent_hydrogens(molecule), molecule.positions
    layer = InternalCoordinates.from_topology(molecule.topology, reference, equivalent=equivalent)
    layer.fit_branch_cuts(layer.bonds_angles_torsions(frames)[2])
    return layer


def test_relabelling(layer, frames):
    labels = layer.labels(frames)
    assert labels.shape == (len(frames), 3)
    assert set(labels.flatten().tolist()) == {0, 1, 2}
    first = layer.relabel(frames, labels)
    assert not layer.labels(first).any()
    u, log_det = layer.inverse_and_log_det(frames)
    assert torch.isfinite(log_det).all()
    torch.testing.assert_close(layer.inverse_and_log_det(first)[0], u, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.place(u, like=frames), frames, rtol=0, atol=1e-9)
    # Each rotation by a third gives other labels of the same conformation.
    rotated = layer.relabel(frames, torch.ones_like(labels))
    assert (rotated - frames).abs().max() > 0.1
    torch.testing.assert_close(layer.inverse_and_log_det(rotated)[0], u, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.relabel(rotated, 2 * torch.ones_like(labels)), frames)
    assert layer.log_multiplicity == pytest.approx(math.log(27))


def test_one_third_of_the_circle_is_the_domain(layer, frames):
    u, _ = layer.inverse_and_log_det(frames)
    assert layer.in_domain(u).all()
    columns = (layer.kinds >= 2).nonzero()[0, 0] + layer.labelling.columns
    for primary, _, _ in columns.tolist():
        beyond = u.clone()
        beyond[:, primary] += math.pi
        assert not layer.in_domain(beyond).any()
        assert torch.isneginf(layer.forward_and_log_det(beyond)[1]).all()
        assert (layer.regularise(beyond)[1] > 0).all()
    again = InternalCoordinates.from_config(layer.to_config())
    assert torch.equal(again.in_domain(u), layer.in_domain(u))
    assert torch.equal(again.inverse_and_log_det(frames)[0], u)


def test_handedness_does_not_depend_on_labels(molecule, frames):
    """Of distorted conformations as well, whichever conformation is the reference."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(frames.shape, generator=generator, dtype=frames.dtype)
    x, settings = frames + 0.045 * noise, {"equivalent": equivalent_hydrogens(molecule)}
    for reference in (molecule.positions, frames[17].numpy()):
        layer = InternalCoordinates.from_topology(molecule.topology, reference, **settings)
        mirrored = layer.is_mirror_image(x)
        assert 0.02 < mirrored.double().mean() < 0.3
        for shift in itertools.product(range(3), repeat=3):
            rotated = layer.relabel(x, torch.tensor(shift).expand(len(x), 3))
            assert torch.equal(layer.is_mirror_image(rotated), mirrored)
        again = InternalCoordinates.from_config(layer.to_config())
        assert torch.equal(again.chirality.weights, layer.chirality.weights)


def test_draws_have_all_labels(molecule):
    dataset = MDDataset.shipped(molecule, stride=40)
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    sample = flow.sample(900, 600.0, torch.Generator().manual_seed(1))
    inside = torch.isfinite(sample.log_prob)
    labels, n = flow.coordinates.labels(sample.x[inside]), int(inside.sum())
    counts = torch.stack([(labels == k).sum(0) for k in range(3)])
    assert (counts - n / 3).abs().max() < 4 * math.sqrt(n * 2 / 9)
    # A density over labelled configurations: NLL with and without folding are comparable.
    options = {"n_blocks": 1, "hidden": (8,), "fold_methyls": False}
    unfolded = TemperatureSteerableFlow.from_dataset(dataset, **options)
    x, p = dataset.positions, torch.zeros(len(dataset), flow.n_momenta, dtype=torch.float64)
    gain = flow.log_prob(x, p, 600) - unfolded.log_prob(x, p, 600)
    assert 0 < gain.mean() < math.log(27)


ATOMS = (("C0", "C"), ("C1", "C"), ("O2", "O"), ("H3", "H"), ("H4", "H"), ("H5", "H"))
BONDS = ((0, 1), (1, 2), (0, 3), (0, 4), (0, 5))
POSITIONS = 0.1 * np.array(
    [[0, 0, 0], [1.5, 0, 0], [2.0, 1.3, 0], [-0.4, 1.0, 0.1], [-0.4, -0.5, 0.9], [-0.4, -0.5, -0.9]]
)

PAIR_ENERGY = 30.0


class Methyl(Potential):
    """Harmonic bonds and angles; dihedrals t of the three hydrogens coupled symmetrically.

    U(t) = sum 2 cos t + 3 cos 3t + 1.5 sin 2t + sum over pairs 30 cos(t_i - t_j), in kJ/mol.
    """

    event_shape, boltzmann_constant = (6, 3), KB

    def __init__(self):
        self.topology = app.Topology()
        residue = self.topology.addResidue("MET", self.topology.addChain())
        atoms = [self.topology.addAtom(n, app.Element.getBySymbol(s), residue) for n, s in ATOMS]
        for first, second in BONDS:
            self.topology.addBond(atoms[first], atoms[second])
        self.polar = InternalCoordinates.from_topology(self.topology, POSITIONS, "polar")

    @staticmethod
    def of_dihedrals(t):
        single = 2.0 * t.cos() + 3.0 * (3 * t).cos() + 1.5 * (2 * t).sin()
        pairs = sum((t[:, i] - t[:, j]).cos() for i, j in itertools.combinations(range(3), 2))
        return single.sum(1) + PAIR_ENERGY * pairs

    def dihedrals(self, x):
        """Of the three hydrogens [B, 3], by label."""
        torsions = self.polar.bonds_angles_torsions(x)[2]
        rows = self.polar.zmatrix.rows[3:]
        primary = next(i for i, row in enumerate(rows) if int(row[3]) not in (3, 4, 5))
        order = np.argsort(rows[:, 0])
        total = torsions + torsions[:, primary : primary + 1]
        total[:, primary] = torsions[:, primary]
        return total[:, order]

    def energy(self, x):
        self.n_evaluations += len(x)
        r, theta, _ = self.polar.bonds_angles_torsions(x)
        harmonic = 2e4 * (r - 0.12).square().sum(1) + 60 * (theta - 1.9).square().sum(1)
        return harmonic + self.of_dihedrals(self.dihedrals(x))

    def energy_and_forces(self, x):
        raise AssertionError("these kernels need no forces")

    def right_handed(self, t):
        """Whether all gaps between the hydrogens, in the reference's order, are below pi."""
        hand = self.polar.handedness[self.polar.handedness != 0]
        rows = [r for r in self.polar.zmatrix.rows[3:].tolist() if r[3] in (3, 4, 5)]
        order = [rows[0][3] - 3, *(r[0] - 3 for _, r in sorted(zip(-hand, rows, strict=True)))]
        gaps = t[:, [order[1], order[2], order[0]]] - t[:, order]
        return (gaps.sin() > 0).all(1)

    def sample(self, n, temperature, generator):
        """Exact samples by rejection (dihedrals) and quadrature (bonds, angles)."""
        kt, kinds = KB * temperature, self.polar.kinds.tolist()
        u = torch.zeros(n, 12, dtype=torch.float64)
        for column in range(9):
            if kinds[column] == 0:
                grid = np.linspace(0.01, 0.25, 4001)
                log_p = -2e4 * (grid - 0.12) ** 2 / kt + 2 * np.log(grid)
            else:
                grid = np.linspace(1e-6, math.pi - 1e-6, 4001)
                log_p = -60 * (grid - 1.9) ** 2 / kt + np.log(np.sin(grid))
            cdf = np.cumsum(np.exp(log_p - log_p.max()))
            uniform = torch.rand(n, generator=generator, dtype=torch.float64).numpy()
            u[:, column] = torch.from_numpy(np.interp(uniform, cdf / cdf[-1], grid))
        axis = torch.linspace(0, 2 * math.pi, 97, dtype=torch.float64)
        lowest = self.of_dihedrals(torch.cartesian_prod(axis, axis, axis)).min()
        # Second derivatives are at most 95 kJ/mol: half the spacing from a minimum, 0.2 in all.
        kept, lowest = [], lowest - 0.2
        while sum(map(len, kept)) < n:
            draws = torch.rand(200_000, 4, generator=generator, dtype=torch.float64)
            t = 2 * math.pi * draws[:, :3]
            accepted = draws[:, 3].log() < (lowest - self.of_dihedrals(t)) / kt
            kept.append(t[accepted & self.right_handed(t)])
        t = torch.cat(kept)[:n]
        rows = self.polar.zmatrix.rows[3:].tolist()
        columns = [t[:, r[0] - 3] - (t[:, r[3] - 3] if r[3] in (3, 4, 5) else 0.0) for r in rows]
        cuts = self.polar.branch_cuts
        u[:, 9:] = cuts + torch.remainder(torch.stack(columns, dim=1) - cuts, 2 * math.pi)
        x, log_det = self.polar.forward_and_log_det(u)
        assert torch.isfinite(log_det).all()
        return x

    def exact(self, functions, temperature, size=96):
        """Expectations over the right-handed part of the three circles, by quadrature."""
        axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * math.pi / size)
        t = torch.cartesian_prod(axis, axis, axis)
        t = t[self.right_handed(t)]
        weight = torch.softmax(-self.of_dihedrals(t) / (KB * temperature), 0)
        return [float((weight * f(t)).sum()) for f in functions]


FUNCTIONS = [
    *(lambda t, i=i, k=k, f=f: f(k * t[:, i]) for i in range(3) for k in (1, 2, 3)
      for f in (torch.sin, torch.cos)),
    *(lambda t, i=i, j=j, f=f: f(t[:, i] - t[:, j]) for i, j in ((0, 1), (1, 2), (2, 0))
      for f in (torch.sin, torch.cos)),
]  # fmt: skip
TEMPERATURE = 450.0
N = 10_000


@pytest.fixture(scope="module")
def methyl():
    return Methyl()


@pytest.fixture(scope="module")
def start(methyl):
    return methyl.sample(N, TEMPERATURE, torch.Generator().manual_seed(11))


def folded_flow(methyl, start, metric="volume", overlap=False):
    options = {"equivalent": [(3, 4, 5)], "overlap": overlap}
    layer = InternalCoordinates.from_topology(methyl.topology, POSITIONS, metric, **options)
    assert len(layer.labelling) == 1
    cuts = layer.fit_branch_cuts(layer.bonds_angles_torsions(start)[2]).clone()
    cuts[layer.labelling.columns[0, 0]] += math.pi / 3  # through a mode: the hard case
    layer.set_branch_cuts(cuts)
    whitening = Whitening.fit(layer.inverse_and_log_det(start)[0], layer.kinds)
    flow = TemperatureSteerableFlow(12, 4, 2, (12,), 500.0, layer, whitening, seed=2)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flow.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise / max(parameter.shape[-1:] or (1,)) ** 0.5
        whitening.soft_scale *= 3  # wide draws: many leave the third of a circle
    return flow


def scores(methyl, x, temperature=TEMPERATURE):
    t = methyl.dihedrals(x)
    values = torch.stack([f(t) for f in FUNCTIONS], dim=1)
    apart = values.mean(0) - torch.tensor(methyl.exact(FUNCTIONS, temperature)).double()
    return float((apart / values.std(0)).abs().max()) * len(x) ** 0.5


def run(methyl, start, flow, n_steps=1, **checks):
    energy, labels = methyl.energy(start)[:, None], torch.zeros(len(start), 1).long()
    state = kernels.WalkerState(start[:, None], None, energy, labels)
    generator, options = torch.Generator().manual_seed(3), {"n_steps": n_steps, **checks}
    moves = [
        kernels.FlowWalk(flow, methyl, (TEMPERATURE,), 0.5, **options),
        kernels.FlowIndependence(flow, methyl, (TEMPERATURE,), **options),
    ]
    accepted = torch.zeros(2)
    for iteration in range(10 // n_steps):
        state = state.evolve(iteration=iteration)  # latents are computed anew in each
        for i, move in enumerate(moves):
            state, info = move(state, generator)
            accepted[i] += int(info.accepted.sum())
    return state.x[:, 0], accepted / (10 * len(start))


def test_exact_start(methyl, start):
    assert scores(methyl, start) < 4


@pytest.mark.parametrize(
    ("metric", "overlap", "n_steps", "n"),
    [
        ("volume", False, 1, N),
        ("volume", False, 5, 4000),
        ("volume", True, 1, 4000),
        ("volume", True, 5, 4000),
        ("polar", False, 1, 4000),
        ("polar", True, 2, 4000),
    ],
)
def test_moves_leave_the_exact_distribution(methyl, start, metric, overlap, n_steps, n):
    start = start[:n]
    x, acceptance = run(methyl, start, folded_flow(methyl, start, metric, overlap), n_steps)
    assert (acceptance > 0.02).all(), acceptance
    assert (acceptance < 0.95).all()
    assert scores(methyl, x) < 4


def test_the_latent_does_not_depend_on_pose_and_labels(methyl, start):
    """Kernels keep v over several steps: match_pose and relabelling must not change it."""
    flow, generator = folded_flow(methyl, start), torch.Generator().manual_seed(6)
    v = flow.sample_prior(N, TEMPERATURE, generator)
    (x, momenta), log_det = flow.forward_and_log_det(v)
    inside = torch.isfinite(log_det)
    v, x, momenta, like = v[inside], x[inside], momenta[inside], start[inside]
    placed = flow.match_pose(x, like=like)
    u, _ = flow.coordinates.inverse_and_log_det(x)
    torch.testing.assert_close(placed, flow.coordinates.place(u, like=like), rtol=0, atol=1e-12)
    relabelled = flow.coordinates.relabel(placed, torch.ones(len(x), 1).long())
    again = flow.match_pose(relabelled, like=like)
    torch.testing.assert_close(again, placed, rtol=0, atol=1e-12)
    labels = flow.coordinates.labels(placed)
    assert torch.equal(labels, flow.coordinates.labels(like))
    assert len(labels.unique()) == 3
    back, log_det_back = flow.inverse_and_log_det(placed, momenta)
    torch.testing.assert_close(back, v, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_back, -log_det[inside], rtol=0, atol=1e-9)


def test_wrapping_into_the_domain_is_noticed(methyl, start, monkeypatch):
    """A mutant: any third of the circle is accepted, though the inverse gives another v."""
    flow = folded_flow(methyl, start)
    _, following, last = flow.coordinates.labelling.columns[0].tolist()

    def are_in_order(torsions, cuts, overlap):
        second, third = torsions[:, following].sin(), -torsions[:, last].sin()
        gap = (torsions[:, last] - torsions[:, following]).sin()
        return (second > 0) & (third > 0) & (gap > 0)

    monkeypatch.setattr(flow.coordinates.labelling, "in_domain", are_in_order)
    x, _ = run(methyl, start, flow, round_trip_tolerance=1e9)
    assert scores(methyl, x) > 5


class WithForces(Methyl):
    """The same with forces, for moves that need them."""

    def energy_and_forces(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energy = self.energy(leaf)
            (gradient,) = torch.autograd.grad(energy.sum(), leaf)
        return energy.detach(), -gradient


def test_partition_of_unity_over_copies(methyl, start):
    """The weights sum to one, whichever copy they are computed from; u and x are consistent."""
    flow = folded_flow(methyl, start, overlap=True)
    layer, x = flow.coordinates, start[:2000]
    tau = torch.linspace(0.3, 2.0, len(x), dtype=torch.float64)
    folded, _ = layer.inverse_and_log_det(x)
    total, crossed = torch.zeros(len(x), dtype=torch.float64), 0
    for copy in range(3):
        copies = torch.full((len(x), 1), copy)
        u, log_det = layer.inverse_and_log_det(x, copies)
        assert torch.isfinite(log_det).all()
        built, forward_log_det = layer.forward_and_log_det(u)
        torch.testing.assert_close(forward_log_det, -log_det, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.inverse_and_log_det(built)[0], folded, rtol=0, atol=1e-9)
        log_weight, of_built = layer.log_partition(u, tau), layer.log_partition_of(built, tau)
        torch.testing.assert_close(log_weight, of_built, rtol=1e-9, atol=1e-9)
        weight = log_weight.exp()
        total += weight
        crossed += int(((weight > 0.1) & (weight < 0.9)).sum())
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert crossed > 300  # the cut goes through a mode
    generator = torch.Generator().manual_seed(4)
    draws = [layer.draw_copies(x, tau, generator) for _ in range(200)]
    drawn = torch.stack([copies[:, 0] for copies, _ in draws])
    copies, log_weight = draws[0]
    expected = layer.log_partition(layer.inverse_and_log_det(x, copies)[0], tau)
    torch.testing.assert_close(log_weight, expected, rtol=0, atol=1e-12)
    for copy in range(3):
        u, _ = layer.inverse_and_log_det(x, torch.full((len(x), 1), copy))
        expected = layer.log_partition(u, tau).exp().sum()
        measured = (drawn == copy).double().sum() / len(drawn)
        assert abs(measured - expected) < 4 * (expected / len(drawn)).sqrt() + 1e-9


def test_the_domain_has_no_copies_with_two_atoms_beyond_the_cut(methyl, start):
    """No configuration is taken for such a copy."""
    flow = folded_flow(methyl, start, overlap=True)
    layer = flow.coordinates
    u, _ = layer.inverse_and_log_det(start[:500])
    column = int((layer.kinds >= 2).nonzero()[0, 0]) + int(layer.labelling.columns[0, 0])
    for shift, allowed in ((-2.1, True), (-4.2, False), (2.1, True), (4.2, False)):
        moved = u.clone()
        moved[:, column] += shift
        inside = torch.isfinite(layer.forward_and_log_det(moved)[1])
        assert (inside.double().mean() > 0.2) == allowed, shift


def test_gradient_moves_and_swaps_with_overlap(methyl, start):
    """LatentMALA and SteeredSwap: two rungs, each scored at its own temperature."""
    potential, generator = WithForces(), torch.Generator().manual_seed(8)
    n, flow = N // 2, folded_flow(methyl, start, overlap=True)
    ladder = (TEMPERATURE, 700.0)
    hot = methyl.sample(n, 700.0, torch.Generator().manual_seed(12))
    x = torch.stack([start[:n], hot], dim=1)
    energy = methyl.energy(x.flatten(0, 1)).reshape(n, 2)
    state = kernels.WalkerState(x, None, energy, torch.arange(2).expand(n, 2).clone())
    mala = kernels.LatentMALA(flow, potential, ladder, 0.3)
    swap = kernels.SteeredSwap(flow, potential, ladder)
    for _ in range(4):
        for kernel in (mala, swap, swap):
            state, info = kernel(state, generator)
            if kernel.name == mala.name or int(info.proposed.sum()):
                assert int(info.accepted.sum()) > 0.02 * n
    assert scores(methyl, state.x[:, 0]) < 4
    assert scores(methyl, state.x[:, 1], 700.0) < 4


@pytest.mark.parametrize("mutant", ["weight", "copy"])
def test_mutants_of_the_overlap_are_noticed(methyl, start, monkeypatch, mutant):
    flow = folded_flow(methyl, start, overlap=True)
    layer = flow.coordinates
    if mutant == "weight":  # left out of the proposal's density
        monkeypatch.setattr(layer, "log_partition_of", lambda x, tau: 0 * tau)
    else:  # drawn without the weights

        def uniform(x, tau, generator):
            copies = torch.randint(3, (len(x), 1), generator=generator)
            u, _ = layer.inverse_and_log_det(x, copies)
            return copies, layer.log_partition(u, tau)

        monkeypatch.setattr(layer, "draw_copies", uniform)
    x, _ = run(methyl, start[:4000], flow, round_trip_tolerance=1e9)
    assert scores(methyl, x) > 5


def test_density_with_overlap(methyl, start):
    """log_prob sums over copies; the density of a drawn copy, over its weight, has that mean."""
    flow, generator = folded_flow(methyl, start, overlap=True), torch.Generator().manual_seed(9)
    x, temperature = start[:400], 450.0
    momenta = 0.9 * torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
    tau = torch.full((len(x),), temperature / flow.reference_temperature, dtype=torch.float64)
    mean = torch.zeros(len(x), dtype=torch.float64)
    for copy in range(3):
        copies = torch.full((len(x), 1), copy)
        v, log_det = flow.inverse_and_log_det(x, momenta, copies)
        log_prob = flow.prior_log_prob(v, temperature) + log_det - flow.log_multiplicity
        u, _ = flow.coordinates.inverse_and_log_det(x, copies)
        log_weight = flow.coordinates.log_partition(u, tau)
        mean += log_weight.exp() * (log_prob - log_weight).exp()
    torch.testing.assert_close(mean.log(), flow.log_prob(x, momenta, temperature))
    # The same in expectations over the flow's draws: the mean of exp(log p - log_prob) is Z.
    drawn = flow.sample(100_000, temperature, generator)
    kinetic = 0.5 * drawn.momenta.square().sum(1) / (temperature / flow.reference_temperature)
    usable = torch.isfinite(drawn.log_prob)
    log_weight = torch.full_like(kinetic, -math.inf)
    reduced_energy = methyl.energy(drawn.x[usable]) / (KB * temperature)
    log_weight[usable] = -reduced_energy - (kinetic + drawn.log_prob)[usable]
    weight = torch.softmax(log_weight, 0)
    angles = methyl.dihedrals(torch.where(usable[:, None, None], drawn.x, start[:1]))
    for function, expected in zip(FUNCTIONS, methyl.exact(FUNCTIONS, temperature), strict=True):
        values = function(angles)
        estimate = float((weight * values).sum())
        stderr = float((weight.square() * (values - estimate).square()).sum().sqrt())
        assert abs(estimate - expected) < 4 * stderr


def test_the_overlap_of_a_configuration_is_checked(layer):
    config = layer.to_config()
    with pytest.raises(ValueError, match="overlap: expected bool"):
        InternalCoordinates.from_config({**config, "overlap": "yes"})
