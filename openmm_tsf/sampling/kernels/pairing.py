"""Which rungs of the temperature ladder exchange replicas in a call of a swap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from openmm_tsf.utils.devices import DeviceConstants
from openmm_tsf.utils.validation import check_choice, unwrap_scalar

SCHEMES = ("even_odd", "random_pairs")
Scheme = str | Sequence[tuple[int, int]]


class Pairing(DeviceConstants):
    """Disjoint pairs of rungs for every walker, chosen without looking at the walkers.

    Parameters
    ----------
    scheme
        ``"even_odd"``: neighbours, alternating between the pairs (0,1), (2,3), ... and (1,2),
        (3,4), ... from call to call. ``"random_pairs"``: every rung gets a partner drawn at random,
        walker by walker (arXiv:2012.00429 draws the two temperatures at random). Or the pairs
        themselves, such as ``[(0, 6)]``, in which no rung occurs twice.
    n_rungs, first_pairs
        The number of rungs R; ``"even"`` or ``"odd"``: the first call's pairs of ``"even_odd"``.
    """

    def __init__(self, scheme: Scheme, n_rungs: int, first_pairs: str = "even") -> None:
        self.n_rungs = n_rungs
        self.scheme: str | list[list[int]] = _checked_scheme(scheme, n_rungs)
        named = isinstance(self.scheme, str)
        self._pairs = torch.tensor(
            [] if named else self.scheme, dtype=torch.int64, device="cpu"
        ).reshape(-1, 2)
        self.first_pairs = check_choice(first_pairs, "first_pairs", ("even", "odd"))
        self._call = int(self.first_pairs == "odd")  # the number of the next call

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """[R-1], one number per adjacent pair, for ``"even_odd"``; else [R, R]."""
        return (self.n_rungs - 1,) if self.scheme == "even_odd" else (self.n_rungs, self.n_rungs)

    def draw(self, n_walkers: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return the disjoint pairs of rungs (low, high), each [W, P], of the next call."""
        parity, self._call = self._call % 2, self._call + 1
        device = generator.device
        if self.scheme == "even_odd":
            # Not arange(parity, n_rungs - 1, 2), which refuses to be empty for a single rung.
            first = torch.arange(self.n_rungs - 1, dtype=torch.int64, device=device)[parity::2]
            low = first.expand(n_walkers, -1)
            return low, low + 1
        if isinstance(self.scheme, list):
            pairs = self.on_device("_pairs", device)
            low, high = pairs.T[:, None].expand(2, n_walkers, -1)
            return low, high
        shape = (n_walkers, self.n_rungs)
        order = torch.rand(shape, generator=generator, dtype=torch.float32, device=device).argsort(
            1
        )
        n_pairs = self.n_rungs // 2
        first, second = order[:, 0 : 2 * n_pairs : 2], order[:, 1 : 2 * n_pairs : 2]
        return torch.minimum(first, second), torch.maximum(first, second)

    def counts(self, chosen: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return how often each pair occurs among the chosen [W, P]; shape :attr:`counts_shape`."""
        table = torch.zeros(self.n_rungs, self.n_rungs, dtype=torch.int64, device=low.device)
        table.index_put_((low, high), chosen.to(torch.int64), accumulate=True)
        return torch.diagonal(table, offset=1).clone() if self.scheme == "even_odd" else table

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        return {"scheme": self.scheme, "first_pairs": self.first_pairs}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next call, which selects the even or the odd pairs."""
        return {"calls": self._call}

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._call = int(content["calls"])


class SwapKernel:
    """What swaps share: the pairs of rungs, their counts and the state of the pairing."""

    pairing: Pairing

    @property
    def counts_shape(self) -> tuple[int, ...]:
        """The shape of the counts: one number per adjacent pair, or a matrix."""
        return self.pairing.counts_shape

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the pairing."""
        return self.pairing.state_dict()

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.pairing.load_state_dict(content)


def _checked_scheme(scheme: Any, n_rungs: int) -> str | list[list[int]]:
    if isinstance(scheme, str):
        if scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {SCHEMES} or pairs, got {scheme!r}")
        return str(scheme)
    try:
        pairs = [list(map(unwrap_scalar, pair)) for pair in scheme]
    except TypeError as error:
        message = f"scheme: expected pairs of rung numbers, or a name, got {scheme!r}"
        raise TypeError(message) from error
    if not all(len(pair) == 2 and all(type(rung) is int for rung in pair) for pair in pairs):
        raise TypeError(f"scheme: expected pairs of rung numbers, got {scheme!r}")
    rungs = [rung for pair in pairs for rung in pair]
    if not rungs or min(rungs) < 0 or max(rungs) >= n_rungs:
        raise ValueError(f"scheme: expected pairs of rungs 0 to {n_rungs - 1}, got {scheme!r}")
    if len(set(rungs)) != len(rungs):
        raise ValueError(f"scheme: expected no rung twice, got {scheme!r}; use one kernel for each")
    return sorted(sorted(pair) for pair in pairs)
