"""What holds the populations of basins in training by path gradients.

How much of p is in which basin is in the slopes only where the basins meet, where there are few
points: path gradients correct populations slowly. ln(p/q), which is constant over a perfect flow,
shows them at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.utils.validation import require_entry

#: Largest |ln(p/q)|, about its mean, that pulls as hard as it is.
_LOG_RATIO_LIMIT = 3.0
#: Memory of the populations' ratios, in points of a basin.
_MEMORY = 50
#: ln(P_p/P_q) is followed so far: a flow that is too poor to tell has both basins at one end.
_RATIO_LIMIT = 3.0
#: Largest of those that pushes as hard as it is.
_PUSH_LIMIT = 0.5
#: Memory of the basins' shares of the draws, in steps.
_SHARE_MEMORY = 100
#: Draws of infinite weight that a basin is given in a step, for those that are drawn no more.
_PSEUDO_DRAWS = 0.1


class Populations:
    """What makes ln(p/q) constant, from point to point of the data and from basin to basin.

    Whole basins are brought up or down at the flow's own draws, of which there are always new ones:
    at data, those few that are in a rare basin would be learnt by heart.

    The ratio P_p/P_q of a basin's populations is Bennett's, from data and draws of the basin: at
    C = ln(P_p/P_q), up to a constant of the temperature,
    E_q[ sigmoid(ln p/q - C) ] = E_p[ sigmoid(C - ln p/q) ] (J. Comput. Phys. 22, 245 (1976)). It is
    followed by small steps along the training. The mean of ln(p/q) over data alone is larger by
    KL(p || q) within the basin: one that the flow knows less well would be drawn too often.

    Parameters
    ----------
    tau
        T/T_ref of every group [G]: the datasets, then the chains.
    ladder
        T/T_ref of the draws [K].
    log_variance, basin_balance
        See :class:`openmm_tsf.FitSettings`.
    """

    def __init__(
        self, tau: Tensor, ladder: Tensor, log_variance: float, basin_balance: float
    ) -> None:
        self.log_variance, self.basin_balance = log_variance, basin_balance
        same = (tau[:, None] / ladder[None, :]).log().abs() < 1e-6
        # Number K is of groups at whose temperature nothing is drawn.
        self._rung = torch.where(same.any(1), same.double().argmax(1), len(ladder))
        self._n_rungs = len(ladder)
        self._shares = torch.full((len(ladder),), 0.5, dtype=torch.float64)
        self._ratio = torch.zeros(len(ladder), 2, dtype=torch.float64)
        self._met = torch.zeros(len(ladder), 2, dtype=torch.float64)  # 1: there have been data

    def pull(self, log_ratio: Tensor, group: Tensor, n_groups: int) -> tuple[Tensor, float]:
        """Coefficients [B] of -ln q at data points, float64, and the spread of their ln(p/q).

        Parameters
        ----------
        log_ratio
            ln(p/q) [B], up to a constant of each temperature.
        group
            Of each point [B].
        n_groups
            The first so many groups have points.
        """
        usable = torch.isfinite(log_ratio)
        cells = torch.nn.functional.one_hot(group, n_groups).double() * usable[:, None]
        values = torch.where(usable, log_ratio, 0.0)
        centred = values - ((cells.T @ values) / cells.sum(0).clamp(min=1))[group]
        centred = torch.where(usable, centred.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT), 0.0)
        return self.log_variance * centred / len(centred), float(centred.std())

    def push(self, drawn: Tensor) -> Tensor:
        """Coefficients [D] of ln q at draws, float64: what brings the basins' shares to p's.

        The mean of grad ln q is grad ln P_q(basin) over a basin's draws, and zero over all draws.
        Summed over the draws of a temperature, times grad ln q, the coefficients are on average
        `basin_balance`/K times what is missing there times grad ln(P_q(1)/P_q(0)).

        Parameters
        ----------
        drawn
            Basins of draws [D], as in :meth:`follow`.
        """
        if self.basin_balance == 0:
            return torch.zeros(len(drawn), dtype=torch.float64)
        each = drawn.view(self._n_rungs, -1).double()
        n = each.shape[1]
        self._shares += (each.mean(1) - self._shares) / _SHARE_MEMORY
        # Where few are drawn, those of this step are not pushed the harder.
        share = self._shares.clamp(1 / (n + 1), n / (n + 1))[:, None]
        by_rung = self.missing[:, None] * (each - share) / (share * (1 - share) * n)
        return self.basin_balance / self._n_rungs * by_rung.flatten()

    @property
    def missing(self) -> Tensor:
        """ln(P_p/P_q) of basin 1 less that of basin 0, by rung [K]; 0 where there is one basin."""
        apart = (self._ratio[:, 1] - self._ratio[:, 0]).clamp(-_PUSH_LIMIT, _PUSH_LIMIT)
        return apart * self._met.prod(dim=1)

    def follow(
        self, of_data: Tensor, group: Tensor, basin: Tensor, of_draws: Tensor, drawn: Tensor
    ) -> None:
        """Take a step towards the ratios, for the next :meth:`push`.

        Parameters
        ----------
        of_data, group, basin
            As in :meth:`pull`.
        of_draws, drawn
            ln(p/q) [D] of draws, as many of each temperature, one temperature after the other, and
            their basins.
        """
        rung = self._rung[group]
        for k, (ours, theirs) in enumerate(
            zip(of_draws.chunk(self._n_rungs), drawn.chunk(self._n_rungs), strict=True)
        ):
            here = (rung == k) & torch.isfinite(of_data)
            if not bool(here.any()):
                continue
            middle = of_data[here].median()
            sides = [
                (of_data[here & (basin == b)] - middle, ours[theirs == b] - middle) for b in (0, 1)
            ]
            fewest = min(min(len(data), max(1, len(draws))) for data, draws in sides)
            # Both basins at one rate: what is common to them must not set them apart.
            rate = min(1.0, max(1, fewest) / _MEMORY)
            for b, (data, draws) in enumerate(sides):
                if len(data):
                    self._met[k, b] = 1
                    ratio = self._ratio[k, b]
                    ratio += rate * _towards(ratio, data, draws)
                    ratio.clamp_(-_RATIO_LIMIT, _RATIO_LIMIT)

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
        return {
            "basin_shares": self._shares,
            "population_ratios": self._ratio,
            "basins_met": self._met,
        }

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If it is of another training.
        """
        loaded = {}
        for name, like in self.state_dict().items():
            found = require_entry(content, name, Tensor)
            if found.shape != like.shape or found.dtype != like.dtype:
                raise ValueError(f"{name}: expected {like.dtype} of shape {tuple(like.shape)}")
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
            if name != "population_ratios" and bool(((found < 0) | (found > 1)).any()):
                raise ValueError(f"{name}: expected numbers from 0 to 1, got others")
            loaded[name] = found.clone()
        self._shares, self._ratio, self._met = loaded.values()


def _towards(ratio: Tensor, data: Tensor, draws: Tensor) -> Tensor:
    """What Bennett's equation lacks at a ratio: 0 at the root, above it negative."""
    weights = torch.sigmoid(torch.nan_to_num(draws, nan=-torch.inf, posinf=torch.inf) - ratio)
    up = (weights.sum() + _PSEUDO_DRAWS) / (len(draws) + _PSEUDO_DRAWS)
    return up - torch.sigmoid(ratio - data).mean()
