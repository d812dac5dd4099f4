"""A simulated CUDA device, for machines that have none.

Inside :func:`simulated_cuda` tensors made with ``device="cuda"`` say that they are on ``cuda:0``,
hold their numbers on the CPU, and obey CUDA's rules: tensors of two devices do not mix, random
numbers come from a generator of the tensor's device, nothing reads a tensor's memory but by a copy.
Whatever would make the program wait for the device is counted with the line that caused it, and so
are operations that would launch a kernel. A copy to pinned memory that does not block arrives, in
place of NaN, when an event recorded after it or anything else is waited for. A simulated generator
draws a CPU generator's numbers, so that results are those of the CPU, bit by bit.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
#: What C++ is told instead of CUDA, which it would refuse; no test uses it for anything else.
_STAND_IN = "meta"
_PACKAGE = "/openmm_tsf/"
_Generator = torch.Generator

#: Operations that wait for the device whenever one of their inputs is on it.
_WAITING = {
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero",
    "masked_select", "nonzero", "unique_dim",
}  # fmt: skip
_TO_HOST = {"_local_scalar_dense", "equal", "is_nonzero"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_CROSSING = {"_to_copy", "copy_", "lift_fresh", "set_"} | _INDEXING
#: Operations that only make or describe a tensor, besides views.
_NOT_LAUNCHED = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty",
    "new_empty_strided",
} | _TO_HOST  # fmt: skip


@dataclass
class Counts:
    """What was counted since the last :meth:`clear`.

    Attributes
    ----------
    waits : Counter of (kind, place)
        Waits for the device; the place is the file and line of the package that waited.
    launches : Counter of str
        Operations that launch a kernel, by name.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    @property
    def n_waits(self) -> int:
        """The number of waits for the device."""
        return self.waits.total()

    @property
    def n_launches(self) -> int:
        """The number of kernels launched, one for each operation."""
        return self.launches.total()

    def clear(self) -> None:
        """Count from zero."""
        self.waits.clear()
        self.launches.clear()

    def add_wait(self, kind: str) -> None:
        """Count a wait at the innermost line of the package, with the thread if it is another."""
        thread = threading.current_thread()
        if thread is not threading.main_thread():
            kind = f"{kind} in {thread.name}"
        frame = sys._getframe(1)
        while frame is not None and _PACKAGE not in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        _arrive(_under_way)
        place = "outside the package"
        if frame is not None:
            place = f"{frame.f_code.co_filename.rpartition(_PACKAGE)[2]}:{frame.f_lineno}"
        self.waits[kind, place] += 1

    def __str__(self) -> str:
        lines = [f"{self.n_waits} waits, {self.n_launches} launches"]
        lines += [f"{n:6d}  {kind:24s} {place}" for (kind, place), n in self.waits.most_common()]
        return "\n".join(lines)


_counts = Counts()
#: Pinned tensors and what will arrive in them.
_under_way: list[tuple[Tensor, Tensor]] = []


def _arrive(copies: list[tuple[Tensor, Tensor]]) -> None:
    for copy in list(copies):
        target, content = copy
        with torch.no_grad():
            target.numpy()[...] = content.numpy()
        copies.remove(copy)


class SimulatedEvent:
    """A point in what the device does, which a thread can wait for."""

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []

    def record(self) -> None:
        self._before = list(_under_way)
        _under_way.clear()

    def synchronize(self) -> None:
        _counts.add_wait("event")
        _arrive(self._before)


class SimulatedTensor(torch.Tensor):
    """A tensor on the simulated device; `held` is the CPU tensor with its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "SimulatedTensor":
        assert not isinstance(held, SimulatedTensor)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_STAND_IN,
            requires_grad=False,
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on the simulated {CUDA}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        _counts.add_wait("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> "SimulatedTensor":
        made = SimulatedTensor(self.held.clone())
        made.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tensor of the simulated device was pickled; files hold CPU tensors")


class SimulatedGenerator(_Generator):
    """A generator of the simulated device, which draws what a CPU generator draws."""

    def __new__(cls, device: Any = CUDA) -> "SimulatedGenerator":
        return super().__new__(cls)

    @property
    def device(self) -> torch.device:
        return CUDA


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", _STAND_IN)


class _AnyGenerator(type):
    """What stands in for ``torch.Generator``: it makes that of the device, and knows both."""

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return SimulatedGenerator() if _is_cuda(device) else _Generator(device=device)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)


class _GeneratorOfDevice(metaclass=_AnyGenerator):
    pass


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, SimulatedTensor):
        return SimulatedTensor(value)
    return value


def _unwrap(value: Any) -> Any:
    return value.held if isinstance(value, SimulatedTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation by CUDA's rules, count it, and run it on the CPU tensors."""
    namespace, name = func._schema.name.split("::")
    if namespace == "prim" and name == "device":
        return CUDA
    flat, _ = tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    to_cuda = bool(ours)
    if kwargs.get("device") is not None:
        to_cuda = _is_cuda(kwargs["device"])
    _check_generator(flat, to_cuda)
    if name in _INDEXING:
        to_cuda = _check_index(args)
    elif name in _CROSSING:
        to_cuda = _count_copy(name, args, kwargs, to_cuda)
    elif ours:
        _check_devices(name, tensors)
        if name in _WAITING or (name == "repeat_interleave" and not kwargs.get("output_size")):
            _counts.add_wait({"_local_scalar_dense": "read of a number"}.get(name, name))
    if to_cuda and name not in _NOT_LAUNCHED and not _is_view(func):
        _counts.launches[name] += 1

    plain_args, plain = tree_map(_unwrap, (args, kwargs))
    if plain.get("device") is not None:
        plain["device"] = torch.device("cpu")
    if name == "copy_" and _is_under_way(args, kwargs):
        _under_way.append((args[0], plain_args[1].clone()))
        return args[0].fill_(torch.nan)
    is_pinned = plain.pop("pin_memory", False)
    result = func(*plain_args, **plain)
    if is_pinned:
        assert not to_cuda
        result.is_simulated_pinned = True
    if not to_cuda or name in _TO_HOST:
        return result
    if any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return kwargs["out"] if kwargs.get("out") is not None else args[0]  # in place
    return tree_map(_wrap, result)


def _is_view(func: Any) -> bool:
    return any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)


def _check_generator(values: list[Any], to_cuda: bool) -> None:
    for generator in values:
        if not isinstance(generator, _Generator):
            continue
        if (isinstance(generator, SimulatedGenerator) or _Functions.cuda_generator) != to_cuda:
            expected, got = ("cuda", "cpu") if to_cuda else ("cpu", "cuda")
            raise RuntimeError(
                f"Expected a '{expected}' device type for generator but found '{got}'"
            )


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if not isinstance(tensor, SimulatedTensor) and tensor.ndim > 0:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (in {name}, the CPU's of shape {tuple(tensor.shape)})"
            )


def _check_index(args: Any) -> bool:
    """Check an indexing operation, and return whether its result is on the device."""
    indexed, indices, *values = args
    value = values[0] if values and isinstance(values[0], Tensor) else None
    on_device = isinstance(indexed, SimulatedTensor)
    if value is not None and value.ndim and isinstance(value, SimulatedTensor) != on_device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but the values put into a tensor by "
            "its index are not on that tensor's"
        )
    for index in indices:
        if index is None:
            continue
        if isinstance(index, SimulatedTensor) and not on_device:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if on_device and not isinstance(index, SimulatedTensor):
            _counts.add_wait("copy of an index")
        elif (
            on_device
            and index.dtype == torch.bool
            and not (value is not None and value.numel() == 1)
        ):
            _counts.add_wait("nonzero of a mask")
    return on_device


def _is_under_way(args: Any, kwargs: Any) -> bool:
    """Whether ``copy_`` copies from the device to pinned memory, without blocking."""
    non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
    is_pinned = getattr(args[0], "is_simulated_pinned", False)
    return bool(non_blocking and is_pinned and isinstance(args[1], SimulatedTensor))


def _count_copy(name: str, args: Any, kwargs: Any, to_cuda: bool) -> bool:
    """Count a copy between the devices, and return whether its result is on the device."""
    if name == "copy_":
        to_cuda = isinstance(args[0], SimulatedTensor)
    if name in ("copy_", "_to_copy"):
        from_cuda = isinstance(args[1 if name == "copy_" else 0], SimulatedTensor)
        if from_cuda != to_cuda and not (name == "copy_" and _is_under_way(args, kwargs)):
            _counts.add_wait("copy to the device" if to_cuda else "copy to the host")
    return to_cuda


class _Operations(TorchDispatchMode):
    """Operations that make a tensor of the simulated device from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Names the stand-in where a call names CUDA, and makes tensors from Python's numbers."""

    #: Whether the call in progress was given a simulated generator: C++ hands on a plain one.
    cuda_generator = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("tensor", "as_tensor", "new_tensor"):
            made = _make_tensor(func, args, kwargs)
            if made is not None:
                return made
        args, kwargs = tree_map(_name_stand_in, (args, kwargs))
        before = _Functions.cuda_generator
        _Functions.cuda_generator = isinstance(kwargs.get("generator"), SimulatedGenerator)
        try:
            return func(*args, **kwargs)
        finally:
            _Functions.cuda_generator = before


def _name_stand_in(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device(_STAND_IN)
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return _STAND_IN
    return value


def _make_tensor(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Return what ``torch.tensor`` or a relative makes; None where nothing is simulated."""
    like = args[0] if func.__name__ == "new_tensor" else None
    data = args[0] if like is None else args[1]
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    on_cuda = _is_cuda(device) or (device is None and isinstance(like, SimulatedTensor))
    if isinstance(data, SimulatedTensor):
        target = data.device if device is None else CUDA if on_cuda else torch.device("cpu")
        moved = data.to(device=target, dtype=dtype or data.dtype)
        return moved if func.__name__ == "as_tensor" else moved.clone()
    if isinstance(data, list | tuple) and any(isinstance(x, SimulatedTensor) for x in data):
        data = [x.item() if isinstance(x, SimulatedTensor) else x for x in data]
    elif not on_cuda:
        return None
    if like is not None and dtype is None:
        dtype = like.dtype
    with torch._C.DisableTorchFunction():
        made = torch.as_tensor(data, dtype=dtype, device="cpu").clone()
    if not on_cuda:
        return made
    _counts.add_wait("copy to the device")
    return SimulatedTensor(made)


@contextmanager
def simulated_cuda() -> Iterator[Counts]:
    """Make ``"cuda"`` the simulated device, and count its waits and launches.

    Nothing is compiled on it: potentials must be made with ``compile=False``.
    """
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _counts.clear()
    replaced = {
        "_lazy_init": lambda: None,  # C++ asks for it before it dispatches to CUDA
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "simulated",
        "synchronize": lambda device=None: None,
        "Event": SimulatedEvent,
    }
    try:
        with (
            mock.patch.multiple(torch.cuda, **replaced),
            mock.patch.object(torch, "Generator", _GeneratorOfDevice),
            _Operations(),
            _Functions(),
        ):
            yield _counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
