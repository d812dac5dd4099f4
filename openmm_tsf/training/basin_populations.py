"""Terms that correct the populations of basins in training by path gradients.

With p the Boltzmann density and q the flow's: forces determine the ratio of two basins' populations
only through the region between the basins, which has few points, so that path gradients correct
populations slowly. ln(p/q), which is constant for a perfect flow, shows them directly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.training.target_points import check_tensor_like

#: |ln(p/q)|, about its mean, is cut to this in the coefficients of data.
_LOG_RATIO_LIMIT = 3.0
#: Number of points of a basin that the running estimates of population ratios average over.
_RATIO_MEMORY = 50
#: |ln(P_p/P_q)| is cut to this; a flow too poor for an estimate has both basins at the same end.
_RATIO_LIMIT = 3.0
#: Differences of ln(P_p/P_q) between the basins are cut to this in the coefficients of draws.
_MISSING_LIMIT = 0.5
#: Number of steps that the running fractions of the draws average over.
_FRACTION_MEMORY = 100
#: Draws of infinite weight added to each basin in a step: an estimate for basins without draws.
_PSEUDO_DRAWS = 0.1


class Populations:
    """Coefficients of loss terms that make ln(p/q) constant, over the data and between basins.

    The populations of whole basins are corrected with gradients at the flow's draws, which are new
    in every step: with gradients at the few frames of a rare basin, the flow would overfit these.

    The ratio P_p/P_q of a basin's probabilities under p and q is Bennett's estimate from data and
    draws in the basin: at C = ln(P_p/P_q), up to a constant that basins of one temperature share,
    E_q[ sigmoid(ln p/q - C) ] = E_p[ sigmoid(C - ln p/q) ] (J. Comput. Phys. 22, 245 (1976)).
    It is updated by a small step in each training step. The mean of ln(p/q) over data alone would
    be larger by KL(p || q) within the basin, and a basin that the flow represents less well would
    be drawn too often.

    Parameters
    ----------
    tau
        T/T_ref of every group [G]: the datasets, then the chains.
    ladder
        T/T_ref of the draws [K].
    log_variance, basin_balance
        See :class:`openmm_tsf.FitSettings`.

    Attributes
    ----------
    basin_fractions
        Running fraction of the draws of each temperature in basin 1 [K].
    population_ratios
        ln(P_p/P_q) of basins 0 and 1 [K, 2].
    basins_met
        1 for basins that have had data, else 0, [K, 2].
    """

    def __init__(
        self, tau: Tensor, ladder: Tensor, log_variance: float, basin_balance: float
    ) -> None:
        self.log_variance, self.basin_balance = log_variance, basin_balance
        same = (tau[:, None] / ladder[None, :]).log().abs() < 1e-6
        # Groups at whose temperature nothing is drawn have rung K.
        self._rung = torch.where(same.any(1), same.double().argmax(1), len(ladder))
        self._n_rungs = len(ladder)
        self.basin_fractions = torch.full((len(ladder),), 0.5, dtype=torch.float64, device="cpu")
        self.population_ratios = torch.zeros(len(ladder), 2, dtype=torch.float64, device="cpu")
        self.basins_met = torch.zeros(len(ladder), 2, dtype=torch.float64, device="cpu")

    def data_coefficients(
        self, log_ratio: Tensor, group: Tensor, n_groups: int
    ) -> tuple[Tensor, float]:
        """Return the coefficients [B] of -ln q at data, float64, and the spread of ln(p/q).

        `log_ratio` is ln(p/q) [B], up to a constant of each temperature; `group` [B] < `n_groups`.
        """
        usable = torch.isfinite(log_ratio)
        members = torch.nn.functional.one_hot(group, n_groups).double() * usable[:, None]
        values = torch.where(usable, log_ratio, 0.0)
        centred = values - ((members.T @ values) / members.sum(0).clamp(min=1))[group]
        centred = torch.where(usable, centred.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT), 0.0)
        return self.log_variance * centred / len(centred), float(centred.std())

    def draw_coefficients(self, draw_basin: Tensor) -> Tensor:
        """Return the coefficients [D] of ln q at draws, float64, that correct the populations.

        The mean of grad ln q is grad ln P_q(basin) over a basin's draws, and zero over all draws.
        Summed over the draws of a temperature, times grad ln q, the coefficients are on average
        `basin_balance`/K times :attr:`missing` times grad ln(P_q(1)/P_q(0)).
        """
        if self.basin_balance == 0:
            return torch.zeros(len(draw_basin), dtype=torch.float64, device="cpu")
        basin = draw_basin.view(self._n_rungs, -1).double()
        n = basin.shape[1]
        self.basin_fractions += (basin.mean(1) - self.basin_fractions) / _FRACTION_MEMORY
        # The running fraction, so that draws of a rare basin do not weigh more in a step that has
        # fewer of them.
        fraction = self.basin_fractions.clamp(1 / (n + 1), n / (n + 1))[:, None]
        by_rung = self.missing[:, None] * (basin - fraction) / (fraction * (1 - fraction) * n)
        return self.basin_balance / self._n_rungs * by_rung.flatten()

    @property
    def missing(self) -> Tensor:
        """ln(P_p/P_q) of basin 1 less that of basin 0, by rung [K], cut to +-0.5.

        Zero for a rung with data of one basin only.
        """
        difference = self.population_ratios[:, 1] - self.population_ratios[:, 0]
        return difference.clamp(-_MISSING_LIMIT, _MISSING_LIMIT) * self.basins_met.prod(dim=1)

    def update(
        self,
        data_log_ratio: Tensor,
        group: Tensor,
        data_basin: Tensor,
        draw_log_ratio: Tensor,
        draw_basin: Tensor,
    ) -> None:
        """Move the population ratios a step towards Bennett's estimates.

        Draws [D] are equally many of each temperature, one temperature after the other; data [B]
        are those of :meth:`data_coefficients`.
        """
        rung = self._rung[group]
        by_rung = (part.chunk(self._n_rungs) for part in (draw_log_ratio, draw_basin))
        for k, (draws, drawn_basin) in enumerate(zip(*by_rung, strict=True)):
            usable = (rung == k) & torch.isfinite(data_log_ratio)
            if not bool(usable.any()):
                continue
            median = data_log_ratio[usable].median()
            by_basin = [
                (
                    data_log_ratio[usable & (data_basin == b)] - median,
                    draws[drawn_basin == b] - median,
                )
                for b in (0, 1)
            ]
            fewest = min(min(len(data), max(1, len(drawn))) for data, drawn in by_basin)
            # One rate for both basins: a change common to both must not change their difference.
            rate = min(1.0, max(1, fewest) / _RATIO_MEMORY)
            for basin, (data, drawn) in enumerate(by_basin):
                if len(data):
                    self.basins_met[k, basin] = 1
                    ratio = self.population_ratios[k, basin]
                    ratio += rate * _bennett_residual(ratio, data, drawn)
                    ratio.clamp_(-_RATIO_LIMIT, _RATIO_LIMIT)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        names = ("basin_fractions", "population_ratios", "basins_met")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if it does not fit."""
        for name, like in self.state_dict().items():
            tensor = check_tensor_like(content.get(name), like, name)
            if name != "population_ratios" and bool(((tensor < 0) | (tensor > 1)).any()):
                raise ValueError(f"{name}: expected numbers from 0 to 1, got others")
            setattr(self, name, tensor.clone())


def _bennett_residual(ratio: Tensor, data: Tensor, draws: Tensor) -> Tensor:
    """The residual of Bennett's equation at a ratio: positive below its root, negative above."""
    weights = torch.sigmoid(torch.nan_to_num(draws, nan=-torch.inf, posinf=torch.inf) - ratio)
    of_draws = (weights.sum() + _PSEUDO_DRAWS) / (len(draws) + _PSEUDO_DRAWS)
    return of_draws - torch.sigmoid(ratio - data).mean()
