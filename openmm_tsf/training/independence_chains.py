"""Markov chains that run through the training: samples of every temperature.

The draws of the energy loss are also proposals to these chains, without further evaluations: an
independence sampler whose proposal, the flow, improves. The states are data at temperatures without
frames (the outlook of arXiv:2012.00429, section 5) with the target's populations, and so keep a
minor basin (compare Markovian score climbing, arXiv:2003.10374, and arXiv:2105.12603).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.metropolis import metropolis
from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.validation import check_int


class IndependenceChains:
    """Independence samplers from initial states [K n], the n of each of K temperatures together."""

    def __init__(self, points: Points, n_temperatures: int) -> None:
        self.points, self.n_temperatures = points, n_temperatures
        self.n_chains = len(points) // n_temperatures
        self._next = 0

    def next_chains(self, n: int) -> Tensor:
        """Return the indices [K n] of the next n chains of each temperature, cyclically."""
        chosen = (self._next + torch.arange(n, dtype=torch.int64, device="cpu")) % self.n_chains
        self._next = (self._next + n) % self.n_chains
        first = self.n_chains * torch.arange(self.n_temperatures, dtype=torch.int64, device="cpu")
        return (first[:, None] + chosen).flatten()

    def propose(
        self,
        index: Tensor,
        points: Points,
        proposed: Tensor,
        current: Tensor,
        generator: torch.Generator,
    ) -> float:
        """Propose other points to the chains `index` [B], and accept or reject.

        In half of the calls, at random, proposals go only to chains in their basin: otherwise a
        chain in a rare basin would receive hardly any proposal from that basin and would keep its
        initial state, a frame of another temperature.

        `points` are proposals [B] in the order of `index` by temperature; `proposed` and `current`
        are ln(target/flow) at them and at the chains [B]. Returns the fraction accepted.
        """
        chain = draw = torch.arange(len(index), dtype=torch.int64, device="cpu")
        if float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu")) < 0.5:
            # These steps do not change basins, so that the reverse step has the same pairs.
            chain, draw = self._pairs_within(self.points.basin[index], points.basin)
        # The network may give a state no finite density: an unlimited weight, which stays.
        limit = torch.finfo(current.dtype).max
        weights = torch.nan_to_num(current[chain], nan=limit)
        accepted, _ = metropolis(weights, proposed[draw], generator)
        self.points.put(index[chain[accepted]], points.take(draw[accepted]))
        return float(accepted.double().mean())

    def _pairs_within(self, chain_basin: Tensor, draw_basin: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of chains and of proposals, paired within temperatures and basins."""
        n = len(chain_basin) // self.n_temperatures
        chains, draws = [], []
        for first in range(0, len(chain_basin), n):
            here = slice(first, first + n)
            for basin in (0, 1):
                in_chains = (chain_basin[here] == basin).nonzero().flatten()
                in_draws = (draw_basin[here] == basin).nonzero().flatten()
                n_pairs = min(len(in_chains), len(in_draws))
                chains.append(first + in_chains[:n_pairs])
                draws.append(first + in_draws[:n_pairs])
        return torch.cat(chains), torch.cat(draws)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        return {**self.points.state_dict(), "next": self._next}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if it does not fit."""
        self.points.load_state_dict(content)
        self._next = check_int(content.get("next"), "next", least=0, most=self.n_chains - 1)
