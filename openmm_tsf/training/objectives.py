"""The loss of a training step: (1 - lambda) likelihood + lambda energy, in two ways."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basin_populations import Populations
from openmm_tsf.training.frames import TrainingFrames, n_from_each
from openmm_tsf.training.independence_chains import IndependenceChains
from openmm_tsf.training.langevin_relaxation import relax
from openmm_tsf.training.losses import negative_log_likelihood, variational_free_energy, whitened
from openmm_tsf.training.path_gradients import (
    data_cotangent,
    draw_cotangent,
    draw_score,
    log_density_at_draws,
    whole,
)
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.validation import require_entry

Note = Callable[[str, float], None]

#: Copies of each frame that are drawn where copies of a configuration overlap.
_COPIES_OF_FRAMES = 2
#: Evaluations that bring a frame of another temperature to that of its chain. Without, chains in a
#: rare basin, which take few proposals, would stay as hot as they were for most of the training.
_RELAXATION = 60


class Objective(Protocol):
    """What the training loop asks for."""

    def backward(self, network: Chain, mixing: float, generator: torch.Generator) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, content: Mapping[str, Any]) -> None: ...


class DirectObjective:
    """Eq. 5 and eq. 6 of arXiv:2012.00429, differentiated as they stand."""

    def __init__(
        self,
        flow: AugmentedFlow,
        train: Sequence[MDDataset],
        potential: Potential | None,
        settings: FitSettings,
        ceiling: float,
        generator: torch.Generator,
        note: Note,
    ) -> None:
        self.flow, self.potential, self.settings = flow, potential, settings
        self.ceiling, self.note = ceiling, note
        self.data = TrainingFrames(flow, train, settings.dtype, settings.basin_share, generator)
        self.temperatures = settings.temperatures or (flow.reference_temperature,)

    def backward(self, network: Chain, mixing: float, generator: torch.Generator) -> None:
        """Set the gradients of the parameters."""
        self.loss(network, mixing, generator).backward()

    def loss(self, network: Chain, mixing: float, generator: torch.Generator) -> Tensor:
        """A number with a graph; NaN where no draw had a finite energy."""
        settings = self.settings
        y, log_det, tau = self.data.batch(settings.batch_size, generator)
        noise = torch.randn(len(y), self.flow.n_momenta, generator=generator, dtype=settings.dtype)
        momenta = noise * tau.sqrt()[:, None]
        nll = negative_log_likelihood(network, y, log_det, momenta, tau).mean()
        self.note("nll", float(nll.detach()))
        if mixing == 0 or self.potential is None:
            return nll
        choice = torch.randint(
            len(self.temperatures), (settings.kl_batch_size,), generator=generator
        )
        ladder = torch.tensor(self.temperatures, dtype=settings.dtype)
        tau = ladder[choice] / self.flow.reference_temperature
        width = self.flow.n_coordinates + self.flow.n_momenta
        v = torch.randn(len(tau), width, generator=generator, dtype=settings.dtype)
        free_energy = variational_free_energy(
            self.flow, network, self.potential, v * tau.sqrt()[:, None], tau, self.ceiling
        )
        finite = torch.isfinite(free_energy)
        if not bool(finite.any()):
            return nll * math.nan  # a step without a gradient: counted and skipped
        kl = free_energy[finite].mean()
        self.note("kl", float(kl.detach()))
        return (1 - mixing) * nll + mixing * kl.to(nll.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Nothing."""


class _Batch(NamedTuple):
    """Points of a step, the group of each (a dataset, or a temperature's chains), and weights."""

    points: Points
    group: Tensor
    n_groups: int
    weight: Tensor


class _Energy(NamedTuple):
    """Gradients of the energy part, the draws it was computed from, and their ln(p/q)."""

    gradients: list[Tensor]
    points: Points
    log_ratio: Tensor


class PathObjective:
    """The same two divergences by path gradients, with chains and with what path gradients lack.

    Two terms take the gradient of ln(p/q) (:mod:`openmm_tsf.training.basin_populations`):
    `log_variance` pulls every point of the data by how far its ln(p/q) is from the mean (the
    log-variance divergence, arXiv:2005.05409, on data and chains), `basin_balance` pushes draws of
    a basin.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        train: Sequence[MDDataset],
        potential: Potential,
        settings: FitSettings,
        ceiling: float,
        generator: torch.Generator,
        note: Note,
    ) -> None:
        self.flow, self.potential, self.settings = flow, potential, settings
        self.ceiling, self.note = ceiling, note
        self.molecule = train[0].molecule
        ladder = settings.temperatures or (flow.reference_temperature,)
        self.ladder = torch.tensor(ladder, dtype=settings.dtype) / flow.reference_temperature
        self.shares = torch.tensor([data.weight for data in train], dtype=torch.float64)
        found = [self._frames(data, generator) for data in train]
        self.frames = [points for points, _ in found]
        log_dets = torch.tensor([log_det for _, log_det in found], dtype=torch.float64)
        # What the NLL of y lacks to be that of x: a constant, on average.
        self._log_det = float((self.shares * log_dets).sum() / self.shares.sum())
        self.chains: IndependenceChains | None = None
        self._relaxed = False
        groups = [frames.tau[:1] for frames in self.frames]
        if settings.n_chains:
            self.chains = IndependenceChains(self._starts(generator), len(ladder))
            groups.append(self.ladder)
        self.populations = Populations(
            torch.cat(groups),
            self.ladder,
            settings.log_variance,
            settings.basin_balance,
        )
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "energy") if threads > 1 else None

    def _frames(self, data: MDDataset, generator: torch.Generator) -> tuple[Points, float]:
        """Points of a dataset; several copies of each frame where copies overlap. Mean log|det|."""
        tau = data.temperature / self.flow.reference_temperature
        ys, log_dets = [], []
        for _ in range(_COPIES_OF_FRAMES if self.flow.overlap else 1):
            y, log_det = whitened(self.flow, data.positions, tau, generator)
            inside = torch.isfinite(log_det) & torch.isfinite(y).all(dim=1)
            if not bool(inside.all()):
                raise ValueError(
                    f"dataset: {int((~inside).sum())} of {len(y)} frames are outside the flow's "
                    "domain (other handedness, or not computable)"
                )
            ys.append(y.to(self.settings.dtype))
            log_dets.append(float(log_det.mean()))
        every = torch.cat(ys)
        points = self._at(every, torch.full((len(every),), tau, dtype=every.dtype))
        return points, sum(log_dets) / len(log_dets)

    def _starts(self, generator: torch.Generator) -> Points:
        """Frames of the dataset nearest in temperature, for each chain."""
        parts = []
        for tau in self.ladder:
            apart = [abs(math.log(float(frames.tau[0]) / float(tau))) for frames in self.frames]
            frames = self.frames[apart.index(min(apart))]
            index = torch.randint(len(frames), (self.settings.n_chains,), generator=generator)
            chosen = frames.take(index)
            parts.append(
                chosen
                if self._is_at(frames, tau)
                else self._at(chosen.y, torch.full_like(chosen.tau, float(tau)))
            )
        return Points.join(parts)

    @staticmethod
    def _is_at(frames: Points, tau: Tensor) -> bool:
        return abs(math.log(float(frames.tau[0]) / float(tau))) < 1e-6

    def _relax(self, chains: IndependenceChains, generator: torch.Generator) -> None:
        """Bring frames of another temperature to that of their chains."""
        n = self.settings.n_chains
        for rung, tau in enumerate(self.ladder):
            if not any(self._is_at(frames, tau) for frames in self.frames):
                index = torch.arange(rung * n, (rung + 1) * n)
                points = chains.points.take(index)
                relax(points, self._at, _RELAXATION, generator)
                chains.points.put(index, points)
        self._relaxed = True

    def _at(self, y: Tensor, tau: Tensor) -> Points:
        return Points.at(self.flow, self.potential, self.molecule, y, tau, self.ceiling)

    def backward(self, network: Chain, mixing: float, generator: torch.Generator) -> None:
        """Set the gradients of the parameters: NaN where no draw had a finite energy.

        Likelihood and energy have no operation in common: where torch has two threads or more, each
        has one of its own. Results are the same.
        """
        per_rung = self.settings.kl_batch_size // len(self.ladder)
        data, turn = self._data(mixing, per_rung, generator)
        momenta = self._momenta(data.points.tau, generator)
        parameters = list(network.parameters())
        energy: _Energy | None = None
        drawn: Future[_Energy] | None = None
        if mixing > 0:
            tau = self.ladder.repeat_interleave(per_rung)
            shape = (len(tau), self.flow.n_coordinates + self.flow.n_momenta)
            v = torch.randn(shape, generator=generator, dtype=self.settings.dtype)
            v = v * tau.sqrt()[:, None]
            if self._pool is None:
                energy = self._energy(network, parameters, v, tau)
            else:
                drawn = self._pool.submit(self._energy, network, parameters, v, tau)
        try:
            gradients, log_ratio = self._likelihood(network, parameters, data, momenta)
        finally:  # whatever happens, nobody is left behind at work
            if drawn is not None:
                energy = drawn.result()
        if energy is not None:
            gradients = [
                (1 - mixing) * ours + mixing * theirs
                for ours, theirs in zip(gradients, energy.gradients, strict=True)
            ]
            self.populations.follow(
                log_ratio, data.group, data.points.basin, energy.log_ratio, energy.points.basin
            )
            if self.chains is not None and turn is not None:
                state = log_ratio[self.settings.batch_size :]
                accepted = self.chains.propose(
                    turn, energy.points, energy.log_ratio, state, generator
                )
                self.note("chains", accepted)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _data(
        self, mixing: float, per_rung: int, generator: torch.Generator
    ) -> tuple[_Batch, Tensor | None]:
        """Frames and states of chains, and which chains those are."""
        settings = self.settings
        parts = [
            frames.take(torch.randint(len(frames), (n,), generator=generator))
            for frames, n in zip(
                self.frames, n_from_each(self.shares, settings.batch_size), strict=True
            )
        ]
        share, turn = 0.0, None
        if self.chains is not None and mixing > 0:
            # They are a while on their way from the frames to their own temperatures.
            share = settings.chain_share * mixing / settings.lambda_max
            if not self._relaxed:
                self._relax(self.chains, generator)
            turn = self.chains.turn(per_rung)
            parts += [self.chains.points.take(part) for part in turn.split(per_rung)]
        points = Points.join(parts)
        sizes = torch.tensor([len(part) for part in parts])
        group = torch.arange(len(parts)).repeat_interleave(sizes)
        n_frames = settings.batch_size
        weight = torch.full((len(points),), (1 - share) / n_frames, dtype=settings.dtype)
        weight[n_frames:] = share / max(1, len(points) - n_frames)
        return _Batch(points, group, len(parts), weight), turn

    def _likelihood(
        self, network: Chain, parameters: list[nn.Parameter], data: _Batch, momenta: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of KL(p || q) and of the populations' terms, and ln(p/q) of the points."""
        points, tau = data.points, data.points.tau
        y = torch.cat([points.y, momenta], dim=1)
        v, log_det, pullback = network.inverse_and_pullback(y)
        slope = torch.cat([points.slope, momenta / tau[:, None]], dim=1)
        cotangent = data_cotangent(v, pullback, slope, tau)
        self.note("cotangent_data", float(cotangent.norm(dim=1).mean()))
        # ln(p/q) up to a constant of each temperature: the same for frames and for chains.
        log_ratio = self._log_ratio(points.action, momenta, v.detach(), log_det.detach(), tau)
        pull, spread = self.populations.pull(log_ratio, data.group, data.n_groups)
        self.note("log_ratio", spread)
        # Points that the network throws far off would outweigh all others.
        known = whole(cotangent)
        nll = torch.where(known, 0.5 * v.square().sum(dim=1) / tau - log_det, 0.0)
        self._note_likelihood(nll.detach(), v, tau, known)
        loss = ((v * cotangent).sum(dim=1) * data.weight + pull.to(nll) * nll).sum()
        return list(torch.autograd.grad(loss, parameters)), log_ratio

    def _note_likelihood(self, nll: Tensor, v: Tensor, tau: Tensor, known: Tensor) -> None:
        """The joint NLL of the frames among the points, as the direct estimator notes it."""
        chosen = known[: self.settings.batch_size].nonzero().flatten()
        norm = 0.5 * v.shape[1] * torch.log(2 * math.pi * tau[chosen])
        self.note("nll", float((nll[chosen] + norm).mean()) - self._log_det)

    def _momenta(self, tau: Tensor, generator: torch.Generator) -> Tensor:
        shape = (len(tau), self.flow.n_momenta)
        noise = torch.randn(shape, generator=generator, dtype=self.settings.dtype)
        return noise * tau.sqrt()[:, None]

    def _log_ratio(
        self, action: Tensor, momenta: Tensor, v: Tensor, log_det_inverse: Tensor, tau: Tensor
    ) -> Tensor:
        """ln(p/q) [B] of (y, momenta), whose preimage is v, up to a constant of tau; float64."""
        squares = v.double().square().sum(dim=1) - momenta.double().square().sum(dim=1)
        return -action + 0.5 * squares / tau.double() - log_det_inverse.double()

    def _energy(
        self, network: Chain, parameters: list[nn.Parameter], v: Tensor, tau: Tensor
    ) -> _Energy:
        """Gradients of KL(q || p) over draws v [B, d+m], and the draws as points."""
        d = self.flow.n_coordinates
        y, log_det, pullback = network.forward_and_pullback(v)
        points = self._at(y[:, :d].detach(), tau)
        momenta = y[:, d:].detach()
        finite = torch.isfinite(points.action)
        ratio = self._log_ratio(points.action, momenta, v, -log_det.detach(), tau)
        if not bool(finite.any()):
            gradients = [torch.full_like(parameter, math.nan) for parameter in parameters]
            return _Energy(gradients, points, torch.full_like(ratio, math.nan))
        slope = torch.cat([points.slope, momenta / tau[:, None]], dim=1)
        score = draw_score(v, pullback, tau)
        cotangent = torch.where(finite[:, None], draw_cotangent(score, slope), 0.0)
        self.note("cotangent_draws", float(cotangent.norm(dim=1).mean()))
        free_energy = points.action + 0.5 * momenta.double().square().sum(1) / tau
        free_energy = free_energy - log_det.detach()
        self.note("kl", float(free_energy[finite & whole(cotangent)].mean()))
        push = torch.where(whole(cotangent), self.populations.push(points.basin), 0.0).to(y)
        pushed = push != 0  # the scores of others may be infinite
        log_q = log_density_at_draws(y[pushed], log_det[pushed], score[pushed])
        loss = (y * cotangent).sum() / finite.sum() - (push[pushed] * log_q).sum()
        return _Energy(list(torch.autograd.grad(loss, parameters)), points, ratio)

    def state_dict(self) -> dict[str, Any]:
        """Chains and running means."""
        chains = {} if self.chains is None else self.chains.state_dict()
        return {**self.populations.state_dict(), "chains": chains, "relaxed": self._relaxed}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If it is of another training.
        """
        self.populations.load_state_dict(content)
        self._relaxed = require_entry(content, "relaxed", bool)
        if self.chains is not None:
            self.chains.load_state_dict(require_entry(content, "chains", dict))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "direct": DirectObjective,
    "path": PathObjective,
}
