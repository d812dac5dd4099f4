"""The paper's baseline: RealNVP (arXiv:1605.08803) with the same interface."""

from typing import ClassVar

from torch import nn

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.coupling import AffineCoupling


class RealNVPFlow(AugmentedFlow):
    """Affine couplings between alternating halves of z; not volume-preserving, no momenta.

    The Jacobian varies, so a prior N(0, T/T_ref) does not steer it to other temperatures: that is
    the comparison of arXiv:2012.00429, Fig. 2. See
    :class:`openmm_tsf.flows.base.AugmentedFlow` for the parameters.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf import RealNVPFlow
    >>> flow = RealNVPFlow(n_coordinates=2, n_momenta=0, n_blocks=2, hidden=(16,))
    >>> flow.is_constant_log_det
    False
    >>> draws = flow.sample(100, temperature=1.0, generator=torch.Generator().manual_seed(0))
    >>> log_prob = flow.log_prob(draws.x, draws.momenta, temperature=1.0)
    >>> torch.allclose(log_prob, draws.log_prob)
    True
    """

    kind: ClassVar[str] = "realnvp"

    def couplings(self, n_blocks: int, hidden: tuple[int, ...]) -> list[nn.Module]:
        d, m = self.n_coordinates, self.n_momenta
        if m != 0:
            raise ValueError(f"n_momenta: RealNVP has none, got {m}")
        if d < 2:
            raise ValueError(f"n_coordinates: RealNVP expects at least 2, got {d}")
        layers: list[nn.Module] = []
        for block in range(n_blocks):
            # Interleaved halves in even blocks, contiguous ones in odd: every pair is coupled.
            first = range(0, d, 2) if block % 2 == 0 else range(d // 2)
            second = [i for i in range(d) if i not in set(first)]
            layers += [AffineCoupling(d, half, hidden, False) for half in (first, second)]
        return layers

    @staticmethod
    def default_momenta(n_coordinates: int) -> int:
        return 0
