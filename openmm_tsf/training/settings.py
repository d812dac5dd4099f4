"""How a flow is trained: sizes and schedules."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import (
    check_between,
    check_choice,
    check_fields,
    check_float,
    check_int,
    check_positive,
    list_items,
)

_not_negative = partial(check_between, low=0, high=math.inf)
_fraction = partial(check_between, low=0, high=1)
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "n_steps batch_size validate_interval n_validation_draws": check_int,
    "kl_batch_size warmup_steps n_chains max_skipped": partial(check_int, least=0),
    "learning_rate max_grad_norm": check_positive,
    "final_learning_rate log_variance basin_balance": _not_negative,
    "lambda_max chain_share ema_decay basin_weight": _fraction,
    "weight_decay": partial(check_between, low=0, high=10),
    "basin_share": partial(check_between, low=0, high=0.5),
    "optimizer": partial(check_choice, allowed=("adam", "muon")),
    "estimator": partial(check_choice, allowed=("direct", "path")),
    "dtype": partial(check_choice, allowed=(torch.float32, torch.float64)),
}


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Attributes
    ----------
    n_steps
        Optimiser steps.
    batch_size, kl_batch_size
        Data frames, and flow draws, per step.
    optimizer, weight_decay
        ``"adam"``, or ``"muon"``, which makes the steps of weight matrices orthogonal
        (:mod:`openmm_tsf.training.optimizers`) and needs far fewer of them. Suitable learning
        rates are about ten times those of Adam; parameters that are not matrices are left to Adam
        at a tenth of the rate. Its steps subtract `weight_decay` times the learning rate of the
        weight matrices from them.
    learning_rate, final_learning_rate, warmup_steps
        Linear warm-up, then cosine decay.
    lambda_max, ramp, final_lambda
        The loss is (1 - lambda) ML + lambda KL; lambda is zero until the fraction ``ramp[0]`` of
        the steps, reaches `lambda_max` at ``ramp[1]`` and changes from there to `final_lambda` in
        equal steps (None: stays).
    temperatures
        Temperatures of the KL draws and of the validation, K; None means T_ref only.
    basin_share
        Fraction of the data that is spread evenly over the basins
        (:mod:`openmm_tsf.training.basins`), of frames and of chains, so that rare ones are learnt
        in detail; with chains, frames only until these are used. These chains also move by Langevin
        steps within their basin, at one evaluation each. The likelihood of these points makes the
        flow propose rare basins too often, for which the population terms make up in part. 0: as in
        the data.
    basin_weight
        For ``"path"``: weight of these points in the likelihood, that of the others being 1; in
        the term of `log_variance` all have the same.
    estimator
        ``"direct"``: the two losses differentiated directly (arXiv:2012.00429, eqs. 5 and 6).
        ``"path"``: their path gradients, which also use the forces at the data and have far less
        noise (:mod:`openmm_tsf.training.path_gradients`).
    n_chains, chain_share
        For ``"path"``: the number of Markov chains at each temperature to which the flow's draws
        are proposals, and their fraction of the data once lambda is at `lambda_max`: likelihood at
        temperatures without frames (:mod:`openmm_tsf.training.independence_chains`). At least twice
        the draws of a temperature in a step, or 0: none.
    log_variance, basin_balance
        For ``"path"``: weights of the terms that make ln(p/q) constant, over the data and, at the
        draws, from basin to basin: path gradients hardly see the populations of basins.
    ema_decay, max_grad_norm
        Decay of the running mean of the weights, which is validated and kept; gradients are clipped
        to this norm, and to twice their usual norm.
    validate_interval, n_validation_draws
        Steps between validations; draws per temperature in each.
    patience, max_skipped
        Stop after this number of validations without a better score (None never stops early);
        number of successive steps with non-finite gradients that are skipped without an error.
    dtype
        Precision of the network in training; the flow is returned in float64.

    Examples
    --------
    >>> from openmm_tsf import FitSettings
    >>> settings = FitSettings(n_steps=100, lambda_max=0.2, ramp=(0.2, 0.6))
    >>> [round(settings.mixing(step), 3) for step in (0, 40, 60)]
    [0.0, 0.1, 0.2]
    """

    n_steps: int = 6000
    batch_size: int = 256
    kl_batch_size: int = 64
    optimizer: str = "adam"
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 100
    lambda_max: float = 0.1
    ramp: tuple[float, float] = (0.3, 0.6)
    final_lambda: float | None = None
    temperatures: tuple[float, ...] | None = None
    basin_share: float = 0.0
    basin_weight: float = 1.0
    estimator: str = "direct"
    n_chains: int = 0
    chain_share: float = 0.5
    log_variance: float = 0.15
    basin_balance: float = 1.0
    ema_decay: float = 0.998
    max_grad_norm: float = 30.0
    validate_interval: int = 500
    n_validation_draws: int = 500
    patience: int | None = None
    max_skipped: int = 20
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        by_name = {name: check for names, check in _CHECKS.items() for name in names.split()}
        check_fields(self, **by_name)
        fractions = list_items(self.ramp) or ()
        if len(fractions) != 2:
            raise ValueError(f"ramp: expected two ascending fractions, got {self.ramp!r}")
        ramp = (check_float(fractions[0], "ramp"), check_float(fractions[1], "ramp"))
        if not 0 <= ramp[0] <= ramp[1]:
            raise ValueError(f"ramp: expected two ascending fractions, got {self.ramp!r}")
        object.__setattr__(self, "ramp", ramp)
        if self.lambda_max > 0:
            check_fields(self, kl_batch_size=check_int)
        self._check_estimator()
        if self.patience is not None:
            check_fields(self, patience=check_int)
        if self.final_lambda is not None:
            check_fields(self, final_lambda=_fraction)
            if self.final_lambda > 0 and self.lambda_max == 0:
                raise ValueError("final_lambda: expected None or 0 for lambda_max=0")
        if self.temperatures is not None:
            check_fields(self, temperatures=as_temperatures)

    def _check_estimator(self) -> None:
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay: expected 0 for Adam, got {self.weight_decay}")
        if self.estimator == "direct":
            if self.n_chains:
                chains = self.n_chains
                raise ValueError(f"n_chains: expected 0 for the direct estimator, got {chains}")
            return
        rungs = len(self.temperatures or (0,))
        n_draws = self.kl_batch_size // rungs  # of each temperature in a step
        if self.lambda_max > 0 and self.kl_batch_size < rungs:
            expected = f"at least one draw of each of {rungs} temperatures"
            raise ValueError(f"kl_batch_size: expected {expected}, got {self.kl_batch_size}")
        if self.n_chains and self.lambda_max == 0:
            raise ValueError("n_chains: expected 0 without draws (lambda_max=0), got chains")
        if 0 < self.n_chains < 2 * n_draws:  # half of them walk while the others get draws
            draws = f"{2 * n_draws}, twice the draws of each temperature in a step"
            raise ValueError(f"n_chains: expected at least {draws}, got {self.n_chains}")

    def mixing(self, step: int) -> float:
        """Return lambda at a step."""
        high = self.ramp[1] * self.n_steps
        if self.final_lambda is None or step <= high:
            return self.lambda_max * self.rise(step)
        fall = (step - high) / (self.n_steps - high)
        return self.lambda_max + fall * (self.final_lambda - self.lambda_max)

    def rise(self, step: int) -> float:
        """Return how far `ramp` has come at a step: from 0 to 1, where it stays."""
        low, high = (fraction * self.n_steps for fraction in self.ramp)
        if step < low:
            return 0.0
        return 1.0 if step >= high else (step - low) / (high - low)

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate at a step."""
        ends = self.learning_rate, self.final_learning_rate
        return scheduled_rate(step, self.n_steps, self.warmup_steps, *ends)

    def to_config(self) -> dict[str, Any]:
        """Return the settings as numbers, strings and lists."""
        config = {**asdict(self), "dtype": str(self.dtype)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def scheduled_rate(step: int, n_steps: int, warmup_steps: int, high: float, low: float) -> float:
    """Return the learning rate at a step: a linear rise to `high`, then cosine decay to `low`."""
    if step < warmup_steps:
        return high * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return low + cosine * (high - low)
