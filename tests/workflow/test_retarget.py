"""A run's flow on another System, of a molecule whose distributions are known."""

import copy
import json
from dataclasses import replace

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.cli.main import main
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.run_config import CONFIG_FORMAT
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.units import KB
from openmm_tsf.utils.random import make_generator, seeded_generator
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.retarget import RETARGET, retarget, retarget_settings
from openmm_tsf.workflow.settings import SamplingSettings
from openmm_tsf.workflow.start import choose_by_weight
from tests.support.constrained_cases import LIGHT, constrained_flow, constrained_tree
from tests.support.exact_cases import the_tree, tree_flow
from tests.support.exact_tree import POSITIONS
from tests.support.simulated_cuda import simulated_cuda

LADDER = (300.0, 420.0, 600.0)
QUIET = RunOptions(platform="Reference", progress=False)
SETTINGS = SamplingSettings(
    temperatures=LADDER, n_walkers=24, n_tuning=10, n_iterations=50, local_interval=1
)


def other_tree():
    """The molecule with another force field: softer bonds, other torsions."""
    tree = copy.copy(the_tree())
    tree.k = torch.where(tree.polar.kinds == 0, 0.9 * tree.k, 1.4 * tree.k)
    tree._marginals = {}
    return tree


def molecule_of(tree):
    return tsf.MolecularSystem(tree.system(), tree.topology, POSITIONS)


def log_partition(tree, kelvin):
    """Return ln Z of the internal coordinates, by quadrature."""
    total = 0.0
    for index, (kind, marginal) in enumerate(
        zip(tree.polar.kinds.tolist(), tree.marginals(kelvin), strict=True)
    ):
        u = tree.centre.repeat(len(marginal.grid), 1)
        u[:, index] = torch.from_numpy(marginal.grid)
        density = np.exp(-tree.term_energies(u)[:, index].numpy() / (KB * kelvin))
        if kind < 2:
            density *= (marginal.grid**2, np.sin(marginal.grid))[kind]
        total += np.log(np.trapezoid(density, marginal.grid))
    return total


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run of the first System that starts from exact samples."""
    tree, n_walkers, generator = the_tree(), 40, seeded_generator(2)
    folder = tmp_path_factory.mktemp("retarget") / "run"
    with tsf.OpenMMPotential(tree.system(), platform="Reference", n_contexts=1) as potential:
        sampler = tsf.ParallelTempering(
            molecule_of(tree), tree_flow("tsf-volume"), LADDER, n_walkers, potential=potential,
            seed=3,
        )  # fmt: skip
        x = [tree.sample(n_walkers, kelvin, generator) for kelvin in LADDER]
        sampler.set_positions(torch.stack(x, dim=1))
        with sampler:
            sampler.run(40, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def retargeted(path, tmp_path_factory):
    output = tmp_path_factory.mktemp("other") / "other"
    molecule = molecule_of(other_tree())
    summary = retarget(path, molecule, output, SETTINGS, options=QUIET)
    return summary, output, json.loads((output / RETARGET).read_text())


def test_samples_are_of_the_other_system(retargeted):
    """|z| < 4 of every coordinate at every rung; the first System's distribution is noticed."""
    _, output, _ = retargeted
    data = tsf.load_run(output)

    def worst(tree):
        scores = []
        for kelvin in LADDER:
            x = torch.from_numpy(data.trajectory(kelvin).xyz.astype(np.float64))
            pits = tree.pit(x, kelvin).reshape(-1, data.n_walkers, tree.n_coordinates)
            for k in range(tree.n_coordinates):
                for part in (pits[..., k] - 0.5, (pits[..., k] - 0.5) ** 2 - 1 / 12):
                    mean = estimate_mean(part)
                    scores.append(abs(mean.value) / mean.stderr)
        return max(scores)

    assert worst(other_tree()) < 4.0
    assert worst(the_tree()) > 6.0


def test_free_energy_differences_are_exact(retargeted):
    _, _, written = retargeted
    assert list(written["by_temperature"]) == ["300.00", "420.00", "600.00"]
    for kelvin, entry in zip(LADDER, written["by_temperature"].values(), strict=True):
        exact = log_partition(the_tree(), kelvin) - log_partition(other_tree(), kelvin)
        difference = entry["delta_F_kT"]
        assert abs(difference["value"] - exact) < 4 * difference["stderr"] < 0.4
        assert 0.1 < difference["overlap"] < 1.0


def test_it_is_a_run_directory_with_the_runs_flow(retargeted, path):
    summary, output, written = retargeted
    assert summary["energy_evaluations"]["training"] == 0
    assert summary["energy_evaluations"]["md"] == 0
    assert summary["n_iterations"] == 50
    before, now = load_flow(path / "flow.pt"), load_flow(output / "flow.pt")
    assert all(torch.equal(before.state_dict()[k], v) for k, v in now.state_dict().items())
    assert now.fingerprint == molecule_of(other_tree()).fingerprint
    config = json.loads((output / "config.json").read_text())
    assert config["choices"]["retargeted"]["run"] == str(path)
    assert written["energy_evaluations"] > 0
    assert tsf.load_run(output).summary()["n_iterations"] == 50


def test_it_is_reproducible_and_resumed(retargeted, path, tmp_path):
    """Stopped after a part and resumed from the shell: the same samples."""
    _, whole, _ = retargeted
    output, molecule = tmp_path / "part", molecule_of(other_tree())
    retarget(path, molecule, output, replace(SETTINGS, n_iterations=20), options=QUIET)
    (output / RETARGET).unlink()
    command = ["retarget", str(path), "--output", str(output), "--iterations", "50", "--resume"]
    assert main([*command, "--quiet", "--platform", "Reference"]) in (0, 3)
    assert np.array_equal(tsf.load_run(whole, 0).energy, tsf.load_run(output, 0).energy)
    assert (output / RETARGET).is_file()


def test_frames_are_chosen_also_with_the_flow_on_a_gpu():
    """Random numbers are of the flow's device, the weights of frames are not; simulated."""
    log_weight = torch.linspace(-2.0, 0.0, 50, dtype=torch.float64)
    expected = choose_by_weight(log_weight, 8, seeded_generator(1))
    with simulated_cuda():
        chosen = choose_by_weight(log_weight, 8, make_generator(1, torch.device("cuda")))
    assert chosen.tolist() == expected.tolist()


def test_from_the_shell_with_a_file_of_the_system(path, tmp_path, capsys):
    file = tmp_path / "other.xml"
    file.write_text(openmm.XmlSerializer.serialize(other_tree().system()))
    command = ["retarget", str(path), "--system", str(file), "--output", str(tmp_path / "out")]
    lengths = ["--iterations", "10", "--walkers", "6", "--tuning", "2", "--temperatures", "300"]
    status = main([*command, *lengths, "350", "--quiet", "--platform", "Reference"])
    assert status in (0, 3)
    assert "F - F(run)" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / RETARGET).read_text())
    assert list(written["by_temperature"]) == ["300.00"]
    assert written["not_in_both_K"] == [350.0, 420.0, 600.0]


def test_a_ladder_is_chosen_for_the_other_system(path, tmp_path, monkeypatch):
    """--temperatures auto measures the System that is sampled."""
    file, measured = tmp_path / "other.xml", []
    file.write_text(openmm.XmlSerializer.serialize(other_tree().system()))

    def choose(molecule, ends, options):
        measured.append(molecule.fingerprint)
        return (ends[0], 380.0, ends[1])

    monkeypatch.setattr("openmm_tsf.workflow.temperatures.choose_temperatures", choose)
    command = ["retarget", str(path), "--system", str(file), "--output", str(tmp_path / "out")]
    lengths = ["--iterations", "4", "--walkers", "4", "--tuning", "2"]
    ladder = ["--temperatures", "auto", "300", "500"]
    status = main([*command, *lengths, *ladder, "--quiet", "--platform", "Reference"])
    assert status in (0, 3)
    assert measured == [molecule_of(other_tree()).fingerprint]
    assert tsf.load_run(tmp_path / "out").temperatures.tolist() == [300.0, 380.0, 500.0]


def test_without_a_common_temperature_there_is_no_difference_and_a_warning(path, tmp_path, caplog):
    settings = replace(SETTINGS, temperatures=(350.0, 500.0), n_walkers=4, n_iterations=4)
    retarget(path, molecule_of(other_tree()), tmp_path / "out", settings, options=QUIET)
    assert "have no temperature in common" in caplog.text
    assert json.loads((tmp_path / "out" / RETARGET).read_text())["by_temperature"] == {}


def changed(change):
    """The molecule after a change of a copy of its Topology and positions."""
    topology, positions = copy.deepcopy(the_tree().topology), POSITIONS.copy()
    system = the_tree().system()
    return tsf.MolecularSystem(*change(system, topology, positions))


def with_iodine(system, topology, positions):
    list(topology.atoms())[5].element = app.element.iodine
    return system, topology, positions


def mirrored(system, topology, positions):
    return system, topology, positions * [1.0, 1.0, -1.0]


def in_a_field(system, topology, positions):
    force = openmm.CustomExternalForce("100*x")
    force.addParticle(0)
    system.addForce(force)
    return system, topology, positions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_iodine, "molecule: expected the run's atoms"),
        (mirrored, "molecule: expected the handedness"),
        (in_a_field, "position and orientation"),
    ],
)
def test_what_the_flow_cannot_serve_is_refused_before_anything_is_written(
    path, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        retarget(path, changed(change), tmp_path / "out", options=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_system_that_tells_hydrogens_of_a_methyl_apart_is_refused(tmp_path):
    """The flow of the other one knows one labelling of them alone."""
    molecule = tsf.systems.alanine_dipeptide()
    dataset = tsf.MDDataset.shipped(molecule)[:1000]
    flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,), seed=1)
    with molecule.potential(platform="Reference", n_contexts=1) as potential:
        kernels = [tsf.kernels.FlowIndependence(flow, potential, (600.0,))]
        sampler = tsf.ParallelTempering(
            molecule, flow, (600.0,), 2, kernels, potential=potential, seed=1
        )
        sampler.set_positions(dataset.positions[:2, None])
        sampler.run(2, tmp_path / "run", progress=False)
    system = copy.deepcopy(molecule.system)
    nonbonded = next(f for f in system.getForces() if isinstance(f, openmm.NonbondedForce))
    charge, *others = nonbonded.getParticleParameters(0)
    nonbonded.setParticleParameters(0, 1.2 * charge, *others)
    other = tsf.MolecularSystem(system, molecule.topology, molecule.positions)
    with pytest.raises(ValueError, match=r"molecule: expected hydrogens \(0, 2, 3\)"):
        retarget(tmp_path / "run", other, tmp_path / "out", options=QUIET)
    assert not (tmp_path / "out").exists()


def test_masses_and_measure_of_constrained_bonds_are_those_of_the_run(tmp_path):
    """The flow has the metric of the run's constraints: samples would have another density."""
    tree, kelvin = constrained_tree("star", "rigid"), LADDER[0]

    def molecule_of_masses(masses, measure="rigid"):
        system = tree.system()
        for atom, mass in enumerate(masses):
            system.setParticleMass(atom, mass)
        return tsf.MolecularSystem(system, tree.topology, x[0].numpy(), measure)

    x = tree.sample_stiff(4, kelvin, seeded_generator(1))
    molecule = molecule_of_masses(LIGHT)
    flow = copy.deepcopy(constrained_flow("tsf-volume", "star", "rigid"))
    flow.fingerprint = molecule.fingerprint
    with tsf.OpenMMPotential(molecule.system, platform="Reference", n_contexts=1) as potential:
        kernels = [tsf.kernels.FlowIndependence(flow, potential, (kelvin,))]
        sampler = tsf.ParallelTempering(molecule, flow, (kelvin,), 4, kernels, potential, seed=1)
        sampler.set_positions(x[:, None])
        sampler.run(2, tmp_path / "run", progress=False)
    settings = replace(SETTINGS, temperatures=(kelvin,), n_iterations=2, local_interval=0)
    cases = {
        "masses of constrained atoms": molecule_of_masses([*LIGHT[:4], 4.0, *LIGHT[5:]]),
        "the run's measure, 'rigid'": molecule_of_masses(LIGHT, "stiff"),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=f"molecule: expected .*{message}"):
            retarget(tmp_path / "run", other, tmp_path / "out", settings, options=QUIET)
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused(path, tmp_path):
    molecule = molecule_of(the_tree())
    with pytest.raises(ValueError, match="output: expected another directory"):
        retarget(path, molecule, path, options=QUIET)
    with pytest.raises(TypeError, match="molecule: expected MolecularSystem"):
        retarget(path, the_tree().system(), tmp_path / "out", options=QUIET)
    with pytest.raises(FileNotFoundError):
        retarget(tmp_path / "none", molecule, tmp_path / "out", options=QUIET)


def test_the_settings_of_a_long_run_with_few_frames_and_shards_fit(tmp_path):
    """Its frames are further apart than the iterations of the default settings."""
    recorded = SamplingSettings(
        n_walkers=64, n_iterations=10**5, n_shards=8, save_interval=1000, numbers_interval=10
    )
    choices = {"settings": {"sampling": to_plain_data(recorded)}}
    (tmp_path / "config.json").write_text(
        json.dumps({"format": CONFIG_FORMAT, "stage": "run", "choices": choices})
    )
    settings = retarget_settings(tmp_path)
    assert (settings.n_shards, settings.save_interval, settings.numbers_interval) == (1, 1, None)
    assert settings.temperatures == recorded.temperatures
