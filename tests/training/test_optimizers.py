"""Muon: the steps of matrices are nearly orthogonal and agree with torch.optim.Muon."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.potentials import GaussianWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training import FitSettings, fit
from openmm_tsf.training import optimizers as module
from openmm_tsf.training.optimizers import Muon, orthogonalize

SHAPES = [(16, 16), (24, 10), (10, 24), (16, 16)]


def random_matrices(seed=1, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, **options) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(5, 16, 16), (3, 24, 10), (3, 10, 24)])
def test_singular_values_are_near_one_and_vectors_kept(shape):
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = 0.05 + s / s.max()  # large enough for the polynomials
    matrices = 1e3 * u @ torch.diag_embed(s) @ vh
    inner = u.mT @ orthogonalize(matrices) @ vh.mT
    values = torch.diagonal(inner, dim1=1, dim2=2)
    assert float(values.min()) > 0.79
    assert float(values.max()) < 1.21
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert not orthogonalize(0 * matrices).any()


def test_steps_are_those_of_torch(monkeypatch):
    """With its polynomial; torch computes in bfloat16, whose numbers differ by 0.8 %."""
    monkeypatch.setattr(module, "QUINTICS", 5 * [(3.4445, -4.7750, 2.0315)])
    changes = []
    options = {"weight_decay": 0.0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    for make in (Muon, partial(torch.optim.Muon, **options)):
        parameters = [nn.Parameter(x.clone()) for x in random_matrices()]
        optimizer = make(parameters, lr=0.01)
        for seed in range(5):
            for parameter, gradient in zip(parameters, random_matrices(10 + seed), strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        start = random_matrices()
        changes.append([p.detach() - x for p, x in zip(parameters, start, strict=True)])
    for step, expected in zip(*changes, strict=True):
        assert float((step - expected).norm() / expected.norm()) < 0.02


def steps_of_matrices(parallel):
    parameters = [nn.Parameter(x.clone()) for x in random_matrices()]
    optimizer = Muon(parameters, lr=0.01, weight_decay=0.1, parallel=parallel)
    for seed in range(3):
        for parameter, gradient in zip(parameters, random_matrices(10 + seed), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return parameters


def test_two_threads_make_the_same_steps():
    """In a process of its own: what other tests do to a thread of torch stays in theirs."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests.training.test_optimizers import steps_of_matrices as steps\n"
        "assert all(map(torch.equal, steps(False), steps(True)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_every_parameter_has_one_optimizer():
    network = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3))
    optimizers = module.make_optimizers(network, "muon", 0.1)
    module.set_learning_rate(optimizers, 0.02)
    rates = {
        parameter: group["lr"]
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(rates) == set(network.parameters())
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.02 * (1 if parameter.ndim == 2 else module.VECTOR_RATE))
    assert [len(o.param_groups[0]["params"]) for o in optimizers.values()] == [2, 2]
    assert list(module.make_optimizers(network, "adam", 0.1)) == ["adam"]


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"expected matrices, got one of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="closure: expected none"):
        Muon([nn.Parameter(torch.zeros(3, 2))], lr=0.1).step(lambda: None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda muon: muon["state"].pop(0),
        lambda muon: muon["state"].clear(),
        lambda muon: muon["state"][0].pop("momentum"),
        lambda muon: muon["param_groups"][0].pop("momentum"),
        lambda muon: muon["state"][0]["momentum"].fill_(float("nan")),
    ],
)
def test_damaged_momentum_is_refused(tmp_path, damage):
    path, potential = tmp_path / "training.pt", GaussianWell(torch.eye(2, dtype=torch.float64))
    data = MDDataset(potential.sample(200, 1.0, torch.Generator().manual_seed(1)), 1.0)
    sizes = {"n_steps": 4, "batch_size": 16, "validate_interval": 2}
    settings = FitSettings(**sizes, lambda_max=0.0, optimizer="muon")
    options = {"settings": settings, "checkpoint_path": path, "progress": False}
    fit(TemperatureSteerableFlow(2, 2, 1, (8,), seed=1), data, **options)
    content = read_tensors(path, "training checkpoint")
    damage(content["optimizers"]["muon"])
    write_tensors(path, content)
    with pytest.raises(ValueError, match=r"training\.pt: not a readable training checkpoint"):
        fit(TemperatureSteerableFlow(2, 2, 1, (8,), seed=1), data, resume=True, **options)
