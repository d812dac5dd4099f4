"""Handedness of centres, also in small rings: the same in x and in u, and never by one triple."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.coordinates.geometry import wrap
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.systems.dataset import MDDataset
from tests.support.molecules import capped, graph_molecule
from tests.support.strained import RINGS, dynamics, harmonic, ring


def flipped_triples(layer: InternalCoordinates, x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Which triple products of bonds [F, C, 4] have the opposite sign, by numpy alone."""
    triples = np.array(
        [
            [[centre, *triple] for triple in combinations(neighbours, 3)]
            for centre, *neighbours in layer.chirality.centres.tolist()
        ]
    )

    def volumes(frames: np.ndarray) -> np.ndarray:
        bonds = frames[:, triples[..., 1:]] - frames[:, triples[..., :1]]
        return np.linalg.det(bonds)

    return volumes(x) * volumes(reference[None]) < 0


@pytest.mark.parametrize("name", RINGS)
def test_hot_conformations_are_proper_and_their_mirror_images_are_not(name):
    topology, positions = ring(name)
    layer = InternalCoordinates.from_topology(topology, positions)
    molecule = harmonic((topology, positions))
    frames = dynamics(molecule, 600.0, 200)
    flipped = flipped_triples(layer, frames, positions)
    assert not flipped.all(axis=-1).any()  # no centre is inverted
    if name in ("housane", "quadricyclane"):
        assert flipped.any(axis=(1, 2)).mean() > 0.1  # but single triples are
    x = torch.tensor(frames)
    assert not layer.is_mirror_image(x).any()
    assert layer.is_mirror_image(-x).all()
    assert (layer.chirality.similarity(x) > 0.3).all()
    # Whichever frame is the reference.
    hot = InternalCoordinates.from_topology(topology, frames[-1])
    assert not hot.is_mirror_image(x).any()
    assert hot.is_mirror_image(-x).all()
    layer.fit_branch_cuts(layer.bonds_angles_torsions(x)[2])
    u, log_det = layer.inverse_and_log_det(x)
    assert (log_det == 0).all()
    assert (layer.inverse_and_log_det(-x)[1] == -math.inf).all()
    assert not layer.regularise(u)[1].any()
    flow = TemperatureSteerableFlow.from_dataset(
        MDDataset(x, 600.0, molecule), n_blocks=1, hidden=(4,)
    )
    assert not flow.is_mirror_image(x).any()


@pytest.mark.parametrize("name", ["housane", "spiropentane", "proline"])
@pytest.mark.parametrize("metric", ["volume", "polar"])
def test_the_domain_is_the_same_in_x_and_in_u(name, metric):
    topology, positions = capped("PRO") if name == "proline" else ring(name)
    layer = InternalCoordinates.from_topology(topology, positions, metric)
    layer.set_branch_cuts(torch.full_like(layer.branch_cuts, -math.pi))
    generator = torch.Generator().manual_seed(1)
    shape = 3000, layer.n_atoms, 3
    x = torch.tensor(positions) + 0.06 * torch.randn(shape, generator=generator).double()
    u, log_det = layer.inverse_and_log_det(x)
    mirrored = layer.is_mirror_image(x)
    assert 0.02 < mirrored.double().mean() < 0.98
    assert torch.equal(torch.isfinite(log_det), ~mirrored)
    assert torch.equal(layer.in_domain(u), ~mirrored)
    # From u: reference coordinates with wide noise.
    start = layer.n_coordinates - len(layer.branch_cuts)
    reference, _ = layer.inverse_and_log_det(torch.tensor(positions)[None])
    u = reference.repeat(3000, 1)
    noise = torch.randn(u.shape, generator=generator, dtype=torch.float64)
    u[:, layer.kinds > 0] += 0.5 * noise[:, layer.kinds > 0]
    limits = (-0.99, 0.99) if metric == "volume" else (0.1, 3.0)
    u[:, layer.kinds == 1] = u[:, layer.kinds == 1].clamp(*limits)
    u[:, start:] = wrap(u[:, start:], layer.branch_cuts)
    x, log_det = layer.forward_and_log_det(u)
    mirrored = layer.is_mirror_image(x)
    assert 0.02 < mirrored.double().mean() < 0.98
    assert torch.equal(torch.isfinite(log_det), ~mirrored)
    assert torch.equal(layer.in_domain(u), ~mirrored)
    assert torch.equal(torch.isfinite(layer.inverse_and_log_det(x)[1]), ~mirrored)
    assert torch.equal(layer.forward_regularised(u)[1] > 0, mirrored)


def test_a_centre_without_siblings_in_the_z_matrix_is_judged_as_well():
    """Carbon 0 of spiropentane: two of its four bonds close rings or are the root's."""
    topology, positions = ring("spiropentane")
    layer = InternalCoordinates.from_topology(topology, positions)
    assert layer.chirality.centres[:, 0].tolist() == [0, 1, 2, 3, 4]
    x = torch.tensor(positions)[None].repeat(5, 1, 1)
    similarity = layer.chirality.similarity(x)
    torch.testing.assert_close(similarity, torch.ones_like(similarity))
    torch.testing.assert_close(layer.chirality.similarity(-x), -similarity)


def test_the_penalty_grows_beyond_the_domain_and_leads_back():
    layer = InternalCoordinates.from_topology(*ring("housane"))
    generator = torch.Generator().manual_seed(3)
    positions = torch.tensor(ring("housane")[1])
    x = positions + 0.07 * torch.randn(400, *positions.shape, generator=generator).double()
    x = x[layer.is_mirror_image(x)].requires_grad_()
    penalty = layer.chirality.penalty(x)
    assert len(x) > 100
    assert (penalty > 0).all()
    assert (penalty < 20).all()
    (gradient,) = torch.autograd.grad(penalty.sum(), x)
    assert torch.isfinite(gradient).all()
    with torch.no_grad():
        assert (layer.chirality.penalty(x - 1e-7 * gradient) < penalty).all()
    # Of a mirror image about 1, whatever the scale.
    for scale in (0.5, 1.0, 3.0):
        image = layer.chirality.penalty(-scale * positions[None]) / len(layer.chirality)
        assert 0.3 < float(image) < 1.1


@pytest.mark.parametrize("shape", ["planar", "a bond at right angles to a plane of three"])
def test_only_centres_without_any_volume_are_refused(shape):
    planar = np.array([[0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [-0.1, 0, 0], [0, -0.1, 0.001]])
    umbrella = np.array([[0, 0, 0], [0.1, 0, 0], [-0.05, 0.09, 0], [-0.05, -0.09, 0], [0, 0, 0.1]])
    positions = planar if shape == "planar" else umbrella
    molecule = graph_molecule([(0, i) for i in range(1, 5)], positions, "CHHHH")
    if shape == "planar":
        with pytest.raises(ValueError, match="MOL1-C0 and its four neighbours lie in one plane"):
            InternalCoordinates.from_topology(*molecule)
    else:  # one of its triples is flat
        layer = InternalCoordinates.from_topology(*molecule)
        assert layer.is_mirror_image(-torch.tensor(positions)[None]).all()
