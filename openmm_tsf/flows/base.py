"""What the flows share: latent v = (z, q) to configuration and momenta (x, p), with a density.

The map D is: network on R^(d+m), then for the first d features a constant-Jacobian
standardisation and, for molecules, the coordinate layer. The momenta come straight from the
network.
"""

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.coupling import set_conditioner_dtype
from openmm_tsf.flows.serialization import FILE_FORMAT, read_flow_file, rebuilt, write_flow_file
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens
from openmm_tsf.units import as_temperature
from openmm_tsf.utils.random import generator_seed
from openmm_tsf.utils.validation import check_int, check_ints, check_seed

#: log_prob sums over 3^6 copies at most.
MOST_GROUPS = 6


class FlowSample(NamedTuple):
    """Draws from a flow: x [n, *event], momenta [n, m], joint log-density [n]."""

    x: Tensor
    momenta: Tensor
    log_prob: Tensor


class AugmentedFlow(nn.Module, ABC):
    """A normalizing flow on (x, p) with prior N(0, T/T_ref) on v = (z, q).

    Subclasses choose the couplings in :meth:`_couplings`.

    Parameters
    ----------
    n_coordinates
        d, the number of degrees of freedom.
    n_momenta
        m, the number of auxiliary momenta.
    n_blocks
        Number of coupling blocks (each updates every feature once).
    hidden
        Widths of the conditioners' hidden layers.
    reference_temperature
        T_ref in K (in units of the potential's 1/k_B for toy systems).
    coordinates, whitening
        The molecular layers; None for potentials on R^d.
    fingerprint
        Hash of the molecule the flow belongs to.
    seed
        Seed of the weights.
    conditioner_dtype
        Precision in which the couplings' networks are evaluated: torch.float32, which is
        quicker, torch.float64, or None for the flow's own. The map is exactly invertible and has
        the same Jacobian in any (see :class:`openmm_tsf.flows.coupling.AffineCoupling`); in
        float32 the numbers depend on the size of the batch from the seventh digit on.

    Raises
    ------
    TypeError
        If `conditioner_dtype` is another, or `hidden` no sequence.
    ValueError
        If a size or the seed is no such integer, or does not fit.
    """

    kind: ClassVar[str]
    volume_preserving: ClassVar[bool]

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
            raise ValueError(
                f"n_coordinates: expected the coordinate layer's {coordinates.n_coordinates}, "
                f"got {n_coordinates}"
            )
        if whitening is not None and whitening.n_coordinates != n_coordinates:
            raise ValueError(
                f"whitening: expected one of {n_coordinates} coordinates, "
                f"got {whitening.n_coordinates}"
            )
        self.n_coordinates, self.n_momenta = n_coordinates, n_momenta
        self.reference_temperature = as_temperature(reference_temperature, "reference_temperature")
        self.fingerprint = fingerprint
        self._sizes = {"n_blocks": n_blocks, "hidden": list(hidden)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_seed(seed))
            self.network = Chain(self._couplings(n_blocks, hidden))
        self.conditioner_dtype = conditioner_dtype
        self.coordinates = coordinates
        self.whitening = whitening
        self.to(torch.float64)

    @abstractmethod
    def _couplings(self, n_blocks: int, hidden: tuple[int, ...]) -> list[nn.Module]:
        """The couplings, each from [B, d + m] to the same."""

    # -- shape and place ---------------------------------------------------------------------

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one configuration."""
        if self.coordinates is None:
            return (self.n_coordinates,)
        return (int(self.coordinates.n_atoms), 3)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the parameters."""
        return next(self.network.parameters()).dtype

    @property
    def conditioner_dtype(self) -> torch.dtype | None:
        """Precision in which the couplings' networks are evaluated; None for the flow's own."""
        return self._conditioner_dtype

    @conditioner_dtype.setter
    def conditioner_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            raise TypeError(
                f"conditioner_dtype: expected torch.float32, torch.float64 or None, got {dtype!r}"
            )
        self._conditioner_dtype = dtype
        set_conditioner_dtype(self.network, dtype)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.network.parameters()).device

    @property
    def is_constant_log_det(self) -> bool:
        """Whether the whole map's Jacobian is constant: the steering condition (eq. 4)."""
        layer = self.coordinates is None or bool(self.coordinates.is_constant_log_det)
        return self.network.is_constant_log_det and layer

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def log_multiplicity(self) -> float:
        """ln of the number of labelled configurations that share one v."""
        return 0.0 if self.coordinates is None else self.coordinates.log_multiplicity

    def match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        """Configurations x in the pose (and hydrogen labels) of `like`, both [B, *event]."""
        if self.coordinates is None:
            return x
        return self.coordinates.move(x, like=like)

    def is_mirror_image(self, x: Tensor) -> Tensor:
        """Which x [B, *event] have a centre of the wrong handedness, [B] bool."""
        if self.coordinates is None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return self.coordinates.is_mirror_image(x)

    def _tau(self, temperature: Any, like: Tensor) -> Tensor:
        """T / T_ref: a number, or one per row."""
        if isinstance(temperature, Tensor):
            if temperature.ndim > 1 or (temperature.ndim == 1 and len(temperature) != len(like)):
                raise ValueError(
                    f"temperature: expected one number or one per row [{len(like)}], "
                    f"got shape {tuple(temperature.shape)}"
                )
            if not bool((temperature > 0).all()):
                raise ValueError("temperature: expected positive temperatures in kelvin")
            return temperature.to(like) / self.reference_temperature
        kelvin = as_temperature(temperature)
        return like.new_tensor(kelvin / self.reference_temperature)

    def _check(self, tensor: Tensor, name: str, shape: tuple[int, ...]) -> None:
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise TypeError(
                f"{name}: expected {self.dtype} on {self.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if tuple(tensor.shape[1:]) != shape or tensor.ndim != 1 + len(shape):
            raise ValueError(f"{name}: expected shape [B, {shape}], got {tuple(tensor.shape)}")

    # -- the map -----------------------------------------------------------------------------

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Map v [B, d+m] to (x [B, *event], p [B, m]) and log|J_D| [B].

        Outside the coordinate layer's domain the log-determinant is -inf.
        """
        self._check(v, "v", (self.n_coordinates + self.n_momenta,))
        y, log_det = self.network.forward_and_log_det(v)
        x, momenta = y[:, : self.n_coordinates], y[:, self.n_coordinates :]
        for layer in (self.whitening, self.coordinates):
            if layer is not None:
                x, extra = layer.forward_and_log_det(x)
                log_det = log_det + extra
        return (x, momenta), log_det

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map (x [B, *event], p [B, m]) to v [B, d+m] and -log|J_D| [B].

        For configurations outside the domain (mirror images) the log-determinant is -inf. Which of
        overlapping copies x is taken for, [B, G], comes from :meth:`draw_copies`: a Markov kernel
        on a flow with `overlap` has to draw it, and to count its share.
        """
        self._check(x, "x", self.event_shape)
        self._check(momenta, "momenta", (self.n_momenta,))
        total = x.new_zeros(len(x))
        if self.coordinates is not None:
            x, total = self.coordinates.inverse_and_log_det(x, copies)
        if self.whitening is not None:
            x, extra = self.whitening.inverse_and_log_det(x)
            total = total + extra
        v, log_det = self.network.inverse_and_log_det(torch.cat([x, momenta], dim=1))
        return v, total + log_det

    # -- overlapping copies --------------------------------------------------------------------

    @property
    def overlap(self) -> bool:
        """Whether copies of a configuration overlap: it is then taken for one at random."""
        return self.coordinates is not None and self.coordinates.overlap

    def draw_copies(
        self, x: Tensor, temperature: Any, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Which copy each x [B, *event] is taken for, and ln of its share.

        The target of a flow with overlapping copies is p(x, p) times the share w of the copy
        (:meth:`openmm_tsf.coordinates.internal.InternalCoordinates.log_partition`), whose marginal is
        p(x, p). Drawing the copy by its shares is a Gibbs step, as drawing the momenta is.

        Returns
        -------
        copies : Tensor
            [B, G], for :meth:`inverse_and_log_det`.
        log_partition : Tensor
            [B].
        """
        layer = self.coordinates
        assert layer is not None
        tau = self._tau(temperature, x).expand(len(x))
        return layer.draw_copies(x, tau, generator)

    def log_partition(self, x: Tensor, temperature: Any) -> Tensor:
        """ln of the share [B] of the copies that :meth:`forward_and_log_det` has returned as x."""
        layer = self.coordinates
        if layer is None or not layer.overlap:
            return x.new_zeros(len(x))
        return layer.log_partition_of(x, self._tau(temperature, x).expand(len(x)))

    # -- the density -------------------------------------------------------------------------

    def prior_log_prob(self, v: Tensor, temperature: Any) -> Tensor:
        """log N(v; 0, tau) [B]."""
        tau = self._tau(temperature, v)
        return -0.5 * (v.square().sum(dim=1) / tau + v.shape[1] * torch.log(2 * math.pi * tau))

    def sample_prior(self, n: int, temperature: Any, generator: torch.Generator) -> Tensor:
        """v ~ N(0, tau), [n, d+m]."""
        shape = (n, self.n_coordinates + self.n_momenta)
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        tau = self._tau(temperature, noise)
        return noise * (tau.sqrt() if tau.ndim == 0 else tau.sqrt()[:, None])

    @torch.no_grad()
    def sample(self, n: int, temperature: Any, generator: torch.Generator) -> FlowSample:
        """Draw n configurations at a temperature in K (biased: the flow is an approximation).

        Draws outside the domain have log_prob +inf, so that their weight is zero. Equivalent
        hydrogens are labelled at random. Where copies overlap, log_prob is the density of the copy
        drawn less ln of its share: p(x, p) over its exponential is still an unbiased weight.
        """
        v = self.sample_prior(n, temperature, generator)
        (x, momenta), log_det = self.forward_and_log_det(v)
        if self.overlap:
            # Where there is no geometry there is no share: such draws stay outside.
            share = self.log_partition(x, temperature)
            log_det = torch.where(torch.isfinite(log_det), log_det + share, log_det)
        if self.coordinates is not None and self.log_multiplicity:
            shape = (n, len(self.coordinates.labelling))
            x = self.coordinates.relabel(
                x, torch.randint(3, shape, generator=generator, device=x.device)
            )
        log_prob = self.prior_log_prob(v, temperature) - log_det - self.log_multiplicity
        return FlowSample(x, momenta, log_prob)

    def log_prob(self, x: Tensor, momenta: Tensor, temperature: Any) -> Tensor:
        """Joint log-density log p(x, p) [B] at a temperature in K.

        x is measured by Cartesian volume modulo rigid motion (nm); -inf outside the domain. Where
        copies overlap it is the sum over all 3^G of them, G groups of equivalent hydrogens.

        Raises
        ------
        ValueError
            If there are too many copies to sum over.
        """
        every: list[Tensor | None] = [None]
        if self.overlap:
            assert self.coordinates is not None
            n_groups = len(self.coordinates.labelling)
            if n_groups > MOST_GROUPS:
                raise ValueError(
                    f"log_prob: expected at most {MOST_GROUPS} groups of overlapping copies to sum "
                    f"over, got {n_groups}; use weights of samples"
                )
            combinations = itertools.product(range(3), repeat=n_groups)
            every = [torch.tensor(c, device=x.device).expand(len(x), -1) for c in combinations]
        terms = []
        for copies in every:
            v, log_det = self.inverse_and_log_det(x, momenta, copies)
            terms.append(self.prior_log_prob(v, temperature) + log_det)
        return torch.logsumexp(torch.stack(terms), 0) - self.log_multiplicity

    # -- construction and files --------------------------------------------------------------

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        n_momenta: int | None = None,
        n_blocks: int = 8,
        hidden: Sequence[int] = (128, 128),
        coordinates: str = "volume",
        fold_methyls: bool = True,
        overlap: bool = False,
        seed: int = 0,
        conditioner_dtype: torch.dtype | None = None,
    ) -> Self:
        """A flow for the dataset's molecule with whitening fitted on its frames.

        Parameters
        ----------
        dataset : MDDataset
            Branch cuts and T_ref come from it, the standardisation from its training part
            (``dataset.split().train``).
        n_momenta
            m; by default d for a TSF. RealNVP has none.
        n_blocks, hidden
            Sizes of the network.
        coordinates
            ``"volume"`` (constant Jacobian) or ``"plain"``.
        fold_methyls
            Learn one of the three equal copies that each methyl group's labelled hydrogens make
            (only where the System really does not tell them apart).
        overlap
            Let these copies overlap where one passes into the next, instead of ending at a step
            (:meth:`openmm_tsf.coordinates.internal.InternalCoordinates.log_partition`).
        seed
            Seed of the weights.
        conditioner_dtype
            Precision of the couplings' networks.
        """
        if not isinstance(dataset, MDDataset):
            raise TypeError(f"dataset: expected an MDDataset, got {type(dataset).__name__}")
        molecule = dataset.molecule
        if molecule is None:
            d = int(dataset.positions[0].numel())
            return cls(
                d,
                cls._default_momenta(d) if n_momenta is None else n_momenta,
                n_blocks,
                hidden,
                dataset.temperature,
                seed=seed,
                conditioner_dtype=conditioner_dtype,
            )
        layer = InternalCoordinates.from_topology(
            molecule.topology,
            molecule.positions,
            coordinates=coordinates,
            equivalent=equivalent_hydrogens(molecule) if fold_methyls else (),
            overlap=overlap,
        )
        layer.fit_branch_cuts(layer.bonds_angles_torsions(dataset.positions)[2])
        u, log_det = layer.inverse_and_log_det(dataset.positions)
        outside = int((~torch.isfinite(log_det)).sum())
        if outside:
            raise ValueError(
                f"dataset: {outside} of {len(u)} frames have another handedness than the "
                "molecule's reference positions"
            )
        train, _ = layer.inverse_and_log_det(dataset.split().train.positions)
        whitening = Whitening.fit(train, layer.kinds)
        d = layer.n_coordinates
        return cls(
            d,
            cls._default_momenta(d) if n_momenta is None else n_momenta,
            n_blocks,
            hidden,
            dataset.temperature,
            layer,
            whitening,
            molecule.fingerprint,
            seed,
            conditioner_dtype,
        )

    @staticmethod
    def _default_momenta(n_coordinates: int) -> int:
        return n_coordinates

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to load the flow again (no pickled code), atomically."""
        layer, whitening, precision = self.coordinates, self.whitening, self.conditioner_dtype
        content = {
            "format": FILE_FORMAT if self.overlap else 1,
            "kind": self.kind,
            "n_coordinates": self.n_coordinates,
            "n_momenta": self.n_momenta,
            "sizes": self._sizes,
            "conditioner_dtype": None if precision is None else str(precision).split(".")[-1],
            "reference_temperature": self.reference_temperature,
            "fingerprint": self.fingerprint,
            "coordinates": None if layer is None else layer.to_config(),
            "whitening": None if whitening is None else whitening.to_config(),
            "state_dict": self.state_dict(),
        }
        write_flow_file(content, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], molecule: Any = None) -> Self:
        """Read a flow file.

        Parameters
        ----------
        path
            File written by :meth:`save`.
        molecule : MolecularSystem, optional
            Refuse the file if the flow belongs to another System or Topology.

        Raises
        ------
        ValueError
            If the file is no flow of this class, damaged, of a newer format, or of another
            molecule.
        """
        content = read_flow_file(path)
        if content["kind"] != cls.kind:
            raise ValueError(f"{path}: expected a {cls.kind} flow, got {content['kind']}")
        return cls.from_content(content, path, molecule)

    @classmethod
    def from_content(cls, content: dict[str, Any], path: Any, molecule: Any) -> Self:
        fingerprint = content.get("fingerprint")
        if molecule is not None and fingerprint != molecule.fingerprint:
            raise ValueError(
                f"{path}: this flow belongs to another molecule (fingerprint "
                f"{str(fingerprint)[:12]}, expected {molecule.fingerprint[:12]})"
            )
        try:
            flow: Self = rebuilt(cls, content)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged flow file: {error}") from error
        if molecule is not None and flow.coordinates is not None:
            reference = torch.tensor(molecule.positions, dtype=flow.dtype)[None]
            if bool(flow.is_mirror_image(reference).any()):
                raise ValueError(
                    f"{path}: this flow belongs to another stereoisomer than the molecule's "
                    "positions show"
                )
        return flow
