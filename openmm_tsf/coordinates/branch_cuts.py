"""Where to cut the circle of a torsion: at the emptiest angle of the data."""

import math

import torch
from torch import Tensor

from openmm_tsf.coordinates.geometry import TWO_PI

#: A gap in the data at least this wide (radians) is cut in its middle.
GAP = math.radians(20.0)
#: Width (radians) of the circular Gaussian that smooths the density of data without such a gap.
SMOOTHING = math.radians(8.0)
_BINS = 720


def emptiest_angles(angles: Tensor) -> Tensor:
    """Return the emptiest angle [n], in [-pi, pi), of each column of angles [F, n] in radians.

    The middle of the widest gap where it spans 20 degrees or more, else the minimum of the density
    smoothed over 8 degrees; float64.
    """
    if angles.ndim != 2 or len(angles) < 1:
        raise ValueError(f"angles: expected shape [F, n] with F >= 1, got {tuple(angles.shape)}")
    if not torch.isfinite(angles).all():
        raise ValueError("angles: expected finite numbers, got NaN or infinity")
    ordered = torch.remainder(angles.detach().to("cpu", torch.float64), TWO_PI).sort(dim=0).values
    gaps = torch.cat((ordered[1:], ordered[:1] + TWO_PI)) - ordered
    width, index = gaps.max(dim=0)
    middle = ordered.gather(0, index[None])[0] + 0.5 * width
    cuts = torch.where(width >= GAP, middle, _minimum_density(ordered))
    return torch.remainder(cuts + math.pi, TWO_PI) - math.pi


def _minimum_density(angles: Tensor) -> Tensor:
    """The minimum [n] of the smoothed circular density of angles [F, n] in [0, 2 pi]."""
    bins = (angles * (_BINS / TWO_PI)).long().remainder(_BINS)
    counts = torch.zeros(_BINS, angles.shape[1], dtype=torch.float64, device="cpu")
    counts.scatter_add_(0, bins, torch.ones_like(angles))
    # A Gaussian on the circle in Fourier space.
    harmonics = torch.arange(_BINS // 2 + 1, dtype=torch.float64, device="cpu")
    kernel = torch.exp(-0.5 * (harmonics * SMOOTHING) ** 2)
    smooth = torch.fft.irfft(torch.fft.rfft(counts, dim=0) * kernel[:, None], n=_BINS, dim=0)
    return (smooth.argmin(dim=0).to(torch.float64) + 0.5) * (TWO_PI / _BINS)
