"""A run beside a reference: distances with exact answers, their floors, mutants, bad input."""

import itertools
import json
import math

import mdtraj
import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis import tica
from openmm_tsf.analysis.certify_samples import Samples
from openmm_tsf.analysis.compare_distances import DistanceMeter, split_halves
from openmm_tsf.analysis.compare_ensembles import compare
from openmm_tsf.analysis.compare_flow import measure_flow
from openmm_tsf.analysis.compare_report import describe_comparison
from openmm_tsf.analysis.compare_verdict import compare_states
from openmm_tsf.analysis.transport import (
    energy_wasserstein,
    euclidean_wasserstein,
    torus_wasserstein,
)
from openmm_tsf.cli.main import main
from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.units import KB
from tests.support.analysis_runs import angles_of_two_basins
from tests.support.fabricate import chain_positions, write_run

KELVINS = [300.0, 600.0]
OPTIONS = {"n_samples": 150, "n_splits": 2, "tica": False}


def samples(rng, n, n_walkers, p=0.3):
    """Energies and torsions [n, W, R] of two basins, the names of a single residue."""
    shape = (n, n_walkers, len(KELVINS))
    phi, psi = angles_of_two_basins(rng, shape, p)
    return rng.normal(-50.0, 8.0, shape), {"phi": phi, "psi": psi}


def write_reference(path, energy, angles, **arrays):
    content = {"temperatures_K": np.array(KELVINS), "energy": energy, **angles, **arrays}
    np.savez_compressed(path, **content)
    return path


@pytest.fixture
def reference(tmp_path):
    rng = np.random.default_rng(1)
    return write_reference(tmp_path / "reference.npz", *samples(rng, 2000, 16), n_md_steps=10**6)


@pytest.mark.parametrize("distance", [torus_wasserstein, euclidean_wasserstein])
def test_a_shifted_sample_is_as_far_as_its_shift(distance):
    rng = np.random.default_rng(2)
    points = 0.3 * rng.normal(size=(200, 3))
    shift = np.array([0.2, -0.1, 0.3])
    moved = rng.permutation(points + shift)
    assert distance(points, moved) == pytest.approx(np.linalg.norm(shift), rel=1e-9)
    if distance is torus_wasserstein:  # also across the branch cut, by any number of turns
        turned = (points + np.pi) + 2 * np.pi * rng.integers(-1, 2, points.shape)
        assert distance(turned, moved + np.pi) == pytest.approx(np.linalg.norm(shift), rel=1e-9)


def test_distances_of_gaussians_are_the_closed_form():
    """W2² = (difference of means)² + (difference of standard deviations)²."""
    rng = np.random.default_rng(3)
    values = [
        energy_wasserstein(rng.normal(0.0, 1.0, 4000), rng.normal(1.0, 2.0, 4000))
        for _ in range(40)
    ]
    stderr = np.std(values) / math.sqrt(len(values))
    # The bias of an empirical W2 is far below the tolerance at this distance.
    assert abs(np.mean(values) - math.sqrt(2.0)) < 4 * stderr + 2e-3


def test_the_assignment_is_the_best_of_all():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(-np.pi, np.pi, (2, 6, 2))
    difference = np.abs(a[:, None] - b[None])
    cost = (np.minimum(difference, 2 * np.pi - difference) ** 2).sum(axis=-1)
    best = min(
        np.mean([cost[i, j] for i, j in enumerate(order)])
        for order in itertools.permutations(range(6))
    )
    assert torus_wasserstein(a, b) == pytest.approx(math.sqrt(best), rel=1e-12)


@pytest.mark.parametrize("second", [[1.0, 2.0], [1.0, np.nan, 2.0], [[1.0, 2.0, 3.0]]])
def test_samples_that_do_not_go_together_are_refused(second):
    with pytest.raises(ValueError, match="first, second: expected"):
        energy_wasserstein([1.0, 2.0, 3.0], second)


@pytest.mark.parametrize(("n", "n_walkers"), [(50, 16), (50, 9), (64, 1), (65, 3)])
def test_halves_are_of_different_walkers_or_blocks(n, n_walkers):
    halves = split_halves((n, n_walkers), 3, np.random.default_rng(5))
    assert len({tuple(first) for first, _ in halves}) > 1
    for first, second in halves:
        assert not set(first) & set(second)
        if n_walkers >= 8:
            assert not set(first % n_walkers) & set(second % n_walkers)
        else:  # blocks: within each half most samples follow each other in time
            time = first.reshape(-1, 1) // n_walkers
            assert len(first) > 0.4 * n * n_walkers
            assert np.unique(time).size > 0.3 * n
    with pytest.raises(ValueError, match="expected at least 2 samples"):
        split_halves((1, 1), 1, np.random.default_rng(5))


def test_a_run_that_is_one_half_of_the_reference_scores_the_floor(tmp_path):
    """Exactly: with all samples, and the division into even and odd walkers."""
    rng = np.random.default_rng(6)
    energy, angles = samples(rng, 400, 16)
    path = write_reference(tmp_path / "reference.npz", energy, angles)
    odd = {name: values[:, 1::2] for name, values in angles.items()}
    run = write_run(tmp_path / "run", KELVINS, energy[:, 1::2], odd)
    meter = DistanceMeter((400, 8), (400, 16), 1, rng)
    for half, whole in ((energy[:, 1::2], energy), (odd["phi"], angles["phi"])):
        first, second = half[..., 0].ravel(), whole[..., 0].ravel()
        distance = meter.points(1e9, first, second, energy_wasserstein)
        assert distance.n_samples == 400 * 8
        assert distance.value == pytest.approx(distance.floor, rel=1e-12)
        assert distance.value > 0
    entry = compare(run, path, n_samples=100, n_splits=1, tica=False)["at"]["300.00"]
    # Of decorrelated frames, drawn at random.
    distance = entry["ramachandran"][""]["total_variation"]
    assert distance["value"] == pytest.approx(distance["floor"], rel=0.1)


def test_an_exact_run_agrees(tmp_path, reference):
    rng = np.random.default_rng(7)
    run = write_run(tmp_path / "run", KELVINS, *samples(rng, 1500, 16))
    result = compare(run, reference, **OPTIONS)
    assert result["verdict"]["status"] == "converged"
    assert result["verdict"]["agrees_with"] == ["the reference"]
    assert result["costs"]["reference"]["energy_evaluations"]["all"] == 10**6
    z = []
    for entry in result["at"].values():
        assert entry["halves"] == "walkers"
        for name in ("energy_w2_kT", "torus_w2_rad"):
            assert 0.4 < entry[name]["ratio"] < 2.0
        assert entry["ramachandran"][""]["total_variation"]["ratio"] == pytest.approx(1.0, abs=0.1)
        z += [quantity["z"] for quantity in entry["quantities"].values()]
    assert len(z) == 2 * 5  # mean energy and four basins
    assert max(map(abs, z)) < 4
    again = compare(run, reference, **OPTIONS)
    assert again == result  # the same seed


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_missing_or_depleted_basin_is_seen(tmp_path, reference, p):
    rng = np.random.default_rng(8)
    run = write_run(tmp_path / "run", KELVINS, *samples(rng, 1500, 16, p=p))
    result = compare(run, reference, **OPTIONS)
    assert result["verdict"]["status"] == "wrong"
    assert any("P(phi > 0" in words for words in result["verdict"]["wrong"])
    entry = result["at"]["300.00"]
    if p == 0.0:
        assert entry["torus_w2_rad"]["value"] > 2 * entry["torus_w2_rad"]["floor_high"]
        assert any("Ramachandran distance" in words for words in result["verdict"]["wrong"])
    assert abs(entry["quantities"]["energy_kJ_mol"]["z"]) < 4


def test_a_run_of_another_temperature_is_seen_in_its_energies(tmp_path, reference):
    rng = np.random.default_rng(9)
    energy, angles = samples(rng, 600, 16)
    run = write_run(tmp_path / "run", KELVINS, energy + 3.0, angles)
    result = compare(run, reference, **OPTIONS)
    assert any("<U> differs" in words for words in result["verdict"]["wrong"])
    entry = result["at"]["300.00"]
    assert entry["energy_w2_kJ_mol"]["value"] > 1.5 * entry["energy_w2_kJ_mol"]["floor"]
    kt = KB * 300.0
    assert entry["energy_w2_kT"]["value"] * kt == pytest.approx(entry["energy_w2_kJ_mol"]["value"])


def test_a_short_run_is_not_judged(tmp_path, reference):
    run = write_run(tmp_path / "run", KELVINS, *samples(np.random.default_rng(10), 12, 2))
    verdict = compare(run, reference, **OPTIONS)["verdict"]
    assert (verdict["status"], verdict["wrong"]) == ("not yet", [])
    assert any("a longer run would decide" in words for words in verdict["undecided"])


@pytest.mark.parametrize(("n", "n_walkers"), [(3, 1), (10, 2)])
def test_a_short_reference_decides_nothing(tmp_path, n, n_walkers):
    """Neither that a right run is wrong nor that it agrees."""
    rng = np.random.default_rng(16)
    run = write_run(tmp_path / "run", KELVINS, *samples(rng, 1500, 16))
    path = write_reference(tmp_path / "short.npz", *samples(rng, n, n_walkers))
    result = compare(run, path, **OPTIONS)
    verdict = result["verdict"]
    assert (verdict["status"], verdict["wrong"]) == ("not yet", [])
    of_reference = [words for words in verdict["undecided"] if "of the reference:" in words]
    assert all(words.endswith("a longer reference would decide") for words in of_reference)
    assert any("Ramachandran plot" in words for words in of_reference)
    assert {q["z"] for entry in result["at"].values() for q in entry["quantities"].values()} == {
        None
    }
    describe_comparison(result)


@pytest.mark.parametrize("p", [(0.3, 0.0), (0.0, 0.3)])
def test_a_difference_is_as_sure_whichever_side_lacks_the_state(p):
    rng = np.random.default_rng(17)
    sides = [rng.random((500, 16)) < each for each in p]
    entry = compare_states(*sides, [8000.0, 8000.0])
    assert entry["z"] * (1 if p[0] else -1) > 5
    swapped = compare_states(*sides[::-1], [8000.0, 8000.0])
    assert swapped["z"] == pytest.approx(-entry["z"], rel=1e-12)
    assert math.isnan(compare_states(*sides, [8000.0, 16.0] if p[0] else [16.0, 8000.0])["z"])


def test_a_single_frame_has_a_page(tmp_path, reference):
    run = write_run(tmp_path / "run", KELVINS, *samples(np.random.default_rng(18), 1, 1))
    result = compare(run, reference, **OPTIONS)
    assert result["verdict"]["status"] == "not yet"
    assert "independent samples" in describe_comparison(result)


def test_other_systems_and_other_atoms(tmp_path):
    """Fingerprints that differ in labels of hydrogens alone are of one System."""
    rng = np.random.default_rng(19)
    energy, angles = samples(rng, 40, 8)
    prints = {"run": "a" * 64, "labels": "a" * 48 + "b" * 16, "field": "c" * 64}
    sides = {
        name: write_run(tmp_path / name, KELVINS, energy, angles, choices={"molecule": each})
        for name, each in prints.items()
    }
    one = compare(sides["run"], sides["labels"], **OPTIONS)
    assert one["at"]["300.00"]["energy_w2_kT"] is not None
    two = compare(sides["run"], sides["field"], **OPTIONS)
    assert two["at"]["300.00"]["energy_w2_kT"] is None
    assert "energy_kJ_mol" not in two["at"]["300.00"]["quantities"]
    assert any("Systems of run and reference differ" in note for note in two["notes"])
    with pytest.raises(ValueError, match="flow: expected one System on both sides"):
        compare(sides["run"], sides["field"], flow=tmp_path / "flow.pt", **OPTIONS)
    config = json.loads((sides["field"] / "config.json").read_text())
    config["dihedrals"]["phi"] = [7, 2, 1, 4]
    (sides["field"] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"reference: expected phi of the run's atoms .*7, 2, 1"):
        compare(sides["run"], sides["field"], **OPTIONS)


def test_tica_of_the_slow_torsion(tmp_path, reference):
    pytest.importorskip("deeptime")
    rng = np.random.default_rng(11)
    slow = np.repeat(rng.normal(size=(60, 4)), 50, axis=0)
    series = np.stack([rng.normal(size=slow.shape), slow, rng.normal(size=slow.shape)], axis=-1)
    project, lag = tica.fit_tica(series)
    assert 15 < lag < 35  # g is 50 frames
    assert tica.fit_tica(series[:100])[1] <= 10
    plane = project(series.reshape(-1, 3))
    assert plane.shape == (12000, 2)
    assert abs(np.corrcoef(plane[:, 0], slow.ravel())[0, 1]) > 0.95
    with pytest.raises(ValueError, match="at least 2 frames"):
        tica.fit_tica(series[:1])
    with pytest.raises(ValueError, match="expected different frames for TICA"):
        tica.fit_tica(np.ones((5, 2, 3)))
    run = write_run(tmp_path / "run", KELVINS, *samples(rng, 300, 16, p=0.0))
    lacking = compare(run, reference, n_samples=100, tica=True)["at"]["300.00"]["tica_w2"]
    assert lacking["features"] == "sine and cosine of phi, psi"
    assert lacking["distance"]["ratio"] > 3


def test_without_deeptime_the_error_names_the_extra(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(tica, "find_spec", lambda name: None)
    run = write_run(tmp_path / "run", KELVINS, *samples(np.random.default_rng(12), 200, 16))
    with pytest.raises(ImportError, match=r"pip install 'openmm-tsf\[tica\]'"):
        compare(run, reference, n_samples=50, tica=True)
    result = compare(run, reference, n_samples=50)
    assert result["at"]["300.00"]["tica_w2"] is None
    assert any("openmm-tsf[tica]" in note for note in result["notes"])


def test_bad_sides_are_refused(tmp_path, reference):
    rng = np.random.default_rng(13)
    energy, angles = samples(rng, 50, 8)
    run = write_run(tmp_path / "run", KELVINS, energy, angles)
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz", phi=np.zeros(3))
    np.savez(tmp_path / "shape.npz", temperatures_K=[300.0], energy=np.zeros((5, 4, 2)))
    other = {name: values for name, values in angles.items()}
    np.savez(tmp_path / "hot.npz", temperatures_K=[350.0, 700.0], energy=energy, **other)
    np.savez(tmp_path / "chi.npz", temperatures_K=KELVINS, energy=energy, chi1=angles["phi"])
    lacking = {**angles, "phi": np.where(angles["phi"] > 0, np.nan, angles["phi"])}
    np.savez(tmp_path / "nan.npz", temperatures_K=KELVINS, energy=energy, **lacking)
    np.savez(tmp_path / "words.npz", temperatures_K=["a", "b"], energy=energy)
    np.savez(tmp_path / "twice.npz", temperatures_K=[300.0, 300.0], energy=energy, **angles)
    np.savez(tmp_path / "none.npz", temperatures_K=KELVINS, energy=energy[:0])
    for name, message in (
        ("text.npz", "reference: .*cannot be read as reference data"),
        ("empty.npz", "reference: .*got no 'energy'"),
        ("shape.npz", r"reference: .*expected energies \[F, W, 1\]"),
        ("hot.npz", r"expected a temperature of the run \(300.00, 600.00 K\), got 350.00, 700.00"),
        ("chi.npz", r"expected torsions of the run \(phi, psi\), got chi1"),
        ("nan.npz", "reference: .*: phi: expected finite numbers"),
        ("words.npz", "reference: .*: temperatures_K: expected finite numbers"),
        ("twice.npz", "expected positive temperatures in K, each once, got 300, 300"),
        ("none.npz", r"expected energies \[F, W, 2\] .* got shape \(0, 8, 2\)"),
        ("nothing.dcd", "expected a run directory or a file .npz .* does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(run, tmp_path / name, **OPTIONS)
    with pytest.raises(TypeError, match="run: expected a run directory"):
        compare(7, reference)
    with pytest.raises(ValueError, match="n_samples: expected"):
        compare(run, reference, n_samples=1)
    with pytest.raises(ValueError, match="walkers: those of trajectory files"):
        compare(run, reference, walkers=8)
    with pytest.raises(ValueError, match="molecule: expected the MolecularSystem of the traj"):
        compare(run, {300: np.zeros((5, 4, 3))})
    with pytest.raises(FileExistsError, match="export: expected a new or empty folder"):
        compare(run, reference, export=run)


def test_frames_are_exported_and_weighed_by_their_temperature(tmp_path):
    rng = np.random.default_rng(14)
    shape = (30, 8, 2)
    energy, phi = rng.normal(size=shape), rng.uniform(-np.pi, np.pi, shape)
    x = chain_positions(phi)
    sides = [
        write_run(tmp_path / name, KELVINS, energy + k, {"phi": phi, "psi": phi}, positions=x)
        for k, name in enumerate(("run", "reference"))
    ]
    compare(*sides, n_samples=20, tica=False, export=tmp_path / "out")
    folder = tmp_path / "out" / "600.00K"
    names = {path.stem for path in folder.iterdir()}
    kinds = ("samples", "samples_energies", "samples_target_log_prob")
    assert names == {f"{side}_{kind}" for side in ("pred", "true") for kind in kinds}
    read = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}
    assert read["pred_samples"].dtype == np.float32
    np.testing.assert_allclose(read["pred_samples"], x[:, :, 1].reshape(240, 12), atol=1e-6)
    np.testing.assert_allclose(
        read["true_samples_energies"], energy[:, :, 1].ravel() + 1, rtol=1e-6
    )
    expected = -read["pred_samples_energies"] / (KB * 600.0)
    np.testing.assert_allclose(read["pred_samples_target_log_prob"], expected)
    assert mdtraj.load(tmp_path / "out" / "topology.pdb").n_atoms == 4


class DensityOf(Potential):
    """The potential whose Boltzmann distribution at one temperature is that of a flow."""

    boltzmann_constant, event_shape = KB, (2,)

    def __init__(self, flow, kelvin):
        self.flow, self.kelvin = flow, kelvin

    def energy(self, x):
        log_q = self.flow.log_prob(x, x.new_zeros(len(x), 0), self.kelvin)
        return -KB * self.kelvin * log_q

    def energy_and_forces(self, x):
        raise NotImplementedError


def test_a_flow_of_the_target_has_full_sample_sizes_and_its_entropy():
    kelvin = 300.0
    flow = RealNVPFlow(2, 0, 2, (8,), reference_temperature=600.0, seed=1).double()
    potential, generator = DensityOf(flow, kelvin), torch.Generator().manual_seed(1)
    x, _, log_q = flow.sample(4000, kelvin, generator)
    energy = -KB * kelvin * log_q.detach().numpy().reshape(500, 8)
    frames = Samples(kelvin, x.numpy().astype(np.float32).reshape(500, 8, 2), energy, ())
    result = measure_flow(flow, potential, frames, np.random.default_rng(1))
    assert result["reverse_ess"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert result["forward_ess"]["value"] == pytest.approx(1.0, abs=1e-6)
    assert result["eubo"]["value"] == pytest.approx(0.0, abs=1e-5)  # ln Z of a normalised density
    assert result["nll"]["value"] == pytest.approx(-float(log_q.mean()), abs=1e-5)
    assert result["outside"] == 0.0


def test_the_command_prints_the_page_and_returns_the_verdict(tmp_path, reference, capsys):
    rng = np.random.default_rng(15)
    run = write_run(tmp_path / "run", KELVINS, *samples(rng, 400, 16, p=0.0))
    given = ["compare", str(run), str(reference), "--samples", "50", "--no-tica", "--quiet"]
    assert main([*given, "--output", str(tmp_path / "compared.json")]) == 4
    page = capsys.readouterr().out
    assert page.startswith("wrong: ")
    for words in ("torus W2 (rad)", "floor: the same of two halves", "total variation of phi, psi"):
        assert words in page
    content = json.loads((tmp_path / "compared.json").read_text())
    assert content["verdict"]["status"] == "wrong"
    assert main([*given, "--output", str(tmp_path / "compared.json")]) == 2
    assert main([*given, "--temperature", "300"]) == 2
    assert "--temperature: it is that of trajectories" in capsys.readouterr().err
    assert main([*given, "--measure", "stiff"]) == 2
    assert "--measure: expected a molecule with constraints" in capsys.readouterr().err


def test_frames_of_another_molecule_are_refused(tmp_path, molecule):
    frames = tsf.MDDataset.shipped(molecule, stride=400).positions[:40].numpy()
    rng = np.random.default_rng(20)
    energy, angles = samples(rng, 40, 8)
    path = write_reference(
        tmp_path / "other.npz", energy, angles, positions_600K=np.zeros((20, 42, 3))
    )
    with pytest.raises(ValueError, match=r"positions of the run's molecule, \[..., 22, 3\], got"):
        compare({600: frames}, path, molecule=molecule, **OPTIONS)
    path = write_reference(tmp_path / "none.npz", energy, angles)
    result = compare({600: frames}, path, molecule=molecule, export=tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "600.00K" / "pred_samples.npy").is_file()
    assert result["verdict"]["status"] == "not yet"
    other = tsf.systems.capped_peptide("G", "amber14-all.xml")
    x = np.repeat(other.positions[None], 5, axis=0)
    run = write_run(
        tmp_path / "run", [600.0], energy[:, :, :1], {k: v[..., :1] for k, v in angles.items()},
        positions=chain_positions(angles["phi"][..., :1]),
    )  # fmt: skip
    for sides in ((run, {600: x}), ({600: x}, run)):
        with pytest.raises(ValueError, match=r"expected the atoms of the \w+ \(\d+ of them\)"):
            compare(*sides, molecule=other, **OPTIONS)


def test_trajectories_are_compared_with_a_run_of_the_molecule(tmp_path, molecule):
    """The frames of each walker, given as arrays or interleaved in one file."""
    frames = tsf.MDDataset.shipped(molecule, stride=100).positions[:160].numpy()
    mdtraj.Trajectory(frames, molecule.mdtraj_topology).save_dcd(str(tmp_path / "md.dcd"))
    sizes = {"molecule": molecule, "n_samples": 40, "n_splits": 1, "tica": False}
    given = {600: frames.reshape(20, 8, 22, 3)}
    result = compare({600: tmp_path / "md.dcd"}, given, walkers=8, **sizes)
    entry = result["at"]["600.00"]
    assert entry["halves"] == "walkers"
    # The file has the same frames but for their last digits: it is in angstrom.
    means = (entry["quantities"]["energy_kJ_mol"][side]["value"] for side in ("run", "reference"))
    assert next(means) == pytest.approx(next(means), abs=1e-3)
    numbers = entry["n_independent"]
    assert numbers["run"] == pytest.approx(numbers["reference"], rel=1e-3)
    assert result["costs"]["run"]["energy_evaluations"]["all"] is None
