"""A random walk in whitened internal coordinates: what sampling is without a network."""

import hashlib
from typing import Any, Self

import torch
from torch import Tensor

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows import RealNVPFlow
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.kernels.flow import FlowWalk
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.validation import check_int


class WhitenedCoordinates:
    """Standardised coordinates y [B, d] to configurations: a flow's layers without its network.

    Behind the face that the moves ask of a flow, with no momenta.

    Parameters
    ----------
    whitening
        y to internal coordinates (to x where there is no coordinate layer), constant Jacobian.
    coordinates
        Internal coordinates to x; None for potentials on R^d.
    reference_temperature
        K, of the frames that the whitening was fitted on.
    """

    n_momenta = 0

    def __init__(
        self,
        whitening: Whitening,
        coordinates: InternalCoordinates | None,
        reference_temperature: Any,
    ) -> None:
        if coordinates is not None and coordinates.n_coordinates != whitening.n_coordinates:
            raise ValueError(
                f"whitening: expected {coordinates.n_coordinates} coordinates as the layer has, "
                f"got {whitening.n_coordinates}"
            )
        if coordinates is not None and coordinates.overlap:
            raise ValueError(
                "coordinates: expected a layer whose copies do not overlap, got one with overlap"
            )
        self.whitening, self.coordinates = whitening, coordinates
        self.n_coordinates = whitening.n_coordinates
        self.reference_temperature = as_temperature(reference_temperature, "reference_temperature")

    @classmethod
    def identity(cls, n_coordinates: int) -> Self:
        """y = x on R^d, T_ref = 1: :class:`InternalWalk` is then x' = x + N(0, sigma^2 T)."""
        d = check_int(n_coordinates, "n_coordinates")
        zeros, ones = torch.zeros(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)
        none = zeros[:0]
        square = none.reshape(0, 0)
        scales = Whitening("diagonal", ones.bool(), zeros, ones, none, square, square)
        return cls(scales, None, 1.0)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one configuration."""
        layer = self.coordinates
        return (self.n_coordinates,) if layer is None else (layer.n_atoms, 3)

    @property
    def dtype(self) -> torch.dtype:
        """Of all inputs and outputs."""
        return self.whitening.cholesky.dtype

    @property
    def digest(self) -> str:
        """SHA-256 of the layers' numbers."""
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

    def inverse_and_log_det(self, x: Tensor, momenta: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [B, *event] to y [B, d] and the log-determinant [B], -inf outside the domain."""
        total = x.new_zeros(len(x))
        if self.coordinates is not None:
            x, total = self.coordinates.inverse_and_log_det(x)
        y, log_det = self.whitening.inverse_and_log_det(x)
        return y, total + log_det

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        """Configurations x in the pose (and hydrogen labels) of `like`, both [B, *event]."""
        if self.coordinates is None:
            return x
        return self.coordinates.place(self.coordinates.inverse_and_log_det(x)[0], like=like)

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Which x [B, *event] have a centre of the wrong handedness, [B] bool."""
        if self.coordinates is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.coordinates.is_mirror_image(x)


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
    potential, temperatures, sigma, n_steps
        See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.
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
        """The walk with the layers that a flow for this dataset would have.

        Parameters
        ----------
        dataset : MDDataset
            Frames; the whitening is fitted on its training part.
        potential, temperatures
            See :class:`openmm_tsf.sampling.kernels.flow.FlowWalk`.
        mode
            Of the whitening: ``"conditional"`` as in a flow (stiff coordinates follow the
            torsions), ``"full"`` for one fixed linear map, ``"diagonal"`` for scales alone.
            Potentials on R^d have no torsions: ``"conditional"`` is ``"full"`` there.
        metric, fold_methyls
            See :meth:`openmm_tsf.TemperatureSteerableFlow.from_dataset`.
        **settings
            ``sigma``, ``name``, ``n_steps`` and the round-trip check's.
        """
        layer, frames = None, dataset.split().train.positions
        kinds = torch.zeros(frames[0].numel(), dtype=torch.int64)
        if dataset.molecule is not None:
            # No network is used of this flow: it knows how the layer is made.
            template = RealNVPFlow.from_dataset(
                dataset, n_blocks=1, hidden=(), metric=metric, fold_methyls=fold_methyls
            )
            layer = template.coordinates
            assert layer is not None
            frames, kinds = layer.inverse_and_log_det(frames)[0], layer.kinds
        whitening = Whitening.fit(frames, kinds, mode)
        layers = WhitenedCoordinates(whitening, layer, dataset.temperature)
        return cls(layers, potential, temperatures, **settings)

    def settings(self) -> dict[str, Any]:
        """The choices made."""
        layer = self.layers.coordinates
        return {
            **super().settings(),
            "whitening": self.layers.whitening.mode,
            "metric": None if layer is None else layer.metric,
            "reference_temperature_K": self.layers.reference_temperature,
            "sha256": self.layers.digest,
        }
