"""What holds the populations of basins in training by path gradients.

How much of p is in which basin is in the slopes only where the basins meet, where there are few
points: path gradients correct populations slowly. ln(p/q), which is constant over a perfect flow,
shows them at once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.doors import entry

#: Largest |ln(p/q)|, about its mean, that pulls as hard as it is.
_LOG_RATIO_LIMIT = 3.0
#: Memory of the running means of ln(p/q) by basin, in points of it: 0.1 nats of noise.
_MEMORY = 200
#: Memory of the basins' shares in a batch, in steps.
_SHARE_MEMORY = 100


class Populations:
    """Coefficients of -ln q that pull ln(p/q) towards a constant in every group of points.

    ln(p/q) of a basin's data is on average ln(P_p/P_q), the ratio of its populations, plus
    KL(p || q) within the basin; that of draws is the same ratio less KL(q || p). Where both are
    known their mean is taken, in which the divergences cancel to the leading order (as in Bennett's
    ratio); by data alone a basin that the flow knows less well would be drawn too often.

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
        # The last column is of groups at whose temperature nothing is drawn.
        self._rung = torch.where(same.any(1), same.double().argmax(1), len(ladder))
        self._shares = torch.full((len(tau), 2), 0.5, dtype=torch.float64)
        self._data, self._draws = _RunningMeans(len(tau)), _RunningMeans(len(ladder))

    def pull(
        self, log_ratio: Tensor, group: Tensor, basin: Tensor, n_groups: int
    ) -> tuple[Tensor, float]:
        """Coefficients [B] of data points, float64, and the spread of their ln(p/q).

        Parameters
        ----------
        log_ratio
            ln(p/q) [B], up to a constant of each temperature.
        group, basin
            Of each point [B]; basins are 0 and 1.
        n_groups
            The first so many groups have points.
        """
        centred, counts, means = _by_basin(log_ratio, group, basin, n_groups)
        pull = self.log_variance * centred / len(centred)
        if self.basin_balance > 0:
            both = counts.sum(1, keepdim=True).clamp(min=1)
            shares = self._shares[:n_groups]
            shares += (counts / both - shares) / _SHARE_MEMORY
            self._data.take(means, counts)
            # Divided by how many points a basin has in a batch on average: where it has few in
            # this one they are not pulled the harder.
            apart = self._apart(n_groups).clamp(-2, 2)
            sign = 2.0 * basin - 1.0
            expected = (shares * both).clamp(min=1).view(-1)
            share = sign * apart[group] / expected[2 * group + basin]
            pull = pull + self.basin_balance / (4 * n_groups) * share
        return pull, float(centred.std())

    def take_draws(self, log_ratio: Tensor, basin: Tensor) -> None:
        """Note ln(p/q) [B] of draws, as many of each temperature, one temperature after another."""
        n_rungs = len(self._draws.mean)
        rung = torch.arange(n_rungs).repeat_interleave(len(log_ratio) // n_rungs)
        _, counts, means = _by_basin(log_ratio, rung, basin, n_rungs)
        self._draws.take(means, counts)

    def _apart(self, n_groups: int) -> Tensor:
        """ln(P_p/P_q) of basin 1 less that of basin 0, by group [G]."""
        by_data = self._data.mean[:n_groups, 1] - self._data.mean[:n_groups, 0]
        none = torch.zeros(1, dtype=torch.float64)
        by_draws = torch.cat([self._draws.mean[:, 1] - self._draws.mean[:, 0], none])
        seen = torch.cat([(self._draws.seen > 0).all(1), none.bool()])
        rung = self._rung[:n_groups]
        return torch.where(seen[rung], 0.5 * (by_data + by_draws[rung]), by_data)

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {
            "basin_shares": self._shares,
            "data_mean": self._data.mean,
            "data_seen": self._data.seen,
            "draws_mean": self._draws.mean,
            "draws_seen": self._draws.seen,
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
            found = entry(content, name, Tensor)
            if found.shape != like.shape or not bool(torch.isfinite(found).all()):
                raise ValueError(f"{name}: expected finite numbers of shape {tuple(like.shape)}")
            if "mean" not in name and bool((found < 0).any()):
                raise ValueError(f"{name}: expected counts or shares, got negative numbers")
            loaded[name] = found.to(torch.float64).clone()
        self._shares = loaded["basin_shares"]
        self._data.mean, self._data.seen = loaded["data_mean"], loaded["data_seen"]
        self._draws.mean, self._draws.seen = loaded["draws_mean"], loaded["draws_seen"]


class _RunningMeans:
    """Means [G, 2] over about the last `_MEMORY` points of each group and basin."""

    def __init__(self, n_groups: int) -> None:
        self.mean = torch.zeros(n_groups, 2, dtype=torch.float64)
        self.seen = torch.zeros(n_groups, 2, dtype=torch.float64)

    def take(self, means: Tensor, counts: Tensor) -> None:
        """Further points of the first groups: how many, and their means."""
        mean, seen = self.mean[: len(means)], self.seen[: len(means)]
        seen += counts
        mean += (means - mean) * (counts / seen.clamp(min=1))
        seen.clamp_(max=_MEMORY)


def _by_basin(
    log_ratio: Tensor, group: Tensor, basin: Tensor, n_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ln(p/q) [B] about the means of the groups, cut; counts and means of it [n_groups, 2]."""
    cells = torch.nn.functional.one_hot(2 * group + basin, 2 * n_groups).double()
    usable = torch.isfinite(log_ratio)
    cells = cells * usable[:, None]
    values = torch.where(usable, log_ratio, 0.0)
    counts = cells.sum(0).view(n_groups, 2)
    sums = (cells.T @ values).view(n_groups, 2)
    centred = values - (sums.sum(1) / counts.sum(1).clamp(min=1))[group]
    centred = torch.where(usable, centred.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT), 0.0)
    return centred, counts, (cells.T @ centred).view(n_groups, 2) / counts.clamp(min=1)
