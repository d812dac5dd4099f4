"""The temperature-steerable flow (Dibak, Klein, Noé, arXiv:2012.00429)."""

from typing import ClassVar

import numpy as np
from torch import nn

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.coupling import AffineCoupling, Scale

_MASK_SEED = 99


class TemperatureSteerableFlow(AugmentedFlow):
    """One flow for every temperature: constant Jacobian, prior N(0, T/T_ref).

    z is scaled by k, then coordinates and momenta are coupled by volume-preserving affine layers
    (arXiv:2012.00429, Fig. 1). With volume internal coordinates the whole map's Jacobian is
    constant, so p(x, p; T') is proportional to p(x, p; T)^(T/T') exactly (eq. 4). See
    :class:`openmm_tsf.flows.base.AugmentedFlow` for the parameters.

    The paper couples z with q only. Then the identity is a saddle point of the likelihood (q is
    independent of z, so neither conditioner has a gradient at first) and training starts slowly.
    Here each block updates a random half of z and of q given the other halves, then the converse.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf import TemperatureSteerableFlow
    >>> flow = TemperatureSteerableFlow(n_coordinates=2, n_momenta=2, n_blocks=2, hidden=(16,))
    >>> flow.is_constant_log_det
    True

    A flow for a molecule is built with :meth:`from_dataset`, trained with :func:`openmm_tsf.fit`
    and saved with :meth:`save`:

    >>> flow.save("flow.pt")
    >>> flow = TemperatureSteerableFlow.load("flow.pt")
    >>> x, momenta, log_prob = flow.sample(
    ...     100, temperature=0.5, generator=torch.Generator().manual_seed(0)
    ... )
    >>> torch.allclose(flow.log_prob(x, momenta, temperature=0.5), log_prob)
    True
    """

    kind: ClassVar[str] = "tsf"

    def couplings(self, n_blocks: int, hidden: tuple[int, ...]) -> list[nn.Module]:
        d, m = self.n_coordinates, self.n_momenta
        if m < 1:
            raise ValueError(f"n_momenta: a TSF expects at least 1, got {m}")
        rng = np.random.default_rng(_MASK_SEED)
        layers: list[nn.Module] = [Scale(d + m, d)]
        for _ in range(n_blocks):
            z, q = rng.permutation(d), d + rng.permutation(m)
            first = [*z[: d // 2].tolist(), *q[m // 2 :].tolist()]
            second = [*z[d // 2 :].tolist(), *q[: m // 2].tolist()]
            halves = (first, second) if second else (first,)
            layers += [AffineCoupling(d + m, half, hidden, True) for half in halves]
        return layers
