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

from openmm_tsf.doors import whole_number
from openmm_tsf.training.points import Points


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
        log_ratio: Tensor,
        generator: torch.Generator,
    ) -> float:
        """Metropolis steps of the chains `index` [B] to other points.

        Parameters
        ----------
        index
            From :meth:`turn`.
        points
            Proposals, in the same order.
        log_ratio
            ln of (target/flow at the proposal) over (target/flow at the state), [B]; a proposal
            with NaN is rejected.

        Returns
        -------
        acceptance
            Share of proposals that were accepted.
        """
        threshold = torch.rand(len(index), generator=generator, dtype=torch.float64).log()
        accepted = threshold < log_ratio
        self.points.put(index[accepted], points.take(accepted))
        return float(accepted.double().mean())

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
        self._next = whole_number(content.get("next"), "next", least=0, most=self.n_chains - 1)
