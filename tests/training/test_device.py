"""Training with everything on one GPU: on a simulated one the CPU's bits, and one wait a step.

Tests marked ``gpu`` train on a real one, whose random numbers are others.
"""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials import MixedDoubleWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.slow_torsions import torsion_angles
from openmm_tsf.training import fit, path_objective
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.cells import count_by_cell, mean_where, sum_by_cell, true_rows
from openmm_tsf.training.langevin_relaxation import tuning_factor
from openmm_tsf.training.trainer import Trainer
from tests.support.exact_cases import the_tree
from tests.support.exact_tree import POSITIONS
from tests.support.path_training import SHORT, D, rough_flow, toy, two_basins
from tests.support.simulated_cuda import simulated_cuda

CHANGES = {"n_steps": 6, "validate_interval": 3, "basin_share": 0.4, "basin_weight": 0.6}
PATH = dataclasses.replace(SHORT, **CHANGES)
DIRECT = dataclasses.replace(PATH, estimator="direct", n_chains=0, optimizer="adam")
BOTH = pytest.mark.parametrize("settings", [PATH, DIRECT], ids=["path", "direct"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_host(flow):
    return [tensor.cpu() for tensor in flow.state_dict().values()]


def same_bits(one, other):
    return all(map(torch.equal, on_host(one), on_host(other)))


@BOTH
def test_a_training_has_the_bits_of_the_cpu(settings, monkeypatch):
    two_basins(monkeypatch)
    monkeypatch.setattr(path_objective, "RELAXATION_STEPS", 4)
    potential, data = toy()
    trained, results = [], []
    for device in ("cpu", "cuda"):
        with simulated_cuda() if device == "cuda" else nullcontext():
            flow = rough_flow("tsf").to(device)
            results.append(fit(flow, data, potential, settings=settings, seed=3, progress=False))
            assert (flow.device.type, flow.dtype) == (device, torch.float64)
            trained.append(flow)
            assert same_bits(*trained[:1], flow)
    assert results[0].history == results[1].history
    assert results[0].n_evaluations == results[1].n_evaluations


@BOTH
def test_a_step_waits_once(settings, monkeypatch):
    """Also the first one with draws, which relaxes the chains."""
    two_basins(monkeypatch)
    monkeypatch.setattr(path_objective, "RELAXATION_STEPS", 4)
    potential, data = toy()
    with simulated_cuda() as counts:
        trainer = Trainer(rough_flow("tsf").to("cuda"), [data], potential, settings, 3)
        for _ in range(4):
            counts.clear()
            trainer.train_step()
            assert counts.n_waits == 1, counts
            assert counts.n_launches > 50
    assert trainer.step == 4
    assert settings.mixing(3) > 0


def of_the_tree(device="cpu"):
    """A molecule of seven atoms, frames, and its potential on a device."""
    tree = the_tree()
    molecule = tsf.MolecularSystem(tree.system(), tree.topology, POSITIONS)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, 7, 3, dtype=torch.float64, generator=generator)
    data = MDDataset(torch.from_numpy(POSITIONS.copy()) + 1e-3 * noise, 300.0, molecule)
    return data, tsf.TorchPotential.from_system(molecule.system, device=device)


def test_a_step_on_a_molecule(monkeypatch):
    monkeypatch.setattr(path_objective, "RELAXATION_STEPS", 2)
    sizes = {"batch_size": 16, "kl_batch_size": 8, "n_chains": 8, "n_validation_draws": 4}
    settings = dataclasses.replace(PATH, temperatures=(300.0, 310.0), ramp=(0.0, 0.1), **sizes)
    networks = []
    for device in ("cpu", "cuda"):
        with simulated_cuda() if device == "cuda" else nullcontext() as counts:
            data, potential = of_the_tree(device)
            flow = tsf.TemperatureSteerableFlow.from_dataset(data, n_blocks=1, hidden=(4,), seed=2)
            trainer = Trainer(flow.to(device), [data], potential, settings, 3)
            for _ in range(2):
                if counts is not None:
                    counts.clear()
                trainer.train_step()
            assert counts is None or counts.n_waits == 1, counts
            assert trainer.validate().score < float("inf")
            networks.append(trainer.network)
            assert same_bits(networks[0], networks[-1])


def test_a_potential_on_another_device_is_refused():
    with simulated_cuda():
        data, potential = of_the_tree("cuda")
        flow = tsf.TemperatureSteerableFlow.from_dataset(data, n_blocks=1, hidden=(4,), seed=2)
        expected = "potential: expected one on cpu, the device of the flow, got one on cuda:0"
        with pytest.raises(ValueError, match=expected):
            fit(flow, data, potential, progress=False)
        energies = data[:5].with_energies(potential).energies
        assert energies.device.type == "cpu"


class Stop(Exception):
    pass


class Stopping(MixedDoubleWell):
    """A potential that raises after a number of calls."""

    calls_left = 10**9

    def energy(self, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Stop
        return super().energy(x)


def resume_on_gpu(settings, path, calls):
    """Return flows on the GPU: trained at once, and stopped after `calls` energies and resumed."""
    potential, data = toy()
    options = {"settings": settings, "seed": 3, "progress": False}
    flows = [rough_flow("tsf").to("cuda") for _ in range(3)]
    fit(flows[0], data, potential, **options)
    stopping = Stopping(potential.wells, potential.mixing)
    stopping.calls_left = calls
    options |= {"checkpoint_path": path, "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        fit(flows[1], data, stopping, **options)
    fit(flows[2], data, potential, resume=True, **options)
    return flows[0], flows[2]


def test_a_checkpoint_resumes_on_its_kind_of_device(tmp_path, monkeypatch):
    two_basins(monkeypatch)
    monkeypatch.setattr(path_objective, "RELAXATION_STEPS", 4)
    path, (potential, data) = tmp_path / "training.pt", toy()
    with simulated_cuda():
        whole, parts = resume_on_gpu(PATH, path, 10)
        assert same_bits(whole, parts)
    content = read_tensors(path, "training checkpoint")  # with the CPU's tensors only
    assert content["generator_device"] == "cuda"
    options = {"settings": PATH, "seed": 3, "checkpoint_path": path, "progress": False}
    with pytest.raises(
        ValueError, match="device: this training draws its random numbers on 'cuda'"
    ):
        fit(rough_flow("tsf"), data, potential, resume=True, **options)
    write_tensors(path, {key: content[key] for key in content if key != "generator_device"})
    with pytest.raises(ValueError, match="generator_device"):
        fit(rough_flow("tsf"), data, potential, resume=True, **options)


def test_basins_are_those_of_numpy(molecule):
    data = MDDataset.shipped(molecule, stride=40)
    basins = BasinPartition.find([data])
    labels = basins.labels(data.positions)
    x = data.positions.clone()
    x[3, 0, 0] = torch.nan
    with simulated_cuda() as counts:
        on_gpu = basins.labels(x.to("cuda"))
        counts.clear()
        assert torch.equal(basins.labels(x.to("cuda")).cpu(), on_gpu.cpu())
        assert counts.n_waits == 3  # the copies in this test
    assert on_gpu.cpu()[3] == basins.n_basins - 1
    assert int((on_gpu.cpu() != labels).sum()) <= 1
    phi = torsion_angles(data.positions.numpy(), {"phi": (4, 6, 8, 14)})["phi"]
    for basin in range(basins.n_basins - 1):  # phi > 0 is apart from phi < 0
        members = phi[labels.numpy() == basin]
        inside = (np.degrees(members) > 0) & (np.degrees(members) < 130)
        assert inside.all() or not inside.any()


def test_sums_have_the_bits_of_bincount():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(700, generator=generator, dtype=torch.float64)
    cell = torch.randint(0, 5, (700,), generator=generator)
    assert torch.equal(sum_by_cell(values, cell, 6), torch.bincount(cell, values, 6))
    assert torch.equal(count_by_cell(cell, 6), torch.bincount(cell, minlength=6))
    mask = values > 0
    assert torch.equal(true_rows(mask, int(mask.sum())), mask.nonzero().flatten())
    with simulated_cuda():
        there = mean_where(values.to("cuda"), mask.to("cuda")).cpu()
        factor = tuning_factor(values.to("cuda")).cpu()
    torch.testing.assert_close(there, mean_where(values, mask), rtol=1e-14, atol=0)
    torch.testing.assert_close(factor, tuning_factor(values), rtol=1e-14, atol=0)


@needs_gpu
@pytest.mark.gpu
@BOTH
def test_resume_has_the_same_bits_on_a_gpu(settings, tmp_path, monkeypatch):
    two_basins(monkeypatch)
    monkeypatch.setattr(path_objective, "RELAXATION_STEPS", 4)
    assert same_bits(*resume_on_gpu(settings, tmp_path / "training.pt", 10))


@needs_gpu
@pytest.mark.gpu
@BOTH
def test_a_flow_trained_on_a_gpu_samples_the_target(settings):
    """Reweighted draws have the exact mean energy, with a reverse ESS that training has raised."""
    potential, data = toy()
    changes = {"n_steps": 300, "validate_interval": 100, "n_validation_draws": 2000}
    settings = dataclasses.replace(settings, learning_rate=5e-3, **changes)
    flow = tsf.TemperatureSteerableFlow(D, D, 4, (32,), seed=2).to("cuda")
    result = fit(flow, data, potential, settings=settings, seed=3, progress=False)
    assert flow.device.type == "cuda"
    assert result.best.ess["1K"] > 1.5 * result.history[0].ess["1K"]
    n, temperature = 40_000, 1.0
    generator = torch.Generator(device="cuda").manual_seed(4)
    x, momenta, log_prob = flow.sample(n, temperature, generator)
    energy = potential.energy(x)
    log_weight = -energy / temperature - 0.5 * momenta.square().sum(1) / temperature - log_prob
    weight = torch.softmax(log_weight, 0)
    mean = (weight * energy).sum()
    error = (weight * (energy - mean)).square().sum().sqrt()
    assert abs(float((mean - potential.mean_energy(temperature)) / error)) < 4
