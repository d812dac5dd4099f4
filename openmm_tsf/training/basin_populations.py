"""Terms that correct the populations of basins in training by path gradients.

With p the Boltzmann density and q the flow's: forces determine the ratio of two basins' populations
only through the region between the basins, which has few points, so that path gradients correct
populations slowly. ln(p/q), which is constant for a perfect flow, shows them directly.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.training.cells import count_by_cell, sum_by_cell
from openmm_tsf.training.target_points import check_tensor_like
from openmm_tsf.utils.distributed import Ranks

#: |ln(p/q)|, about its mean, is cut to this in the coefficients of data.
_LOG_RATIO_LIMIT = 3.0
#: Number of points of a basin that the running estimates of population ratios average over.
_RATIO_MEMORY = 50
#: |ln(P_p/P_q)| is cut to this; a flow too poor for an estimate has all basins at the same end.
_RATIO_LIMIT = 3.0
#: ln(P_p/P_q) of a basin is cut to this in the coefficients of draws.
_MISSING_LIMIT = 0.5
#: Number of steps that the running fractions of the draws average over.
_FRACTION_MEMORY = 100
#: A basin with fewer draws in a step, on average, counts as one that is not drawn at all.
_FEWEST_DRAWS = 0.1


class Populations:
    """Coefficients of loss terms that make ln(p/q) constant, over the data and between basins.

    The populations of whole basins are corrected with gradients at the flow's draws, which are new
    in every step: with gradients at the few frames of a rare basin, the flow would overfit these.

    The ratio P_p/P_q of a basin's probabilities under p and q is Bennett's estimate from data and
    draws in the basin: at C = ln(P_p/P_q), up to a constant that basins of one temperature share,
    E_q[ sigmoid(ln p/q - C) ] = E_p[ sigmoid(C - ln p/q) ] (J. Comput. Phys. 22, 245 (1976)).
    It is updated by a small step in each training step. The mean of ln(p/q) over data alone would
    be larger by KL(p || q) within the basin, and a basin that the flow represents less well would
    be drawn too often. Both means are over a basin: data that have more of a rare basin than the
    target change nothing.

    Parameters
    ----------
    tau
        T/T_ref of every group [G]: the datasets, then the chains.
    ladder
        T/T_ref of the draws [K].
    n_basins
        The number B of basins.
    log_variance, basin_balance
        See :class:`openmm_tsf.FitSettings`.
    ranks
        Those that share the points of a step; coefficients are of the points of this rank.

    Attributes
    ----------
    basin_fractions
        Running fraction of the draws of each temperature in each basin [K, B].
    population_ratios
        ln(P_p/P_q) of the basins [K, B], up to a constant of each temperature.
    basins_met
        1 for basins that have had data, else 0, [K, B].
    """

    def __init__(
        self,
        tau: Tensor,
        ladder: Tensor,
        n_basins: int,
        log_variance: float,
        basin_balance: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.log_variance, self.basin_balance = log_variance, basin_balance
        self._ranks = ranks or Ranks()
        same = (tau[:, None] / ladder[None, :]).log().abs() < 1e-6
        # Groups at whose temperature nothing is drawn have rung K.
        self._rung = torch.where(same.any(1), same.double().argmax(1), len(ladder))
        self._n_rungs, self._n_basins = len(ladder), n_basins
        zeros = torch.zeros(len(ladder), n_basins, dtype=torch.float64, device=ladder.device)
        self.basin_fractions = zeros + 1 / n_basins
        self.population_ratios, self.basins_met = zeros.clone(), zeros.clone()

    def data_coefficients(
        self, log_ratio: Tensor, group: Tensor, n_groups: int
    ) -> tuple[Tensor, Tensor]:
        """Return the coefficients [D] of -ln q at data, float64, and the spread of ln(p/q).

        `log_ratio` is ln(p/q) [D], up to a constant of each temperature; `group` [D] < `n_groups`.
        """
        usable = torch.isfinite(log_ratio)
        members = torch.nn.functional.one_hot(group, n_groups).double() * usable[:, None]
        values = torch.where(usable, log_ratio, 0.0)
        numbers = values.new_full((n_groups,), float(len(values)))
        sums = torch.stack([members.T @ values, members.sum(0), numbers])
        totals, n_usable, n_points = self._ranks.sum_(sums)
        centred = values - (totals / n_usable.clamp(min=1))[group]
        centred = torch.where(usable, centred.clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT), 0.0)
        return self.log_variance * centred / n_points[0], centred.std()

    def draw_coefficients(self, draw_basin: Tensor, n_draws: int | None = None) -> Tensor:
        """Return the coefficients [D] of ln q at draws, float64, that correct the populations.

        The mean of grad ln q is grad ln P_q(basin) over a basin's draws, and zero over all draws.
        Summed over the draws of a temperature, times grad ln q, the coefficients are on average
        `basin_balance`/K times the sum over basins of :attr:`missing` times grad ln P_q(basin).
        All ranks together have `n_draws` of each temperature, by default those given.
        """
        n_here = len(draw_basin) // self._n_rungs
        n = n_here if n_draws is None else n_draws
        if self.basin_balance == 0:
            return draw_basin.new_zeros(len(draw_basin), dtype=torch.float64)
        # The running fraction, so that draws of a rare basin do not weigh more in a step that has
        # fewer of them; a basin with less than one draw in a step counts less.
        per_draw = self.missing / (n * self.basin_fractions).clamp(min=1)
        # Without the mean, which changes no expectation, there is less noise.
        mean = (per_draw * self.basin_fractions).sum(1, keepdim=True)
        by_basin = self.basin_balance / self._n_rungs * (per_draw - mean)
        return by_basin.gather(1, draw_basin.view(self._n_rungs, n_here)).flatten()

    @property
    def missing(self) -> Tensor:
        """ln(P_p/P_q) of every basin [K, B], cut to +-0.5; zero for basins without data.

        P_p and P_q are probabilities among the basins with data.
        """
        fractions = self.basin_fractions * self.basins_met
        fractions = fractions / fractions.sum(1, keepdim=True).clamp(min=1e-9)
        total = (fractions * self.population_ratios.exp()).sum(1, keepdim=True)
        relative = self.population_ratios - total.clamp(min=1e-9).log()
        return relative.clamp(-_MISSING_LIMIT, _MISSING_LIMIT) * self.basins_met

    def update(
        self,
        data_log_ratio: Tensor,
        group: Tensor,
        data_basin: Tensor,
        draw_log_ratio: Tensor,
        draw_basin: Tensor,
    ) -> None:
        """Move the running fractions, and the population ratios a step towards Bennett's estimates.

        Draws [D] are equally many of each temperature, one temperature after the other; data [B]
        are those of :meth:`data_coefficients`; both are of all ranks.
        """
        shape = self._n_rungs, self._n_basins
        draws, drawn = draw_log_ratio.view(shape[0], -1), draw_basin.view(shape[0], -1)
        n = drawn.shape[1]
        is_drawn = torch.nn.functional.one_hot(drawn, shape[1]).double()
        self.basin_fractions += (is_drawn.mean(1) - self.basin_fractions) / _FRACTION_MEMORY
        rung = self._rung[group]
        usable, n_cells = (rung < shape[0]) & torch.isfinite(data_log_ratio), shape[0] * shape[1]
        of_rung = usable[:, None] & (torch.nn.functional.one_hot(rung, shape[0] + 1)[:, :-1] > 0)
        median = torch.where(of_rung, data_log_ratio[:, None], torch.nan).nanmedian(0).values
        cell = torch.where(usable, rung * shape[1] + data_basin, n_cells)  # or in none of them
        counts = count_by_cell(cell, n_cells).view(shape)
        rung = rung.clamp(max=shape[0] - 1)
        weights = self.population_ratios[rung, data_basin] - data_log_ratio + median[rung]
        of_data = sum_by_cell(torch.sigmoid(weights), cell, n_cells).view(shape)
        shifted = torch.nan_to_num(draws - median[:, None], nan=-torch.inf, posinf=torch.inf)
        weights = torch.sigmoid(shifted - self.population_ratios.gather(1, drawn))
        n_drawn, expected = is_drawn.sum(1), n * self.basin_fractions
        of_draws = (is_drawn * weights[..., None]).sum(1) / n_drawn.clamp(min=1)
        # Draws of a basin that there are none of would have infinite weight.
        is_lost = (n_drawn == 0) & (expected < _FEWEST_DRAWS)
        residual = torch.where(is_lost, 1.0, of_draws) - of_data / counts.clamp(min=1)
        self.basins_met = torch.where(counts > 0, 1.0, self.basins_met)
        # One rate for all basins: a change common to them must not change their differences.
        fewest = torch.where(self.basins_met > 0, torch.minimum(counts, expected), torch.inf)
        rate = (fewest.amin(1, keepdim=True).clamp(min=1) / _RATIO_MEMORY).clamp(max=1)
        is_known = (counts > 0) & ((n_drawn > 0) | is_lost) & torch.isfinite(residual)
        step = torch.where(is_known, rate * residual, 0.0)
        self.population_ratios = (self.population_ratios + step).clamp(-_RATIO_LIMIT, _RATIO_LIMIT)

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
            setattr(self, name, tensor.to(like, copy=True))
