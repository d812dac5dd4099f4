"""Flow files: written, read, and checked before a network is built from them."""

import os
from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from openmm_tsf.coordinates.internal import InternalCoordinates
from openmm_tsf.coordinates.whitening import Whitening
from openmm_tsf.flows.coupling import AffineCoupling
from openmm_tsf.io.tensors import read_tensors, write_tensors
from openmm_tsf.utils.validation import check_choice, check_int, check_ints, require_entry

#: The only format that is read.
FILE_FORMAT = 3
_PRECISIONS = (None, "float32", "float64")


def write_flow_file(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write tensors, numbers, strings, lists and dictionaries to a file, all or nothing."""
    write_tensors(path, content)


def read_flow_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a flow file, of which only the format is checked."""
    content = read_tensors(path, "flow file")
    if "kind" not in content or "format" not in content:
        raise ValueError(f"{path}: not a flow file")
    check_format(path, "flow file", content["format"], FILE_FORMAT)
    return content


def check_format(path: str | os.PathLike[str], what: str, number: Any, current: int) -> None:
    """Refuse a file of any format but the current one."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{path}: not a {what} (format: expected a number, got {number!r})")
    if number != current:
        version = "a newer" if number > current else "an earlier"
        written = f"{what} written in format {number} by {version} version"
        raise ValueError(f"{path}: {written}; this one reads format {current}")


def network_sizes(content: dict[str, Any]) -> tuple[int, int, int, tuple[int, ...]]:
    """Return coordinates, momenta, blocks and hidden widths of the network in a flow file.

    A network larger than the file's tensors is refused.
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


def layer_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments besides the sizes, from the content of a flow file."""
    layer = require_entry(content, "coordinates", dict | NoneType)
    whitening = require_entry(content, "whitening", dict | NoneType)
    precision = require_entry(content, "conditioner_dtype", str | NoneType)
    precision = check_choice(precision, "conditioner_dtype", _PRECISIONS)
    return {
        "reference_temperature": require_entry(content, "reference_temperature", int | float),
        "coordinates": None if layer is None else InternalCoordinates.from_config(layer),
        "whitening": None if whitening is None else Whitening.from_config(whitening),
        "fingerprint": require_entry(content, "fingerprint", str | NoneType),
        "conditioner_dtype": None if precision is None else getattr(torch, precision),
    }


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are missing or differ in shape from the expected ones."""
    for name, like in expected.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != tuple(like.shape):
            raise ValueError(f"state_dict: expected {name} {tuple(like.shape)}, got {shape}")


def load_tensors(flow: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of a flow file into a flow built from the file's other entries.

    They are refused if they do not index every feature once, or contradict these entries.
    """
    buffers = dict(flow.named_buffers())
    fixed = {k: b.clone() for k, b in buffers.items() if not k.startswith("network.")}
    check_shapes(tensors, flow.state_dict())
    if unknown := sorted(tensors.keys() - flow.state_dict().keys()):
        raise ValueError(f"state_dict: expected tensors of the flow only, got {unknown[0]}")
    flow.load_state_dict(tensors)
    for module in flow.modules():
        if isinstance(module, AffineCoupling):
            module.check_indices()
    for name, buffer in flow.named_buffers():
        if name in fixed and not torch.equal(buffer, fixed[name]):
            raise ValueError(f"state_dict: expected {name} as in the layer's entries")


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
