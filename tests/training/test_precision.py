"""Training in lower precision: its energies, gradients and records."""

import dataclasses
import logging

import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.training import FitSettings, fit, settings
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.losses import whiten
from openmm_tsf.training.target import Target, trains_in_single_precision
from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.tensors import multiplies_bfloat16
from tests.support.path_training import SHORT, rough_flow, toy, weights


def test_energies_in_float32_are_those_in_float64():
    """Far below a kT, and gradients to float32's rounding; no energy is no gradient."""
    molecule = tsf.systems.alanine_dipeptide()
    frames = tsf.MDDataset.shipped(molecule, stride=100)
    flow = tsf.TemperatureSteerableFlow.from_dataset(frames, n_blocks=1, hidden=(4,), overlap=True)
    potential, basins = molecule.potential(), BasinPartition.find([frames])
    y = whiten(flow, frames.positions[:20], 1.0, torch.Generator().manual_seed(1))[0]
    y[0] = torch.nan
    tau = torch.full((len(y),), 0.5, dtype=torch.float64)
    exact, single = (
        Points.at(Target(flow, potential, basins, 1e4, is_single), y, tau)
        for is_single in (False, True)
    )
    error = (single.reduced_energy - exact.reduced_energy)[1:].abs()
    assert 0 < float(error.max()) < 1e-3
    difference = (single.gradient - exact.gradient)[1:].norm(dim=1)
    assert bool((difference < 1e-4 * exact.gradient[1:].norm(dim=1)).all())
    assert not torch.isfinite(single.reduced_energy[0])
    assert torch.equal(single.gradient[0].isnan(), exact.gradient[0].isnan())
    assert trains_in_single_precision(potential, torch.float32)
    assert not trains_in_single_precision(potential, torch.float64)
    assert not trains_in_single_precision(toy()[0], torch.float32)


def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch):
    chosen = FitSettings(bfloat16_gradients=True)
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(settings, "multiplies_bfloat16", lambda native=native: native)
        assert chosen.gradient_dtype == expected
        assert FitSettings().gradient_dtype == torch.float32
    with pytest.raises(ValueError, match=r"bfloat16_gradients: expected False for torch.float64"):
        FitSettings(bfloat16_gradients=True, dtype=torch.float64)


@pytest.mark.parametrize(("capabilities", "expected"), [({"avx512_bf16": True}, True), ({}, False)])
def test_the_processor_is_asked(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    multiplies_bfloat16.cache_clear()
    try:
        assert multiplies_bfloat16() is expected
    finally:
        multiplies_bfloat16.cache_clear()


def test_another_processor_is_told_of(monkeypatch, tmp_path, caplog):
    """Emulated where this one lacks bfloat16, with the same rounding."""
    potential, data = toy()
    chosen = dataclasses.replace(SHORT, n_steps=20, bfloat16_gradients=True)
    options = {"settings": chosen, "seed": 3, "progress": False, "resume": True}
    trained = []
    for native in (True, False):
        monkeypatch.setattr(settings, "multiplies_bfloat16", lambda native=native: native)
        flow = rough_flow("tsf")
        fit(flow, data, potential, checkpoint_path=tmp_path / f"{native}.pt", **options)
        trained.append(weights(flow))
    change = (trained[0] - trained[1]).norm() / (trained[1] - weights(rough_flow("tsf"))).norm()
    assert 0 < float(change) < 0.2
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, logger="openmm_tsf"):
        fit(flow, data, potential, checkpoint_path=tmp_path / "True.pt", **options)
    (message,) = caplog.messages
    assert "gradients in torch.bfloat16, continued on this processor in torch.float32" in message
    assert torch.equal(weights(flow), trained[0])
