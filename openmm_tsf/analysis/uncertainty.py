"""Means of correlated series of several walkers, with their standard errors."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import (
    MIN_CORRELATION_TIMES,
    MIN_EFFECTIVE_SAMPLES,
    Array,
    between_walker_stderr,
    group_means,
    logit_free_energy,
    n_eff,
    statistical_inefficiency,
)

#: Fewer walkers than this are cut into blocks for the spread between groups.
_MIN_GROUPS = 8


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over iterations and walkers with its standard error."""

    value: float
    #: The larger of the two errors below; NaN where neither is known (a constant series, or a
    #: single sample). NaN, unlike infinity, cannot pass a test of the form ``abs(z) < 3``.
    stderr: float
    #: From the statistical inefficiency: sqrt(variance g / (n W - g)).
    stderr_correlation: float
    #: From the spread of the walkers' means; of those of blocks where there are fewer than 8
    #: walkers.
    stderr_groups: float
    g: float  # statistical inefficiency in saved iterations; NaN for a constant series
    n_samples: int  # n times W, for MBAR times the number of rungs
    variance: float  # of the observable
    #: Degrees of freedom of stderr, for Student's quantiles; 0 where it is not known.
    dof: float = 0.0

    @classmethod
    def without_error(cls, value: float, n_samples: int, variance: float) -> "MeanEstimate":
        """Return a mean whose standard errors and g are not known."""
        nan = float("nan")
        return cls(value, nan, nan, nan, nan, n_samples, variance)

    @property
    def pair(self) -> tuple[float, float]:
        """The mean and its standard error."""
        return self.value, self.stderr

    @property
    def n_eff(self) -> float:
        """The effective samples of a probability, p(1-p)/SE²; 0 where the error is not known."""
        return n_eff(self.value, self.stderr)

    @property
    def n_independent(self) -> float:
        """The effective samples of any mean, variance/SE²; NaN where the error is not known."""
        return self.variance / self.stderr**2 if self.stderr > 0 else float("nan")

    def can_be_tested(self, n_iterations: int) -> bool:
        """Whether the error is good enough for tests, given the iterations of each walker.

        That is from 100 effective samples on, and walkers of 4 correlation times g: errors of fewer
        samples or shorter walkers are too small too often.
        """
        long_enough = n_iterations >= MIN_CORRELATION_TIMES * self.g
        return bool(long_enough and self.n_independent >= MIN_EFFECTIVE_SAMPLES)

    @property
    def free_energy(self) -> tuple[float, float]:
        """-ln[p/(1-p)] of a probability and its standard error, in kT."""
        return logit_free_energy(self.value, self.stderr)


def estimate_mean(series: npt.ArrayLike) -> MeanEstimate:
    """Return the mean of a series [n, W] of W independent walkers with its standard error.

    Two errors are computed, from the statistical inefficiency g and from the variance between
    walkers, and the larger one is reported: g is too small where the slow motion was seen only a
    few times.
    """
    values = np.asarray(series, dtype=np.float64)
    g = statistical_inefficiency(values)
    size = values.size
    if np.isnan(g) or size == 1:
        return MeanEstimate.without_error(float(values.mean()), size, float(values.var()))
    n_independent = size / g
    if n_independent > 1.0:
        # n - 1 effective samples: the variance is taken around the samples' own mean.
        from_correlation = float(np.sqrt(values.var() / (n_independent - 1.0)))
    else:
        from_correlation = float(values.std())
    groups = group_means(values, _MIN_GROUPS)
    from_groups = between_walker_stderr(groups[None])
    return MeanEstimate(
        value=float(values.mean()),
        stderr=float(np.nanmax([from_correlation, from_groups])),
        stderr_correlation=from_correlation,
        stderr_groups=from_groups,
        g=g,
        n_samples=size,
        variance=float(values.var()),
        dof=degrees_of_freedom(groups),
    )


def degrees_of_freedom(groups: npt.ArrayLike) -> float:
    """Return the degrees of freedom of the variance of G independent values, at most G - 1.

    2/(relative variance of the sample variance) = 2G/(kurtosis - 1): some G for a normal
    distribution, 2 where one value (a walker with the only long visit of a basin) makes up all of
    the variance. 0 where the variance is 0 or not known.
    """
    values = np.asarray(groups, dtype=np.float64)
    squares = (values - values.mean()) ** 2
    if values.size < 2 or not squares.any():
        return 0.0
    kurtosis = np.mean(squares**2) / squares.mean() ** 2
    if kurtosis <= 1.0:  # two values, or two equal clusters
        return float(values.size - 1)
    return float(min(2.0 * values.size / (kurtosis - 1.0), values.size - 1))


def covariance_of_means(series: npt.ArrayLike, stderr: npt.ArrayLike) -> Array:
    """Return the covariance [R, R] of the means of R series [n, W, R] with standard errors [R].

    The series were sampled together. Correlations come from the means of walkers (of blocks, where
    walkers are few), the diagonal from the standard errors. NaN where there are no more groups than
    series, or a series is constant.
    """
    means = group_means(series)
    errors = np.asarray(stderr, dtype=np.float64)
    n_rungs = errors.size
    if n_rungs == 1:
        return errors[:, None] ** 2
    spread = means.std(axis=0)
    if means.shape[0] <= n_rungs or (spread == 0).any():
        return np.full((n_rungs, n_rungs), np.nan)
    return np.corrcoef(means, rowvar=False) * np.outer(errors, errors)
