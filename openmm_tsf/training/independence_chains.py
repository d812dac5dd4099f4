"""Markov chains that live through the training: its own samples of every temperature.

Draws for the energy part of the loss are at the same time proposals to these chains, at no further
evaluation: an independence sampler whose proposal, the flow, gets better. Their states are data at
temperatures of which there are no frames (the paper's outlook, arXiv:2012.00429, section 5), with
the populations of the target, not of the flow: what keeps a minor basin from being dropped
(compare Markovian score climbing, arXiv:2003.10374, and arXiv:2105.12603).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.training.target_points import Points
from openmm_tsf.utils.validation import check_int


class IndependenceChains:
    """Independence samplers, some for each temperature.

    Parameters
    ----------
    points
        Where the chains start, [K n] points of the target, the n of each temperature together.
    n_temperatures
        K.
    """

    def __init__(self, points: Points, n_temperatures: int) -> None:
        self.points, self.n_temperatures = points, n_temperatures
        self.n_chains = len(points) // n_temperatures
        self._next = 0

    def turn(self, n: int) -> Tensor:
        """Indices [K n] of the n chains of each temperature whose turn it is."""
        chosen = (self._next + torch.arange(n)) % self.n_chains
        self._next = (self._next + n) % self.n_chains
        first = self.n_chains * torch.arange(self.n_temperatures)
        return (first[:, None] + chosen).flatten()

    def propose(
        self,
        index: Tensor,
        points: Points,
        proposed: Tensor,
        present: Tensor,
        generator: torch.Generator,
    ) -> float:
        """Metropolis steps of the chains `index` [B] to other points.

        Every other time, by chance, a proposal goes to a chain in its own basin: else a chain in a
        rare basin would meet hardly any proposal of that basin, and would be there as it came from
        the frames, of another temperature.

        Parameters
        ----------
        index
            From :meth:`turn`.
        points
            Proposals [B], those of each temperature in the place of its chains.
        proposed, present
            ln(target/flow) at the proposals and at the chains' states [B]; a proposal with NaN is
            rejected.

        Returns
        -------
        acceptance
            Share of proposals that were accepted.
        """
        chain = draw = torch.arange(len(index))
        if float(torch.rand((), generator=generator)) < 0.5:
            # Basins do not change by such steps, so that the pairs are the same on the way back.
            chain, draw = self._pairs_within(self.points.basin[index], points.basin)
        threshold = torch.rand(len(chain), generator=generator, dtype=torch.float64).log()
        accepted = threshold < proposed[draw] - present[chain]
        self.points.put(index[chain[accepted]], points.take(draw[accepted]))
        return float(accepted.double().mean())

    def _pairs_within(self, of_chain: Tensor, of_draw: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of chains and of proposals of the same temperature and basin, in pairs."""
        n = len(of_chain) // self.n_temperatures
        chains, draws = [], []
        for first in range(0, len(of_chain), n):
            for basin in (0, 1):
                ours = (of_chain[first : first + n] == basin).nonzero().flatten()
                theirs = (of_draw[first : first + n] == basin).nonzero().flatten()
                both = min(len(ours), len(theirs))
                chains.append(first + ours[:both])
                draws.append(first + theirs[:both])
        return torch.cat(chains), torch.cat(draws)

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
        return {**self.points.state_dict(), "next": self._next}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If it is not of chains like these.
        """
        self.points.load_state_dict(content)
        self._next = check_int(content.get("next"), "next", least=0, most=self.n_chains - 1)
