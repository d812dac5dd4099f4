"""The monitor: fabricated runs with one fault each, and a flow that proposes mirror images."""

import json
from itertools import pairwise

import mdtraj
import numpy as np
import pytest
import torch

from openmm_tsf.analysis import Reference, load_run
from openmm_tsf.analysis.frame_checks import (
    leak,
    mirrored,
    peptide_bonds,
    read_branches,
    signed_volumes,
    tetrahedral_centres,
)
from openmm_tsf.analysis.monitor import default_basins, monitor
from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.flows.serialization import FILE_FORMAT, write_flow_file
from openmm_tsf.sampling.kernels import (
    FlowIndependence,
    FlowWalk,
    PlainSwap,
    Scheduled,
    SequenceSettings,
    default_kernels,
)
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from tests.support.fabricate import (
    chain_positions,
    four_atoms,
    two_state_chains,
    write_frames,
    write_run,
)

TEMPERATURES = np.array([300.0, 424.26, 600.0])
N, W = 400, 8


def healthy_angles(rng, p=0.1):
    """φ and ψ [N, W, R] of chains that cross often, and true populations."""
    shape = (N, W, len(TEMPERATURES))
    positive = two_state_chains(rng, shape, p, 0.5)
    alpha = two_state_chains(rng, shape, 0.4, 0.5)
    phi = np.where(positive, 1.0, -1.5) + 0.2 * rng.normal(size=shape)
    psi = np.where(alpha, -0.7, 2.5) + 0.2 * rng.normal(size=shape)
    return phi, np.remainder(psi + np.pi, 2 * np.pi) - np.pi


def reference(rng, p=0.1):
    shape = (4000, 1, len(TEMPERATURES))
    phi = np.where(rng.random(shape) < p, 1.0, -1.5) + 0.2 * rng.normal(size=shape)
    psi = np.where(rng.random(shape) < 0.4, -0.7, 2.5) + 0.2 * rng.normal(size=shape)
    return Reference(TEMPERATURES, phi[:, 0], psi[:, 0], rng.normal(size=shape)[:, 0], 1.0)


def make_run(path, phi, psi, **options):
    energy = np.random.default_rng(9).normal(TEMPERATURES / 10, 8.0, phi.shape)
    write_run(path, TEMPERATURES, energy, {"phi": phi, "psi": psi}, **options)
    return load_run(path)


# ----------------------------------------------------------------------------- basins


def test_a_healthy_run_has_no_warnings(tmp_path):
    rng = np.random.default_rng(1)
    run = make_run(tmp_path / "run", *healthy_angles(rng))
    for known in (None, reference(rng)):
        found = monitor(run, known)
        assert found["warnings"] == []
        assert found["notes"] == []
    assert found["proposals"]["mirror_images"] == 2 * 4
    cold = found["basins"]["phi > 0"]["300.00"]
    assert abs(cold["p"] - 0.1) < 4 * cold["stderr"]
    assert cold["expected_from"] == "reference"
    assert cold["walkers"] == W
    # Two-state chains with memory rho: 2 p (1 - p) (1 - rho) changes a step.
    expected = 2 * 0.1 * 0.9 * 0.5 * (N - 1) * W
    assert abs(cold["crossings"] - expected) < 4 * np.sqrt(expected)
    shares = [found["basins"][name]["300.00"]["p"] for name in found["basins"]]
    assert sum(shares) == pytest.approx(1.0)
    summary = json.loads(json.dumps(run.summary(), allow_nan=False))
    assert summary["monitor"]["warnings"] == []
    assert summary["monitor"]["basins"].keys() == found["basins"].keys()


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_lost_basin(tmp_path, with_reference):
    rng = np.random.default_rng(2)
    phi, psi = healthy_angles(rng)
    phi[:, :, 0] = -np.abs(phi[:, :, 0])  # the coldest rung
    found = monitor(
        make_run(tmp_path / "run", phi, psi), reference(rng) if with_reference else None
    )
    (words,) = [w for w in found["warnings"] if "phi > 0" in w]
    assert words.startswith("300.00 K: the basin phi > 0 was never visited")
    assert ("reference" in words) == with_reference
    assert found["basins"]["phi > 0"]["300.00"]["walkers"] == 0


def test_a_basin_that_is_too_small(tmp_path):
    rng = np.random.default_rng(3)
    phi, psi = healthy_angles(rng, p=0.03)
    run = make_run(tmp_path / "run", phi, psi)
    words = monitor(run, reference(rng, p=0.1))["warnings"]
    assert len(words) == len(TEMPERATURES)
    assert all("phi > 0" in w and "being lost" in w for w in words)
    assert monitor(run)["warnings"] == []


def test_nothing_ever_crosses(tmp_path):
    rng = np.random.default_rng(4)
    phi, psi = healthy_angles(rng)
    sign = np.ones((1, W, 1))
    sign[0, 0] = -1  # one walker is always on the other side
    found = monitor(make_run(tmp_path / "run", -sign * np.abs(phi), psi))
    assert "all rungs: no replica ever entered or left the basin phi > 0; its populations are " \
        "those of the start" in found["warnings"]  # fmt: skip
    assert "300.00 K: the basin phi > 0 was visited by 1 of 8 walkers only" in found["warnings"]


def test_a_rung_that_lives_on_exchanges(tmp_path):
    """At 300 K every change of side comes with a change of replica."""
    rng = np.random.default_rng(5)
    phi, psi = healthy_angles(rng)
    replica = np.broadcast_to(np.arange(3), phi.shape).copy()
    crossed = np.zeros((N, W), dtype=bool)
    crossed[1:] = (phi[1:, :, 0] > 0) != (phi[:-1, :, 0] > 0)
    swapped = crossed.cumsum(axis=0) % 2 == 1
    replica[swapped] = [1, 0, 2]
    found = monitor(make_run(tmp_path / "run", phi, psi, replica=replica))
    assert found["basins"]["phi > 0"]["300.00"]["crossings"] == 0
    assert found["basins"]["phi > 0"]["600.00"]["crossings"] > 0
    assert any(
        w.startswith("300.00 K: the basin phi > 0: no replica entered or left it here")
        for w in found["warnings"]
    )


def test_basins_of_ones_own(tmp_path):
    run = make_run(tmp_path / "run", *healthy_angles(np.random.default_rng(6)))
    found = monitor(run, basins={"low psi": lambda angles: np.abs(angles["psi"]) < 2.0})
    assert found["basins"].keys() == {"low psi"}
    with pytest.raises(ValueError, match="basins: 'x': expected truth values of shape"):
        monitor(run, basins={"x": lambda angles: angles["psi"]})
    assert default_basins(["psi1", "phi2"]).keys() == {"phi2 > 0", "phi2 < 0"}
    assert len(default_basins(["phi3", "psi3", "phi4", "psi4"])) == 6
    assert default_basins([]) == {}


def test_before_the_first_segment_and_without_angles(tmp_path):
    write_run(tmp_path / "empty", [300.0], np.empty((0, 2, 1)))
    assert monitor(load_run(tmp_path / "empty"))["basins"] == {}
    write_run(tmp_path / "toy", [1.0, 2.0], np.random.default_rng(7).normal(size=(20, 2, 2)))
    found = monitor(load_run(tmp_path / "toy"))
    assert (found["basins"], found["cis_peptide_bonds"], found["warnings"]) == ({}, None, [])


# ----------------------------------------------------------------------------- branch cuts


def write_flow_of_chain(path, cut):
    """A flow file of four atoms in a row whose dihedral is cut there (rad)."""
    topology = four_atoms()
    atoms = list(topology.atoms)
    for first, second in pairwise(atoms):
        topology.add_bond(first, second)
    layer = InternalCoordinates.from_topology(topology.to_openmm(), chain_positions(1.0))
    layer.set_branch_cuts(torch.tensor([cut]))
    write_flow_file({"format": FILE_FORMAT, "kind": "tsf", "coordinates": layer.to_config()}, path)


def run_of_chain(path, angles, cut):
    """A run whose only dihedral has these values [n, W] at one rung."""
    positions = chain_positions(angles)[:, :, None]
    energy = np.random.default_rng(8).normal(size=(*angles.shape, 1))
    write_run(path, [300.0], energy, positions=positions)
    write_flow_of_chain(path / "flow.pt", cut)
    return monitor(load_run(path))


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (2.9, None),  # in the gap
        (0.4, "cut there"),  # on the flank of the peak
    ],
)
def test_where_a_branch_is_cut(tmp_path, cut, expected):
    angles = 0.3 * np.random.default_rng(10).normal(size=(300, 8))
    found = run_of_chain(tmp_path / "run", angles, cut)
    if expected is None:
        assert (found["warnings"], found["leaking_branches"]) == ([], [])
    else:
        (words,) = found["warnings"]
        assert expected in words
        (entry,) = found["leaking_branches"]
        assert entry["cut_degrees"] == pytest.approx(np.degrees(cut))
        assert entry["emptiest_density"] == 0.0


def test_samples_that_pile_up_at_a_wall(tmp_path):
    """All angles on one side of the cut, densest there: nothing passes."""
    angles = np.abs(0.5 * np.random.default_rng(11).normal(size=(300, 8)))
    found = run_of_chain(tmp_path / "run", angles, 0.0)
    assert "pile up at the cut" in found["warnings"][0]
    assert found["leaking_branches"][0]["frames_below"] == 0


def test_a_cut_with_no_better_place_is_a_note(tmp_path):
    """A free rotor is cut somewhere."""
    angles = np.random.default_rng(12).uniform(-np.pi, np.pi, (300, 8))
    found = run_of_chain(tmp_path / "run", angles, 1.0)
    assert found["warnings"] == []
    assert "nowhere much lower" in found["notes"][0]


def test_leak_of_a_density_that_is_known():
    """p = (1 + a cos x) / 2 pi, cut at its minimum: (1 - a)/(1 + a) of the peak, even sides."""
    rng = np.random.default_rng(13)
    x = rng.uniform(-np.pi, np.pi, (40_000, 8))
    kept = rng.random(x.shape) < 0.5 * (1 + 0.8 * np.cos(x))
    angles = np.stack([c[k][:15_000] for c, k in zip(x.T, kept.T, strict=True)], axis=1)
    found = leak(angles, np.pi)
    window = np.sinc(np.radians(5.0) / np.pi)  # mean of the cosine over 5 degrees at its extremum
    expected = (1 - 0.8 * window) / (1 + 0.8 * window)
    assert found.density == pytest.approx(expected, rel=0.15)
    assert abs(found.z) < 4


def test_dihedrals_of_the_file_are_those_of_the_layer(tmp_path, molecule):
    layer = InternalCoordinates.from_topology(
        molecule.topology, molecule.positions, equivalent=[[0, 2, 3]]
    )
    write_flow_file(
        {"format": FILE_FORMAT, "kind": "tsf", "coordinates": layer.to_config()},
        tmp_path / "flow.pt",
    )
    branches = read_branches(tmp_path / "flow.pt")
    x = molecule.positions + 0.01 * np.random.default_rng(14).normal(size=(5, 22, 3))
    ours = mdtraj.compute_dihedrals(
        mdtraj.Trajectory(x, molecule.mdtraj_topology), branches.atoms, periodic=False
    )
    theirs = layer.bonds_angles_torsions(torch.tensor(x))[2].numpy()
    names = [" ".join(name.split()[1:]) for name in layer.names[-19:]]
    columns = [names.index(name) for name in branches.names]
    assert len(columns) == 18  # all but the turning of one methyl group
    np.testing.assert_allclose(np.cos(ours - theirs[:, columns]), 1.0, atol=1e-8)
    np.testing.assert_allclose(branches.cuts, layer.branch_cuts[columns])


# ----------------------------------------------------------------------------- frames


def write_molecule_run(path, molecule, positions):
    """A run directory of alanine dipeptide with given frames [n, W, 2, 22, 3]."""
    energy = np.random.default_rng(15).normal(size=positions.shape[:3])
    write_run(path, [300.0, 600.0], energy)
    write_frames(path, [300.0, 600.0], positions, molecule.mdtraj_topology)
    return load_run(path)


def test_frames_turned_over_and_cis_bonds(tmp_path, molecule):
    rng = np.random.default_rng(16)
    shape = (5, 4, 2, molecule.n_atoms, 3)
    positions = molecule.positions + 0.003 * rng.normal(size=shape)
    found = monitor(write_molecule_run(tmp_path / "good", molecule, positions))
    assert found["warnings"] == []
    assert found["wrong_handedness"] == {"frames": {"300.00": 0, "600.00": 0}, "centres": []}
    assert found["cis_peptide_bonds"].keys() == {"ACE1-ALA2", "ALA2-NME3"}
    assert found["frames_checked"] == {"300.00": 20, "600.00": 20}

    turned = positions.copy()
    turned[2, 1, 1] *= [1, 1, -1]
    found = monitor(write_molecule_run(tmp_path / "turned", molecule, turned))
    assert found["wrong_handedness"]["frames"] == {"300.00": 0, "600.00": 1}
    assert {"ALA2-CA", "ALA2-CB"} <= set(found["wrong_handedness"]["centres"])
    assert found["warnings"] == [
        "600.00 K: 1 of 20 frames have another handedness than topology.pdb"
    ]

    names, quartets = peptide_bonds(molecule.mdtraj_topology)
    assert names == ("ACE1-ALA2", "ALA2-NME3")
    assert quartets.tolist() == [[1, 4, 6, 8], [8, 14, 16, 18]]
    swapped = positions.copy()  # where H and methyl carbon trade places, the bond is cis
    swapped[3:, :, 0, [17, 18]] = swapped[3:, :, 0, [18, 17]]
    found = monitor(write_molecule_run(tmp_path / "cis", molecule, swapped))
    assert found["cis_peptide_bonds"]["ALA2-NME3"] == {"300.00": 8, "600.00": 0}
    assert "300.00 K: the peptide bond ALA2-NME3 is cis in 8 of 20 frames" in " ".join(
        found["warnings"]
    )


def test_a_bent_centre_is_not_turned(molecule):
    """CA pushed through the plane of its three lowest neighbours: one of four triples flips."""
    topology, x = molecule.mdtraj_topology, np.asarray(molecule.positions)
    centres = tetrahedral_centres(topology, x)
    k = centres.names.index("ALA2-CA")
    centre, *lowest = centres.atoms[k, 0]
    bent = x.copy()
    normal = np.cross(x[lowest[1]] - x[lowest[0]], x[lowest[2]] - x[lowest[0]])
    normal *= np.sign(normal @ (x[centre] - x[lowest[0]])) / np.linalg.norm(normal)
    height = normal @ (x[centre] - x[lowest[0]])
    bent[centre] -= (height + 0.005) * normal
    flipped = signed_volumes(bent[None], centres.atoms[k])[0] * centres.signs[k] < 0
    assert flipped.tolist() == [True, False, False, False]
    frames = np.stack([x, bent, x * [1, 1, -1], bent * [1, 1, -1]])
    assert mirrored(frames, centres)[:, k].tolist() == [False, False, True, False]
    exchanged = x.copy()  # two neighbours trade places: the other handedness
    exchanged[lowest[:2]] = x[lowest[1::-1]]
    assert mirrored(exchanged[None], centres)[0, k]


def test_few_of_many_frames(tmp_path, molecule):
    positions = np.broadcast_to(molecule.positions, (30, 2, 2, molecule.n_atoms, 3))
    run = write_molecule_run(tmp_path / "run", molecule, positions)
    assert monitor(run, max_frames=20)["frames_checked"] == {"300.00": 20, "600.00": 20}


def test_frames_that_are_not_there(tmp_path, molecule):
    positions = np.broadcast_to(molecule.positions, (4, 2, 2, molecule.n_atoms, 3))
    run = write_molecule_run(tmp_path / "run", molecule, positions)
    (run.path / "T300.00K.dcd").unlink()
    with open(run.path / "T600.00K.dcd", "r+b") as file:  # its frames are not written yet
        file.truncate(276)
    found = monitor(run)
    assert found["frames_checked"] == {"300.00": 0, "600.00": 0}
    assert found["wrong_handedness"]["frames"] == {}


class Mirroring:
    """A flow that proposes the mirror image of every other draw, once it is told to.

    Everything else is the flow's own; the verdict on the mirror image is its coordinate layer's.
    """

    def __init__(self, flow):
        self.flow, self.mirroring, self.n_mirrored = flow, False, 0
        self.generator = torch.Generator().manual_seed(17)

    def __getattr__(self, name):
        return getattr(self.flow, name)

    def forward_and_log_det(self, v):
        (x, momenta), log_det = self.flow.forward_and_log_det(v)
        if self.mirroring:
            chosen = (torch.rand(len(x), generator=self.generator) < 0.5) & torch.isfinite(log_det)
            self.n_mirrored += int(chosen.sum())
            x = torch.where(chosen[:, None, None], x * x.new_tensor([1.0, 1.0, -1.0]), x)
            _, inverse_log_det = self.flow.coordinates.inverse_and_log_det(x)
            log_det = torch.where(chosen & torch.isinf(inverse_log_det), -torch.inf, log_det)
        return (x, momenta), log_det


def test_mirror_images_are_all_counted_and_none_is_taken(tmp_path, molecule):
    dataset = MDDataset.shipped(molecule, stride=40)
    flow = Mirroring(TemperatureSteerableFlow.from_dataset(dataset, n_blocks=2, hidden=(16,)))
    ladder, n_walkers, n_iterations = (300.0, 600.0), 4, 12

    def start_to_mirror(sampler, state):
        flow.mirroring = True

    start_to_mirror.interval = 1
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        once = {"round_trip_interval": 10**6}  # in the first iteration, which is not mirrored
        settings = SequenceSettings(
            n_flow_independent=0, n_flow_walk=0, swap="plain", local_interval=4, local_steps=5
        )
        kernels = default_kernels(potential, flow, ladder, molecule.masses, settings)
        walk = FlowWalk(flow, potential, ladder, 0.02, **once)
        independent = FlowIndependence(flow, potential, ladder, **once)
        kernels = [Scheduled(independent), Scheduled(walk, repeats=3), *kernels]
        assert isinstance(kernels[-1].kernel, PlainSwap)
        with ParallelTempering(
            molecule, flow, ladder, n_walkers, kernels, potential, seed=18
        ) as sampler:
            index = torch.arange(8) * len(dataset) // 8
            sampler.set_positions(dataset.positions[index].reshape(n_walkers, 2, -1, 3))
            sampler.reporters.append(start_to_mirror)
            sampler.run(n_iterations, tmp_path / "run", progress=False)
            totals = sampler.totals
    run = load_run(tmp_path / "run")
    assert flow.n_mirrored > 100
    assert run.segments.mirror_images == flow.n_mirrored
    assert totals["flow_walk"].accepted.min() > 10  # and the others are taken as before
    found = monitor(run, basins={})
    proposals = found["proposals"]
    assert proposals["mirror_images"] == flow.n_mirrored
    assert proposals["outside_domain"] == sum(info.outside_domain for info in totals.values())
    assert 0 <= proposals["outside_domain"] <= proposals["rejected_non_finite"]
    assert found["wrong_handedness"]["frames"] == {"300.00": 0, "600.00": 0}
    assert found["frames_checked"] == {"300.00": 48, "600.00": 48}
    centres = tetrahedral_centres(run.topology, molecule.positions)
    assert {"ACE1-CH3", "ALA2-CA", "ALA2-CB", "NME3-C"} == set(centres.names)
