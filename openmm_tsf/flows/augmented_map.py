"""The map between latent v = (z, q) and configuration with momenta (x, p), and its density.

The map D is: network on R^(d+m), then for the first d features a constant-Jacobian
standardisation and, for molecules, the coordinate layer. The momenta are the network's last m
features.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.units import KELVIN, as_array, as_temperature, in_unit
from openmm_tsf.utils.deferred import check_flag
from openmm_tsf.utils.random import generator_seed
from openmm_tsf.utils.validation import check_int, check_ints, check_seed

#: log_prob sums over 3^6 copies at most.
MAX_GROUPS = 6


class FlowSample(NamedTuple):
    """Draws from a flow: x [n, *event], momenta [n, m], joint log-density [n].

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.flows import RealNVPFlow
    >>> flow = RealNVPFlow(n_coordinates=2, n_momenta=0, n_blocks=1, hidden=(8,))
    >>> draws = flow.sample(5, temperature=1.0, generator=torch.Generator().manual_seed(0))
    >>> draws.x.shape, draws.momenta.shape, draws.log_prob.shape
    (torch.Size([5, 2]), torch.Size([5, 0]), torch.Size([5]))
    """

    x: Tensor
    momenta: Tensor
    log_prob: Tensor


def _refuse_temperature() -> None:
    raise ValueError("temperature: expected positive temperatures in kelvin")


class MapPrograms(Protocol):
    """Both maps as compiled programs: :class:`openmm_tsf.flows.compilation.FlowPrograms`."""

    def describe(self) -> dict[str, Any]:
        """Return what a run records of its programs."""

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """See :meth:`AugmentedMap.forward_and_log_det`."""

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`AugmentedMap.inverse_and_log_det`."""


class AugmentedMap(nn.Module, ABC):
    """The invertible map of :class:`AugmentedFlow`, which has its parameters, and its density."""

    #: What computes both maps, where they are compiled.
    programs: MapPrograms | None = None
    _conditioner_dtype: torch.dtype | None

    def __init__(
        self,
        n_coordinates: int,
        n_momenta: int,
        n_blocks: int = 8,
        hidden: Sequence[int] = (128, 128),
        reference_temperature: Any = 1.0,
        coordinates: InternalCoordinates | None = None,
        whitening: Whitening | None = None,
        fingerprint: str | None = None,
        seed: int = 0,
        conditioner_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_coordinates = check_int(n_coordinates, "n_coordinates")
        n_momenta = check_int(n_momenta, "n_momenta", least=0)
        n_blocks, hidden = check_int(n_blocks, "n_blocks"), check_ints(hidden, "hidden")
        seed = check_seed(seed)
        if coordinates is not None and coordinates.n_coordinates != n_coordinates:
            expected = f"the coordinate layer's {coordinates.n_coordinates}"
            raise ValueError(f"n_coordinates: expected {expected}, got {n_coordinates}")
        if whitening is not None and whitening.n_coordinates != n_coordinates:
            expected, number = f"one of {n_coordinates} coordinates", whitening.n_coordinates
            raise ValueError(f"whitening: expected {expected}, got {number}")
        self.n_coordinates, self.n_momenta = n_coordinates, n_momenta
        self.reference_temperature = as_temperature(reference_temperature, "reference_temperature")
        self.fingerprint, self.n_blocks, self.hidden = fingerprint, n_blocks, hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed(seed))
            self.network = Chain(self.couplings(n_blocks, hidden))
        self.conditioner_dtype = conditioner_dtype
        self.coordinates, self.whitening = coordinates, whitening
        self.to(torch.float64)

    @abstractmethod
    def couplings(self, n_blocks: int, hidden: tuple[int, ...]) -> list[nn.Module]:
        """Return new couplings, each a bijector of [B, d + m]."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one configuration."""
        if self.coordinates is None:
            return (self.n_coordinates,)
        return (int(self.coordinates.n_atoms), 3)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.network.parameters()).dtype

    @property
    def conditioner_dtype(self) -> torch.dtype | None:
        """The precision of the couplings' networks; None for the flow's dtype."""
        return self._conditioner_dtype

    @conditioner_dtype.setter
    def conditioner_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            expected = "torch.float32, torch.float64 or None"
            raise TypeError(f"conditioner_dtype: expected {expected}, got {dtype!r}")
        if self.programs is not None and dtype != self._conditioner_dtype:
            raise RuntimeError("a flow that is compiled must not change: compile it again")
        self._conditioner_dtype = dtype
        set_conditioner_dtype(self.network, dtype)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.network.parameters()).device

    @property
    def is_constant_log_det(self) -> bool:
        """Whether the whole map's Jacobian is constant: the steering condition (eq. 4)."""
        layer = self.coordinates is None or bool(self.coordinates.is_constant_log_det)
        return self.network.is_constant_log_det and layer

    @property
    def n_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def log_multiplicity(self) -> float:
        """The ln of the number of labelled configurations with the same v."""
        return 0.0 if self.coordinates is None else self.coordinates.log_multiplicity

    def match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        """Return x in the pose (and hydrogen labels) of `like`, both [B, *event]."""
        return x if self.coordinates is None else self.coordinates.match_pose(x, like=like)

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a centre of the wrong handedness, [B] bool."""
        if self.coordinates is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.coordinates.is_mirror_image(x)

    def is_in_domain(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a v, [B] bool: the inverse, without the network."""
        if self.coordinates is None:
            return x.isfinite().flatten(1).all(dim=1)
        return self.coordinates.inverse_and_log_det(x)[1].isfinite()

    def _tau(self, temperature: Any, like: Tensor) -> Tensor:
        """T / T_ref, a scalar or [B]."""
        temperature = in_unit(temperature, KELVIN, "temperature")
        if isinstance(temperature, (np.ndarray, list, tuple)):
            temperature = torch.from_numpy(as_array(temperature, KELVIN, "temperature"))
        if isinstance(temperature, Tensor):
            if temperature.ndim > 1 or (temperature.ndim == 1 and len(temperature) != len(like)):
                expected, shape = f"one per row [{len(like)}]", tuple(temperature.shape)
                raise ValueError(f"temperature: expected one number or {expected}, got {shape}")
            check_flag(~(temperature > 0).all(), _refuse_temperature)
            return temperature.to(like) / self.reference_temperature
        return like.new_full((), as_temperature(temperature) / self.reference_temperature)

    def _check(self, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            expected, given = f"{self.dtype} on {self.device}", f"{tensor.dtype} on {tensor.device}"
            raise TypeError(f"{name}: expected {expected}, got {given}")
        if tuple(tensor.shape[1:]) != shape or tensor.ndim != 1 + len(shape):
            raise ValueError(f"{name}: expected shape [B, {shape}], got {tuple(tensor.shape)}")

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Map v [B, d+m] to (x [B, *event], p [B, m]) and log|J_D| [B].

        Outside the coordinate layer's domain the log-determinant is -inf.
        """
        self._check(v, "v", (self.n_coordinates + self.n_momenta,))
        if self.programs is not None:
            return self.programs.forward_and_log_det(v)
        y, log_det = self.network.forward_and_log_det(v)
        x, log_det = self.apply_layers(y[:, : self.n_coordinates], log_det)
        return (x, y[:, self.n_coordinates :]), log_det

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map (x [B, *event], p [B, m]) to v [B, d+m] and -log|J_D| [B].

        For configurations outside the domain (mirror images) the log-determinant is -inf. With
        `overlap`, `copies` [B, G] from :meth:`draw_copies` selects the copy of each x that is
        mapped; a Markov kernel has to draw it and to include its partition weight.
        """
        self._check(x, "x", self.event_shape)
        self._check(momenta, "momenta", (self.n_momenta,))
        if self.programs is not None:
            return self.programs.inverse_and_log_det(x, momenta, copies)
        y, total = self.undo_layers(x, x.new_zeros(len(x)), copies)
        v, log_det = self.network.inverse_and_log_det(torch.cat([y, momenta], dim=1))
        return v, total + log_det

    def apply_layers(self, y: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """Map y [B, d], the network's output, by the standardisation and the coordinate layer.

        Returns configurations x [B, *event], and `log_det` [B] plus the layers' log-determinants.
        """
        for layer in (self.whitening, self.coordinates):
            if layer is not None:
                y, extra = layer.forward_and_log_det(y)
                log_det = log_det + extra
        return y, log_det

    def undo_layers(
        self, x: Tensor, log_det: Tensor, copies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x [B, *event] to y [B, d]: the inverse of :meth:`apply_layers`."""
        if self.coordinates is not None:
            x, extra = self.coordinates.inverse_and_log_det(x, copies)
            log_det = log_det + extra
        if self.whitening is not None:
            x, extra = self.whitening.inverse_and_log_det(x)
            log_det = log_det + extra
        return x, log_det

    @property
    def overlap(self) -> bool:
        """Whether the copies of a configuration overlap, so that one of them has to be drawn."""
        return self.coordinates is not None and self.coordinates.overlap

    def draw_copies(
        self, x: Tensor, temperature: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw a copy of each x [B, *event], with the probabilities of the partition weights.

        Returns copies [B, G], for :meth:`inverse_and_log_det`, and the ln of their partition
        weights [B] (:meth:`openmm_tsf.InternalCoordinates.log_partition`), with which a copy's
        target is p(x, p) times its weight.
        """
        layer = self.coordinates
        assert layer is not None
        return layer.draw_copies(x, self._tau(temperature, x).expand(len(x)), generator)

    def log_partition(self, x: Tensor, temperature: Any) -> Tensor:
        """Return the ln of the partition weights [B] of x, copies as built by the forward map."""
        layer = self.coordinates
        if layer is None or not layer.overlap:
            return x.new_zeros(len(x))
        return layer.log_partition_of(x, self._tau(temperature, x).expand(len(x)))

    def prior_log_prob(self, v: Tensor, temperature: Any) -> Tensor:
        """Return log N(v; 0, tau) [B]."""
        tau = self._tau(temperature, v)
        return -0.5 * (v.square().sum(dim=1) / tau + v.shape[1] * torch.log(2 * math.pi * tau))

    def sample_prior(self, n: int, temperature: Any, generator: torch.Generator) -> Tensor:
        """Draw v ~ N(0, tau), [n, d+m]."""
        shape = (check_int(n, "n", least=0), self.n_coordinates + self.n_momenta)
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        tau = self._tau(temperature, noise)
        return noise * (tau.sqrt() if tau.ndim == 0 else tau.sqrt()[:, None])

    @torch.no_grad()
    def sample(self, n: int, temperature: Any, generator: torch.Generator) -> FlowSample:
        """Draw n configurations at a temperature in K (biased: the flow is an approximation).

        Draws outside the domain have log_prob +inf, so that their weight is zero. Equivalent
        hydrogens are labelled at random. Where copies overlap, log_prob is the log-density of the
        drawn copy less the ln of its partition weight: the weight p(x, p) / exp(log_prob) stays
        unbiased.
        """
        n = check_int(n, "n", least=0)
        v = self.sample_prior(n, temperature, generator)
        (x, momenta), log_det = self.forward_and_log_det(v)
        if self.overlap:
            # Outside the domain the partition weight may be NaN: log_det stays -inf.
            partition = self.log_partition(x, temperature)
            log_det = torch.where(torch.isfinite(log_det), log_det + partition, log_det)
        if self.coordinates is not None and self.log_multiplicity:
            shape = (n, len(self.coordinates.labelling))
            shift = torch.randint(3, shape, generator=generator, device=x.device, dtype=torch.int64)
            x = self.coordinates.relabel(x, shift)
        log_prob = self.prior_log_prob(v, temperature) - log_det - self.log_multiplicity
        return FlowSample(x, momenta, log_prob)

    def log_prob(self, x: Tensor, momenta: Tensor, temperature: Any) -> Tensor:
        """Return the joint log-density log p(x, p) [B] at a temperature in K.

        x is measured by Cartesian volume modulo rigid motion (nm); -inf outside the domain. Where
        copies overlap it is the sum over all 3^G of them, G groups of equivalent hydrogens: a
        ValueError if there are more than `MAX_GROUPS` groups.
        """
        all_copies: list[Tensor | None] = [None]
        if self.overlap:
            assert self.coordinates is not None
            n_groups = len(self.coordinates.labelling)
            if n_groups > MAX_GROUPS:
                expected = f"at most {MAX_GROUPS} groups of overlapping copies to sum over"
                hint = f"got {n_groups}; use weights of samples"
                raise ValueError(f"log_prob: expected {expected}, {hint}")
            combinations = itertools.product(range(3), repeat=n_groups)
            table = torch.tensor(list(combinations), device=x.device, dtype=torch.int64)
            all_copies = [row.expand(len(x), -1) for row in table]
        terms = []
        for copies in all_copies:
            v, log_det = self.inverse_and_log_det(x, momenta, copies)
            terms.append(self.prior_log_prob(v, temperature) + log_det)
        return torch.logsumexp(torch.stack(terms), 0) - self.log_multiplicity
