"""Markov chains that run through the training: samples of every temperature.

The draws of the energy loss are also proposals to these chains, without further evaluations: an
independence sampler whose proposal, the flow, improves. The states are data at temperatures without
frames (the outlook of arXiv:2012.00429, section 5) with the target's populations, and so keep a
minor basin (compare Markovian score climbing, arXiv:2003.10374, and arXiv:2105.12603). Chains of a
rare basin, which get few draws, also move by Langevin steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.training.cells import count_by_cell, true_rows
from openmm_tsf.training.langevin_relaxation import (
    FIRST_STEP,
    accept_mala,
    propose_mala,
    tuning_factor,
)
from openmm_tsf.training.target_points import Points, check_tensor_like
from openmm_tsf.utils.validation import check_int

#: The home of a chain that may be in any basin.
EVERYWHERE = -1


class Walk(NamedTuple):
    """Langevin steps y [B, d] that are proposed to `chains` [B], and their noise."""

    chains: Tensor
    y: Tensor
    tau: Tensor
    noise: Tensor


class Pairs(NamedTuple):
    """Chains and draws [M] by their rows, paired where `is_pair` [M] is true."""

    chain: Tensor
    draw: Tensor
    is_pair: Tensor

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the rows of the pairs, of which there are so many."""
        rows = true_rows(self.is_pair, number)
        return self.chain[rows], self.draw[rows]


class Match(NamedTuple):
    """Chains `chosen` [B] and their pairs with draws: of those with a home, and of the others.

    `all_free` are the rows of the others; `numbers` [3] are a random number, which decides for
    these or for the pairs within basins, and the numbers of pairs of both kinds.
    """

    chosen: Tensor
    all_free: Tensor
    settled: Pairs
    free: Pairs
    numbers: Tensor


class IndependenceChains:
    """Independence samplers from initial states [K n], the n of each of K temperatures together.

    A chain with a home, a basin, stays there: it samples the target restricted to that basin, so
    that a rare basin can have as many chains as a common one. The populations are those of the
    other chains, whose home is EVERYWHERE.

    Parameters
    ----------
    points
        The initial states.
    n_temperatures, n_basins
        K, and the number of basins.
    home
        The home of each chain [K n], int64; by default EVERYWHERE.

    Attributes
    ----------
    step_sizes
        Step size of :meth:`propose_walk` at each temperature [K].
    """

    def __init__(
        self, points: Points, n_temperatures: int, n_basins: int, home: Tensor | None = None
    ) -> None:
        self.points, self.n_temperatures, self.n_basins = points, n_temperatures, n_basins
        self.n_chains = len(points) // n_temperatures
        self.home = torch.full_like(points.basin, EVERYWHERE) if home is None else home
        self.step_sizes = torch.full(
            (n_temperatures,), FIRST_STEP, dtype=points.y.dtype, device=points.y.device
        )
        self._next = 0
        self._has_home = (self.home != EVERYWHERE).cpu()  # to know their number without a wait
        self._last_turn = self.home[:0], 0

    def next_chains(self, n: int) -> Tensor:
        """Return the indices [K n] of the next n chains of each temperature, cyclically."""
        self._last_turn = self._upcoming(n)
        self._next = (self._next + n) % self.n_chains
        return self._last_turn[0]

    def _upcoming(self, n: int) -> tuple[Tensor, int]:
        """The indices that :meth:`next_chains` will return, and how many of them have a home."""
        n_settled = int(self._has_home[self._turn(n, self._has_home.device)].sum())
        return self._turn(n, self.home.device), n_settled

    def _turn(self, n: int, device: torch.device) -> Tensor:
        """The indices of the next n chains of each temperature."""
        chosen = (self._next + torch.arange(n, dtype=torch.int64, device=device)) % self.n_chains
        first = self.n_chains * torch.arange(self.n_temperatures, dtype=torch.int64, device=device)
        return (first[:, None] + chosen).flatten()

    def settle(self) -> None:
        """Make the present basin the home of every chain that has one."""
        self.home = torch.where(self.home == EVERYWHERE, EVERYWHERE, self.points.basin)

    def propose_walk(self, generator: torch.Generator, n: int) -> Walk:
        """Propose a MALA step to those of the next n chains of each temperature with a home.

        A rare basin has few frames and gets few draws: without other moves its chains would show
        the flow the same points throughout the training, which it would learn by heart.
        """
        turn, n_settled = self._upcoming(n)
        index = turn[true_rows(self.home[turn] != EVERYWHERE, n_settled)]
        step = self.step_sizes[index // self.n_chains]
        y, noise = propose_mala(self.points.take(index), step, generator)
        return Walk(index, y, self.points.tau[index], noise)

    def finish_walk(self, walk: Walk, new: Points, generator: torch.Generator) -> None:
        """Make the steps of :meth:`propose_walk`, evaluated as `new`, that are accepted.

        Chains stay at home. The step size of each temperature is tuned on the way.
        """
        index, temperature = walk.chains, walk.chains // self.n_chains
        points, step = self.points.take(index), self.step_sizes[temperature]
        accepted = accept_mala(points, new, walk.noise, step, generator)
        of_accepted = torch.where(accepted, temperature, self.n_temperatures)  # or of none
        counts, n_accepted = (
            count_by_cell(each, self.n_temperatures) for each in (temperature, of_accepted)
        )
        acceptance = (n_accepted.float() / counts.float().clamp(min=1)).double()
        factors = torch.where(counts > 0, tuning_factor(acceptance), 1.0)
        self.step_sizes = self.step_sizes * factors.to(self.step_sizes)
        self.points.replace(index, new, accepted & (new.basin == self.home[index]))

    def propose(
        self,
        index: Tensor,
        points: Points,
        proposed: Tensor,
        current: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Propose other points to the chains `index` [B], and accept or reject.

        Chains with a home get proposals in their basin. The others get, in half of the calls at
        random, proposals in the basin where they are: otherwise a chain in a rare basin would
        receive hardly any proposal from that basin and would keep its initial state, a frame of
        another temperature. A point may be proposed to one chain of either kind.

        `points` are proposals [B] in the order of `index` by temperature; `proposed` and `current`
        are ln(target/flow) at them and at the chains [B]. Returns the fraction accepted.
        """
        match = self.match(index, points, generator)
        return self.accept(match, match.numbers.tolist(), points, proposed, current, generator)

    def match(self, index: Tensor, points: Points, generator: torch.Generator) -> Match:
        """Pair chains and proposals, the first part of :meth:`propose`."""
        basin, is_settled = self.points.basin[index], self.home[index] != EVERYWHERE
        turn, n_settled = self._last_turn
        if index is not turn:
            n_settled = int(is_settled.sum())
        device = index.device
        coin = torch.rand((), generator=generator, dtype=torch.float32, device=device)
        free = true_rows(~is_settled, len(index) - n_settled)
        # Steps within basins do not change basins, so that the reverse step has the same pairs.
        settled = true_rows(is_settled, n_settled)
        if n_settled:  # in random order: those without a draw are others each time
            order = torch.randperm(n_settled, generator=generator, dtype=torch.int64, device=device)
            settled = settled[order]
        of_settled = self._pairs_within(settled, basin, points.basin)
        of_free = self._pairs_within(free, basin, points.basin)
        counts = of_settled.is_pair.sum(), of_free.is_pair.sum()
        numbers = torch.stack([coin.double(), *(count.double() for count in counts)])
        return Match(index, free, of_settled, of_free, numbers)

    def accept(
        self,
        match: Match,
        numbers: Sequence[float],
        points: Points,
        proposed: Tensor,
        current: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Accept or reject what is paired, the second part of :meth:`propose`."""
        coin, n_settled, n_free = numbers
        parts = [match.settled.first(int(n_settled))]
        parts += [match.free.first(int(n_free)) if coin < 0.5 else (match.all_free, match.all_free)]
        chain, draw = (torch.cat(part) for part in zip(*parts, strict=True))
        if not len(chain):
            return current.new_zeros(())
        # The network may give a state no finite density: an unlimited weight, which stays.
        limit = torch.finfo(current.dtype).max
        weights = torch.nan_to_num(current[chain], nan=limit)
        accepted, _ = metropolis(weights, proposed[draw], generator)
        self.points.replace(match.chosen[chain], points.take(draw), accepted)
        return accepted.double().mean()

    def _pairs_within(self, chains: Tensor, chain_basin: Tensor, draw_basin: Tensor) -> Pairs:
        """Pairs of these chains and of draws, within temperatures and basins, in their order."""
        n = len(draw_basin)
        temperature = torch.arange(n, dtype=torch.int64, device=chains.device)
        temperature = temperature // (n // self.n_temperatures)
        of_chains = (temperature * self.n_basins + chain_basin)[chains]
        of_draws = temperature * self.n_basins + draw_basin
        n_cells = self.n_temperatures * self.n_basins
        chain_order, draw_order = (
            torch.argsort(cells, stable=True) for cells in (of_chains, of_draws)
        )
        n_chains, n_draws = (count_by_cell(cells, n_cells) for cells in (of_chains, of_draws))
        sorted_cells = of_chains[chain_order]
        rank = torch.arange(len(chains), dtype=torch.int64, device=chains.device)
        rank = rank - (n_chains.cumsum(0) - n_chains)[sorted_cells]
        first_draw = (n_draws.cumsum(0) - n_draws)[sorted_cells]
        draw = draw_order[(first_draw + rank).clamp(max=n - 1)]
        return Pairs(chains[chain_order], draw, rank < n_draws[sorted_cells])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        own = {"home": self.home, "step_sizes": self.step_sizes, "next": self._next}
        return {**self.points.state_dict(), **own}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if it does not fit."""
        self.points.load_state_dict(content)
        home, basin = (
            check_tensor_like(content.get("home"), self.home, "home"),
            self.points.basin.cpu(),
        )
        if bool(((basin < 0) | (basin >= self.n_basins)).any()):
            raise ValueError(f"basin: expected 0 to {self.n_basins - 1}, got others")
        if bool(((home != EVERYWHERE) & (home != basin)).any()):
            raise ValueError("home: expected the basin of the chain, got another")
        sizes = check_tensor_like(content.get("step_sizes"), self.step_sizes, "step_sizes")
        if bool((sizes <= 0).any()):
            raise ValueError("step_sizes: expected positive numbers, got others")
        self.home = home.to(self.home, copy=True)
        self.step_sizes = sizes.to(self.step_sizes, copy=True)
        self._has_home = (self.home != EVERYWHERE).cpu()
        self._next = check_int(content.get("next"), "next", least=0, most=self.n_chains - 1)
