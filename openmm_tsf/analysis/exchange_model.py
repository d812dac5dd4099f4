"""How long replica exchange takes to average over a state that replicas enter rarely.

A minute of replica exchange sees a rare state of the lowest rung once or never, but at the hot
rungs many passages in and out. Replicas are modelled as independent Markov chains over rung,
direction and state: between swaps a replica passes in or out of the state with the rates of its
rung, which follow Arrhenius's law over the ladder; swaps alternate between even and odd pairs, so
that an accepted replica goes on in its direction and a rejected one turns (Syed et al., J. R. Stat.
Soc. B 84, 321 (2022)). The asymptotic variance of the time average at one rung is that of this
chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.statistics import Array

#: Activation energies of torsions in kJ/mol, before any passage is seen.
_BARRIER, _BARRIER_SPREAD = 20.0, 15.0
_NEWTON_STEPS = 200


@dataclass(frozen=True)
class Passages:
    """The passages of replicas out of (column 0) and into (column 1) the complement of a state.

    Attributes
    ----------
    exposure
        The iterations that replicas spent outside (0) and inside (1) the state, by rung [R, 2].
    counts
        Passages from outside to inside (0), and back (1), by rung [R, 2].
    betas
        1/kT [R] of the rungs in mol/kJ.

    Examples
    --------
    >>> import numpy as np
    >>> from openmm_tsf.analysis.exchange_model import Passages
    >>> inside = np.array([0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0], dtype=bool)[:, None, None]
    >>> replica = np.zeros((12, 1, 1), dtype=int)
    >>> Passages.count(inside, replica, [0.4], shortest=2).counts  # one iteration is no visit
    array([[1., 1.]])
    """

    exposure: Array
    counts: Array
    betas: Array

    @classmethod
    def count(
        cls, inside: npt.ArrayLike, replica: npt.ArrayLike, betas: npt.ArrayLike, shortest: int = 1
    ) -> "Passages":
        """Count passages in truth values [n, W, R] at rungs, with the replica [n, W, R] there.

        What a replica does for fewer than `shortest` iterations is no passage but a recrossing.
        """
        truth, labels = np.asarray(inside), np.asarray(replica)
        if truth.dtype != np.bool_ or truth.ndim != 3 or truth.shape != labels.shape:
            raise ValueError(
                f"inside: expected truth values [n, W, R] of the shape of replica {labels.shape}, "
                f"got {truth.dtype} of shape {truth.shape}"
            )
        n, _, n_rungs = truth.shape
        rung = np.argsort(labels, axis=2)  # of each replica
        states = np.take_along_axis(truth, rung, axis=2).reshape(n, -1)
        states = np.stack([_without_recrossings(s, shortest) for s in states.T], axis=1)
        before, after = states[:-1].ravel(), states[1:].ravel()
        where = rung.reshape(n, -1)[:-1].ravel()
        columns = 2 * where + before
        exposure = np.bincount(columns, minlength=2 * n_rungs)
        counts = np.bincount(columns[before != after], minlength=2 * n_rungs)
        shape = (n_rungs, 2)
        numbers = (exposure.reshape(shape).astype(float), counts.reshape(shape).astype(float))
        return cls(*numbers, np.asarray(betas, dtype=np.float64))

    @classmethod
    def by_walker(
        cls, inside: npt.ArrayLike, replica: npt.ArrayLike, betas: npt.ArrayLike, shortest: int = 1
    ) -> "list[Passages]":
        """Count the passages of each walker; see `count`."""
        truth, labels = np.asarray(inside), np.asarray(replica)
        return [
            cls.count(truth[:, w : w + 1], labels[:, w : w + 1], betas, shortest)
            for w in range(truth.shape[1])
        ]

    @classmethod
    def total(cls, parts: "Sequence[Passages]") -> "Passages":
        """Return the sum of passages at the same temperatures."""
        exposure = np.sum([each.exposure for each in parts], axis=0)
        return cls(exposure, np.sum([each.counts for each in parts], axis=0), parts[0].betas)

    def __add__(self, other: "Passages") -> "Passages":
        """Return the passages of both, rung by rung."""
        names = ("exposure", "counts", "betas")
        return Passages(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))

    @property
    def fewest(self) -> int:
        """The number of passages in the rarer direction."""
        return int(self.counts.sum(axis=0).min())

    def energy_difference(self) -> float:
        """Return ⟨U⟩ inside less outside in kJ/mol, from where replicas of either kind are.

        Replicas are sorted by the ladder much sooner than they pass: inside, a fraction
        proportional to exp(-ΔU/kT) of them is at each rung. By logistic regression; 0 for a single
        rung or a state that no replica was in.
        """
        x = self.betas - self.betas.mean()
        total = self.exposure.sum(axis=1)
        if len(x) == 1 or (self.exposure.sum(axis=0) == 0).any():
            return 0.0
        level, slope = _logit(self.exposure[:, 1].sum() / total.sum()), 0.0
        for _ in range(_NEWTON_STEPS):
            p = 1.0 / (1.0 + np.exp(-np.clip(level + slope * x, -50.0, 50.0)))
            residual, spread = self.exposure[:, 1] - total * p, total * p * (1.0 - p)
            gradient = np.array([residual.sum(), residual @ x])
            hessian = np.array([[spread.sum(), spread @ x], [spread @ x, spread @ x**2]])
            step = np.linalg.solve(hessian, gradient)
            step *= min(1.0, 1.0 / max(np.abs(step * [1.0, np.abs(x).max()]).max(), 1e-300))
            level, slope = level + step[0], slope + step[1]
            if np.abs(step * [1.0, np.abs(x).max()]).max() < 1e-9:
                break
        return -float(slope)

    def rates(self, betas: npt.ArrayLike, energy_difference: float) -> Array:
        """Return the rates [R, 2] in and out of the state per iteration at temperatures 1/kT [R].

        Poisson regression on the counts of all rungs by Arrhenius's law. The activation energies
        differ by ⟨U⟩ inside less outside, and are held near those of torsions where passages are
        few. Where there is none, in or out, half of one is taken.
        """
        targets, reference = np.asarray(betas, dtype=np.float64), float(self.betas.min())
        x, offset = self.betas - reference, np.array([[energy_difference, 0.0]])
        counts = self.counts + 0.5 * (self.counts.sum(axis=0) == 0) / len(x)
        exposure = np.maximum(self.exposure, 1e-12)
        # ln k_in = a - (E + ΔU) x, ln k_out = b - E x.
        levels = np.log(counts.sum(axis=0) / exposure.sum(axis=0))
        barrier, steepest = _BARRIER, max(float(np.abs(x).max()), 1e-12)
        for _ in range(_NEWTON_STEPS):
            expected = exposure * np.exp(levels - (barrier + offset) * x[:, None])
            residual = counts - expected
            prior = (barrier - _BARRIER) / _BARRIER_SPREAD**2
            gradient = np.append(residual.sum(axis=0), -float((residual.T @ x).sum()) - prior)
            first, second = expected.sum(axis=0), expected.T @ x
            hessian = np.diag(np.append(first, (expected.T @ x**2).sum() + _BARRIER_SPREAD**-2))
            hessian[:2, 2] = hessian[2, :2] = -second
            step = np.linalg.solve(hessian, gradient)
            size = np.abs(step * [1.0, 1.0, steepest]).max()
            step *= min(1.0, 1.0 / max(size, 1e-300))
            levels, barrier = levels + step[:2], barrier + step[2]
            if size < 1e-9:
                break
        return np.asarray(np.exp(levels - (barrier + offset) * (targets[:, None] - reference)))


@dataclass(frozen=True)
class PassageSamples:
    """Passages in and out of a state by independent walkers, on a ladder and above it."""

    ladder: Sequence[Passages]
    above: Sequence[Passages]

    @property
    def total(self) -> Passages:
        """The passages of all walkers."""
        return Passages.total(self.ladder) + Passages.total(self.above)

    def rates(self, betas: npt.ArrayLike) -> Array:
        """Return the rates [R, 2] in and out of the state at temperatures 1/kT [R]."""
        return self.total.rates(betas, Passages.total(self.ladder).energy_difference())

    def resampled(self, rng: np.random.Generator) -> "PassageSamples":
        """Return as many walkers, drawn with replacement."""
        drawn = (
            [parts[k] for k in rng.integers(len(parts), size=len(parts))]
            for parts in (self.ladder, self.above)
        )
        return PassageSamples(*drawn)


def _logit(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def _without_recrossings(states: npt.NDArray[np.bool_], shortest: int) -> npt.NDArray[np.bool_]:
    """Return truth values [n] in which pieces that are too short continue the one before."""
    starts = np.flatnonzero(np.concatenate([[True], states[1:] != states[:-1]]))
    lengths = np.diff(np.append(starts, len(states)))
    kept = starts[lengths >= shortest]
    if kept.size == 0:
        return np.full(len(states), states[starts[np.argmax(lengths)]])
    last = np.searchsorted(kept, np.arange(len(states)), side="right") - 1
    return np.asarray(states[kept[np.maximum(last, 0)]])


def populations(rates: npt.ArrayLike) -> Array:
    """Return the populations [R] of the state at each rung from rates [R, 2]."""
    values = np.asarray(rates, dtype=np.float64)
    return np.asarray(values[:, 0] / values.sum(axis=1))


def state_inefficiency(
    rates: npt.ArrayLike, rejections: npt.ArrayLike, mixing: float = 1.0, rung: int = 0
) -> float:
    """Return g of the truth value of a state at one rung, in iterations.

    A run of n iterations has n/g independent samples of it for each walker, that is for one replica
    at every rung.

    Parameters
    ----------
    rates
        [R, 2]: the probabilities to pass in and out of the state in an iteration at each rung.
    rejections
        [R-1]: of swaps of each pair of neighbours, every second iteration.
    mixing
        The round trips in proportion to those that these rejections allow: energies that are
        correlated from swap to swap slow replicas down.
    rung
        Whose samples are used.

    Examples
    --------
    Of a single rung g = 2/(k_in + k_out), less a half at either end:

    >>> import numpy as np
    >>> from openmm_tsf.analysis.exchange_model import state_inefficiency
    >>> round(state_inefficiency([[0.001, 0.009]], []))
    199
    >>> hot = [[0.001, 0.009], [0.1, 0.9]]  # where replicas forget at once
    >>> state_inefficiency(hot, [0.5]) < 20
    True
    """
    k, r = np.asarray(rates, dtype=np.float64), np.asarray(rejections, dtype=np.float64)
    n_rungs = len(k)
    if k.shape != (n_rungs, 2) or r.shape != (n_rungs - 1,):
        raise ValueError(f"rates, rejections: expected [R, 2] and [R-1], got {k.shape}, {r.shape}")
    k = k / np.maximum(1.0, k.sum(axis=1, keepdims=True))  # as often as in every iteration
    p = populations(k)
    inside = np.stack([1.0 - p, p], axis=1)  # [R, 2]
    stationary = np.repeat(inside[:, None], 2, axis=1).ravel() / (2 * n_rungs)
    transition = _passing(k) @ _swapping(inside, r, mixing)
    centred = np.zeros((n_rungs, 2, 2))
    centred[rung, :, 0], centred[rung, :, 1] = -p[rung], 1.0 - p[rung]
    f = centred.ravel()
    ones = np.ones(len(f))
    fundamental = np.eye(len(f)) - transition + np.outer(ones, stationary)
    response = np.linalg.solve(fundamental, f)
    variance = n_rungs * float(stationary @ (2.0 * f * response - f * f))
    return variance / float(p[rung] * (1.0 - p[rung]))


def simulate_swaps(
    rejections: npt.ArrayLike, n: int, n_walkers: int, seed: int = 1
) -> npt.NDArray[np.int64]:
    """Return replicas [n, W, R] at rungs whose swaps are rejected independently of each other.

    Round trips that are completed within a window of n iterations are compared with those of the
    same window here; they begin at the rungs where the replicas of a simulation start.
    """
    r = np.asarray(rejections, dtype=np.float64)
    rng, n_rungs = np.random.default_rng(seed), len(r) + 1
    labels = np.tile(np.arange(n_rungs), (n_walkers, 1))
    result = np.empty((n, n_walkers, n_rungs), dtype=np.int64)
    for t in range(n):
        for k in range(t % 2, n_rungs - 1, 2):
            rows = np.flatnonzero(rng.random(n_walkers) >= r[k])
            labels[rows, k], labels[rows, k + 1] = labels[rows, k + 1], labels[rows, k]
        result[t] = labels
    return result


def _passing(rates: Array) -> Array:
    """Return the transition matrix over [rung, direction, state] of passages in an iteration."""
    n_rungs = len(rates)
    matrix = np.zeros((n_rungs, 2, 2, n_rungs, 2, 2))
    for k, (enter, leave) in enumerate(rates):
        for d in (0, 1):
            matrix[k, d, :, k, d, :] = [[1.0 - enter, enter], [leave, 1.0 - leave]]
    return matrix.reshape(4 * n_rungs, 4 * n_rungs)


def _swapping(inside: Array, rejections: Array, mixing: float) -> Array:
    """Return that of swaps, which keep the state, and its populations at every rung."""
    n_rungs = len(inside)
    matrix = np.zeros((n_rungs, 2, 2, n_rungs, 2, 2))
    for k in range(n_rungs):
        for d, step in ((0, 1), (1, -1)):
            other = k + step
            for state in (0, 1):
                accepted = 0.0
                if 0 <= other < n_rungs:
                    accepted = 1.0 - rejections[min(k, other)]
                    accepted *= min(1.0, inside[other, state] / inside[k, state])
                    matrix[k, d, state, other, d, state] = accepted
                matrix[k, d, state, k, 1 - d, state] = 1.0 - accepted
    size = 4 * n_rungs
    return mixing * matrix.reshape(size, size) + (1.0 - mixing) * np.eye(size)
