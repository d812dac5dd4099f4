"""Linear groups: any angle of the reference up to 180 degrees is accepted, and nothing is lost."""

import json
import math

import numpy as np
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates, ZMatrix, bond_graph
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.target import PENALTY
from openmm_tsf.units import KB
from tests.coordinates.poses import rotation
from tests.support.molecules import graph_molecule
from tests.support.strained import LINEAR, dynamics, harmonic, linear


def noisy(positions: np.ndarray, n: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(n, *positions.shape, generator=generator, dtype=torch.float64)
    return torch.tensor(positions) + scale * noise


@pytest.mark.parametrize("name", LINEAR)
def test_the_reference_may_be_linear(name):
    topology, positions = linear(name)
    exact = InternalCoordinates.from_topology(topology, positions)
    frames = noisy(positions, 200, 0.005)
    u, log_det = exact.inverse_and_log_det(frames)
    assert (log_det == 0).all()
    torch.testing.assert_close(exact.place(u, like=frames), frames, rtol=0, atol=1e-10)
    # Whichever frame is the reference, the coordinates are the same.
    for frame in frames[:20].numpy():
        other = InternalCoordinates.from_topology(topology, frame)
        assert other.names == exact.names
    # At 180 degrees exactly: finite, inside, the same in every pose and call.
    turned = torch.tensor(positions)[None] @ rotation(*torch.tensor([0.3, 0.2, 1.0]).double()).T
    for x in (torch.tensor(positions)[None], turned):
        u, log_det = exact.inverse_and_log_det(x)
        assert float(log_det) == 0.0
        torch.testing.assert_close(exact.place(u, like=x), x, rtol=0, atol=1e-8)
        again = InternalCoordinates.from_topology(topology, x[0].numpy())
        torch.testing.assert_close(again.branch_cuts, exact.branch_cuts, rtol=0, atol=1e-6)
    assert torch.isfinite(exact.branch_cuts).all()


@pytest.mark.parametrize("name", ["butyne", "pentadiyne", "hydrazoic acid"])
def test_the_jacobian_is_constant(name):
    layer = InternalCoordinates.from_topology(*linear(name))
    frames = noisy(linear(name)[1], 3, 0.01)
    d = layer.n_coordinates

    def square(v: torch.Tensor) -> torch.Tensor:
        turn = rotation(*v[d : d + 3])
        return layer.from_pose(v[None, :d], turn[None], v[None, d + 3 :])[0].reshape(-1)

    for u in layer.inverse_and_log_det(frames)[0]:
        v = torch.cat((u, torch.tensor([0.7, -0.3, 2.0, 0.1, 0.2, 0.3], dtype=u.dtype)))
        jacobian = torch.autograd.functional.jacobian(square, v)
        assert abs(float(torch.linalg.slogdet(jacobian).logabsdet)) < 1e-7


def test_torsions_across_a_linear_group_start_beyond_it():
    zmatrix = ZMatrix.from_topology(*linear("butyne"))
    rows = zmatrix.rows[3:][~zmatrix.siblings[3:]].tolist()
    across = next(row for row in rows if row[1] in (0, 3) and row[0] > 3 and row[3] > 3)
    assert {across[1], across[2]} in ({0, 1}, {2, 3})  # a methyl group against the other


ALL_IN_LINE = {
    "acetylene": ("HCCH", 0.0),
    "acetylene, bent": ("HCCH", 0.02),
    "dicyanogen": ("NCCN", 0.0),
    "dicyanoacetylene": ("NCCCCN", 0.01),
}


@pytest.mark.parametrize("name", ALL_IN_LINE)
def test_molecules_in_one_line_are_refused_by_their_bonds(name):
    elements, bend = ALL_IN_LINE[name]
    n = len(elements)
    positions = np.array([[0.12 * i, bend * (i % 2), 0.0] for i in range(n)])
    molecule = graph_molecule([(i, i + 1) for i in range(n - 1)], positions, elements)
    with pytest.raises(ValueError, match=r"no linear angle at one atom.*MOL1-C.*without a flow"):
        InternalCoordinates.from_topology(*molecule)


BENT = {
    "carbons without hydrogens": ("CCCCC", [(0, 1), (1, 2), (2, 3), (3, 4)]),
    "imine": ("CNHHH", [(0, 1), (0, 2), (0, 3), (1, 4)]),
    "diazene": ("HNNH", [(0, 1), (1, 2), (2, 3)]),
    "peroxide": ("HOOH", [(0, 1), (1, 2), (2, 3)]),
}


@pytest.mark.parametrize("name", BENT)
def test_other_atoms_with_two_neighbours_are_not_linear(name):
    """Their Z-matrix starts torsions at the next atom, as always."""
    elements, bonds = BENT[name]
    positions = np.random.default_rng(1).normal(size=(len(elements), 3))
    topology, positions = graph_molecule(bonds, positions, elements)
    zmatrix = ZMatrix.from_topology(topology, positions)
    bonded = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    for row in zmatrix.rows[3:][~zmatrix.siblings[3:]].tolist():
        assert frozenset(row[2:]) in bonded


@pytest.mark.parametrize("seed", range(40))
def test_any_atoms_with_two_neighbours_may_be_linear(seed, monkeypatch):
    """Of random molecules with rings, at random: the map stays a bijection, with all partners."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 30))
    neighbours: list[set[int]] = [set() for _ in range(n)]

    def add_bond(i: int, j: int) -> None:
        neighbours[i].add(j)
        neighbours[j].add(i)

    for i in range(1, n):
        add_bond(i, int(rng.choice([k for k in range(max(0, i - 3), i) if len(neighbours[k]) < 4])))
    for i, j in rng.integers(n, size=(2, 2)).tolist():
        if i != j and max(len(neighbours[i]), len(neighbours[j])) < 4:
            add_bond(i, j)
    pairs = [i for i in range(n) if len(neighbours[i]) == 2]
    linear = frozenset(i for i in pairs if rng.random() < 0.6)
    monkeypatch.setattr(bond_graph, "find_linear_atoms", lambda *_: linear)
    bonds = [(i, j) for i in range(n) for j in neighbours[i] if i < j]
    layer = None
    while layer is None:
        molecule = graph_molecule(bonds, rng.normal(size=(n, 3)), "O" * n)
        try:
            layer = InternalCoordinates.from_topology(*molecule)
        except ValueError as error:
            if all(i in linear for i in range(n) if len(neighbours[i]) > 1):
                if "no linear angle at one atom" not in str(error):
                    raise
                return
            if "no linear angle" not in str(error):  # other atoms, by chance: other positions
                raise
    for _, atom, axis, partner in layer.zmatrix.rows[3:][~layer.zmatrix.siblings[3:]].tolist():
        line = {atom, axis}  # and the atoms in line with them
        while more := {j for i in line & linear for j in neighbours[i]} - line:
            line |= more
        assert axis not in linear or partner not in line
    x = torch.tensor(rng.normal(size=(4, n, 3)))
    u, log_det = layer.inverse_and_log_det(x)
    assert (log_det == 0).all()
    torch.testing.assert_close(layer.place(u, like=x), x, rtol=0, atol=1e-8)
    again = InternalCoordinates.from_config(json.loads(json.dumps(layer.to_config())))
    assert torch.equal(again.inverse_and_log_det(x)[0], u)


def test_a_flow_is_fitted_to_dynamics_of_a_linear_group():
    molecule = harmonic(linear("propyne"))
    frames = torch.tensor(dynamics(molecule, 600.0, 150))
    flow = TemperatureSteerableFlow.from_dataset(
        MDDataset(frames, 600.0, molecule), n_blocks=2, hidden=(8,)
    )
    momenta = torch.zeros(len(frames), flow.n_momenta, dtype=torch.float64)
    v, log_det = flow.inverse_and_log_det(frames, momenta)
    assert torch.isfinite(log_det).all()
    (x, _), _ = flow.forward_and_log_det(v)
    torch.testing.assert_close(flow.match_pose(x, like=frames), frames, rtol=0, atol=1e-8)
    sampled = flow.sample(200, 600.0, torch.Generator().manual_seed(1))
    assert math.isfinite(float(sampled.x[torch.isfinite(sampled.log_prob)].abs().max()))


@pytest.mark.parametrize("name", ["nitrile oxide", "butyne"])
def test_training_does_not_draw_flows_beyond_the_line(name):
    """Of the density that flows are trained towards, little is outside the domain."""
    molecule = harmonic(linear(name))
    layer = InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    (ideal,), _ = layer.inverse_and_log_det(torch.tensor(molecule.positions)[None])
    columns = ((layer.kinds == 1) & (ideal > 0.99)).nonzero().flatten().tolist()
    assert columns
    minus_cos = torch.linspace(0.9, 1.5, 2401, dtype=torch.float64)
    for column in columns:
        u = ideal.repeat(len(minus_cos), 1)
        u[:, column] = minus_cos
        x, penalty = layer.forward_regularised(u)
        energy = molecule.potential("openmm").energy(x)
        for kelvin in (300.0, 600.0):
            weight = torch.softmax(-energy / (KB * kelvin) - PENALTY * penalty, dim=0)
            assert float(weight[minus_cos > 1].sum()) < 0.2


def test_a_bent_group_that_is_linear_in_the_reference_alone():
    """Disiloxane: its bridge is bent, but little energy from linear."""
    sides = 0.13 * np.array([[0, 1, 0], [0, -0.5, 0.87], [0, -0.5, -0.87]])
    silicon = 0.16 * np.array([[-1.0, 0, 0], [1.0, 0, 0]])
    hydrogens = [atom * 1.3 + side for atom in silicon for side in sides]
    positions = np.array([[0.0, 0, 0], *silicon, *hydrogens])
    bonds = [(0, 1), (0, 2), *((1 + k // 3, 3 + k) for k in range(6))]
    elements = ["O", "Si", "Si", *"HHHHHH"]
    with pytest.raises(ValueError, match=r"180.00 degrees.*give a conformation in which it is"):
        InternalCoordinates.from_topology(*graph_molecule(bonds, positions, elements))
    positions[0, 1] += 0.001  # a degree
    InternalCoordinates.from_topology(*graph_molecule(bonds, positions, elements))
