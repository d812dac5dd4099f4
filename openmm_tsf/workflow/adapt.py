"""Adaptive Markov chain Monte Carlo: a flow learns from the chains to which it proposes.

Local moves and proposals of the flow alternate, and after each iteration the flow makes steps of
maximum likelihood on the chains' states (Gabrié, Rotskoff and Vanden-Eijnden, PNAS 119,
e2109420119 (2022), arXiv:2105.12603). The chains have no stationary distribution meanwhile: their
states depend on the past through the flow. Estimates come from what the sampler does afterwards.
"""

import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.sampling.consistency import with_members
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.sampling.tempering import ParallelTempering
from openmm_tsf.training.losses import (
    draw_normal,
    marginal_nll_bound,
    negative_log_likelihood,
    whiten,
)
from openmm_tsf.training.optimizers import make_optimizers, set_learning_rate
from openmm_tsf.training.settings import scheduled_rate
from openmm_tsf.utils.random import Purpose, derive_seed, make_generator
from openmm_tsf.utils.validation import (
    check_between,
    check_choice,
    check_fields,
    check_int,
    check_positive,
)

_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "n_iterations memory batch_size ess_interval": check_int,
    "n_gradient_steps warmup_steps n_ess_draws max_skipped": partial(check_int, least=0),
    "learning_rate max_grad_norm": check_positive,
    "final_learning_rate": partial(check_between, low=0, high=math.inf),
    "optimizer": partial(check_choice, allowed=("adam", "muon")),
}


@dataclass(frozen=True)
class AdaptSettings:
    """How a flow is adapted to chains.

    Attributes
    ----------
    n_iterations
        Iterations of the sampler.
    n_gradient_steps
        Steps of the optimiser after each of them; 0 leaves the flow as it is.
    memory, batch_size
        The states of so many last iterations are data, of which each step takes at most so many,
        at random. ``memory=1`` trains on the present states alone, which suits many walkers; a
        single walker needs a longer memory.
    optimizer, learning_rate, final_learning_rate, warmup_steps, max_grad_norm, max_skipped
        As in :class:`openmm_tsf.FitSettings`; the schedule is of gradient steps.
    ess_interval, n_ess_draws
        Iterations between two measurements of the effective sample size, and the flow's draws at
        each temperature in each of them, one energy each; 0: none.

    Examples
    --------
    >>> from openmm_tsf import AdaptSettings
    >>> AdaptSettings(n_iterations=300, memory=1).learning_rate
    0.002
    """

    n_iterations: int = 1000
    n_gradient_steps: int = 1
    memory: int = 20
    batch_size: int = 256
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 20
    max_grad_norm: float = 30.0
    max_skipped: int = 20
    ess_interval: int = 50
    n_ess_draws: int = 500

    def __post_init__(self) -> None:
        check_fields(self, **{n: check for names, check in _CHECKS.items() for n in names.split()})


@dataclass(frozen=True)
class AdaptResult:
    """What happened while a flow was adapted; no estimate may use it.

    Attributes
    ----------
    flow
        The sampler's flow, which does not change any more.
    states : Tensor
        The last states of the walkers [W, R, *event], with which the sampler goes on.
    loss
        Mean NLL of the batches of each iteration, in nats (a bound on the marginal's where the
        flow has momenta); NaN without a gradient step.
    acceptance : dict of str to Tensor
        Of each kernel in each iteration, [n_iterations, R] for counts per rung; NaN where nothing
        was proposed.
    ess_iterations, ess
        Iterations completed when the effective sample size of the flow's draws was measured, and
        the fraction at each temperature. It does not see modes that the flow never draws.
    n_evaluations, n_skipped, wall_seconds
        Energies, or energies with forces, of chains and of draws; gradient steps skipped as not
        finite; time.

    Examples
    --------
    Of two iterations; :func:`adapt` has a whole example.

    >>> import torch
    >>> from openmm_tsf import AdaptResult, RealNVPFlow
    >>> rates = {"flow_independent": torch.tensor([[0.1], [0.2]])}
    >>> flow, states = RealNVPFlow(2, 0, n_blocks=1, hidden=(8,)), torch.zeros(8, 1, 2)
    >>> losses, ess = [2.6, 2.4], [(0.1,), (0.3,)]
    >>> result = AdaptResult(flow, states, losses, rates, [0, 2], ess, 1032, 0, 0.1)
    >>> result.loss[-1], result.ess[-1]
    (2.4, (0.3,))
    """

    flow: AugmentedFlow
    states: Tensor = field(repr=False)
    loss: list[float] = field(repr=False)
    acceptance: dict[str, Tensor] = field(repr=False)
    ess_iterations: list[int] = field(repr=False)
    ess: list[tuple[float, ...]] = field(repr=False)
    n_evaluations: int
    n_skipped: int
    wall_seconds: float


def adapt(
    sampler: ParallelTempering, settings: AdaptSettings | None = None, *, progress: bool = True
) -> AdaptResult:
    """Train the sampler's flow in place on its walkers while they run, then freeze it.

    The walkers make the sampler's iterations, in which the flow proposes; after each the flow makes
    steps of maximum likelihood on their last states. As in :meth:`ParallelTempering.tune`, which
    should come first, this is not a Markov chain meanwhile, and nothing is written; the sampler's
    reporters see it, but none of their numbers is an estimate. ``sampler.run(n, "run")`` then goes
    on from the last states with the flow as it is. Discard the beginning: the last states are not
    yet a sample of the target.

    The flow learns the modes that walkers have visited. A mode that none was started in, and that
    local moves do not reach, stays unknown; acceptance and ESS then look as good as if it did not
    exist. ln Z of the flow's draws, compared with that of a method with another start
    (:func:`openmm_tsf.sampling.sequential_monte_carlo`), tells.

    All random numbers come from the sampler's seed. There is no checkpoint: an adaptation that is
    stopped leaves the flow of its last step, and starts again with a new sampler and flow.

    Parameters
    ----------
    sampler
        A sampler with walkers (:meth:`ParallelTempering.set_positions`), and kernels of which at
        least one proposes through its flow.
    settings
        Sizes and rates.
    progress
        Show a progress bar.

    Raises
    ------
    TypeError
        If the sampler is not a ParallelTempering, or its flow is not a flow of this package.
    ValueError
        If no kernel proposes through the flow, or the flow is compiled or has a parameter that
        needs no gradient.
    FloatingPointError
        If too many gradients in a row are not finite.

    Warns
    -----
    UserWarning
        If all walkers start from one configuration.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials import GaussianMixture
    >>> mixture = GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 0.5)
    >>> flow = tsf.RealNVPFlow(2, 0, n_blocks=2, hidden=(16,))
    >>> moves = [
    ...     tsf.kernels.Scheduled(
    ...         tsf.kernels.CartesianMALA(mixture, [1.0], masses=1.0, timestep=0.5), repeats=5
    ...     ),
    ...     tsf.kernels.FlowIndependence(flow, mixture, [1.0]),
    ... ]
    >>> sampler = tsf.ParallelTempering(None, flow, [1.0], 32, moves, mixture, seed=1)
    >>> sampler.set_positions(mixture.means.repeat(16, 1)[:, None])
    >>> result = tsf.adapt(sampler, tsf.AdaptSettings(n_iterations=20), progress=False)
    >>> result.acceptance["flow_independent"].shape, result.ess_iterations
    (torch.Size([20, 1]), [0, 20])
    >>> x = sampler.run(10, collect=True, progress=False)  # the flow is frozen
    """
    settings = AdaptSettings() if settings is None else settings
    flow = _check(sampler, settings)
    x = sampler.state.x
    if bool((x == x[:1]).all()):
        warnings.warn(
            "adapt: all walkers start from one configuration; modes that local moves do not reach "
            "from there stay unknown, and neither acceptance nor ESS can tell",
            stacklevel=2,
        )
    started, reporters = time.monotonic(), sampler.reporters
    adaptation = _Adaptation(sampler, flow, settings)
    sampler.reporters = [*reporters, adaptation]
    try:
        sampler.run(settings.n_iterations, progress=progress)
    finally:
        sampler.reporters = reporters
        flow.network.zero_grad(set_to_none=True)
    return adaptation.result(time.monotonic() - started)


def _check(sampler: Any, settings: Any) -> AugmentedFlow:
    """Return the sampler's flow, if it can be adapted."""
    if not isinstance(sampler, ParallelTempering):
        name = type(sampler).__name__
        raise TypeError(f"sampler: expected a ParallelTempering, got {name}")
    if not isinstance(settings, AdaptSettings):
        raise TypeError(f"settings: expected AdaptSettings, got {type(settings).__name__}")
    flow = sampler.flow
    if not isinstance(flow, AugmentedFlow):
        name = type(flow).__name__
        raise TypeError(f"sampler: expected one with a flow that can be trained, got a {name}")
    if flow.programs is not None:
        raise ValueError("sampler: expected a flow that is not compiled; compile it afterwards")
    if not all(parameter.requires_grad for parameter in flow.network.parameters()):
        raise ValueError("sampler: expected a flow whose parameters all require gradients")
    named = with_members(sampler.kernels.values())
    if not any(getattr(kernel, "flow", None) is flow for _, kernel in named):
        names = ", ".join(sampler.kernels)
        raise ValueError(f"sampler: expected a kernel that proposes through its flow, got {names}")
    return flow


class _Adaptation:
    """A reporter that trains the flow after each iteration."""

    interval = 1

    def __init__(
        self, sampler: ParallelTempering, flow: AugmentedFlow, settings: AdaptSettings
    ) -> None:
        self.sampler, self.flow, self.settings = sampler, flow, settings
        self.start = sampler.state.iteration
        seed = derive_seed(sampler.seed, Purpose.ADAPTATION, self.start)
        self.generator = make_generator(seed, flow.device)
        # Its own, so that the chains do not depend on how often the ESS is measured.
        self.of_draws = make_generator(derive_seed(seed, Purpose.ADAPTATION, 0), flow.device)
        self.optimizers = make_optimizers(flow.network, settings.optimizer, settings.learning_rate)
        self.taus = [kelvin / flow.reference_temperature for kelvin in sampler.temperatures]
        self.tau = torch.tensor(self.taus, dtype=flow.dtype, device=flow.device)
        self.memory: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.memory)
        self.totals = sampler._zero()
        self.loss: list[float] = []
        self.acceptance: dict[str, list[Tensor]] = {name: [] for name in sampler.kernels}
        self.ess: list[tuple[float, ...]] = []
        self.ess_iterations: list[int] = []
        self.step = self.n_skipped = self.skipped_in_a_row = self.n_evaluations = 0
        self._measure(0)

    def __call__(self, sampler: ParallelTempering, state: WalkerState) -> None:
        """Train on the walkers' last states."""
        for name, total in sampler.totals.items():
            before = self.totals[name]
            accepted = (total.accepted - before.accepted).double()
            self.acceptance[name].append(accepted / (total.proposed - before.proposed))
            self.n_evaluations += total.n_evaluations - before.n_evaluations
        self.totals = dict(sampler.totals)
        self.memory.append(self._whiten(state.x))
        with torch.enable_grad():  # others may have disabled gradients
            losses = [self._train_step() for _ in range(self.settings.n_gradient_steps)]
        self.loss.append(sum(losses) / len(losses) if losses else math.nan)
        self._measure(state.iteration - self.start)

    def _whiten(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y [R, W, d] and log|det dy/dx| [R, W] of walkers x [W, R, *event]."""
        x = x.to(self.flow.dtype)
        parts = [
            whiten(self.flow, x[:, rung], tau, self.generator) for rung, tau in enumerate(self.taus)
        ]
        y, log_det = zip(*parts, strict=True)
        return torch.stack(y), torch.stack(log_det)

    def _train_step(self) -> float:
        """Make one step of maximum likelihood; return the loss."""
        flow, settings = self.flow, self.settings
        n_rungs, n_walkers = self.memory[0][1].shape
        n_rows = len(self.memory) * n_rungs * n_walkers
        order = torch.randperm(
            n_rows, generator=self.generator, dtype=torch.int64, device=flow.device
        )
        rows = order[: settings.batch_size]
        y, log_det = (
            torch.stack(part).flatten(0, 2)[rows] for part in zip(*self.memory, strict=True)
        )
        tau = self.tau[rows // n_walkers % n_rungs]
        momenta = draw_normal(tau, flow.n_momenta, self.generator)
        nll = negative_log_likelihood(flow.network, y, log_det, momenta, tau)
        n_steps = settings.n_iterations * settings.n_gradient_steps
        ends = settings.learning_rate, settings.final_learning_rate
        rate = scheduled_rate(self.step, n_steps, settings.warmup_steps, *ends)
        set_learning_rate(self.optimizers, rate)
        flow.network.zero_grad(set_to_none=True)
        nll.mean().backward()
        loss = marginal_nll_bound(nll.detach(), flow.n_momenta, tau).mean()
        clipped = torch.nn.utils.clip_grad_norm_(flow.network.parameters(), settings.max_grad_norm)
        norm, loss = torch.stack([clipped.to(loss), loss]).tolist()  # a GPU is waited for once
        self.step += 1
        if math.isfinite(norm):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.n_skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > settings.max_skipped:
                raise FloatingPointError(
                    f"adapt: {self.skipped_in_a_row} gradients in a row were not finite (step "
                    f"{self.step}); lower the learning rate"
                )
        return loss

    def _measure(self, iteration: int) -> None:
        """Measure the ESS of the flow's draws, if it is due."""
        settings, sampler = self.settings, self.sampler
        due = iteration % settings.ess_interval == 0 or iteration == settings.n_iterations
        if not settings.n_ess_draws or not due:
            return
        sizes = settings.n_ess_draws, self.of_draws
        fractions = []
        for kelvin in sampler.temperatures:
            draws = draw_weighted(self.flow, sampler.potential, kelvin, *sizes)
            self.n_evaluations += int(draws.inside.sum())
            weights = draws.log_weights.cpu().numpy()
            known = bool(torch.isfinite(draws.log_weights).any())
            fractions.append(reverse_ess(weights).fraction if known else 0.0)
        self.ess.append(tuple(fractions))
        self.ess_iterations.append(iteration)

    def result(self, seconds: float) -> AdaptResult:
        """Return what happened."""
        acceptance = {name: torch.stack(rates) for name, rates in self.acceptance.items()}
        return AdaptResult(
            self.flow, self.sampler.state.x, self.loss, acceptance, self.ess_iterations, self.ess,
            self.n_evaluations, self.n_skipped, seconds,
        )  # fmt: skip
