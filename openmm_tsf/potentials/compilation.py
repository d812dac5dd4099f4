"""An energy and its gradient as one program, by torch's compiler."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.potentials.blocks import EnergyFunction, evaluate_eagerly
from openmm_tsf.utils.activity import log_while

logger = logging.getLogger(__name__)

#: Names of the errors that torch raises without a working compiler: not every version has all.
_NO_COMPILER = {"InvalidCxxCompiler", "CppCompileError", "TritonMissing", "GPUTooOldForTriton"}
_NO_COMPILER_MESSAGES = ("Failed to find C compiler", "Cannot find a working triton")
#: Tracing changes torch for the whole process: one program is traced at a time.
_TRACING = threading.Lock()
#: Rows that are evaluated together, eagerly, where compilation failed.
_EAGER_ROWS = 16


class CompiledEnergy:
    """Energies [B] of positions [3, N, B], and their gradient, compiled for one block size.

    The gradient is traced once (``make_fx``), so that the compiler sees energy and gradient as one
    program and keeps what they share. Programs are compiled on first use, and cached on disk by
    torch. One runs on one thread and without the interpreter's lock: threads share blocks.

    Where no compiler works, a warning gives the reason and everything is evaluated eagerly from
    then on. `seconds` is the time spent in compilation so far.
    """

    def __init__(self, function: EnergyFunction, n_atoms: int, block_size: int) -> None:
        self._function = function
        self._shape = (3, n_atoms)
        self._programs: dict[bool, Any] = {}
        self._lock = threading.Lock()
        self._failed = False
        self.seconds = 0.0
        self.block_size = block_size

    @property
    def is_ready(self) -> bool:
        """Whether a program has been compiled."""
        return bool(self._programs)

    def pays_for(self, n: int) -> bool:
        """Return whether n rows are worth a program: fewer would be mostly padding."""
        return not self._failed and n >= self.block_size // 4

    def __call__(
        self, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the energies [B], and gradient [3, N, B] if requested, B up to the block size."""
        n = y.shape[-1]
        program = self._program(y, parameters, with_forces)
        if program is None:
            return self._evaluate_eagerly(y, parameters, with_forces)
        if n < self.block_size:
            padding = y[..., -1:].expand(*self._shape, self.block_size - n)
            y = torch.cat([y, padding], dim=-1)
        with torch.no_grad():
            result = program(y, *parameters)
        if not with_forces:
            return result[:n], None
        return result[0][:n], result[1][..., :n]

    def _program(self, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool) -> Any:
        """Return the program; None where no compiler works."""
        with self._lock:
            if with_forces not in self._programs and not self._failed:
                start = time.perf_counter()
                what = f"compiling the energy{' and forces' * with_forces}: up to two minutes"
                example = y[..., :1].expand(*self._shape, self.block_size).contiguous()
                try:
                    with log_while(logger, what), _TRACING:
                        self._programs[with_forces] = self._build(example, parameters, with_forces)
                except Exception as error:
                    reason = missing_compiler_reason(error)
                    if reason is None:
                        raise
                    self._failed = True
                    logger.warning("not compiled, evaluating eagerly: %s", reason)
                self.seconds += time.perf_counter() - start
                if not self._failed:
                    logger.info("compiled in %.1f s", time.perf_counter() - start)
            return self._programs.get(with_forces)

    def _build(self, example: Tensor, parameters: tuple[Tensor, ...], with_forces: bool) -> Any:
        # Imported here: torch's compiler takes seconds to import, and its parts are not public.
        import torch._inductor
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        function = self._energy_and_gradient if with_forces else self._energy
        traced = make_fx(function)(example, *parameters)
        _fold_constants(traced)
        # Not torch.compile: its guards compile all again when the number of threads changes.
        options = {"cpp.threads": 1, "cpp_wrapper": True} if example.device.type == "cpu" else {}
        # Without a ShapeEnv torch does not use its disk cache, though all shapes are fixed.
        context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
        with torch.no_grad():
            with tracing(context):
                program = torch._inductor.compile(traced, [example, *parameters], options=options)
            program(example, *parameters)
        return program

    def _energy(self, y: Tensor, *parameters: Tensor) -> Tensor:
        return self._function(y, *parameters)

    def _energy_and_gradient(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor | None]:
        return evaluate_eagerly(self._function, y, parameters, with_forces=True)

    def _evaluate_eagerly(
        self, y: Tensor, parameters: tuple[Tensor, ...], with_forces: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Evaluate a few rows at a time, eagerly: only for the batch that failed to compile."""
        parts = [
            evaluate_eagerly(self._function, rows, parameters, with_forces)
            for rows in y.split(_EAGER_ROWS, dim=-1)
        ]
        energy = torch.cat([energy for energy, _ in parts])
        gradients = [gradient for _, gradient in parts if gradient is not None]
        return energy, torch.cat(gradients, dim=-1) if with_forces else None


def missing_compiler_reason(error: BaseException) -> str | None:
    """Return why no compiler works, if that is what the error says."""
    if isinstance(error, (ImportError, AttributeError)) and "torch" in str(error):
        return f"this torch has another compiler ({error})"
    for cause in _causes(error):
        text = str(cause)
        if type(cause).__name__ in _NO_COMPILER or any(m in text for m in _NO_COMPILER_MESSAGES):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            output = "Output:" in lines and lines[lines.index("Output:") + 1 :]
            return " ".join([lines[0], *(output[:3] if output else [])])
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__


def _fold_constants(module: torch.fx.GraphModule) -> None:
    """Compute once what depends on constants only, such as force-field parameters."""
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
