"""How much of the target's gradient to use at data, basin by basin."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.training.cells import sum_by_cell
from openmm_tsf.training.path_gradients import limit_norm
from openmm_tsf.training.target_points import check_tensor_like
from openmm_tsf.utils.distributed import Ranks

#: Number of steps that the running products average over.
_MEMORY = 20
#: The norm of g is cut to this in the products and in the cotangent; the square of that of c is
#: the number of features over tau where the flow is exact, 11 to 15 for 120 features.
_LIMIT = 60.0


class ControlVariates:
    """The coefficients beta of :func:`openmm_tsf.training.path_gradients.data_cotangent`.

    A path gradient is large and noisy where the flow is poor, as it is in rare basins for most of
    a training: there the gradient of the likelihood has less noise. The betas make E |c - beta g|^2
    least, beta = E[c . g] / E[g^2], from running means over each cell: a dataset, or the chains of
    a temperature, and a basin. The sums of a step are those over all `ranks`.
    """

    def __init__(self, n_cells: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()
        self.products = torch.zeros(2, n_cells, dtype=torch.float64, device=device)

    def update(
        self, v: Tensor, gradient: Tensor, tau: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take v and g [B, d+m] of a step, and return g with limited norms and the betas [B].

        `tau` [B] is T/T_ref, `cell` [B] the cell of each point.
        """
        c, g = v.detach() / tau[:, None], limit_norm(gradient, _LIMIT)
        products = torch.stack([(c * g).sum(1), g.square().sum(1)]).double()
        products = torch.where(torch.isfinite(products), products, 0.0)
        n_cells = self.products.shape[1]
        sums = torch.stack([sum_by_cell(each, cell, n_cells) for each in products])
        sums = self._ranks.sum_(sums)
        self.products = self.products + (sums - self.products) / _MEMORY
        ratio = self.products[0] / self.products[1].clamp(min=torch.finfo(torch.float64).tiny)
        return g, ratio.clamp(0, 1)[cell].to(g)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        return {"products": self.products}

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Set what :meth:`state_dict` returned; a ValueError if it does not fit."""
        products = check_tensor_like(content.get("products"), self.products, "products")
        self.products = products.to(self.products, copy=True)
