"""The base class of flows: an augmented map that is built from data, saved and loaded."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch.overrides import TorchFunctionMode

from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows.augmented_map import AugmentedMap
from openmm_tsf.flows.layers import fit_layers
from openmm_tsf.flows.serialization import (
    FILE_FORMAT,
    check_shapes,
    layer_arguments,
    load_tensors,
    network_sizes,
    read_flow_file,
    write_flow_file,
)
from openmm_tsf.potentials.toy import GaussianWell
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.molecule import is_stereoisomer
from openmm_tsf.systems.training_frames import check_frames_to_train_on
from openmm_tsf.utils.validation import check_bool


class _WithoutMemory(TorchFunctionMode):
    """Makes tensors whose factory names a device on the meta device, where they take no memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class AugmentedFlow(AugmentedMap):
    """A normalizing flow on (x, p) with prior N(0, T/T_ref) on v = (z, q).

    Subclasses choose the couplings in :meth:`couplings`.

    Parameters
    ----------
    n_coordinates, n_momenta
        The numbers d of degrees of freedom and m of auxiliary momenta.
    n_blocks, hidden
        Number of coupling blocks (each updates every feature once), and widths of the conditioners'
        hidden layers.
    reference_temperature
        T_ref in K (in units of the potential's 1/k_B for toy systems).
    coordinates, whitening, fingerprint
        The molecular layers and the hash of the molecule; None for potentials on R^d.
    seed
        Seed of the weights.
    conditioner_dtype
        Precision of the couplings' networks: torch.float32, which is faster, torch.float64, or
        None for the flow's dtype. In any of them the map is exactly invertible; in float32 the
        results depend on the batch size from the seventh digit on.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.flows import AugmentedFlow, TemperatureSteerableFlow
    >>> flow = TemperatureSteerableFlow(n_coordinates=2, n_momenta=2, n_blocks=1, hidden=(8,))
    >>> isinstance(flow, AugmentedFlow)
    True
    >>> v = flow.sample_prior(4, temperature=1.0, generator=torch.Generator().manual_seed(0))
    >>> (x, momenta), log_det = flow.forward_and_log_det(v)
    >>> back, log_det_inverse = flow.inverse_and_log_det(x, momenta)
    >>> torch.allclose(back, v), torch.allclose(log_det, -log_det_inverse)
    (True, True)
    """

    kind: ClassVar[str]

    @staticmethod
    def default_momenta(n_coordinates: int) -> int:
        """Return the number of momenta that :meth:`from_dataset` chooses by default."""
        return n_coordinates

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        n_momenta: int | None = None,
        n_blocks: int = 8,
        hidden: Sequence[int] = (128, 128),
        metric: str = "volume",
        fold_methyls: bool = True,
        overlap: bool = False,
        seed: int = 0,
        conditioner_dtype: torch.dtype | None = None,
        check: bool = True,
        base: GaussianWell | None = None,
    ) -> Self:
        """Build a flow for the dataset's molecule, its standardisation fitted on the frames.

        A flow on R^d has no standardisation; its base measure is N(0, 1), or `base`.

        Parameters
        ----------
        dataset : MDDataset
            Gives T_ref and the branch cuts; its training part (``dataset.split().train``) gives
            the standardisation.
        n_momenta
            m; by default d for a TSF and 0 for a RealNVP.
        n_blocks, hidden, seed, conditioner_dtype
            As in :class:`AugmentedFlow`.
        metric
            ``"volume"`` (constant Jacobian) or ``"polar"``.
        fold_methyls
            Learn one of the three equal copies that relabelling a methyl group's hydrogens gives
            (only where the System does not distinguish them).
        overlap
            Let these copies overlap at their boundaries instead of ending in a step
            (:meth:`openmm_tsf.coordinates.internal.InternalCoordinates.log_partition`).
        check
            Look at a molecule's frames first, for a few seconds, and log a warning of few frames,
            of wells of slow torsions with few visits and, of frames that were not read from a file,
            of another temperature or force field.
        base
            For potentials on R^d: the Gaussian whose Boltzmann distribution is the base measure at
            every temperature, such as ``PhiFourChain().coupled_gaussian()``. The untrained flow is
            this Gaussian.

        Raises
        ------
        ValueError
            If the molecule's energy depends on its position or orientation
            (:meth:`openmm_tsf.MolecularSystem.check_pose_independent`), a frame is a mirror
            image, the frames are too few, or their energies are not the System's. If there are
            both a molecule and a `base`, or the base is of another dimension.
        """
        if not isinstance(dataset, MDDataset):
            raise TypeError(f"dataset: expected an MDDataset, got {type(dataset).__name__}")
        layer, fingerprint = None, None
        whitening = None if base is None else _whitening_of(base, dataset)
        d = int(dataset.positions[0].numel())
        if dataset.molecule is not None:
            dataset.molecule.check_pose_independent()
            if check_bool(check, "check"):
                check_frames_to_train_on(dataset)
            layer, whitening = fit_layers(dataset, metric, fold_methyls, overlap)
            d, fingerprint = layer.n_coordinates, dataset.molecule.fingerprint
        n_momenta = cls.default_momenta(d) if n_momenta is None else n_momenta
        sizes = d, n_momenta, n_blocks, hidden
        layers = dataset.temperature, layer, whitening, fingerprint
        return cls(*sizes, *layers, seed, conditioner_dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to load the flow again (no pickled code), atomically."""
        layer, whitening, precision = self.coordinates, self.whitening, self.conditioner_dtype
        content = {
            "format": FILE_FORMAT,
            "kind": self.kind,
            "n_coordinates": self.n_coordinates,
            "n_momenta": self.n_momenta,
            "sizes": {"n_blocks": self.n_blocks, "hidden": list(self.hidden)},
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
        """Read a file written by :meth:`save`.

        It is refused (ValueError) if the flow is of another class or belongs to another System or
        Topology than that of `molecule`, a MolecularSystem or None.
        """
        content = read_flow_file(path)
        if content["kind"] != cls.kind:
            raise ValueError(f"{path}: expected a {cls.kind} flow, got {content['kind']}")
        return cls.from_content(content, path, molecule)

    @classmethod
    def from_content(cls, content: dict[str, Any], path: Any, molecule: Any) -> Self:
        """Return the flow that the content of a flow file describes; see :meth:`load`."""
        fingerprint = content.get("fingerprint")
        if molecule is not None and fingerprint != molecule.fingerprint:
            if is_stereoisomer(str(fingerprint), molecule.fingerprint):
                other = "another stereoisomer than the molecule's positions show"
                hint = "the handedness of centres, or of labelled hydrogens, differs"
                raise ValueError(f"{path}: this flow belongs to {other}: {hint}")
            prints = f"fingerprint {str(fingerprint)[:12]}, expected {molecule.fingerprint[:12]}"
            raise ValueError(f"{path}: this flow belongs to another molecule ({prints})")
        try:
            flow = cls._rebuild(content)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged flow file: {error}") from error
        return flow

    @classmethod
    def _rebuild(cls, content: dict[str, Any]) -> Self:
        """The flow of a file's content, built only once the file is known to hold its weights."""
        sizes, tensors = network_sizes(content), content["state_dict"]
        with torch.device("meta"), _WithoutMemory():
            network = cls(*sizes).network
        check_shapes(tensors, {f"network.{k}": v for k, v in network.state_dict().items()})
        flow = cls(*sizes, **layer_arguments(content))
        load_tensors(flow, tensors)
        return flow


def _whitening_of(base: GaussianWell, dataset: MDDataset) -> Whitening:
    """Return the map from N(0, 1) to the Boltzmann distribution of `base` at T_ref."""
    if not isinstance(base, GaussianWell):
        raise TypeError(f"base: expected a GaussianWell or None, got {type(base).__name__}")
    if dataset.molecule is not None:
        raise ValueError("base: expected None for a molecule, got a GaussianWell")
    shape = tuple(dataset.positions.shape[1:])
    if base.event_shape != shape:
        raise ValueError(f"base: expected configurations of shape {shape}, got {base.event_shape}")
    return Whitening.from_covariance(base.covariance(dataset.temperature))
