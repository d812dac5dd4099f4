"""A random walk in whitened internal coordinates: the baseline without a network."""

import hashlib
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.flow import FlowWalk
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_int


class WhitenedCoordinates(nn.Module):
    """Map of standardised coordinates y [B, d] to configurations: a flow without its network.

    It is a :class:`openmm_tsf.sampling.kernels.base.SteerableMap` without momenta.

    Parameters
    ----------
    whitening, coordinates
        y to internal coordinates, with a constant Jacobian, and these to x (None on R^d).
    reference_temperature
        K, of the frames that the whitening was fitted on.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.sampling.kernels import WhitenedCoordinates
    >>> layers = WhitenedCoordinates.identity(2)
    >>> (x, momenta), log_det = layers.forward_and_log_det(torch.ones(1, 2).double())
    >>> x, log_det
    (tensor([[1., 1.]], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """

    n_momenta = 0
    overlap = False

    def __init__(
        self,
        whitening: Whitening,
        coordinates: InternalCoordinates | None,
        reference_temperature: Any,
    ) -> None:
        super().__init__()
        n_coordinates = whitening.n_coordinates
        if coordinates is not None and coordinates.n_coordinates != n_coordinates:
            n = coordinates.n_coordinates
            raise ValueError(f"whitening: expected {n} coordinates, got {n_coordinates}")
        if coordinates is not None and coordinates.overlap:
            raise ValueError("coordinates: expected copies that do not overlap, got overlap=True")
        self.whitening, self.coordinates = whitening, coordinates
        self.n_coordinates = n_coordinates
        self.reference_temperature = as_temperature(reference_temperature, "reference_temperature")

    @classmethod
    def identity(cls, n_coordinates: int) -> Self:
        """Return y = x on R^d, T_ref = 1: the walk is then x' = x + N(0, sigma^2 T)."""
        d = check_int(n_coordinates, "n_coordinates")
        zeros, ones = (
            torch.zeros(d, dtype=torch.float64, device="cpu"),
            torch.ones(d, dtype=torch.float64, device="cpu"),
        )
        none, square = zeros[:0], zeros[:0].reshape(0, 0)
        scales = Whitening("diagonal", ones.bool(), zeros, ones, none, square, square)
        return cls(scales, None, 1.0)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one configuration."""
        layer = self.coordinates
        return (self.n_coordinates,) if layer is None else (layer.n_atoms, 3)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all inputs and outputs."""
        return self.whitening.cholesky.dtype

    @property
    def device(self) -> torch.device:
        """The device of all inputs and outputs."""
        return self.whitening.cholesky.device

    @property
    def digest(self) -> str:
        """The SHA-256 of the numbers in both layers."""
        parts = [self.whitening] if self.coordinates is None else [self.whitening, self.coordinates]
        digest = hashlib.sha256()
        for part in parts:
            for name, value in part.state_dict().items():
                digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Map y [B, d] to (x [B, *event], no momenta [B, 0]) and the log-determinant [B]."""
        x, log_det = self.whitening.forward_and_log_det(v)
        if self.coordinates is not None:
            x, extra = self.coordinates.forward_and_log_det(x)
            log_det = log_det + extra
        return (x, v[:, :0]), log_det

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x [B, *event] to y [B, d] and the log-determinant [B], -inf outside the domain."""
        total = x.new_zeros(len(x))
        if self.coordinates is not None:
            x, total = self.coordinates.inverse_and_log_det(x)
        y, log_det = self.whitening.inverse_and_log_det(x)
        return y, total + log_det

    def draw_copies(
        self, x: Tensor, temperature: Any, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return empty copies [B, 0] and ln 1 [B]: the copies do not overlap."""
        return x.new_zeros(len(x), 0, dtype=torch.int64), x.new_zeros(len(x))

    def log_partition(self, x: Tensor, temperature: Any) -> Tensor:
        """Return ln 1 [B]: the copies do not overlap."""
        return x.new_zeros(len(x))

    def match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        """Return x in the pose (and with the hydrogen labels) of `like`, all [B, *event]."""
        if self.coordinates is None:
            return x
        return self.coordinates.place(self.coordinates.inverse_and_log_det(x)[0], like=like)

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a centre of the wrong handedness, [B] bool."""
        if self.coordinates is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.coordinates.is_mirror_image(x)

    def is_in_domain(self, x: Tensor) -> Tensor:
        """Return which x [B, *event] have a v, [B] bool: the inverse, without the whitening."""
        if self.coordinates is None:
            return x.isfinite().flatten(1).all(dim=1)
        return self.coordinates.inverse_and_log_det(x)[1].isfinite()


class InternalWalk(FlowWalk):
    """Gaussian random walk in whitened internal coordinates: the baseline without a flow.

    x -> u -> y by the coordinate layer and a whitening fitted on frames; y' = y + xi,
    xi ~ N(0, sigma^2 T/T_ref); back to x' in the pose of x; log alpha = -dU/kT + d log|J| of the
    layer, which is 0 for volume coordinates (the whitening's Jacobian is constant). Proposals
    outside the coordinates' domain are rejected. Whatever the frames, the kernel is exact.

    Parameters
    ----------
    layers
        The coordinates; :meth:`from_dataset` fits them.
    potential, temperatures, sigma, name, n_steps, **round_trip
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import GaussianWell
    >>> potential = GaussianWell(torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double())
    >>> frames = potential.sample(500, 1.0, torch.Generator().manual_seed(1))
    >>> dataset = tsf.MDDataset(frames, 1.0)
    >>> walk = tsf.kernels.InternalWalk.from_dataset(dataset, potential, (1.0, 2.0), sigma=0.8)
    >>> sampler = tsf.ParallelTempering(None, walk.layers, (1.0, 2.0), 4, [walk], potential)
    >>> sampler.set_positions(torch.zeros(4, 2, 2))
    >>> sampler.run(10, progress=False)
    >>> sampler.totals["internal_walk"].proposed
    tensor([40, 40])
    """

    def __init__(
        self,
        layers: WhitenedCoordinates,
        potential: Potential,
        temperatures: Any,
        sigma: Any = 0.1,
        name: str = "internal_walk",
        n_steps: int = 1,
        **round_trip: Any,
    ) -> None:
        if not isinstance(layers, WhitenedCoordinates):
            raise TypeError(
                f"layers: expected WhitenedCoordinates, got {type(layers).__name__}; "
                "InternalWalk.from_dataset makes them"
            )
        super().__init__(layers, potential, temperatures, sigma, name, n_steps, **round_trip)
        self.layers = layers

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        potential: Potential,
        temperatures: Any,
        *,
        mode: str = "conditional",
        metric: str = "volume",
        fold_methyls: bool = True,
        **settings: Any,
    ) -> Self:
        """Return the walk in the coordinates that a flow for this dataset would have.

        Parameters
        ----------
        dataset : MDDataset
            The frames; the whitening is fitted on the training part.
        mode
            Of the whitening: ``"conditional"`` as in a flow (the mean of stiff coordinates
            depends on the torsions), ``"full"`` for one fixed linear map, ``"diagonal"`` for
            scales alone. Without torsions, on R^d, ``"conditional"`` is ``"full"``.
        metric, fold_methyls
            See :meth:`openmm_tsf.TemperatureSteerableFlow.from_dataset`.
        potential, temperatures, **settings
            See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.
        """
        layer, frames = None, dataset.split().train.positions
        kinds = torch.zeros(frames[0].numel(), dtype=torch.int64, device="cpu")
        if dataset.molecule is not None:
            # Only its layers are used: they are then those of a flow for this dataset.
            template = RealNVPFlow.from_dataset(
                dataset,
                n_blocks=1,
                hidden=(),
                metric=metric,
                fold_methyls=fold_methyls,
                check=False,
            )
            layer = template.coordinates
            assert layer is not None
            frames, kinds = layer.inverse_and_log_det(frames)[0], layer.kinds
        whitening = Whitening.fit(frames, kinds, mode)
        layers = WhitenedCoordinates(whitening, layer, dataset.temperature)
        return cls(layers, potential, temperatures, **settings)

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        layer = self.layers.coordinates
        return {
            **super().settings(),
            "whitening": self.layers.whitening.mode,
            "metric": None if layer is None else layer.metric,
            "reference_temperature_K": self.layers.reference_temperature,
            "sha256": self.layers.digest,
        }
