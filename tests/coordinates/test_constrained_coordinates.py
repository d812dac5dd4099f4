"""Internal coordinates with constrained bonds: Jacobians against autograd, labels, files."""

import json

import numpy as np
import openmm.app as app
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.constraints import Constraints
from tests.coordinates.poses import rotation
from tests.support.molecules import alanine, capped, random_tree

MASSES = (12.011, 1.008, 14.007, 15.999, 1.008)


def constrained(name: str, kind: str, **options) -> tuple[InternalCoordinates, InternalCoordinates]:
    """Return coordinates with the bonds to hydrogen, or all bonds, constrained, and without."""
    makers = {
        "alanine": alanine,
        "proline": lambda: capped("PRO"),
        "tree": lambda: random_tree(9, 3),
    }
    topology, positions = makers[name]()
    bonds = [(first.index, second.index) for first, second in topology.bonds()]
    if kind == "HBonds":
        hydrogens = {a.index for a in topology.atoms() if a.element is app.element.hydrogen}
        bonds = [bond for bond in bonds if not hydrogens.isdisjoint(bond)]
    lengths = [1.01 * np.linalg.norm(positions[i] - positions[j]) for i, j in bonds]
    masses = [MASSES[index % len(MASSES)] for index in range(len(positions))]
    constraints = Constraints(bonds, lengths, masses)
    build = InternalCoordinates.from_topology
    metric = options.pop("metric", "volume")
    layer = build(topology, positions, metric, constraints=constraints, **options)
    return layer, build(topology, positions, metric)


CASES = [("alanine", "HBonds"), ("proline", "HBonds"), ("tree", "AllBonds")]


def free_rows(layer: InternalCoordinates) -> list[int]:
    """Return the rows of bonds that are not constrained."""
    fixed = {frozenset(pair) for pair in layer.constraints.pairs.tolist()}
    bonds = layer.zmatrix.rows[1:, :2].tolist()
    return [row for row, bond in enumerate(bonds) if frozenset(bond) not in fixed]


def random_u(layer: InternalCoordinates, batch: int) -> torch.Tensor:
    """Return coordinates near the reference's, which are in the domain."""
    generator = torch.Generator().manual_seed(3)
    u = torch.zeros(batch, layer.n_coordinates, dtype=torch.float64)
    n = len(layer.branch_cuts)
    noise = torch.rand(batch, n, generator=generator, dtype=torch.float64) - 0.5
    u[:, -n:] = layer.branch_cuts + np.pi + 0.3 * noise
    angles = layer.kinds == 1
    spread = torch.rand(batch, int(angles.sum()), generator=generator, dtype=torch.float64) - 0.5
    u[:, angles] = 0.4 + 0.2 * spread  # -cos(114 degrees)
    r = layer.reference_bonds[free_rows(layer)] * 1.02
    u[:, layer.kinds == 0] = r**3 / 3 if layer.metric == "volume" else r
    if layer.metric == "polar":
        u[:, angles] = torch.acos(-u[:, angles])
    return u


@pytest.mark.parametrize("metric", ["volume", "polar"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_log_det_equals_that_of_autograd(name, kind, metric):
    """ln|det d x / d(u, lengths, pose)| + 1/2 ln|Z|, with Z from the Jacobian of the distances."""
    rigid, free = constrained(name, kind, metric=metric)
    stiff, _ = constrained(name, kind, metric=metric, measure="stiff")
    constraints = rigid.constraints
    assert rigid.n_coordinates == free.n_coordinates - constraints.n_constraints
    assert len(rigid.names) == len(rigid.kinds) == rigid.n_coordinates
    assert set(rigid.names) < set(free.names)
    assert not rigid.is_constant_log_det
    assert stiff.is_constant_log_det == (metric == "volume")
    kept = torch.tensor([free.names.index(name) for name in rigid.names])
    u = random_u(rigid, 2)
    assert rigid.in_domain(u).all()
    x, log_det = rigid.forward_and_log_det(u)
    assert float(constraints.deviations(x).abs().max()) < 1e-15
    pairs = constraints.pairs
    row_of = {frozenset(b): row for row, b in enumerate(free.zmatrix.rows[1:, :2].tolist())}
    columns = torch.tensor([row_of[frozenset(pair)] for pair in pairs.tolist()])
    d, k = rigid.n_coordinates, len(pairs)

    def positions(v):
        full, r = torch.zeros(len(free.names), dtype=v.dtype), v[d : d + k]
        full = full.index_copy(0, kept, v[:d])
        full = full.index_copy(0, columns, r**3 / 3 if metric == "volume" else r)
        pose = v[d + k :]
        return free.from_pose(full[None], rotation(*pose[:3])[None], pose[None, 3:]).flatten()

    def distances(flat):
        x = flat.reshape(-1, 3)
        return (x[pairs[:, 0]] - x[pairs[:, 1]]).norm(dim=1)

    pose = torch.tensor([0.7, -0.3, 2.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    for point, conformation, value, other in zip(
        u, x, log_det, stiff.forward_and_log_det(u)[1], strict=True
    ):
        v = torch.cat([point, constraints.lengths, pose])
        jacobian = torch.func.jacfwd(positions)(v)
        volume = torch.linalg.slogdet(jacobian).logabsdet
        gradients = torch.func.jacrev(distances)(conformation.flatten())
        inverse_masses = constraints.inverse_masses.repeat_interleave(3)
        half = 0.5 * torch.linalg.slogdet((gradients * inverse_masses) @ gradients.T).logabsdet
        torch.testing.assert_close(other, volume, rtol=0, atol=1e-8)
        torch.testing.assert_close(value, volume + half, rtol=0, atol=1e-8)


@pytest.mark.parametrize("metric", ["volume", "polar"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_round_trip_pose_and_gradients(name, kind, metric):
    layer, _ = constrained(name, kind, metric=metric)
    u = random_u(layer, 4)
    x, log_det = layer.forward_and_log_det(u)
    back, inverse_log_det = layer.inverse_and_log_det(x)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)
    turned = x @ rotation(*torch.tensor([0.7, -0.3, 2.0], dtype=x.dtype)).T + 0.3
    placed = layer.place(u, like=turned)
    torch.testing.assert_close(placed, turned, rtol=0, atol=1e-12)
    clamped, penalty = layer.regularise(u)
    torch.testing.assert_close(clamped, u, rtol=1e-14, atol=0)
    assert float(penalty.max()) == 0.0
    if name == "tree":
        leaf = u[:2].clone().requires_grad_()
        assert torch.autograd.gradcheck(layer.forward_and_log_det, leaf)


def test_with_hydrogen_labels_and_after_saving():
    topology, _ = alanine()
    atoms = list(topology.atoms())
    triples = [
        tuple(a.index for a in atoms if (a.residue.index, a.name) in names)
        for names in ([(0, "H1"), (0, "H2"), (0, "H3")], [(1, "HB1"), (1, "HB2"), (1, "HB3")])
    ]
    layer, _ = constrained("alanine", "HBonds", equivalent=triples, overlap=True)
    assert len(layer.labelling) == 2
    u, _ = layer.inverse_and_log_det(layer.forward_and_log_det(random_u(layer, 4))[0])
    x, _ = layer.forward_and_log_det(u)
    shift = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 0]])
    relabelled = layer.relabel(x, shift)
    torch.testing.assert_close(layer.inverse_and_log_det(relabelled)[0], u, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.place(u, like=relabelled), relabelled, rtol=0, atol=1e-12)
    again = InternalCoordinates.from_config(json.loads(json.dumps(layer.to_config())))
    assert again.to_config() == layer.to_config()
    for one, two in zip(again.forward_and_log_det(u), layer.forward_and_log_det(u), strict=True):
        assert torch.equal(one, two)
    assert "constraints" not in constrained("alanine", "HBonds")[1].to_config()


def test_a_constraint_that_is_no_bond_of_the_coordinates_is_named():
    topology, positions = alanine()
    masses = [12.0] * len(positions)
    with pytest.raises(ValueError, match=r"constraints: expected bonds of the .*, got ACE1-H1 and"):
        InternalCoordinates.from_topology(
            topology, positions, constraints=Constraints([[0, 2]], [0.18], masses)
        )
    ring, places = capped("PRO")
    bonds = [(i.index, j.index) for i, j in ring.bonds()]
    every = Constraints(bonds, [0.15] * len(bonds), [12.0] * len(places))
    with pytest.raises(ValueError, match="closes a ring"):
        InternalCoordinates.from_topology(ring, places, constraints=every)


def test_a_constrained_bond_is_not_the_one_that_opens_a_ring():
    topology, positions = capped("PRO")
    free = InternalCoordinates.from_topology(topology, positions)
    rows = {frozenset(bond) for bond in free.zmatrix.rows[1:, :2].tolist()}
    bonds = [(i.index, j.index) for i, j in topology.bonds()]
    (closing,) = [bond for bond in bonds if frozenset(bond) not in rows]
    masses = [12.0] * len(positions)
    constraints = Constraints([closing], [0.15], masses)
    layer = InternalCoordinates.from_topology(topology, positions, constraints=constraints)
    assert layer.n_coordinates == free.n_coordinates - 1
