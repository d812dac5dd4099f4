"""The monitor: fabricated runs with one fault each, and a flow that proposes mirror images."""

import json

import numpy as np
import pytest
import torch

from openmm_tsf.analysis import Reference, load_run
from openmm_tsf.analysis.frame_checks import tetrahedral_centres
from openmm_tsf.analysis.monitor import monitor
from openmm_tsf.flows import TemperatureSteerableFlow
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
from tests.support.analysis_runs import BETAS, GAP, TEMPERATURES, two_state_run
from tests.support.fabricate import two_state_chains, write_run

N, W = 400, 8
BASINS = {f"{phi}, {psi}" for phi in ("phi < 0", "phi > 0") for psi in ("psi alpha", "psi beta")}
PHI = {"phi > 0": lambda angles: angles["phi"] > 0}


def healthy_angles(rng, p=0.1, n=N, n_walkers=W):
    """φ and ψ [n, W, R] of chains that cross often."""
    shape = (n, n_walkers, len(TEMPERATURES))
    positive = two_state_chains(rng, shape, p, 0.5)
    alpha = two_state_chains(rng, shape, 0.4, 0.5)
    phi = np.where(positive, 1.0, -1.5) + 0.2 * rng.normal(size=shape)
    psi = np.where(alpha, -0.7, 2.5) + 0.2 * rng.normal(size=shape)
    return phi, np.remainder(psi + np.pi, 2 * np.pi) - np.pi


def reference(rng, p=0.1):
    phi, psi = healthy_angles(rng, p, n=8000, n_walkers=1)
    return Reference(TEMPERATURES, phi[:, 0], psi[:, 0], rng.normal(size=phi[:, 0].shape), 1.0)


def make_run(path, phi, psi, **options):
    energy = np.random.default_rng(9).normal(TEMPERATURES / 10, 8.0, phi.shape)
    return load_run(write_run(path, TEMPERATURES, energy, {"phi": phi, "psi": psi}, **options))


def test_a_healthy_run_has_no_warnings(tmp_path):
    rng = np.random.default_rng(1)
    run = make_run(tmp_path / "run", *healthy_angles(rng))
    for known in (None, reference(rng)):
        result = monitor(run, known)
        assert (result["warnings"], result["notes"]) == ([], [])
    assert result["proposals"]["mirror_images"] == 2 * 4
    assert result["basins"].keys() == BASINS
    cold = result["basins"]["phi > 0, psi alpha"]["300.00"]
    assert abs(cold["p"] - 0.04) < 4 * cold["stderr"]
    assert cold["low"] < cold["p"] < cold["high"]
    assert (cold["expected_from"], cold["walkers"]) == ("reference", W)
    # Two-state chains with memory 0.5: 1 is followed by 1 with the probability (1 + p) / 2.
    expected = 2 * 0.04 * (1 - 0.55 * 0.7) * (N - 1) * W
    assert abs(cold["crossings"] - expected) < 4 * np.sqrt(expected)
    populations = [result["basins"][name]["300.00"]["p"] for name in result["basins"]]
    assert sum(populations) == pytest.approx(1.0)
    summary = json.loads(json.dumps(run.summary(), allow_nan=False))
    assert summary["monitor"]["warnings"] == []
    assert summary["monitor"]["basins"].keys() == result["basins"].keys()


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_lost_basin(tmp_path, with_reference):
    rng = np.random.default_rng(2)
    phi, psi = healthy_angles(rng)
    phi[:, :, 0] = -np.abs(phi[:, :, 0])  # the coldest rung
    run = make_run(tmp_path / "run", phi, psi)
    result = monitor(run, reference(rng) if with_reference else None)
    words = [w for w in result["warnings"] if "phi > 0" in w]
    assert len(words) == len(result["warnings"]) == 2
    for name, text in zip(("phi > 0, psi alpha", "phi > 0, psi beta"), words, strict=True):
        assert text.startswith(f"300.00 K: the basin {name} was never visited")
        assert ("reference" in text) == with_reference
        cold = result["basins"][name]["300.00"]
        assert (cold["walkers"], cold["p"], cold["stderr"]) == (0, 0, None)
        assert 0 < cold["high"] < 0.01


def test_a_basin_that_is_too_small(tmp_path):
    rng = np.random.default_rng(3)
    phi, psi = healthy_angles(rng, p=0.03)
    run = make_run(tmp_path / "run", phi, psi)
    words = monitor(run, reference(rng, p=0.1))["warnings"]
    assert len(words) == 2 * len(TEMPERATURES)
    assert all("phi > 0" in w and "being lost" in w for w in words)
    assert monitor(run)["warnings"] == []


def test_a_rung_that_hardly_visits_a_basin_does_not_outweigh_the_others(tmp_path):
    """Its expected population is that of the other rungs alone: 0.119, and not its own."""
    rng = np.random.default_rng(4)
    energy, states = two_state_run(rng, n=300, n_walkers=16)
    states[:, :, 0] &= rng.random(states.shape[:2]) < 0.02
    energy[:, :, 0] = np.where(
        states[:, :, 0], energy[:, :, 0], rng.chisquare(5, energy.shape[:2]) / (2 * BETAS[0])
    )
    phi = np.where(states, 1.0, -1.0) + 0.1 * rng.normal(size=states.shape)
    run = load_run(write_run(tmp_path / "run", TEMPERATURES, energy, {"phi": phi}))
    cold = monitor(run)["basins"]["phi > 0"]["300.00"]
    assert cold["p"] < 0.01
    assert cold["expected_from"] == "the other rungs (MBAR)"
    exact = 1 / (1 + np.exp(BETAS[0] * GAP))
    assert abs(cold["expected_p"] - exact) < 4 * cold["expected_stderr"] < 0.05
    assert run.summary()["verdict"]["status"] == "wrong"


def test_nothing_ever_crosses(tmp_path):
    rng = np.random.default_rng(4)
    phi, psi = healthy_angles(rng)
    sign = np.ones((1, W, 1))
    sign[0, 0] = -1  # one walker is always on the other side
    result = monitor(make_run(tmp_path / "run", -sign * np.abs(phi), psi), basins=PHI)
    words = "all rungs: no replica ever entered or left the basin phi > 0"
    assert f"{words}; its populations are those of the start" in result["warnings"]
    assert "300.00 K: the basin phi > 0 was visited by only 1 of 8 walkers" in result["warnings"]
    cold = result["basins"]["phi > 0"]["300.00"]
    assert not cold["converged"]
    assert cold["low"] < 0.05
    assert cold["high"] > 0.3


def test_a_rung_populated_by_exchanges_only(tmp_path):
    """At 300 K every change of side comes with a change of replica."""
    rng = np.random.default_rng(5)
    phi, psi = healthy_angles(rng)
    replica = np.broadcast_to(np.arange(3), phi.shape).copy()
    replica[(phi[:, :, 0] > 0) != (phi[0, :, 0] > 0)] = [1, 0, 2]
    result = monitor(make_run(tmp_path / "run", phi, psi, replica=replica), basins=PHI)
    assert result["basins"]["phi > 0"]["300.00"]["crossings"] == 0
    assert result["basins"]["phi > 0"]["600.00"]["crossings"] > 0
    words = "300.00 K: the basin phi > 0: no replica entered or left it at this temperature"
    assert any(w.startswith(words) for w in result["warnings"])


def test_basins_of_the_user(tmp_path):
    run = make_run(tmp_path / "run", *healthy_angles(np.random.default_rng(6)))
    result = monitor(run, basins={"low psi": lambda angles: np.abs(angles["psi"]) < 2.0})
    assert result["basins"].keys() == {"low psi"}
    with pytest.raises(ValueError, match="basins: 'x': expected truth values of shape"):
        monitor(run, basins={"x": lambda angles: angles["psi"]})


def test_before_the_first_segment_and_without_angles(tmp_path):
    empty = write_run(tmp_path / "empty", [300.0], np.empty((0, 2, 1)))
    assert monitor(load_run(empty))["basins"] == {}
    energy = np.random.default_rng(7).normal(size=(20, 2, 2))
    result = monitor(load_run(write_run(tmp_path / "toy", [1.0, 2.0], energy)))
    assert (result["basins"], result["cis_peptide_bonds"], result["warnings"]) == ({}, None, [])


class Mirroring:
    """A flow that, once `mirroring` is set, proposes the mirror image of every other draw.

    The coordinate layer of the flow decides about the mirror image, as about any other.
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


def test_mirror_images_are_all_counted_and_none_is_accepted(tmp_path, molecule):
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
        arguments = (molecule, flow, ladder, n_walkers, kernels, potential)
        with ParallelTempering(*arguments, seed=18) as sampler:
            index = torch.arange(8) * len(dataset) // 8
            sampler.set_positions(dataset.positions[index].reshape(n_walkers, 2, -1, 3))
            sampler.reporters.append(start_to_mirror)
            sampler.run(n_iterations, tmp_path / "run", progress=False)
            totals = sampler.totals
    run = load_run(tmp_path / "run")
    assert flow.n_mirrored > 100
    assert totals["flow_walk"].accepted.min() > 10  # the others are accepted as before
    result = monitor(run, basins={})
    proposals = result["proposals"]
    assert proposals["mirror_images"] == run.segments.mirror_images == flow.n_mirrored
    assert proposals["outside_domain"] == sum(info.outside_domain for info in totals.values())
    assert 0 <= proposals["outside_domain"] <= proposals["rejected_non_finite"]
    assert result["wrong_handedness"]["frames"] == {"300.00": 0, "600.00": 0}
    assert result["frames_checked"] == {"300.00": 48, "600.00": 48}
    centres = tetrahedral_centres(run.topology, molecule.positions)
    assert {"ACE1-CH3", "ALA2-CA", "ALA2-CB", "NME3-C"} == set(centres.names)
