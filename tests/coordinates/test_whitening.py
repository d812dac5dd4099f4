"""Whitening: exact in both directions, constant Jacobian, and likelihood of held-out data."""

import json
import math

import pytest
import torch
from torch import Tensor

from openmm_tsf.coordinates import Whitening
from openmm_tsf.coordinates.whitening import MODES

KINDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])


def frames(n: int = 4000, seed: int = 0) -> Tensor:
    """Correlated stiff coordinates that depend on two torsions, scales from 1e-5 to 1."""
    generator = torch.Generator().manual_seed(seed)
    torsions = math.pi * (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1)
    noise = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    ones = torch.ones(6, 6, dtype=torch.float64)
    mixing = ones.diag().diag() + 0.3 * ones.tril(-1)
    stiff = noise @ mixing.T
    stiff[:, 2] += 3.0 * torsions[:, 0].sin()
    stiff[:, 5] += 2.0 * (2 * torsions[:, 1]).cos()
    scale = torch.tensor([1e-5, 1e-4, 0.01, 0.02, 0.05, 0.1], dtype=torch.float64)
    stiff = stiff * scale + 5 * scale
    return torch.cat((stiff[:, :5], torsions, stiff[:, 5:]), dim=1)


@pytest.mark.parametrize("mode", MODES)
class TestEveryMode:
    def test_round_trip_mean_and_variance(self, mode):
        u = frames()
        whitening = Whitening.fit(u, KINDS, mode)
        y, inverse_log_det = whitening.inverse_and_log_det(u)
        back, log_det = whitening.forward_and_log_det(y)
        torch.testing.assert_close(back, u, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(log_det, -inverse_log_det)
        again, _ = whitening.inverse_and_log_det(back)
        torch.testing.assert_close(again, y, rtol=0, atol=1e-10)
        torch.testing.assert_close(y.mean(0), torch.zeros(8).double(), rtol=0, atol=0.02)
        torch.testing.assert_close(y.std(0), torch.ones(8).double(), rtol=0, atol=0.02)
        if mode == "full":
            unit = torch.eye(8).double()
            torch.testing.assert_close(y.T.cov(correction=0), unit, rtol=0, atol=1e-2)

    def test_log_det_is_constant_and_autograds(self, mode):
        whitening = Whitening.fit(frames(), KINDS, mode)
        assert whitening.is_constant_log_det
        generator = torch.Generator().manual_seed(1)
        points = 2 * torch.randn(4, 8, dtype=torch.float64, generator=generator)
        _, log_det = whitening.forward_and_log_det(points)
        assert log_det.shape == (4,)
        for y, expected in zip(points, log_det, strict=True):
            jacobian = torch.func.jacrev(lambda y: whitening.forward_and_log_det(y[None])[0][0])(y)
            measured = torch.linalg.slogdet(jacobian).logabsdet
            torch.testing.assert_close(measured, expected, rtol=0, atol=1e-9)

    def test_gradients(self, mode):
        u = frames(50)
        scale = u.std(0)
        whitening = Whitening.fit(u / scale, KINDS, mode)
        v = (u / scale)[:3].clone().requires_grad_()
        assert torch.autograd.gradcheck(whitening.inverse_and_log_det, v)
        assert torch.autograd.gradcheck(whitening.forward_and_log_det, v)

    def test_config_and_state(self, mode):
        u = frames(500)
        whitening = Whitening.fit(u, KINDS, mode)
        again = Whitening.from_config(json.loads(json.dumps(whitening.to_config())))
        y, _ = whitening.inverse_and_log_det(u)
        assert torch.equal(again.inverse_and_log_det(u)[0], y)
        results = again.forward_and_log_det(y), whitening.forward_and_log_det(y)
        assert all(map(torch.equal, *results))
        other = Whitening.fit(frames(500, seed=9), KINDS, mode)
        other.load_state_dict(whitening.state_dict())
        assert torch.equal(other.inverse_and_log_det(u)[0], y)

    def test_single_precision(self, mode):
        whitening = Whitening.fit(frames().float(), KINDS, mode)
        u, log_det = whitening.forward_and_log_det(torch.zeros(2, 8))
        assert u.dtype == log_det.dtype == torch.float32


def test_conditional_removes_what_the_torsions_explain():
    u, held_out = frames(seed=0), frames(seed=1)

    def nll(mode: str) -> float:
        y, log_det = Whitening.fit(u, KINDS, mode).inverse_and_log_det(held_out)
        return float((0.5 * y.square().sum(1) - log_det).mean())

    # Explained: 0.5 ln of the variance ratios 5.5+ and 3+ of two coordinates.
    assert nll("conditional") < nll("full") - 1.0
    assert nll("full") < nll("diagonal")
    whitening = Whitening.fit(u, KINDS)
    assert whitening.mode == "conditional"
    y, _ = whitening.inverse_and_log_det(held_out)
    residual = torch.corrcoef(y.T)
    torsions = held_out[:, 5].sin()
    correlation = torch.corrcoef(torch.stack((y[:, 2], torsions)))[0, 1]
    assert abs(float(correlation)) * math.sqrt(len(y)) < 4
    assert (residual - torch.eye(8)).abs().max() < 0.08


def test_soft_torsions_are_only_shifted_and_scaled():
    whitening = Whitening.fit(frames(), KINDS)
    y = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = y.clone()
    other[:, KINDS != 2] += 1.0
    u, _ = whitening.forward_and_log_det(y)
    moved, _ = whitening.forward_and_log_det(other)
    assert torch.equal(u[:, KINDS == 2], moved[:, KINDS == 2])


@pytest.mark.parametrize("mode", MODES)
def test_constant_coordinates_are_refused(mode):
    u = frames()
    u[:, 3] = 0.1
    with pytest.raises(ValueError, match="coordinate 3 does not vary"):
        Whitening.fit(u, KINDS, mode)


def test_bad_arguments_are_refused():
    u, dependent = frames(100), frames()
    dependent[:, 4] = dependent[:, 0] * 10 - dependent[:, 2]
    for message, *arguments in (
        ("coordinate 4 is a linear function", dependent, KINDS),
        ("mode: expected one of", u, KINDS, "pca"),
        ("harmonics: expected 0 or more", u, KINDS, "conditional", -1),
        ("at least 9 frames", u[:8], KINDS),
        ("u, kinds: expected shapes", u, KINDS[:3]),
        ("u: expected finite", u * math.nan, KINDS),
    ):
        with pytest.raises(ValueError, match=message):
            Whitening.fit(*arguments)
    whitening = Whitening.fit(u, KINDS)
    with pytest.raises(TypeError, match=r"y: expected dtype torch\.float64"):
        whitening.forward_and_log_det(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"u: expected shape \[B, 8\]"):
        whitening.inverse_and_log_det(torch.zeros(2, 7).double())
