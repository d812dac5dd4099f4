import json
import subprocess
import sys

import mdtraj
import numpy as np
import openmm.unit as unit
import pytest

import openmm_tsf.analysis.reference as reference_module
from openmm_tsf.analysis import Reference, compare, load_reference, load_run, write_summary
from openmm_tsf.analysis.mbar import Mbar, solve_mbar
from openmm_tsf.analysis.ramachandran import decorrelated_frames, ramachandran_distance
from openmm_tsf.analysis.uncertainty import covariance_of_means, estimate_mean
from openmm_tsf.units import KB
from tests.support.fabricate import chain_positions, four_atoms, two_state_chains, write_run

TEMPERATURES = np.array([300.0, 424.26, 600.0])
BETAS = 1 / (KB * TEMPERATURES)
GAP = 5.0  # kJ/mol between the two states


def two_state_run(rng, n=60, n_walkers=4, rho=0.5, temperatures=TEMPERATURES):
    """Exact chains: state 1 lies GAP above state 0, both with five harmonic modes.

    Returns energies [n, W, R] and states. -ln[P(1)/P(0)] is GAP / kT.
    """
    betas = 1 / (KB * np.asarray(temperatures))
    p = 1 / (1 + np.exp(betas * GAP))
    states = two_state_chains(rng, (n, n_walkers, len(betas)), p, rho)
    return GAP * states + rng.chisquare(5, states.shape) / (2 * betas), states


def small_run(path, rng=None, **options):
    """A run directory with everything in it; phi is ±1, by state."""
    rng = rng or np.random.default_rng(1)
    sizes = {k: options.pop(k) for k in ("n", "n_walkers", "temperatures") if k in options}
    energy, states = two_state_run(rng, **sizes)
    phi = np.where(states, 1.0, -1.0) + 0.2 * rng.normal(size=states.shape)
    psi = rng.uniform(-np.pi, np.pi, states.shape)
    temperatures = sizes.get("temperatures", TEMPERATURES)
    options = {"per_segment": 25, "positions": chain_positions(phi), **options}
    write_run(path, temperatures, energy, {"phi": phi, "psi": psi}, **options)
    return energy, phi, psi


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One run directory for all tests that only read."""
    path = tmp_path_factory.mktemp("shared") / "run"
    energy, phi, psi = small_run(path)
    return path, energy, phi, psi


def phi_of(trajectory):
    return mdtraj.compute_dihedrals(trajectory, [[0, 1, 2, 3]])[:, 0]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(("n", "n_walkers"), [(600, 12), (1500, 2), (3000, 1)])
def test_standard_error_is_calibrated(n, n_walkers):
    p, rho, repeats = 0.2, 0.8, 150
    rng = np.random.default_rng(5)
    chains = two_state_chains(rng, (n, n_walkers, repeats), p, rho)
    estimates = [estimate_mean(chains[:, :, k]) for k in range(repeats)]
    z = np.array([(e.value - p) / e.stderr for e in estimates])
    assert abs(z.mean()) < 4 / np.sqrt(repeats)
    # The larger of two errors: a little too large on average, never much too small.
    assert 0.7 < z.std() < 1.15
    exact = np.sqrt(p * (1 - p) * (1 + rho) / (1 - rho) / (n * n_walkers))
    assert np.median([e.stderr for e in estimates]) == pytest.approx(exact, rel=0.3)


def test_a_state_never_visited_has_no_known_error():
    never = estimate_mean(np.zeros((100, 4), dtype=bool))
    assert never.value == 0.0
    assert np.isnan(never.stderr)
    assert never.n_eff == 0.0
    assert not abs(never.value / never.stderr) < 3  # it cannot pass a z test
    single = estimate_mean([[3.0]])
    assert single.value == 3.0
    assert np.isnan(single.stderr)


def test_walkers_that_never_move_count_once_each():
    stuck = np.broadcast_to(np.arange(10) % 2 == 0, (400, 10))
    estimate = estimate_mean(stuck)
    assert estimate.stderr == pytest.approx(0.5 / 3, rel=0.02)
    assert 8 < estimate.n_eff < 10


def test_few_samples():
    assert np.isfinite(estimate_mean([[0.0, 1.0, 1.0]]).stderr)
    assert np.isfinite(estimate_mean([[0.0], [1.0]]).stderr)


def test_covariance_of_means():
    rng, repeats, n = np.random.default_rng(6), 400, 50
    common = rng.normal(size=(repeats, n, 30, 1))
    series = 0.8 * common + 0.6 * rng.normal(size=(repeats, n, 30, 2))
    error = 1 / np.sqrt(n * 30)
    mean = np.mean([covariance_of_means(s, [error, error]) for s in series], axis=0)
    exact = error**2 * np.array([[1, 0.64], [0.64, 1]])
    np.testing.assert_allclose(mean, exact, rtol=0.05)
    assert np.isnan(covariance_of_means(np.zeros((9, 9, 2)), [error, error])).all()


# --------------------------------------------------------------------- reading


def test_numbers_of_a_run(shared):
    path, energy, phi, psi = shared
    run = load_run(str(path))
    np.testing.assert_allclose(run.temperatures, TEMPERATURES)
    assert (run.n_iterations, run.n_walkers, run.n_rungs) == (60, 4, 3)
    np.testing.assert_array_equal(run.energies(424.265), energy[:, :, 1])
    np.testing.assert_array_equal(run.energies(600 * unit.kelvin), energy[:, :, 2])
    np.testing.assert_allclose(run.dihedral("psi", 300), psi[:, :, 0], rtol=1e-6)
    a, b = run.ramachandran(300)
    np.testing.assert_allclose(a, phi[:, :, 0].ravel(), rtol=1e-6)
    np.testing.assert_allclose(b, psi[:, :, 0].ravel(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"rungs at 300\.00, 424\.26, 600\.00 K, got 350 K"):
        run.energies(350)
    with pytest.raises(ValueError, match="omega"):
        run.dihedral("omega", 300)
    u_kn, n_k = run.u_kn()
    assert u_kn.shape == (3, 720)
    assert n_k.tolist() == [240] * 3
    np.testing.assert_allclose(u_kn[2, 240:480], energy[:, :, 1].ravel() * BETAS[2])
    table = run.acceptance()
    assert table.keys() == {"local", "flow_walk", "swap_plain"}
    np.testing.assert_allclose(table["flow_walk"], [0.3] * 3)
    np.testing.assert_allclose(table["swap_plain"], [0.4] * 2)
    np.testing.assert_array_equal(run.mixing_matrix(), np.eye(3))
    assert run.round_trips().shape == (4, 3)


def test_trajectory(shared):
    path, _, phi, _ = shared
    run = load_run(path)
    frames = run.trajectory(424.26)
    assert isinstance(frames, mdtraj.Trajectory)
    assert len(frames) == 240
    np.testing.assert_allclose(phi_of(frames), run.ramachandran(424.26)[0], atol=1e-5)
    one = run.trajectory(600, walker=3)
    np.testing.assert_allclose(phi_of(one), phi[:, 3, 2], atol=1e-5)
    np.testing.assert_array_equal(one.time, np.arange(60))
    whole = mdtraj.load(str(path / "T600.00K.dcd"), top=str(path / "topology.pdb"))
    np.testing.assert_allclose(whole.xyz, run.trajectory(600).xyz, atol=1e-6)
    with pytest.raises(ValueError, match="walker: expected an integer of 0 to 3, got 4"):
        run.trajectory(600, walker=4)
    with pytest.raises(ValueError, match=r"walker: expected an integer of 0 to 3, got 1\.5"):
        run.trajectory(600, walker=1.5)
    with pytest.raises(ValueError, match="rungs at"):
        run.trajectory(599)


def test_a_run_still_writing(tmp_path):
    path = tmp_path / "run"
    small_run(path)
    dcd = path / "T300.00K.dcd"
    whole = dcd.read_bytes()
    # Frames ahead of the numbers: the last segment is not complete.
    last = path / "segments" / "segment_000002.npz"
    numbers = last.read_bytes()
    last.write_bytes(numbers[: len(numbers) // 2])
    (path / "segments" / "segment_000003.npz.tmp").write_bytes(b"half")
    assert len(load_run(path).trajectory(300)) == 4 * 50
    # A truncated last frame, and numbers ahead of the frames.
    last.write_bytes(numbers)
    dcd.write_bytes(whole[:-10])
    run = load_run(path)
    assert run.n_iterations == 60
    assert len(run.trajectory(300)) == 4 * 59
    assert len(run.trajectory(300, walker=3)) == 59
    assert len(run.trajectory(600)) == 4 * 60
    assert np.isfinite(run.free_energy_difference(lambda t: phi_of(t) > 0, 300)).all()
    # A file only just opened.
    for size in (0, 50, 95, 200):
        dcd.write_bytes(whole[:size])
        assert len(load_run(path).trajectory(300)) == 0
    with pytest.raises(ValueError, match="no complete iteration"):
        load_run(path).free_energy_difference(lambda t: phi_of(t) > 0, 300)


def test_before_the_first_segment(tmp_path):
    write_run(tmp_path / "run", TEMPERATURES, np.empty((0, 4, 3)), {"phi": np.empty((0, 4, 3))})
    run = load_run(tmp_path / "run")
    assert run.n_iterations == 0
    assert run.energies(300).shape == (0, 4)
    with pytest.raises(ValueError, match="no complete segment yet"):
        run.mean_energy(300)
    summary = write_summary(run, tmp_path / "summary.json")
    assert summary["n_iterations"] == 0


def test_every_so_many_th_iteration(tmp_path):
    small_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    whole = run.trajectory(300)
    w = run.n_walkers
    for stride in (1, 7, 1000):
        kept = np.arange(0, run.n_iterations, stride)
        rows = (kept[:, None] * w + np.arange(w)).ravel()
        part = run.trajectory(300, stride=stride)
        np.testing.assert_array_equal(part.xyz, whole.xyz[rows])
        np.testing.assert_array_equal(part.time, whole.time[rows])
        one = run.trajectory(300, walker=1, stride=stride)
        np.testing.assert_array_equal(one.xyz, whole.xyz[kept * w + 1])
    with pytest.raises(ValueError, match="stride: expected an integer of at least 1, got 0"):
        run.trajectory(300, stride=0)


def test_damaged_directories_are_named(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no such run directory"):
        load_run(path)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_run(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a readable JSON"):
        load_run(path)
    (path / "config.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="written in format 99 by a newer version"):
        load_run(path)
    (path / "config.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="has no 'temperatures_K'"):
        load_run(path)


def test_damaged_segments_are_named(tmp_path):
    path = tmp_path / "run"
    small_run(path, positions=None)
    segment = path / "segments" / "segment_000001.npz"
    whole = segment.read_bytes()
    with np.load(segment) as data:
        arrays = dict(data)
    segment.unlink()
    with pytest.raises(FileNotFoundError, match=r"segment_000001\.npz is missing"):
        load_run(path)
    segment.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"segment_000001\.npz: cannot be read"):
        load_run(path)
    np.savez(segment, **{**arrays, "energy": arrays["energy"][:, :2]})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: energy: expected shape"):
        load_run(path)
    np.savez(segment, **{**arrays, "energy": arrays["energy"] * np.inf})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: energy: expected finite"):
        load_run(path).energies(300)  # opened in no time, checked when read
    np.savez(segment, **arrays)
    damaged = bytearray(segment.read_bytes())
    damaged[damaged.index(b"energy.npy") + 300] ^= 1  # one bit, in the middle of the numbers
    segment.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"segment_000001\.npz: .*Bad CRC"):
        load_run(path).energies(300)
    np.savez(segment, **{k: v for k, v in arrays.items() if k != "replica"})
    with pytest.raises(ValueError, match=r"segment_000001\.npz: has no array 'replica'"):
        load_run(path)
    np.savez(segment, **arrays)
    with pytest.raises(FileNotFoundError, match=r"T300\.00K\.dcd is missing"):
        load_run(path).trajectory(300)


def test_proposals_outside_the_domain_are_summed_over_the_segments(tmp_path):
    small_run(tmp_path / "run")
    paths = sorted((tmp_path / "run" / "segments").glob("*.npz"))
    for number, path in enumerate(paths):
        with np.load(path) as data:
            arrays = dict(data)
        np.savez(path, **arrays | {"outside_domain": np.int64(number + 5)})
    assert len(paths) == 3
    assert load_run(tmp_path / "run").segments.outside_domain == 5 + 6 + 7


def test_damaged_trajectories_are_named(tmp_path):
    path = tmp_path / "run"
    small_run(path, n=10)
    dcd = path / "T300.00K.dcd"
    whole = dcd.read_bytes()
    run = load_run(path)
    dcd.write_bytes(b"x" * 500)
    with pytest.raises(ValueError, match=r"T300\.00K\.dcd: not a DCD file"):
        run.trajectory(300)
    middle = len(whole) // 2
    dcd.write_bytes(whole[:middle] + whole[middle + 4 :])
    with pytest.raises(ValueError, match=r"T300\.00K\.dcd: corrupt"):
        run.trajectory(300)
    dcd.unlink()
    with pytest.raises(FileNotFoundError, match=r"T300\.00K\.dcd is missing"):
        run.trajectory(300)
    five = four_atoms()
    five.add_atom("X", mdtraj.element.carbon, next(five.residues))
    mdtraj.Trajectory(np.zeros((1, 5, 3)), five).save_pdb(str(path / "topology.pdb"))
    with pytest.raises(ValueError, match="expected 5 atoms as in the topology, got 4"):
        load_run(path).trajectory(600)


# ----------------------------------------------------------------- free energy


def test_mbar_is_pymbars():
    """Independent samples: value and error agree with pymbar's own."""
    from pymbar import MBAR

    energy, states = two_state_run(np.random.default_rng(7), n=250, n_walkers=8, rho=0.0)
    beta = 1 / (KB * 350)
    f = solve_mbar(energy, BETAS)
    ours = Mbar(energy, BETAS, f).at(beta).mean(states)
    flat = np.moveaxis(energy, 2, 0).ravel()
    protocol = ({"method": "adaptive"},)
    theirs = MBAR(np.outer(BETAS, flat), np.full(3, 2000), solver_protocol=protocol)
    np.testing.assert_allclose(f, theirs.f_k, atol=1e-7)
    inside = np.moveaxis(states, 2, 0).ravel().astype(float)
    with np.errstate(divide="ignore"):  # it takes the logarithm of an observable that is 0
        expected = theirs.compute_expectations(inside, u_kn=(beta * flat)[None])
    assert ours.value == pytest.approx(expected["mu"].item(), rel=1e-7)
    assert ours.stderr_correlation == pytest.approx(expected["sigma"].item(), rel=0.1)


def test_mbar_on_many_samples_is_solved_on_all_of_them():
    energy, _ = two_state_run(np.random.default_rng(8), n=700, n_walkers=64, rho=0.0)
    f = solve_mbar(energy, BETAS)
    exact = np.log((1 + np.exp(-BETAS[0] * GAP)) / (1 + np.exp(-BETAS * GAP)))
    exact += 2.5 * np.log(BETAS / BETAS[0])
    np.testing.assert_allclose(f, exact, atol=0.02)
    memberships = Mbar(energy, BETAS, f).memberships
    np.testing.assert_allclose(memberships.sum(axis=(0, 1, 2)), 700 * 64, rtol=1e-9)


def test_free_energy_difference_is_exact_and_its_error_calibrated(tmp_path):
    """Correlated chains, at a rung and between rungs."""
    repeats, rng = 40, np.random.default_rng(9)
    temperatures = np.array([300.0, 350.0])
    z = np.empty((repeats, 2))
    for k in range(repeats):
        energy, states = two_state_run(rng, n=150, n_walkers=8, rho=0.7)
        write_run(tmp_path / str(k), TEMPERATURES, energy, {"phi": states - 0.5})
        run = load_run(tmp_path / str(k))
        value, stderr = np.transpose([run.free_energy_positive("phi", t) for t in temperatures])
        z[k] = (value - GAP / (KB * temperatures)) / stderr
    assert (abs(z.mean(axis=0)) < 4 / np.sqrt(repeats)).all()
    assert (z.std(axis=0) > 0.6).all()
    assert (z.std(axis=0) < 1.3).all()


def test_free_energy_difference_from_frames(shared):
    run = load_run(shared[0])
    value, stderr = run.free_energy_difference(lambda t: phi_of(t) > 0, temperature=300)
    assert (value, stderr) == pytest.approx(run.free_energy_positive("phi", 300), rel=1e-9)
    assert abs(value - GAP * BETAS[0]) < 4 * stderr
    # Steeper than the single rung's own estimate, which uses a third of the samples.
    assert stderr < run.positive("phi", 300).free_energy[1]
    at = run.free_energy_difference(lambda t: phi_of(t) > 0, 350 * unit.kelvin)[0]
    assert run.free_energy_difference(lambda t: phi_of(t) > 0, 600)[0] < at < value
    never = run.free_energy_difference(lambda t: np.zeros(len(t), dtype=bool), 300)
    assert never[0] == np.inf
    assert np.isnan(never[1])
    with pytest.raises(ValueError, match=r"within 300\.00 to 600\.00 K"):
        run.free_energy_difference(lambda t: phi_of(t) > 0, 299)
    with pytest.raises(TypeError, match="truth values"):
        run.free_energy_difference(phi_of, 300)
    with pytest.raises(ValueError, match="expected 240 values"):
        run.free_energy_difference(lambda t: phi_of(t)[1:] > 0, 300)


def test_one_walker_and_one_rung(tmp_path):
    small_run(tmp_path / "run", n=200, n_walkers=1, temperatures=[300.0])
    run = load_run(tmp_path / "run")
    value, stderr = run.free_energy_difference(lambda t: phi_of(t) > 0, 300)
    own = run.positive("phi", 300)
    assert value == pytest.approx(own.free_energy[0])
    assert stderr == pytest.approx(own.free_energy[1], rel=0.02)
    assert abs(value - GAP * BETAS[0]) < 4 * stderr
    assert run.round_trips().tolist() == [[0]]
    assert run.mixing_matrix().tolist() == [[1.0]]
    assert len(run.trajectory(300, walker=0)) == 200
    json.loads(json.dumps(run.summary(), allow_nan=False))


@pytest.mark.parametrize(("n", "n_walkers"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_very_short_runs_do_not_fail(tmp_path, n, n_walkers):
    small_run(tmp_path / "run", n=n, n_walkers=n_walkers)
    json.dumps(load_run(tmp_path / "run").summary(), allow_nan=False)


# ------------------------------------------------------------------- reference


def exact_angles(rng, shape, p=0.3, rho=0.6):
    """(φ, ψ) of two basins, exchanging slowly, with fast motion within each."""
    basin = two_state_chains(rng, shape, p, rho)
    phi = np.where(basin, 1.0, -1.5) + 0.3 * rng.normal(size=shape)
    return phi, np.where(basin, 0.7, 2.5) + 0.4 * rng.normal(size=shape)


def make_reference(rng, n=3000, temperatures=(*TEMPERATURES, 700.0)):
    shape = (n, len(temperatures))
    phi, psi = exact_angles(rng, shape)
    return Reference(temperatures, phi, psi, rng.normal(size=shape), 1.0)


def run_like_reference(rng, path, p=0.3, temperatures=TEMPERATURES):
    shape = (300, 10, len(temperatures))
    phi, psi = exact_angles(rng, shape, p)
    write_run(path, temperatures, rng.normal(size=shape), {"phi": phi, "psi": psi})
    return load_run(path)


def test_an_exact_run_agrees_with_the_reference(tmp_path):
    repeats, rng = 16, np.random.default_rng(10)
    z, p_values, ratios = [], [], []
    for k in range(repeats):
        run = run_like_reference(rng, tmp_path / str(k))
        result = compare(run, make_reference(rng))
        z += [*result.phi_positive.z, *result.energy.z]
        p_values += [result.phi_positive.p_value, result.energy.p_value]
        ratios += [d.total_variation / d.expected_total_variation for d in result.ramachandran]
    assert abs(np.mean(z)) < 4 / np.sqrt(len(z))
    assert 0.75 < np.std(z) < 1.2
    assert min(p_values) > 1e-3
    assert abs(np.mean(p_values) - 0.5) < 0.2
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.05)
    assert max(ratios) < 1.3


def test_a_wrong_run_does_not(tmp_path):
    rng = np.random.default_rng(11)
    run = run_like_reference(rng, tmp_path / "run", p=0.6, temperatures=[300.0, 350.0])
    result = compare(run, make_reference(rng))
    assert result.temperatures == (300.0,)
    assert result.not_compared == (350.0,)
    assert result.phi_positive.z[0] > 5
    assert result.phi_positive.p_value < 1e-5
    distance = result.ramachandran[0]
    assert distance.total_variation > 1.5 * distance.floor_total_variation
    assert distance.kl > distance.floor_kl
    other = run_like_reference(rng, tmp_path / "other", temperatures=[310.0])
    with pytest.raises(ValueError, match="none of the run's"):
        compare(other, make_reference(rng))


def test_a_run_that_never_visits_the_basin_cannot_agree(tmp_path):
    rng = np.random.default_rng(12)
    run = run_like_reference(rng, tmp_path / "run", p=0.0)
    result = compare(run, make_reference(rng))
    # A few of the exact basin's tail do cross zero in neither.
    assert not any(abs(z) < 3 for z in result.phi_positive.z)
    assert not result.phi_positive.p_value > 0.01
    summary = run.summary()
    assert summary["phi_positive"]["300.00"]["stderr"] is None
    assert summary["phi_positive"]["300.00"]["n_eff"] == 0
    assert summary["delta_F_phi_kT"]["300.00"]["value"] is None


def test_decorrelated_frames():
    rng = np.random.default_rng(13)
    phi, psi = exact_angles(rng, (2000, 30), rho=0.0)
    assert decorrelated_frames(phi, psi) > 0.85 * phi.size
    # Every frame ten times over: a tenth as many.
    tenfold = decorrelated_frames(
        np.repeat(phi[:200], 10, axis=0), np.repeat(psi[:200], 10, axis=0)
    )
    assert tenfold == pytest.approx(200 * 30, rel=0.2)
    distance = ramachandran_distance(phi, psi, phi, psi)
    assert distance.total_variation == distance.kl == 0.0
    single = ramachandran_distance(phi[:1, :1], psi[:1, :1], phi, psi)
    assert np.isnan(single.floor_total_variation)


def test_load_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_module, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="no reference data"):
        load_reference()
    original = make_reference(np.random.default_rng(14), n=50)
    arrays = {
        "temperatures_K": original.temperatures,
        "phi": original.phi.astype(np.float32),
        "psi": original.psi.astype(np.float32),
        "energy": original.energy.astype(np.float32),
        "interval_ps": 1.0,
    }
    np.savez(tmp_path / "ala2_reference.npz", **arrays)
    loaded = load_reference()
    np.testing.assert_allclose(loaded.phi, original.phi, rtol=1e-6)
    assert loaded.rung(424.265) == 1
    assert loaded.rung(424.3) is None
    # A run that names it is compared with it in its summary.
    rng = np.random.default_rng(15)
    shape = (50, 4, 3)
    phi, psi = exact_angles(rng, shape)
    write_run(
        tmp_path / "run",
        TEMPERATURES,
        rng.normal(size=shape),
        {"phi": phi, "psi": psi},
        reference="ala2_reference.npz",
    )
    summary = load_run(tmp_path / "run").summary()
    assert summary["comparison"]["ramachandran"].keys() == {"300.00", "424.26", "600.00"}
    assert np.isfinite(summary["comparison"]["phi_positive"]["p_value"])
    np.savez(tmp_path / "ala2_reference.npz", **{**arrays, "psi": arrays["psi"][:, :2]})
    with pytest.raises(ValueError, match="psi: expected shape"):
        load_reference()
    del arrays["psi"]
    np.savez(tmp_path / "ala2_reference.npz", **arrays)
    with pytest.raises(ValueError, match="no array 'psi'"):
        load_reference()


# --------------------------------------------------------------------- summary


def test_summary(tmp_path):
    energy, phi, _ = small_run(
        tmp_path / "run",
        positions=None,
        energy_evaluations={"md": 7, "training": 8, "sampling": 9},
        wall_seconds={"md": 1.0, "training": 2.0},
    )
    run = load_run(tmp_path / "run")
    returned = write_summary(run, tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == returned
    assert summary["temperatures_K"] == TEMPERATURES.tolist()
    assert (summary["seed"], summary["n_walkers"], summary["n_iterations"]) == (5, 4, 60)
    own = summary["phi_positive"]["424.26"]
    assert own["p"] == pytest.approx((phi[:, :, 1] > 0).mean())
    assert own["n_eff"] == pytest.approx(own["p"] * (1 - own["p"]) / own["stderr"] ** 2)
    assert summary["energy_kJ_mol"]["600.00"]["mean"] == pytest.approx(energy[:, :, 2].mean())
    # Independent energies: about as many effective samples as there are.
    assert 60 < summary["energy_kJ_mol"]["600.00"]["n_eff"] <= 241
    assert own["r_hat"] == pytest.approx(run.r_hat("phi", 424.26))
    assert 0.9 < summary["energy_kJ_mol"]["300.00"]["r_hat"] < 1.2
    capacity = summary["heat_capacity_kJ_mol_K"]["300.00"]
    assert capacity["value"] == pytest.approx(energy[:, :, 0].var() / (KB * 300**2))
    assert summary["replica_relaxation"] == {"second_eigenvalue": 1.0, "iterations": None}
    for check in summary["ensemble_check"].values():
        assert check.keys() == {"300.00-424.26", "424.26-600.00"}
        assert all(abs(pair["z"]) < 4 for pair in check.values())
    delta = summary["delta_F_phi_kT"]["300.00"]
    assert abs(delta["mbar_value"] - GAP * BETAS[0]) < 4 * delta["mbar_stderr"]
    assert summary["acceptance"]["local"] == {"300.00": 0.2, "424.26": 0.2, "600.00": 0.2}
    assert summary["acceptance"]["swap_plain"] == [0.4, 0.4]
    assert summary["acceptance"]["swap_steered"] == []
    assert summary["energy_evaluations"] == {"md": 7, "training": 8, "sampling": 6009}
    assert summary["wall_seconds"] == {"md": 1.0, "training": 2.0, "sampling": 1.5}
    assert summary["rejected_non_finite"] == 3
    assert summary["mirror_images"] == 6
    assert summary["versions"] == {"numpy": np.__version__}
    assert summary["efficiency"]["n_eff_phi_per_million_evaluations"] == pytest.approx(
        summary["phi_positive"]["300.00"]["n_eff"] / 6000e-6
    )


def test_summary_has_the_users_seed(tmp_path):
    small_run(tmp_path / "run", n=3, positions=None, choices={"seed": 1})
    assert load_run(tmp_path / "run").summary()["seed"] == 1


def test_summary_with_a_reference_and_costs_given(tmp_path):
    rng = np.random.default_rng(17)
    run = run_like_reference(rng, tmp_path / "run")
    costs = {"energy_evaluations": {"md": 3, "sampling": 1}}
    summary = write_summary(run, tmp_path / "summary.json", make_reference(rng, n=300), costs)
    assert summary["comparison"]["phi_positive"]["z"].keys() == {"300.00", "424.26", "600.00"}
    assert summary["energy_evaluations"] == {"md": 3, "training": None, "sampling": 30001}
    assert "comparison" not in run.summary()


def test_summary_without_phi(tmp_path):
    rng = np.random.default_rng(16)
    energy = rng.normal(size=(30, 2, 2))
    write_run(tmp_path / "toy", [0.5, 1.0], energy, boltzmann_constant=1.0)
    summary = load_run(tmp_path / "toy").summary()
    assert "phi_positive" not in summary
    assert summary["dihedral_positive"] == {}
    write_run(tmp_path / "chi", [300, 400], energy, {"chi1": energy - 0.5})
    assert load_run(tmp_path / "chi").summary()["dihedral_positive"]["chi1"].keys() == {
        "300.00",
        "400.00",
    }


def test_analysis_knows_no_models():
    code = "import openmm_tsf.analysis, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
