"""An energy and its gradient as one fused program, by torch.compile."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

logger = logging.getLogger(__name__)


class CompiledEnergy:
    """Energies [B] of positions [3, N, B], and their derivative, fused for one size of block.

    The derivative is traced once (``make_fx``), so that the compiler sees energy and gradient as
    one program and keeps what they share. Programs are made when first asked for, and cached on
    disk by torch.

    Parameters
    ----------
    total
        From positions [3, N, B] and parameters to energies [B].
    n_atoms
        Number N of atoms.
    dtype, device
        Of the positions.
    """

    def __init__(
        self, total: Callable[..., Tensor], n_atoms: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._total = total
        self._shape = (3, n_atoms)
        self._dtype, self._device = dtype, device
        self._programs: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._failed = False
        self.seconds = 0.0
        self.block_size = 128 if device.type == "cpu" else 16384

    @property
    def is_ready(self) -> bool:
        """Whether a program has been compiled."""
        return bool(self._programs)

    def wants(self, n: int) -> bool:
        """Whether a batch of n is worth a program: less would be mostly padding."""
        return not self._failed and n >= self.block_size // 4

    def __call__(
        self, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Energies [B] and derivative [3, N, B] (None if not asked for), B up to the block size."""
        n = y.shape[-1]
        program = self._program(y, parameters, with_forces)
        if n < self.block_size:
            last = y[..., -1:].expand(*self._shape, self.block_size - n)
            y = torch.cat([y, last], dim=-1)
        with torch.no_grad():
            result = program(y, *parameters)
        if not with_forces:
            return result[:n], None
        return result[0][:n], result[1][..., :n]

    def _program(self, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool) -> Any:
        with self._lock:
            if with_forces not in self._programs:
                start = time.perf_counter()
                example = y[..., :1].expand(*self._shape, self.block_size).contiguous()
                self._programs[with_forces] = self._build(example, parameters, with_forces)
                self.seconds += time.perf_counter() - start
                logger.info("compiled in %.1f s", time.perf_counter() - start)
            return self._programs[with_forces]

    def _build(self, example: Tensor, parameters: tuple[Tensor, ...], with_forces: bool) -> Any:
        def both(y: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
            y = y.detach().requires_grad_()
            energy = self._total(y, *values)
            (slope,) = torch.autograd.grad(energy.sum(), y)
            return energy.detach(), slope

        traced = make_fx(both if with_forces else self._total)(example, *parameters)
        _fold_constants(traced)
        program = torch.compile(traced, dynamic=False)
        with torch.no_grad():
            program(example, *parameters)
        return program


def _fold_constants(module: torch.fx.GraphModule) -> None:
    """Compute once what depends on constants only, force-field parameters first of all."""
    graph = module.graph
    values: dict[torch.fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args = torch.fx.map_arg(node.args, values.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    for number, (node, value) in enumerate(values.items()):
        users = [user for user in node.users if user not in values]
        if node.op == "call_function" and users and isinstance(value, Tensor):
            name = f"_folded_{number}"
            module.register_buffer(name, value.contiguous())
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            for user in users:
                user.replace_input_with(node, constant)
    graph.eliminate_dead_code()
    module.recompile()
