"""A flow from the content of its file: nothing is believed before it is checked."""

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows.coupling import AffineCoupling
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.utils.validation import check_choice, check_int, check_ints, require_entry

_PRECISIONS = (None, "float32", "float64")


def rebuilt(kind: type[Any], content: dict[str, Any]) -> Any:
    """The flow of this class that the content of a file describes.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        If it does not describe one. No network is built whose weights the file does not hold.
    """
    sizes, tensors = _network_sizes(content), content["state_dict"]
    with torch.device("meta"):  # takes no memory
        network = kind(*sizes).network
    _check_shapes(tensors, {f"network.{k}": v for k, v in network.state_dict().items()})
    layer = require_entry(content, "coordinates", dict | NoneType)
    whitening = require_entry(content, "whitening", dict | NoneType)
    # Files of earlier versions do not name it.
    precision = check_choice(content.get("conditioner_dtype"), "conditioner_dtype", _PRECISIONS)
    flow = kind(
        *sizes,
        require_entry(content, "reference_temperature", int | float),
        None if layer is None else InternalCoordinates.from_config(layer),
        None if whitening is None else Whitening.from_config(whitening),
        require_entry(content, "fingerprint", str | NoneType),
        conditioner_dtype=None if precision is None else getattr(torch, precision),
    )
    fixed = {
        name: buffer.clone()
        for name, buffer in flow.named_buffers()
        if not name.startswith("network.")
    }
    _check_shapes(tensors, flow.state_dict())
    if unknown := sorted(tensors.keys() - flow.state_dict().keys()):
        raise ValueError(f"state_dict: expected tensors of the flow only, got {unknown[0]}")
    flow.load_state_dict(tensors)
    for coupling in flow.network.modules():
        if isinstance(coupling, AffineCoupling):
            coupling.check_indices()
    for name, buffer in flow.named_buffers():
        if name in fixed and not torch.equal(buffer, fixed[name]):
            raise ValueError(f"state_dict: expected {name} as in the layer's entries")
    return flow


def _network_sizes(content: dict[str, Any]) -> tuple[int, int, int, tuple[int, ...]]:
    """Coordinates, momenta, blocks and widths in a flow file, not larger than its tensors can be.

    A network is only built once the file is known to hold its weights.

    Raises
    ------
    ValueError
        If a size, or a tensor, is none or cannot be.
    """
    tensors = require_entry(content, "state_dict", dict)
    n_bytes = _size_of(tensors)
    sizes = require_entry(content, "sizes", dict)
    n_coordinates = check_int(require_entry(content, "n_coordinates", int), "n_coordinates")
    n_momenta = check_int(require_entry(content, "n_momenta", int), "n_momenta", least=0)
    n_blocks = check_int(require_entry(sizes, "n_blocks", int), "n_blocks")
    hidden = check_ints(require_entry(sizes, "hidden", list), "hidden")
    # Every block has a permutation of all features; every hidden layer has weights.
    largest = max(8 * n_blocks * (n_coordinates + n_momenta), n_blocks * sum(hidden))
    if largest > n_bytes or n_blocks * len(hidden) > len(tensors):
        raise ValueError(
            f"sizes: expected a network of {n_bytes} bytes, got n_coordinates={n_coordinates}, "
            f"n_momenta={n_momenta}, n_blocks={n_blocks}, hidden={list(hidden)}"
        )
    return n_coordinates, n_momenta, n_blocks, hidden


def _check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing or have another shape than those of the same name.

    Raises
    ------
    ValueError
        If one has.
    """
    for name, like in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(like.shape):
            raise ValueError(f"state_dict: expected {name} {tuple(like.shape)}, got {found}")


def _size_of(tensors: dict[Any, Any]) -> int:
    """Bytes of tensors, all of them finite."""
    size = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"state_dict: expected named tensors, got {name!r}: {type(tensor)}")
        held, used = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if tensor.is_sparse or used > held:  # a view that repeats a few numbers for ever
            raise ValueError(f"state_dict: expected {used} bytes of {name}, got {held}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"state_dict: expected finite numbers, got NaN or infinity in {name}")
        size += used
    return size


#: 2: copies that overlap, which readers of format 1 would take for walls.
FILE_FORMAT = 2


def write_flow_file(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries to a file, all or nothing."""
    write_tensors(path, content)


def read_flow_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The raw content of a flow file, checked for its format.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a flow file, damaged, or of a newer format.
    """
    content = read_tensors(path, "flow file")
    if "kind" not in content or "format" not in content:
        raise ValueError(f"{path}: not a flow file")
    number = content["format"]
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{path}: not a flow file (format: expected a number, got {number!r})")
    if number > FILE_FORMAT:
        raise ValueError(
            f"{path}: written in format {number} by a newer version; "
            f"this one reads up to format {FILE_FORMAT}"
        )
    return content
