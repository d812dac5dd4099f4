"""Certificates of faultless samples, and of samples with planted faults."""

import json

import mdtraj
import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.analyze import analyze
from openmm_tsf.analysis.certify import certify
from openmm_tsf.analysis.certify_checks import MISSING, NOTED, PASSED, UNDECIDED, WRONG, Check
from openmm_tsf.analysis.certify_report import describe_certificate, judge_checks
from openmm_tsf.analysis.certify_samples import read_trajectories
from openmm_tsf.analysis.convergence import assess_mean
from openmm_tsf.cli.main import main
from tests.support.chain import chain_of
from tests.support.exact_chain import draw_frames

BARRIER = 5.0
TEMPERATURES = (300.0, 400.0)
#: The gauche well that a trajectory may lack.
GAUCHE = (-2 * np.pi / 3, 0.0)


@pytest.fixture(scope="module")
def chain():
    """A molecule with one slow torsion."""
    return chain_of(barrier=BARRIER, elements="HOOOC")


@pytest.fixture(scope="module")
def flow(chain, tmp_path_factory):
    """A flow that was never trained: broad, and everywhere."""
    frames = draw_frames(np.random.default_rng(1), (1000,), 400.0, BARRIER)
    sizes = {"n_momenta": 1, "n_blocks": 1, "hidden": (4,)}
    path = tmp_path_factory.mktemp("flow") / "flow.pt"
    dataset = tsf.MDDataset(frames, 400.0, chain)
    tsf.TemperatureSteerableFlow.from_dataset(dataset, **sizes).save(path)
    return path


def frames_of(seed=2, shape=(60, 8), factor=1.0, **options):
    rng = np.random.default_rng(seed)
    kelvins = (factor * TEMPERATURES[0], TEMPERATURES[1])
    drawn = [draw_frames(rng, shape, kelvin, BARRIER, **options) for kelvin in kelvins]
    return dict(zip(TEMPERATURES, drawn, strict=True))


def names(certificate, status):
    return {check["name"] for check in certificate["checks"] if check["status"] == status}


def test_faultless_samples_are_converged(chain, flow, tmp_path):
    certificate = tsf.certify(frames_of(), chain, flow=flow, output=tmp_path / "out")
    verdict = certificate["verdict"]
    assert verdict["sentence"] == "converged, in agreement with Boltzmann", verdict
    assert (verdict["status"], verdict["wrong"], verdict["missing"]) == ("converged", [], [])
    assert names(certificate, PASSED) == {
        "energies", "bonds", "vibrations", "configurational temperature", "mean torques",
        "copies", "Boltzmann", "Boltzmann in basins", "never visited", "not reached by the flow",
        "populations by the flow", "convergence",
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert written == certificate
    assert (tmp_path / "out" / "certificate.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "certificate.json", "certificate.png"
    ]  # fmt: skip
    basins = certificate["coverage"]["300.00"]["basins"]
    assert list(basins) == ["O2-O3 -60", "O2-O3 60", "O2-O3 180"]
    for basin in basins.values():  # of equal populations
        assert abs(np.log(3 * basin["p"])) < 4 * basin["stderr"] < 0.4
        assert basin["frames"]["low"] < 1 / 3 < basin["frames"]["high"]
    page = describe_certificate(certificate)
    assert page.startswith("certificate: converged, in agreement with Boltzmann")
    assert page.endswith("certificate: converged, in agreement with Boltzmann")


def test_a_missing_basin(chain, flow):
    """The flow finds it; nothing that the trajectories say of themselves is amiss."""
    lacking = frames_of(without=GAUCHE)
    certificate = tsf.certify(lacking, chain, flow=flow)
    wrong = certificate["verdict"]["wrong"]
    assert names(certificate, WRONG) == {"never visited"}
    assert len(wrong) == 2
    assert wrong[0].startswith("300.00 K: O2-O3 -60 was never visited; by the flow's weighted")
    for table in certificate["coverage"].values():
        missing = table["basins"]["O2-O3 -60"]
        assert missing["low"] < 1 / 3 < missing["high"]
        assert table["unvisited_high"] > 1 / 3


@pytest.mark.slow
def test_nothing_but_a_flow_tells_a_missing_basin(chain):
    assert tsf.certify(frames_of(without=GAUCHE), chain)["verdict"]["status"] == "converged"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("temperature", "Boltzmann"),
        ("half of the frames", "copies"),
        ("energy", "energies"),
        ("barrier", "mean torques"),
    ],
)
def test_planted_faults(chain, fault, name):
    frames = frames_of(shape=(1500, 8), factor=1.05 if fault == "temperature" else 1.0)
    assert tsf.certify(frames_of(shape=(1500, 8)), chain)["verdict"]["status"] == "converged"
    low = frames[300.0]
    if fault == "half of the frames":
        frames[300.0] = np.concatenate([low[:750], low[:750]])
    elif fault == "energy":
        low[700, 3, 4] += 0.03
    elif fault == "barrier":
        frames[300.0] = draw_frames(np.random.default_rng(5), (1500, 8), 300.0, 7.0)
    certificate = tsf.certify(frames, chain)
    assert certificate["verdict"]["status"] == "wrong"
    assert name in names(certificate, WRONG)


def test_verdicts():
    def status(*statuses):
        verdict = judge_checks(Check("Boltzmann", "here", each, "words") for each in statuses)
        return verdict.status, verdict.sentence

    assert status(PASSED, NOTED) == ("converged", "converged, in agreement with Boltzmann")
    assert status(NOTED) == ("converged", "converged")
    assert status(PASSED, UNDECIDED) == ("not yet", "not yet converged: here: words")
    assert status(MISSING, UNDECIDED)[1] == "not yet converged: here: words (and 1 more)"
    assert status(MISSING, WRONG, UNDECIDED) == ("wrong", "wrong: here: words")


def test_frames_that_are_no_numbers(chain, tmp_path):
    """Dynamics that blew up: the certificate says so, and nothing else can be checked."""
    frames = frames_of(shape=(6, 2))
    frames[300.0][3:] = np.nan
    certificate = tsf.certify(frames, chain, output=tmp_path)
    assert certificate["verdict"]["wrong"] == ["300.00 K: 6 of 12 frames have no finite energy"]
    assert describe_certificate(certificate).startswith("certificate: wrong: 300.00 K: 6 of 12")
    assert (tmp_path / "certificate.png").exists()


def test_the_command(chain, tmp_path, capsys):
    """Files of several temperatures and walkers; the exit status is that of the verdict."""
    tsf.systems.files.write_molecule(chain, tmp_path)
    frames = frames_of(shape=(40, 2))
    lists = []
    for kelvin, x in frames.items():
        paths = [tmp_path / f"{kelvin:g}_{walker}.dcd" for walker in range(2)]
        for walker, path in enumerate(paths):
            part = x[: 40 + walker, walker] if kelvin == 300.0 else x[:, walker]
            mdtraj.Trajectory(part, chain.mdtraj_topology).save_dcd(str(path))
        lists += ["--trajectory", *map(str, paths), "--temperature", f"{kelvin:g}"]
    molecule = ["--pdb", str(tmp_path / "topology.pdb"), "--system", str(tmp_path / "system.xml")]
    command = ["certify", *molecule, "--quiet", *lists, "--output", str(tmp_path / "out")]
    assert main(command) == 3
    printed = capsys.readouterr().out
    assert printed.startswith("certificate: not yet converged: ")
    assert "300.00          80        2" in printed
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    # Walkers side by side in one file are the same.
    both = tmp_path / "both.dcd"
    mdtraj.Trajectory(frames[300.0].reshape(-1, 5, 3), chain.mdtraj_topology).save_dcd(str(both))
    with chain.potential() as potential:
        (same,) = read_trajectories({300: both}, chain, potential, walkers=2)
    assert same.energy.shape == (40, 2)
    energy = certificate["quantities"]["energy_kJ_mol"]["300.00"]
    assert assess_mean(same.energy).to_dict() == energy
    # Results of an analysis may stand beside them, other files may not.
    (tmp_path / "out" / "summary.json").write_text("{}")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert "certificate, " in (error := capsys.readouterr().err)
    assert "holds notes.txt" in error
    (tmp_path / "out" / "notes.txt").unlink()
    # The same files at another temperature.
    start = command.index("--trajectory", command.index("--temperature"))
    wrong = [{"300": "900"}.get(word, word) for word in command[:start]]
    assert main([*wrong, *command[-2:]]) == 4
    assert "by the forces, the frames are of" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "certificate.json", "certificate.png", "summary.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "RUN, --trajectory: expected one of the two, got none"),
        ("run --trajectory x --temperature 300", "expected one of the two, got both"),
        ("--trajectory x --output o", "--temperature: expected one for each --trajectory (1), all"),
        ("--trajectory x --temperature 300", "--output: expected a folder for the certificate"),
        ("--trajectory no.dcd --temperature 300 --output o", "path: no such trajectory no.dcd"),
        ("no", "no: no such run directory"),
    ],
)
def test_errors_of_the_command(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["certify", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_errors(chain, flow, tmp_path):
    frames = frames_of(shape=(4, 2))
    with pytest.raises(ValueError, match="molecule: expected the MolecularSystem of the traj"):
        tsf.certify(frames)
    with pytest.raises(ValueError, match=r"samples: expected positions \[n, 5, 3\]"):
        tsf.certify({300.0: np.zeros((3, 4, 3))}, chain)
    mdtraj.Trajectory(frames[300.0][:3, 0], chain.mdtraj_topology).save_dcd(f"{tmp_path}/x.dcd")
    with pytest.raises(ValueError, match="walkers: expected a divisor of the 3 frames"):
        tsf.certify({300.0: tmp_path / "x.dcd"}, chain, walkers=2)
    with pytest.raises(TypeError, match="samples: expected temperatures with their trajectories"):
        tsf.certify({}, chain)
    with pytest.raises(ValueError, match="this flow belongs to another molecule"):
        tsf.certify(frames, chain_of(), flow=flow.parent)  # the folder that holds flow.pt
    with pytest.raises(ValueError, match="walkers: a run directory tells its own, got 2"):
        tsf.certify(tmp_path, chain, walkers=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="output: "):
        tsf.certify(frames, chain, output=tmp_path / "file")


@pytest.mark.slow
def test_a_run(chain, flow, tmp_path):
    """The run's own energies, flow and molecule; changed frames are found."""
    network = tsf.load_flow(flow, chain)
    run = tmp_path / "run"
    sampler = tsf.ParallelTempering(chain, network, TEMPERATURES, n_walkers=4, seed=1)
    sampler.set_positions(torch.from_numpy(draw_frames(np.random.default_rng(3), (4, 2), 300.0)))
    sampler.run(30, output=run, progress=False)
    certificate = tsf.certify(run)
    assert WRONG not in {check["status"] for check in certificate["checks"]}
    assert {"recorded energies", "equilibration"} <= names(certificate, PASSED)
    assert certificate["verdict"]["status"] == "not yet"
    # Analyses and certificates share a directory, in any order.
    together = tmp_path / "together"
    for judge in (analyze, certify, analyze):
        judge(run, output=together)
    assert {"report.html", "certificate.png"} <= {path.name for path in together.iterdir()}
    assert list(certificate["coverage"]) == ["300.00", "400.00"]
    assert (run / "certificate.json").exists()
    (run / "flow.pt").unlink()
    assert main(["certify", str(run), "--output", str(tmp_path / "elsewhere"), "--quiet"]) == 3
    trajectory = run / "T300.00K.dcd"
    x = mdtraj.load_dcd(str(trajectory), top=chain.mdtraj_topology)
    x.xyz[:, 4] += 0.005
    x.save_dcd(str(trajectory))
    certificate = tsf.certify(run, output=tmp_path / "changed")
    assert certificate["verdict"]["status"] == "wrong"
    assert "recorded energies" in names(certificate, WRONG)
