"""Samples at any temperature from a run's flow, on a molecule whose distribution is known."""

import json
import shutil
from dataclasses import replace

import mdtraj
import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.cli.main import main
from openmm_tsf.io.dcd import DCDWriter
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.potentials.toy import DoubleWell
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.workflow import at
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.settings import SamplingSettings
from tests.support.exact_cases import the_tree, tree_flow
from tests.support.exact_tree import POSITIONS, TreePotential
from tests.support.examples import load_example

LADDER, KELVIN = (300.0, 420.0, 600.0), 350.0
QUIET = RunOptions(platform="Reference", progress=False)


def exact_energy(kelvin):
    """Return ⟨U⟩ in kJ/mol, of many exact draws."""
    u = the_tree().sample_internal(100_000, kelvin, seeded_generator(1))
    return float(the_tree().term_energies(u).sum(dim=1).mean())


def make_run(folder, potential, n_iterations):
    """A run of the molecule that starts from exact samples."""
    tree, n_walkers, generator = the_tree(), 40, seeded_generator(2)
    molecule = tsf.MolecularSystem(tree.system(), tree.topology, POSITIONS)
    sampler = tsf.ParallelTempering(
        molecule, tree_flow("tsf-volume"), LADDER, n_walkers, potential=potential, seed=3
    )
    x = [tree.sample(n_walkers, kelvin, generator) for kelvin in LADDER]
    sampler.set_positions(torch.stack(x, dim=1))
    with sampler:
        sampler.run(n_iterations, folder, progress=False)
    return folder


@pytest.fixture(scope="module", autouse=True)
def short_tuning():
    """Walkers start from weighted frames: a few iterations are enough for the step size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at, "N_TUNING", 5)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A run without a rung at 350 K."""
    with tsf.OpenMMPotential(the_tree().system(), platform="Reference", n_contexts=1) as potential:
        return make_run(tmp_path_factory.mktemp("at") / "run", potential, 40)


@pytest.fixture(scope="module")
def samples(path, tmp_path_factory):
    file = tmp_path_factory.mktemp("samples") / "350K.dcd"
    options = replace(QUIET, observe={"d": "distance:0,2", "w": "dihedral:3,2,1,0"})
    return tsf.sample_at(path, KELVIN, file, n_frames=3950, options=options), file


def test_samples_are_of_the_temperature(samples):
    """|z| < 4 of U and of every coordinate against the exact ones; far more at 400 K."""
    result, _ = samples
    tree, shape = the_tree(), result.energy.shape
    x = torch.from_numpy(result.trajectory.xyz.astype(np.float64))

    def scores(kelvin):
        pits = np.moveaxis(tree.pit(x, kelvin).reshape(*shape, -1), 2, 0)
        parts = result.energy - exact_energy(kelvin), *(pits - 0.5), *((pits - 0.5) ** 2 - 1 / 12)
        return np.array([each.value / each.stderr for each in map(estimate_mean, parts)])

    assert np.abs(scores(KELVIN)).max() < 4.0
    assert np.abs(scores(400.0)).max() > 6.0
    acceptance = result.record["acceptance"]
    assert acceptance["flow_independent"] > 0.01
    assert acceptance["local"] > 0.5


def test_samples_agree_with_the_run_and_the_record_says_so(samples, path):
    result, file = samples
    record = json.loads(file.with_suffix(".json").read_text())
    assert record == result.record
    assert (record["temperature_K"], record["seed"], record["run"]) == (KELVIN, 1, str(path))
    assert (record["n_frames"], record["n_walkers"], record["n_iterations"]) == (4000, 100, 40)
    finished = tsf.load_run(path)
    means = record["observable_mean"].values()
    for entry in (record["energy_kJ_mol"], *record["dihedral_positive"].values(), *means):
        assert abs(entry["z"]) < 4
        assert entry["stderr"] > 0
    curve = finished.curve("energy", KELVIN)
    energy = record["energy_kJ_mol"]
    assert (energy["run_value"], energy["run_stderr"]) == (curve.value[0], curve.stderr[0])
    assert energy["value"] == pytest.approx(result.energy.mean())
    assert set(record["dihedral_positive"]) == {*finished.dihedral_atoms, "w"}
    lengths = mdtraj.compute_distances(result.trajectory, [[0, 2]], periodic=False)
    assert record["observable_mean"]["d"]["value"] == pytest.approx(lengths.mean(), rel=1e-5)


def test_frames_are_written_with_their_energies_in_order(samples, path):
    result, file = samples
    frames = mdtraj.load(str(file), top=str(path / "topology.pdb"))
    np.testing.assert_allclose(frames.xyz, result.trajectory.xyz, atol=1e-6)
    assert {p.name for p in file.parent.iterdir()} == {"350K.dcd", "350K.json"}
    energy = TreePotential(the_tree()).energy(torch.from_numpy(frames.xyz.astype(np.float64)))
    np.testing.assert_allclose(energy.numpy(), result.energy.ravel(), atol=0.1)


def test_the_seed_decides(path, tmp_path):
    def draw(seed, name):
        options = replace(QUIET, seed=seed)
        tsf.sample_at(path, KELVIN, tmp_path / name, n_frames=20, options=options)
        return (tmp_path / name).read_bytes()

    first = draw(5, "a.dcd")
    assert first == draw(5, "b.dcd")
    assert first != draw(6, "c.dcd")
    # Fewer frames than walkers: as many walkers.
    assert json.loads((tmp_path / "a.json").read_text())["n_walkers"] == 20


def test_all_or_nothing(path, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for where, name in ((at, "_sample"), (at, "write_json"), (DCDWriter, "append")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                tsf.sample_at(path, KELVIN, tmp_path / "x.dcd", n_frames=20, options=QUIET)
        assert list(tmp_path.iterdir()) == []


def test_what_another_process_wrote_meanwhile_stays(path, tmp_path, monkeypatch):
    def write_too(*args, **options):
        (tmp_path / "x.dcd").write_text("of another process")
        return samples(*args, **options)

    samples = at._sample
    monkeypatch.setattr(at, "_sample", write_too)
    with pytest.raises(FileExistsError, match=r"x\.dcd exists"):
        tsf.sample_at(path, KELVIN, tmp_path / "x.dcd", n_frames=10, options=QUIET)
    assert (tmp_path / "x.dcd").read_text() == "of another process"
    assert [p.name for p in tmp_path.iterdir()] == ["x.dcd"]


def test_outside_the_ladder_it_warns_once(path):
    with pytest.warns(UserWarning, match="temperature: 290 K is outside the ladder") as caught:
        tsf.sample_at(path, 290.0, n_frames=10, options=QUIET)
    assert len(caught) == 1


def test_the_moves_are_those_of_the_run(path, tmp_path):
    """Of recorded settings; without any, as here, the defaults. One temperature has no swaps."""
    shutil.copytree(path, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    settings = SamplingSettings(n_independent=3, n_walk=0, local_interval=5)
    config["choices"]["settings"] = to_plain_data(settings)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))

    def kernels(folder):
        record = tsf.sample_at(folder, KELVIN, n_frames=10, options=QUIET).record
        return {kernel["name"]: kernel for kernel in record["choices"]["kernels"]}

    assert set(kernels(path)) == {"flow_independent", "flow_walk", "local"}
    recorded = kernels(tmp_path / "run")
    assert set(recorded) == {"flow_independent", "local"}
    assert (recorded["flow_independent"]["n_steps"], recorded["local"]["interval"]) == (3, 5)


def test_what_is_refused(path, tmp_path):
    (tmp_path / "there.dcd").touch()
    (tmp_path / "numbers.json").touch()
    for error, words, changes in (
        (FileExistsError, "output: .*there.dcd exists", {"output": tmp_path / "there.dcd"}),
        (FileExistsError, "numbers.json exists", {"output": tmp_path / "numbers.dcd"}),
        (ValueError, "output: expected a name that ends in .dcd", {"output": tmp_path / "x.xtc"}),
        (FileNotFoundError, "output: .*no is no folder", {"output": tmp_path / "no" / "x.dcd"}),
        (ValueError, "n_frames: expected an integer of at least 1", {"n_frames": 0}),
        (ValueError, "only .* effective samples", {"temperature": 20.0}),
        (ValueError, "resume: expected False", {"options": replace(QUIET, resume=True)}),
        (TypeError, "options: expected", {"options": 3}),
        (FileNotFoundError, "no such run directory", {"run": tmp_path / "none"}),
    ):
        arguments = {"run": path, "temperature": KELVIN, "options": QUIET} | changes
        with pytest.raises(error, match=words):
            tsf.sample_at(**arguments)


def test_another_flow_or_energy_is_refused(path, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(path, changed)
    tree_flow("tsf-polar").save(changed / "flow.pt")
    with pytest.raises(ValueError, match="is not the flow that it was sampled with"):
        tsf.sample_at(changed, KELVIN, options=QUIET)

    class Shifted(TreePotential):
        def energy(self, x):
            return super().energy(x) + 3.0

    with pytest.raises(ValueError, match="potential: expected the energies of the run"):
        tsf.sample_at(path, KELVIN, options=QUIET, potential=Shifted(the_tree()))


def test_runs_with_an_energy_of_their_own(tmp_path):
    """The potential has to be given; runs without a molecule have no frames."""
    folder = make_run(tmp_path / "run", TreePotential(the_tree()), 4)
    with pytest.raises(
        ValueError, match="potential: expected the run's, a TreePotential, got none"
    ):
        tsf.sample_at(folder, KELVIN, options=QUIET)
    potential = TreePotential(the_tree())
    result = tsf.sample_at(folder, KELVIN, n_frames=30, potential=potential, options=QUIET)
    assert result.energy.shape == (1, 30)
    assert result.record["energy_evaluations"] == potential.n_evaluations
    flow = tsf.TemperatureSteerableFlow(1, 1, 1, (4,))
    well = DoubleWell(0.1, -1.0, 0.3)
    toy = tsf.ParallelTempering(None, flow, [1.0, 2.0], 4, potential=well, seed=1)
    toy.set_positions(torch.zeros(4, 2, 1))
    toy.run(3, tmp_path / "toy", progress=False)
    with pytest.raises(ValueError, match="run: expected one of a molecule"):
        tsf.sample_at(tmp_path / "toy", 1.5)


def test_command(path, tmp_path, capsys):
    file = tmp_path / "360K.dcd"
    given = f"at {path} --temperature 360 --output {file} --frames 300 --seed 4 --quiet"
    assert main([*given.split(), "--platform", "Reference"]) == 0
    printed = capsys.readouterr().out
    assert "300 frames at 360.00 K, of 100 walkers; accepted: " in printed
    assert "flow_independent 0." in printed
    assert "<U> (kJ/mol)" in printed
    record = json.loads(file.with_suffix(".json").read_text())
    assert (record["temperature_K"], record["seed"], record["n_frames"]) == (360.0, 4, 300)
    assert main(given.split()) == 2
    assert f"output: {file} exists" in capsys.readouterr().err


@pytest.mark.slow
def test_weighted_frames_new_draws_and_a_rung_agree(tmp_path):
    """|z| < 4 of U, P(phi > 0) and P(psi > 0) of alanine dipeptide, with a flow of a minute."""
    run(tmp_path / "run", preset("quick"), options=RunOptions(progress=False))
    measure = load_example("benchmarks/between_rungs.py").measure
    result = measure(tmp_path / "run", [350.0], tmp_path, 4000, 200, 1, progress=False)
    table = result["temperatures"]["350.00"]["quantities"]
    assert set(table) == {"energy_kJ_mol", "P(phi > 0)", "P(psi > 0)"}
    for name, entry in table.items():
        for pair in ("mbar_rung", "drawn_rung", "drawn_mbar"):
            assert abs(entry[f"z_{pair}"]) < 4, (name, pair)
