"""The temperature-steerable flow (Dibak, Klein, Noé, arXiv:2012.00429)."""

from typing import ClassVar

from torch import nn

from openmm_tsf.flows.augmented import AugmentedFlow
from openmm_tsf.flows.coupling import AffineCoupling, Scale


class TemperatureSteerableFlow(AugmentedFlow):
    """One flow for every temperature: constant Jacobian, prior N(0, T/T_ref).

    z is scaled by k, then z and the momenta q are coupled by volume-preserving affine layers in
    turn (arXiv:2012.00429, Fig. 1). With volume internal coordinates the whole map's Jacobian is
    constant, so p(x, p; T') is proportional to p(x, p; T)^(T/T') exactly (eq. 4). See
    :class:`openmm_tsf.flows.augmented.AugmentedFlow` for the parameters.
    """

    kind: ClassVar[str] = "tsf"
    volume_preserving: ClassVar[bool] = True

    def _couplings(self, n_blocks: int, hidden: tuple[int, ...]) -> list[nn.Module]:
        d, m = self.n_coordinates, self.n_momenta
        if m < 1:
            raise ValueError(f"n_momenta: a TSF expects at least 1, got {m}")
        layers: list[nn.Module] = [Scale(d + m, d)]
        for _ in range(n_blocks):
            layers.append(AffineCoupling(d + m, range(d, d + m), hidden, True))
            layers.append(AffineCoupling(d + m, range(d), hidden, True))
        return layers
