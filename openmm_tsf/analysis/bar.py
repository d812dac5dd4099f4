"""The free-energy difference of two Systems at one temperature, from samples of both.

Bennett, J. Comput. Phys. 22, 245 (1976), as the maximum-likelihood estimate of Shirts, Bair, Hooker
and Pande, Phys. Rev. Lett. 91, 140601 (2003). pymbar's estimate is the same; its error takes the
samples as independent, and it has no value where an energy is infinite. Here every sample has an
influence on the estimate, and the error is that of the means of these series, with their
correlation, as `openmm_tsf.analysis.uncertainty` computes it.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.special import expit  # type: ignore[import-untyped]

from openmm_tsf.analysis.uncertainty import estimate_mean

#: The estimate lies between the smallest and largest difference of energies; beyond them by this.
_MARGIN = 50.0


@dataclass(frozen=True)
class FreeEnergyDifference:
    """f_B - f_A = -ln(Z_B/Z_A) in kT, its standard error, and how far the ensembles overlap.

    The overlap is 1 where both are the same, and 0 where no sample is likely in both. The error is
    NaN where it is not known: a single sample, or no overlap.
    """

    value: float
    stderr: float
    overlap: float


def estimate_difference(work_in_a: npt.ArrayLike, work_in_b: npt.ArrayLike) -> FreeEnergyDifference:
    """Return the free-energy difference of two ensembles A and B at one temperature.

    Parameters
    ----------
    work_in_a, work_in_b
        The reduced energy of B less that of A, (U_B - U_A)/kT, of samples of A [n, W] and of B
        [m, V], iterations by independent walkers; +inf where only B, -inf where only A has no
        finite energy.

    Examples
    --------
    Two harmonic wells of which one is twice as stiff; the exact difference is ln(2)/2 = 0.347:

    >>> import numpy as np
    >>> from openmm_tsf.analysis.bar import estimate_difference
    >>> rng = np.random.default_rng(1)
    >>> a, b = rng.normal(size=(500, 8)), rng.normal(size=(500, 8)) / np.sqrt(2.0)
    >>> difference = estimate_difference(a**2 / 2, b**2 / 2)
    >>> abs(difference.value - np.log(2.0) / 2) < 3 * difference.stderr < 0.1
    True
    """
    a, b = (np.asarray(work, dtype=np.float64) for work in (work_in_a, work_in_b))
    for name, work in (("work_in_a", a), ("work_in_b", b)):
        if work.ndim != 2 or work.size == 0:
            raise ValueError(f"{name}: expected shape [n, W], got {work.shape}")
        if np.isnan(work).any():
            raise ValueError(f"{name}: expected numbers, got NaN")
    log_ratio = math.log(a.size / b.size)

    def membership(work: npt.NDArray[np.float64], f: float) -> npt.NDArray[np.float64]:
        """Return the probability that a sample was drawn in B."""
        result: npt.NDArray[np.float64] = expit(f - work - log_ratio)
        return result

    def score(f: float) -> float:
        return float(membership(a, f).sum() + membership(b, f).sum() - b.size)

    finite = np.concatenate([work[np.isfinite(work)] for work in (a, b)])
    if finite.size == 0:
        return FreeEnergyDifference(math.nan, math.nan, 0.0)
    low, high = finite.min() - abs(log_ratio) - _MARGIN, finite.max() + abs(log_ratio) + _MARGIN
    if score(low) * score(high) >= 0:  # infinite energies of all that one ensemble has
        return FreeEnergyDifference(math.nan, math.nan, 0.0)
    f = float(brentq(score, low, high, xtol=1e-12))
    in_a, in_b = membership(a, f), membership(b, f)
    information = float((in_a * (1 - in_a)).sum() + (in_b * (1 - in_b)).sum())
    overlap = information * (a.size + b.size) / (a.size * b.size)
    # A constant series, as of equal Systems or infinite energies, has no error of its own.
    errors = [
        part.size * estimate_mean(part).stderr if np.ptp(part) > 0 else 0.0 for part in (in_a, in_b)
    ]
    stderr = math.hypot(*errors) / information if information > 0 else math.nan
    return FreeEnergyDifference(f, stderr, overlap)
