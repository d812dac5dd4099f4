"""The loss of a training step by path gradients, with Markov chains and population terms."""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basin_populations import Populations
from openmm_tsf.training.batches import Batch, ChainStates, FramePoints
from openmm_tsf.training.cells import mean_where
from openmm_tsf.training.control_variates import ControlVariates
from openmm_tsf.training.frames import FramePicker
from openmm_tsf.training.independence_chains import EVERYWHERE, IndependenceChains, Match, Walk
from openmm_tsf.training.langevin_relaxation import relax_mala
from openmm_tsf.training.losses import draw_normal
from openmm_tsf.training.parallel import gather_chains, place, split_chains
from openmm_tsf.training.path_gradients import (
    data_cotangent,
    draw_cotangent,
    draw_score,
    is_uncut,
    limit_norm,
    log_density_at_draws,
)
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.step_numbers import StepNumbers
from openmm_tsf.training.target import Target
from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.distributed import Ranks
from openmm_tsf.utils.threads import torch_threads
from openmm_tsf.utils.validation import require_entry

logger = logging.getLogger(__name__)

#: MALA steps that bring a frame to the temperature of its chain. Without them, chains in a rare
#: basin, which accept few proposals, would keep the frames' temperature for most of the training.
RELAXATION_STEPS = 60


class _EnergyPart(NamedTuple):
    """Gradients of the energy loss, the draws they were computed from, and their ln(p/q).

    `walked` are the points of a walk, evaluated together with the draws.
    """

    gradients: list[Tensor]
    points: Points
    log_ratio: Tensor
    walked: Points | None


class _ChainsStep(NamedTuple):
    """What moves the chains once the numbers of the step are read."""

    match: Match
    counts: list[float]
    energy: _EnergyPart
    current: Tensor
    walk: Walk | None


class PathObjective:
    """Both divergences by path gradients, with chains and terms for the populations.

    `log_variance` draws the ln(p/q) of every data point towards the mean (the log-variance
    divergence, arXiv:2005.05409, on data and chains); `basin_balance` corrects the populations of
    basins at the flow's draws (:mod:`openmm_tsf.training.basin_populations`). Of several `ranks`,
    each has its part of the frames, draws and chains.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        train: Sequence[MDDataset],
        target: Target,
        settings: FitSettings,
        generator: torch.Generator,
        numbers: StepNumbers,
        ranks: Ranks | None = None,
    ) -> None:
        self.flow, self.settings, self.numbers = flow, settings, numbers
        self.ranks = ranks or Ranks()
        self.exchanged: list[Tensor] = []
        self._n_chains = self.ranks.count_share(settings.n_chains)
        self._n_draws = settings.kl_batch_size // len(settings.temperatures or (0,))
        self.n_basins = target.basins.n_basins
        self._evaluate = partial(Points.at, target)
        temperatures = settings.temperatures or (flow.reference_temperature,)
        self.ladder = (
            torch.tensor(temperatures, dtype=settings.dtype, device=flow.device)
            / flow.reference_temperature
        )
        self.data = FramePoints(flow, train, self._evaluate, settings, generator, self.ranks)
        self.frames = self.data.parts
        # As the host's numbers, which are read once.
        self._taus = [float(tau) for tau in self.ladder]
        self._frame_taus = [float(points.tau[0]) for points in self.frames]
        self.chains: IndependenceChains | None = None
        self._relaxed = False
        self._step: _ChainsStep | None = None
        groups = [points.tau[:1] for points in self.frames]
        if settings.n_chains:
            points, home = self._initial_states(generator)
            self.chains = IndependenceChains(points, len(temperatures), self.n_basins, home)
            groups.append(self.ladder)
        n_cells = (len(self.frames) + len(temperatures)) * self.n_basins
        self.control = ControlVariates(n_cells, flow.device, self.ranks)
        self.populations = Populations(
            torch.cat(groups),
            self.ladder,
            self.n_basins,
            settings.log_variance,
            settings.basin_balance,
            self.ranks,
        )
        self._threads = torch.get_num_threads()
        # A GPU is kept busy by one thread; ranks exchange numbers in the order of one.
        in_two = flow.device.type == "cpu" and self._threads > 1 and self.ranks.size == 1
        self._pool = ThreadPoolExecutor(1, "energy") if in_two else None

    def _n_spread(self, n: int) -> int:
        """How many of n points are spread evenly over the basins."""
        return round(self.settings.basin_share * n) if self.n_basins > 1 else 0

    def _initial_states(self, generator: torch.Generator) -> tuple[Points, Tensor]:
        """Initial states and homes of all chains: frames of the dataset nearest in temperature.

        Of each temperature's chains the fraction `basin_share` is spread evenly over the basins.
        """
        parts, homes, n = [], [], self._n_chains
        n_settled = self._n_spread(n)
        for tau in self._taus:
            nearest = min(range(len(self.frames)), key=lambda k: self._distance(k, tau))
            frames = self.frames[nearest]
            in_all = FramePicker(frames.basin, 0.0).draw(n - n_settled, generator)
            in_each = FramePicker(frames.basin, 1.0).draw(n_settled, generator)
            # In random order, so that each step has chains of both kinds.
            device = self.flow.device
            order = torch.randperm(n, generator=generator, dtype=torch.int64, device=device)
            home = torch.cat([torch.full_like(in_all, EVERYWHERE), frames.basin[in_each]])
            homes.append(home[order])
            chosen = frames.take(torch.cat([in_all, in_each])[order])
            if not self._is_near(nearest, tau):
                chosen = self._evaluate(chosen.y, torch.full_like(chosen.tau, tau))
            parts.append(chosen)
        return Points.join(parts), torch.cat(homes)

    def _distance(self, number: int, tau: float) -> float:
        """Between the temperature of a dataset and another one."""
        return abs(math.log(self._frame_taus[number] / tau))

    def _is_near(self, number: int, tau: float) -> bool:
        return self._distance(number, tau) < 1e-6

    def _relax(self, chains: IndependenceChains, generator: torch.Generator) -> None:
        """Bring initial states of another temperature to the temperature of their chains."""
        n = self._n_chains
        what = "training: Markov chains are brought to the temperatures of the ladder"
        # Steps have fewer threads: two run at once.
        with log_while(logger, what), torch_threads(self._threads):
            for rung, tau in enumerate(self._taus):
                if not any(self._is_near(number, tau) for number in range(len(self.frames))):
                    index = rung * n + _numbers(n, self.flow.device)
                    points = chains.points.take(index)
                    relax_mala(points, self._evaluate, RELAXATION_STEPS, generator)
                    chains.points.put(index, points)
        chains.settle()  # a few moved to another basin
        self._relaxed = True

    def backward(self, network: Chain, step: int, generator: torch.Generator) -> None:
        """Set the gradients of the parameters: NaN where no draw had a finite energy.

        :meth:`update` completes the step, once its numbers are read.
        Likelihood and energy share no operation: with two or more of torch's threads they run in
        parallel, with the same results.
        """
        mixing = self.settings.mixing(step)
        draws_per_rung = self.ranks.count_share(self._n_draws)
        self.exchanged = []
        chains: Tensor | None = None
        walk: Walk | None = None
        energy: _EnergyPart | None = None
        future: Future[_EnergyPart] | None = None
        if mixing > 0:
            if self.chains is not None and not self._relaxed:
                self._relax(self.chains, generator)
            tau = self.ladder.repeat_interleave(draws_per_rung)
            v = draw_normal(tau, self.flow.n_coordinates + self.flow.n_momenta, generator)
            if self.chains is not None:
                chains = self.chains.next_chains(draws_per_rung)
                # Of the chains of the next step: evaluated with the draws of this one.
                walk = self.chains.propose_walk(generator, draws_per_rung)
            if self._pool is None:
                energy = self._energy(network, v, tau, walk)
            else:
                future = self._pool.submit(self._energy, network, v, tau, walk)
        try:
            batch = self._batch(step, chains, generator)
            momenta = draw_normal(batch.points.tau, self.flow.n_momenta, generator)
            gradients, log_ratio = self._likelihood(network, batch, momenta)
        finally:  # also after an error: no thread is left working
            if future is not None:
                energy = future.result()
        if energy is not None:
            of_data = torch._foreach_mul(gradients, 1 - mixing)
            of_draws = torch._foreach_mul(energy.gradients, mixing)
            gradients = list(torch._foreach_add(of_data, of_draws))
            self._update_populations(batch, log_ratio, energy)
            if self.chains is not None and chains is not None:
                match = self.chains.match(chains, energy.points, generator)
                counts: list[float] = []
                self.numbers.add(match.numbers, counts.extend)
                current = log_ratio[batch.n_frames :]
                self._step = _ChainsStep(match, counts, energy, current, walk)
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient

    def update(self, generator: torch.Generator) -> None:
        """Move the chains with the draws of :meth:`backward`."""
        step, self._step = self._step, None
        if self.exchanged:
            of_data, of_draws = self.exchanged
            log_ratio, *labels = of_data.unbind(1)
            group, basin = (label.long() for label in labels)
            draws, drawn = of_draws.flatten(0, 1).unbind(1)
            self.populations.update(log_ratio, group, basin, draws, drawn.long())
        if self.chains is None or step is None:
            return
        if not step.counts:
            self.numbers.read()
        proposals = step.energy.points, step.energy.log_ratio
        accepted = self.chains.accept(step.match, step.counts, *proposals, step.current, generator)
        self.numbers.record("chains", accepted)
        if step.walk is not None and step.energy.walked is not None:
            self.chains.finish_walk(step.walk, step.energy.walked, generator)

    def _update_populations(self, batch: Batch, log_ratio: Tensor, energy: _EnergyPart) -> None:
        """Update them at once, or leave to :meth:`update` what all ranks need of each other."""
        of_data = log_ratio, batch.group, batch.points.basin
        of_draws = energy.log_ratio, energy.points.basin
        if self.ranks.size == 1:
            self.populations.update(*of_data, *of_draws)
            return
        part, n_points = self.data.place_in_all(
            [] if self.chains is None else [self._n_draws] * len(self.ladder)
        )
        rows, draws = (
            torch.stack([each.double() for each in parts], 1) for parts in (of_data, of_draws)
        )
        draws = draws.unflatten(0, (len(self.ladder), -1))
        self.exchanged = [
            place(rows, part, n_points),
            place(draws, self.ranks.share(self._n_draws), self._n_draws, dim=1),
        ]

    def _batch(self, step: int, chains: Tensor | None, generator: torch.Generator) -> Batch:
        """Frames, and the states of `chains` (indices), which there are once there are draws."""
        states = None
        if self.chains is not None and chains is not None:
            parts = [self.chains.points.take(part) for part in chains.chunk(len(self.ladder))]
            # Chains take time to forget the frames: their share of the data rises as lambda does.
            share = self.settings.chain_share * self.settings.rise(step)
            states = ChainStates(parts, self.chains.home[chains] != EVERYWHERE, share)
        # Chains meet new points of a rare basin, of which there are few frames.
        n_spread_of = (lambda n: 0) if self._relaxed else self._n_spread
        return self.data.batch(n_spread_of, states, generator)

    def _likelihood(
        self, network: Chain, batch: Batch, momenta: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of KL(p || q) and of the log-variance term, and ln(p/q) of the points."""
        points, tau = batch.points, batch.points.tau
        y = torch.cat([points.y, momenta], dim=1)
        v, log_det, pullback = network.inverse_and_pullback(y)
        gradient = torch.cat([points.gradient, momenta / tau[:, None]], dim=1)
        cell = batch.group * self.n_basins + points.basin
        target, beta = self.control.update(v, pullback(gradient), tau, cell)
        cotangent = data_cotangent(v, target, tau, beta)
        self.numbers.record("cotangent_data", cotangent.norm(dim=1).mean())
        # Up to a constant of each temperature, the same for frames and for chains.
        log_ratio = _log_ratio(points, momenta, v.detach(), log_det.detach())
        coefficients, spread = self.populations.data_coefficients(
            log_ratio, batch.group, batch.n_groups
        )
        self.numbers.record("log_ratio", spread)
        # A point that the network maps far away would outweigh all others.
        uncut = is_uncut(cotangent)
        nll = torch.where(uncut, 0.5 * v.square().sum(dim=1) / tau - log_det, 0.0)
        self._record_likelihood(nll.detach(), v, tau, uncut, batch.n_frames)
        path_loss = (v * cotangent).sum(dim=1) - (1 - beta) * torch.where(uncut, log_det, 0.0)
        # The target's gradient, for which points are cut, has no part in the log-variance term:
        # the points with the largest ln(p/q) are just those.
        likelihood = (v * limit_norm(v.detach() / tau[:, None])).sum(dim=1) - log_det
        likelihood = torch.where(torch.isfinite(log_ratio), likelihood, 0.0)
        loss = (batch.weight * path_loss + coefficients.to(nll) * likelihood).sum()
        return list(torch.autograd.grad(loss, list(network.parameters()))), log_ratio

    def _record_likelihood(
        self, nll: Tensor, v: Tensor, tau: Tensor, uncut: Tensor, n_frames: int
    ) -> None:
        """Record the joint NLL of the frames, as the direct estimator does."""
        frames = slice(n_frames)
        nll = nll[frames] + 0.5 * v.shape[1] * torch.log(2 * math.pi * tau[frames])
        self.numbers.record("nll", mean_where(nll, uncut[frames]).double() - self.data.log_det)

    def _energy(self, network: Chain, v: Tensor, tau: Tensor, walk: Walk | None) -> _EnergyPart:
        """Gradients of KL(q || p) and of the population term over draws v [B, d+m]."""
        parameters, d = list(network.parameters()), self.flow.n_coordinates
        y, log_det, pullback = network.forward_and_pullback(v)
        points, walked = self._evaluate_together(y[:, :d].detach(), tau, walk)
        momenta = y[:, d:].detach()
        finite = torch.isfinite(points.reduced_energy)
        log_ratio = _log_ratio(points, momenta, v, -log_det.detach())
        gradient = torch.cat([points.gradient, momenta / tau[:, None]], dim=1)
        score = draw_score(v, pullback, tau)
        cotangent = torch.where(finite[:, None], draw_cotangent(score, gradient), 0.0)
        self.numbers.record("cotangent_draws", cotangent.norm(dim=1).mean() / finite.any())
        uncut = is_uncut(cotangent)
        weight = log_weight(points.reduced_energy, momenta.double(), tau, -log_det.detach())
        self.numbers.record("kl", -mean_where(weight, finite & uncut))
        coefficients = self.populations.draw_coefficients(points.basin, self._n_draws)
        coefficients = torch.where(uncut, coefficients, 0.0).to(y)
        score = torch.where(coefficients[:, None] != 0, score, 0.0)  # others may be infinite
        log_q = log_density_at_draws(y, log_det, score)
        # Without a finite energy 0/0: a step without a gradient, which is counted and skipped.
        n_finite = self.ranks.sum_(finite.sum())
        loss = (y * cotangent).sum() / n_finite - (coefficients * log_q).sum()
        gradients = list(torch.autograd.grad(loss, parameters))
        return _EnergyPart(gradients, points, log_ratio, walked)

    def _evaluate_together(
        self, y: Tensor, tau: Tensor, walk: Walk | None
    ) -> tuple[Points, Points | None]:
        """The target at y [B, d] and at the points of a walk: one call costs less than two."""
        if walk is None:
            return self._evaluate(y, tau), None
        points = self._evaluate(torch.cat([y, walk.y]), torch.cat([tau, walk.tau]))
        return points.rows(slice(len(y))), points.rows(slice(len(y), None))

    def state_dict(self) -> dict[str, Any]:
        """Return the chains, of all ranks, and running estimates; every rank has to call it."""
        chains = {} if self.chains is None else self.chains.state_dict()
        chains = gather_chains(chains, (len(self.ladder), self.settings.n_chains), self.ranks)
        states = {**self.populations.state_dict(), **self.control.state_dict()}
        return {**states, "chains": chains, "relaxed": self._relaxed}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if it does not fit."""
        self.populations.load_state_dict(content)
        self.control.load_state_dict(content)
        self._relaxed = require_entry(content, "relaxed", bool)
        if self.chains is not None:
            chains = require_entry(content, "chains", dict)
            shape = len(self.ladder), self.settings.n_chains
            self.chains.load_state_dict(split_chains(chains, shape, self.ranks))


def _numbers(n: int, device: torch.device) -> Tensor:
    """0 to n - 1."""
    return torch.arange(n, dtype=torch.int64, device=device)


def _log_ratio(points: Points, momenta: Tensor, v: Tensor, log_det_inverse: Tensor) -> Tensor:
    """ln(p/q) [B] of (y, momenta), whose preimage is v, up to a constant of tau; float64."""
    squares = v.double().square().sum(dim=1) - momenta.double().square().sum(dim=1)
    return -points.reduced_energy + 0.5 * squares / points.tau.double() - log_det_inverse.double()
