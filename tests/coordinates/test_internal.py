"""Internal coordinates: round trips, Jacobians, domain, pose."""

import json
import math

import mdtraj
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.branch_cuts import emptiest_angles
from openmm_tsf.coordinates.geometry import wrap
from openmm_tsf.systems.dataset import MDDataset
from tests.coordinates.poses import rotation
from tests.support import molecules
from tests.support.molecules import alanine, capped, graph_molecule, random_tree

MOLECULES = {
    "alanine": alanine,
    "proline": lambda: capped("PRO"),
    "tryptophan": lambda: capped("TRP"),
    "disulfide": molecules.disulfide,
    "tree": lambda: random_tree(14, 3, n_rings=1),
}
METRICS = ("volume", "polar")


@pytest.fixture(params=METRICS)
def metric(request) -> str:
    return request.param


@pytest.fixture(params=MOLECULES)
def name(request) -> str:
    return request.param


def build(name: str, metric: str = "volume", **options) -> InternalCoordinates:
    return InternalCoordinates.from_topology(*MOLECULES[name](), metric, **options)


def random_u(layer: InternalCoordinates, batch: int, seed: int) -> Tensor:
    """Points in the domain: any torsions, wide tetrahedra, other angles and bonds.

    Offsets at planar centres are near the reference's. Where a bond of a centre closes a ring, some
    points are mirrored: others are drawn in their place.
    """
    generator = torch.Generator().manual_seed(seed)
    u = draw_u(layer, batch, generator)
    while not (inside := layer.in_domain(u)).all():
        u[~inside] = draw_u(layer, int((~inside).sum()), generator)
    return u


def draw_u(layer: InternalCoordinates, batch: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(batch, layer.n_coordinates, generator=generator, dtype=torch.float64)
    bonds, angles = layer.kinds == 0, layer.kinds == 1
    torsions, offsets = layer.kinds == 2, layer.kinds == 3
    r = layer.reference_bonds * (0.8 + 0.4 * u[:, bonds])
    vertex = torch.as_tensor(layer.zmatrix.rows[2:, 1])
    is_centre = torch.isin(vertex, layer.chirality.centres[:, 0])
    theta = torch.where(is_centre, 1.4 + u[:, angles], 0.5 + 2.0 * u[:, angles])
    u[:, bonds] = r**3 / 3 if layer.is_constant_log_det else r
    u[:, angles] = -theta.cos() if layer.is_constant_log_det else theta
    cuts = layer.branch_cuts
    start = layer.n_coordinates - len(cuts)
    u[:, torsions] = cuts[torsions[start:]] + 2 * math.pi * u[:, torsions]
    uniform = u[:, offsets]
    near = cuts[offsets[start:]] + math.pi + 0.4 * (uniform - 0.5)
    sign = layer.handedness[offsets[start:]]
    handed = wrap(sign * (1.6 + uniform), cuts[offsets[start:]])
    u[:, offsets] = torch.where(sign != 0, handed, near)
    return u


def random_pose(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    axes = np.stack([molecules.random_rotation(rng) for _ in range(batch)])
    return torch.tensor(axes), torch.tensor(rng.normal(size=(batch, 3)))


def noisy(name: str, batch: int, scale: float = 0.004) -> Tensor:
    """The reference conformation with noise, in random poses."""
    positions = torch.tensor(np.array(MOLECULES[name]()[1]))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(batch, *positions.shape, generator=generator, dtype=torch.float64)
    axes, translation = random_pose(batch, 6)
    return (positions + scale * noise) @ axes.mT + translation[:, None]


class TestRoundTrips:
    def test_u_to_x_to_u(self, name, metric):
        layer = build(name, metric)
        u = random_u(layer, 32, seed=1)
        assert layer.in_domain(u).all()
        x, log_det = layer.forward_and_log_det(u)
        back, inverse_log_det = layer.inverse_and_log_det(x)
        torch.testing.assert_close(back, u, rtol=0, atol=1e-10)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)
        assert x.shape == (32, layer.n_atoms, 3)
        assert log_det.shape == (32,)

    def test_x_to_u_to_x_in_the_same_pose(self, name, metric):
        layer, x = build(name, metric), noisy(name, 32)
        u, log_det = layer.inverse_and_log_det(x)
        assert torch.isfinite(log_det).all()
        torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-12)

    def test_match_pose_is_placing(self, name):
        layer, like = build(name), noisy(name, 32)
        u = random_u(layer, 32, seed=2)
        x = layer.from_pose(u, *random_pose(32, 7))
        moved = layer.match_pose(x, like=like)
        torch.testing.assert_close(moved, layer.place(u, like=like), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.match_pose(like, like=like), like, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match=r"like: expected shape \[B, "):
            layer.match_pose(x, like=like[:, 1:])

    def test_residues_of_a_protein(self):
        topology, positions = molecules.protein_piece()
        layer = InternalCoordinates.from_topology(topology, positions)
        assert layer.n_atoms > 350
        x = torch.tensor(positions)[None]
        u, log_det = layer.inverse_and_log_det(x)
        assert float(log_det) == 0.0
        torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-9)

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(st.integers(4, 60), st.integers(0, 10**6), st.integers(0, 2), st.sampled_from(METRICS))
    def test_random_graphs(self, n_atoms, seed, n_rings, metric):
        topology, positions = random_tree(n_atoms, seed, n_rings)
        try:
            layer = InternalCoordinates.from_topology(topology, positions, metric)
        except ValueError:
            if n_rings == 0:
                raise
            assume(False)  # bonds across the tree may lie in line, or flatten a centre
        u = random_u(layer, 4, seed)
        x, log_det = layer.forward_and_log_det(u)
        back, inverse_log_det = layer.inverse_and_log_det(x)
        torch.testing.assert_close(back, u, rtol=0, atol=1e-9)
        torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)
        torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-9)

    def test_reference_positions_are_in_the_middle_of_their_branches(self):
        layer = build("proline")
        positions = torch.tensor(capped("PRO")[1])[None]
        u, _ = layer.inverse_and_log_det(positions)
        torsions = u[0, -len(layer.branch_cuts) :]
        torch.testing.assert_close(torsions, layer.branch_cuts + math.pi)


class TestJacobian:
    """Against autograd's Jacobian of the square map 3N -> 3N, pose appended."""

    @staticmethod
    def square_map(layer: InternalCoordinates, v: Tensor) -> Tensor:
        """x [3N] of (u, alpha, cos beta, gamma, translation)."""
        d = layer.n_coordinates
        turn = rotation(*v[d : d + 3])
        return layer.from_pose(v[None, :d], turn[None], v[None, d + 3 :])[0].reshape(-1)

    def test_log_det(self, name, metric):
        layer = build(name, metric)
        points = random_u(layer, 1 if layer.n_atoms > 30 else 3, seed=2)
        _, log_dets = layer.forward_and_log_det(points)
        for u, log_det in zip(points, log_dets, strict=True):
            v = torch.cat((u, torch.tensor([0.7, -0.3, 2.0, 0.1, 0.2, 0.3], dtype=u.dtype)))
            jacobian = torch.autograd.functional.jacobian(lambda v: self.square_map(layer, v), v)
            measured = torch.linalg.slogdet(jacobian).logabsdet
            assert abs(float(measured - log_det)) < 1e-8
            if metric == "volume":
                assert float(log_det) == 0.0
            else:
                r, theta = u[layer.kinds == 0], u[layer.kinds == 1]
                formula = 2 * r.log().sum() + theta.sin().log().sum()
                assert abs(float(measured - formula)) < 1e-8

    def test_gradients(self, metric):
        layer = InternalCoordinates.from_topology(*random_tree(7, 1), metric)
        u = random_u(layer, 2, seed=3).requires_grad_()
        assert torch.autograd.gradcheck(layer.forward_and_log_det, u)
        x = layer.forward_and_log_det(u)[0].detach().requires_grad_()
        assert torch.autograd.gradcheck(layer.inverse_and_log_det, x)


class TestMeasures:
    @pytest.mark.parametrize("name", ["alanine", "tryptophan", "disulfide"])
    def test_against_mdtraj(self, name):
        layer, x = build(name), noisy(name, 8)
        frames = mdtraj.Trajectory(x.numpy(), mdtraj.Topology.from_openmm(MOLECULES[name]()[0]))
        rows = layer.zmatrix.rows
        r, theta, torsions = (part.numpy() for part in layer.bonds_angles_torsions(x))
        exact = {"periodic": False, "opt": False}
        distances = mdtraj.compute_distances(frames, rows[1:, :2], **exact)
        np.testing.assert_allclose(r, distances, atol=1e-6)
        angles = mdtraj.compute_angles(frames, rows[2:, :3], **exact)
        np.testing.assert_allclose(theta, angles, atol=2e-5)
        other = mdtraj.compute_dihedrals(frames, rows[3:], **exact)
        np.testing.assert_allclose(np.exp(1j * torsions), np.exp(1j * other), atol=5e-5)

    def test_phi_and_psi_have_mdtrajs_sign(self):
        layer, x = build("alanine"), noisy("alanine", 8, scale=0.02)
        frames = mdtraj.Trajectory(x.numpy(), mdtraj.Topology.from_openmm(alanine()[0]))
        torsions = layer.bonds_angles_torsions(x)[2].numpy()
        for compute in (mdtraj.compute_phi, mdtraj.compute_psi):
            quartets, expected = compute(frames)
            column = [set(row) for row in layer.zmatrix.rows[3:].tolist()].index(set(quartets[0]))
            assert layer.names[2 * 22 - 3 + column].startswith("torsion")
            assert abs(np.sin(expected)).min() > 1e-3  # a wrong sign would show
            difference = np.angle(np.exp(1j * (torsions[:, column] - expected[:, 0])))
            np.testing.assert_allclose(difference, 0.0, atol=1e-4)

    def test_siblings_turn_with_their_primary_torsion(self):
        layer = build("alanine")
        u = layer.inverse_and_log_det(noisy("alanine", 1))[0]
        turned = u.clone()
        psi = next(i for i, n in enumerate(layer.names) if n.startswith("torsion NME3-N ALA2-C "))
        turned[:, psi] = layer.branch_cuts[psi - 43] + 1.0
        x = layer.forward_and_log_det(torch.cat((u, turned)))[0]
        old, new = layer.bonds_angles_torsions(x)[2]
        assert ((new - old).abs() > 1e-9).nonzero()[:, 0].tolist() == [psi - 41]


class TestDomain:
    @pytest.mark.parametrize(
        ("kind", "value"),
        [(0, 0.0), (0, -0.1), (0, math.nan), (1, 4.0), (1, -1.001), (2, 40.0), (2, -40.0)],
    )
    def test_each_violation(self, metric, kind, value):
        layer = build("alanine", metric)
        u = random_u(layer, 4, seed=4)
        u[1, int((layer.kinds == kind).nonzero()[0])] = value
        x, log_det = layer.forward_and_log_det(u)
        inside = torch.tensor([True, False, True, True])
        assert torch.equal(layer.in_domain(u), inside)
        assert torch.equal(torch.isfinite(log_det), inside)
        assert float(log_det[1]) == -math.inf
        assert torch.isfinite(x[inside]).all()
        if kind == 2:
            assert torch.isfinite(x[1]).all()

    def test_branch_is_half_open(self):
        layer = build("alanine")
        u = random_u(layer, 3, seed=4)
        torsion = int((layer.kinds == 2).nonzero()[0])
        cut = layer.branch_cuts[torsion - 41]
        u[:, torsion] = torch.stack((cut, cut + 2 * math.pi, torch.nextafter(cut, cut - 1)))
        assert layer.in_domain(u).tolist() == [True, False, False]

    def test_mirrored_offsets(self, metric):
        layer = build("alanine", metric)
        u = random_u(layer, 2, seed=5)
        layer.set_branch_cuts(torch.full_like(layer.branch_cuts, -math.pi))
        siblings = torch.as_tensor(layer.zmatrix.siblings[3:])
        centre = torch.as_tensor(layer.zmatrix.rows[3:, 1])
        assert len(layer.chirality) == 4
        for atom in layer.chirality.centres[:, 0].tolist():
            flipped = u.clone()
            flipped[:, 41:][1, siblings & (centre == atom)] *= -1.0
            flipped[:, 41:] = wrap(flipped[:, 41:], layer.branch_cuts)
            x, log_det = layer.forward_and_log_det(flipped)
            assert torch.isfinite(log_det).tolist() == [True, False]
            assert torch.isfinite(x).all()
            assert layer.is_mirror_image(x).tolist() == [False, True]
            assert torch.isfinite(layer.inverse_and_log_det(x)[1]).tolist() == [True, False]

    def test_mirror_images_are_flagged(self, name):
        layer, x = build(name), noisy(name, 16)
        mirrored = x * torch.tensor([1.0, 1.0, -1.0], dtype=x.dtype)
        assert not layer.is_mirror_image(x).any()
        assert layer.is_mirror_image(mirrored).all()
        assert (layer.inverse_and_log_det(mirrored)[1] == -math.inf).all()

    def test_mirror_images_of_md_frames(self, molecule):
        layer, x = build("alanine"), MDDataset.shipped(molecule, stride=20).positions
        layer.fit_branch_cuts(layer.bonds_angles_torsions(x)[2])
        assert not layer.is_mirror_image(x).any()
        assert layer.is_mirror_image(-x).all()
        assert (layer.inverse_and_log_det(x)[1] == 0).all()

    def test_swapped_methyl_hydrogens_are_a_mirror_image(self):
        layer, x = build("alanine"), noisy("alanine", 2)
        first, second = (a.index for a in alanine()[0].atoms() if a.name in ("HB2", "HB3"))
        swapped = x.clone()
        swapped[:, [first, second]] = x[:, [second, first]]
        assert layer.is_mirror_image(swapped).all()

    def test_pyramidal_nitrogen_may_invert(self):
        positions = np.array([[0, 0, 40], [100, 0, 0], [-50, 87, 0], [-50, -87, 0]]) / 1000
        molecule = graph_molecule([(0, 1), (0, 2), (0, 3)], positions, "NHHH")
        layer = InternalCoordinates.from_topology(*molecule)
        x = torch.tensor(positions)[None]
        assert not layer.is_mirror_image(-x).any()
        assert torch.isfinite(layer.inverse_and_log_det(-x)[1]).all()

    def test_broken_conformations_have_no_coordinates(self, metric):
        layer, x = build("alanine", metric), noisy("alanine", 3)
        x[1, 5] = x[1, 4]
        x[2, 0] = math.nan
        _, log_det = layer.inverse_and_log_det(x)
        assert torch.isfinite(log_det).tolist() == [True, False, False]
        assert not layer.is_mirror_image(x)[2]


class TestBranchCuts:
    def test_gap_and_density(self):
        rng = np.random.default_rng(0)
        with_gap = rng.uniform(math.radians(100), math.radians(400), size=5000)
        is_rare = rng.random(5000) < 0.02
        rare = rng.uniform(-math.pi, math.pi, 5000)
        rare = np.where(is_rare, rare, rng.normal(1.0, 0.6, 5000))
        cuts = emptiest_angles(torch.tensor(np.stack((with_gap, rare), axis=1)))
        assert abs(float(cuts[0]) - math.radians(70)) < 0.01
        occupied = np.abs(np.angle(np.exp(1j * (rare - float(cuts[1]))))) < math.radians(5)
        assert occupied.mean() < 0.002
        # One frame.
        cuts = emptiest_angles(torch.tensor([[0.5, 3.0]], dtype=torch.float64))
        torch.testing.assert_close(cuts, torch.tensor([0.5 - math.pi, 3.0 - math.pi]).double())

    def test_fitted_cuts_are_used(self):
        layer, x = build("alanine"), noisy("alanine", 50)
        angles = layer.bonds_angles_torsions(x)[2]
        cuts = layer.fit_branch_cuts(angles)
        u, log_det = layer.inverse_and_log_det(x)
        assert torch.isfinite(log_det).all()
        assert (u[:, 41:] >= cuts).all()
        assert (u[:, 41:] < cuts + 2 * math.pi).all()
        span = u[:, 41:].amax(0) - u[:, 41:].amin(0)
        assert span.max() < math.pi  # no torsion's data is torn apart

    def test_errors(self):
        layer = build("alanine")
        for message, refuse, cuts in (
            (r"angles: expected shape \[F, 19\]", layer.fit_branch_cuts, torch.zeros(5, 3)),
            ("F >= 1", layer.fit_branch_cuts, torch.zeros(0, 19)),
            ("angles: expected finite", layer.fit_branch_cuts, torch.full((2, 19), math.nan)),
            ("cuts: expected shape", layer.set_branch_cuts, torch.zeros(3)),
            ("cuts: expected finite", layer.set_branch_cuts, torch.full((19,), math.inf)),
        ):
            with pytest.raises(ValueError, match=message):
                refuse(cuts)


class TestPose:
    def test_from_pose_and_pose(self):
        layer = build("tryptophan")
        u = random_u(layer, 6, seed=7)
        axes, translation = random_pose(6, 8)
        x = layer.from_pose(u, axes, translation)
        torch.testing.assert_close(layer.pose(x), (axes, translation))
        canonical, _ = layer.forward_and_log_det(u)
        torch.testing.assert_close(canonical @ axes.mT + translation[:, None], x)

    def test_place_keeps_the_pose_of_the_old_conformation(self):
        layer, x = build("alanine"), noisy("alanine", 6)
        placed = layer.place(random_u(layer, 6, seed=9), like=x)
        torch.testing.assert_close(layer.pose(placed), layer.pose(x))
        with pytest.raises(ValueError, match="one batch size, got 3, 2, 2"):
            layer.place(random_u(layer, 3, seed=9), like=x[:2])


class TestRegularised:
    def test_inside_it_is_the_map(self, metric):
        layer = build("proline", metric)
        u = random_u(layer, 16, seed=10).requires_grad_()
        x, penalty = layer.forward_regularised(u)
        torch.testing.assert_close(x, layer.forward_and_log_det(u)[0])
        (gradient,) = torch.autograd.grad(penalty.sum(), u)
        assert not penalty.any()
        assert not gradient.any()

    def test_anywhere_it_is_finite_and_its_gradient_points_outwards(self, metric):
        layer = build("proline", metric)
        generator = torch.Generator().manual_seed(11)
        u = 10 * torch.randn(64, layer.n_coordinates, generator=generator, dtype=torch.float64)
        u[0], u[1] = 0.0, 1.0
        u.requires_grad_()
        x, penalty = layer.forward_regularised(u)
        assert torch.isfinite(x).all()
        assert (penalty > 0).all()
        gradient = torch.autograd.grad(penalty.sum() + x.square().sum(), u, retain_graph=True)[0]
        assert torch.isfinite(gradient).all()
        (gradient,) = torch.autograd.grad(penalty.sum(), u)
        with torch.no_grad():
            assert (layer.regularise(u - 1e-4 * gradient)[1] < penalty).all()
        assert torch.isfinite(layer.log_abs_det(layer.regularise(u)[0])).all()

    def test_penalty_is_quadratic_in_the_violation(self):
        layer = build("alanine")
        inside = random_u(layer, 2, seed=12)
        scale = layer.reference_bonds[0] ** 3 / 3
        u = inside.repeat(2, 1)[:4]
        u[0, 0] = 0.1 * scale
        vertex = torch.as_tensor(layer.zmatrix.rows[2:, 1])
        planar = int((~torch.isin(vertex, layer.chirality.centres[:, 0])).nonzero()[0])
        u[1, 21 + planar] = -1.199
        u[2, 41] = layer.branch_cuts[0] - 0.5
        torsion = int((layer.kinds == 2).nonzero()[-1])
        u[3, torsion] = layer.branch_cuts[torsion - 41] + 2 * math.pi + 0.3
        expected = torch.tensor([0.04, 0.04, 0.25, 0.09], dtype=torch.float64)
        torch.testing.assert_close(layer.regularise(u)[1], expected)


class TestConfiguration:
    def test_config_and_state(self, metric):
        layer, x = build("tryptophan", metric), noisy("tryptophan", 5)
        layer.fit_branch_cuts(layer.bonds_angles_torsions(x)[2])
        again = InternalCoordinates.from_config(json.loads(json.dumps(layer.to_config())))
        assert again.names == layer.names
        assert again.metric == metric
        assert again.state_dict().keys() == layer.state_dict().keys()
        for key, value in layer.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        u, _ = layer.inverse_and_log_det(x)
        assert torch.equal(again.inverse_and_log_det(x)[0], u)
        assert torch.equal(again.forward_and_log_det(u)[0], layer.forward_and_log_det(u)[0])
        layer.set_branch_cuts(layer.branch_cuts + 0.1)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.branch_cuts, layer.branch_cuts)

    def test_attributes(self):
        layer = build("alanine")
        assert (layer.n_atoms, layer.n_coordinates) == (22, 60)
        assert layer.kinds.dtype == torch.int64
        assert layer.kinds.bincount().tolist() == [21, 20, 7, 12]
        assert len(set(layer.names)) == 60
        assert layer.is_constant_log_det
        assert not build("alanine", "polar").is_constant_log_det

    def test_single_precision(self):
        layer, x = build("alanine"), noisy("alanine", 8)
        u, _ = layer.inverse_and_log_det(x)
        expected, _ = layer.forward_and_log_det(u)
        layer.to(torch.float32)
        single, log_det = layer.forward_and_log_det(u.float())
        assert single.dtype == log_det.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)
        assert InternalCoordinates.from_config(layer.to_config()).dtype == torch.float32


class TestErrors:
    def test_inputs(self):
        layer = build("alanine")
        u, x = random_u(layer, 2, seed=1), noisy("alanine", 2)
        forward, inverse = layer.forward_and_log_det, layer.inverse_and_log_det
        for error, message, method, tensor in (
            (TypeError, r"u: expected dtype torch\.float64", forward, u.float()),
            (TypeError, r"x: expected a torch\.Tensor, got ndarray", inverse, x.numpy()),
            (ValueError, r"u: expected shape \[B, 60\], got \(60,\)", forward, u[0]),
            (ValueError, r"x: expected shape \[B, 22, 3\]", layer.is_mirror_image, x[:, :5]),
            (ValueError, "u: expected device cpu, got meta", layer.in_domain, u.to("meta")),
        ):
            with pytest.raises(error, match=message):
                method(tensor)
        with pytest.raises(ValueError, match="metric: expected one of volume, polar"):
            build("alanine", "plain")
        with pytest.raises(TypeError, match="dtype: expected"):
            build("alanine", dtype=torch.int64)

    def test_flat_centre(self):
        flat = np.array([[0, 0], [0.1, 0], [-0.02, 0.1], [-0.1, -0.01], [0.01, -0.1]])
        flat = np.pad(flat, ((0, 0), (0, 1)))
        flat[4] += 1e-4
        topology, positions = graph_molecule([(0, i) for i in range(1, 5)], flat, "CHHHH")
        with pytest.raises(ValueError, match=r"handedness, but .*MOL1-C0.*one plane"):
            InternalCoordinates.from_topology(topology, positions)
