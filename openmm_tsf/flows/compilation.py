"""The two maps of a flow as programs of torch's compiler, for sampling."""

import copy
import logging
import time
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.perceptron import Perceptron
from openmm_tsf.potentials.compilation import missing_compiler_reason
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.validation import check_instance, check_int

logger = logging.getLogger(__name__)

#: The largest deviation of D(D^-1(x)), in nm, that the kernels allow as well.
_ROUND_TRIP = 1e-6
#: The largest difference from what the flow computes eagerly: networks in float32 are rounded in
#: another way, and nothing else differs.
_AGREEMENT = 1e-4
#: A CUDA graph is recorded in the second call, and replayed from the third on.
_CALLS = 3


class FlowPrograms:
    """The maps of a frozen flow, compiled for blocks of `rows` configurations.

    Batches of any size are mapped block by block, the last one filled up with copies. A row's image
    therefore never depends on the size of its batch, whatever the precision of the networks.

    The results are not those of the eager flow bit by bit. Exactness needs none of that: both
    programs are maps of their own, and the kernels check that one is the inverse of the other.
    """

    def __init__(self, flow: AugmentedFlow, rows: int, cuda_graphs: bool) -> None:
        self.rows, self.cuda_graphs = rows, cuda_graphs
        self._device, self._dtype = flow.device, flow.dtype
        self._parameters = list(flow.parameters())
        self._versions = [parameter._version for parameter in self._parameters]
        self._eager = copy.deepcopy(flow)
        for module in self._eager.modules():
            if isinstance(module, Perceptron):
                module.freeze(flow.conditioner_dtype or flow.dtype)
        options: dict[str, Any] = {"cpp.threads": 1}  # more are slower for networks of this size
        if flow.device.type != "cpu":
            options = {"triton.cudagraphs": cuda_graphs}

        def compile_map(method: Any) -> Callable[..., Any]:
            compiled: Callable[..., Any] = torch.compile(
                _with_own_code(method), fullgraph=True, dynamic=False, options=options
            )
            return compiled

        self._forward = compile_map(self._eager.forward_and_log_det)
        self._inverse = compile_map(self._eager.inverse_and_log_det)

    def describe(self) -> dict[str, Any]:
        """Return what a run records of its programs."""
        return {"rows": self.rows, "cuda_graphs": self.cuda_graphs}

    def forward_and_log_det(self, v: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Map v [B, d + m] to (x [B, *event], p [B, m]) and log|J_D| [B]."""
        if not len(v):
            return self._eager.forward_and_log_det(v)
        x, momenta, log_det = self._map_blocks(self._forward_parts, v)
        return (x, momenta), log_det

    def inverse_and_log_det(
        self, x: Tensor, momenta: Tensor, copies: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Map (x [B, *event], p [B, m]), and copies [B, G], to v [B, d + m] and -log|J_D| [B]."""
        if not len(x):
            return self._eager.inverse_and_log_det(x, momenta, copies)
        given = (x, momenta) if copies is None else (x, momenta, copies)
        v, log_det = self._map_blocks(self._inverse, *given)
        return v, log_det

    def _forward_parts(self, v: Tensor) -> tuple[Tensor, ...]:
        (x, momenta), log_det = self._forward(v)
        return x, momenta, log_det

    def _map_blocks(
        self, function: Callable[..., tuple[Tensor, ...]], *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the results [B, ...] of a function of `rows` rows for arguments [B, ...]."""
        if torch.is_grad_enabled() and any(part.requires_grad for part in given):
            raise RuntimeError("a flow that is compiled has no derivatives: use the flow itself")
        moved = given[0].device != self._device or given[0].dtype != self._dtype
        changed = (p._version != n for p, n in zip(self._parameters, self._versions, strict=True))
        if moved or any(changed):
            raise RuntimeError("a flow that is compiled must not change: compile it again")
        n_rows, parts = len(given[0]), []
        with torch.no_grad():
            for start in range(0, n_rows, self.rows):
                block = tuple(
                    _filled_up(part[start : start + self.rows], self.rows) for part in given
                )
                if self.cuda_graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                # Copied: the next replay of a CUDA graph overwrites its results.
                parts.append([part.clone() for part in function(*block)])
            return tuple(torch.cat(column)[:n_rows] for column in zip(*parts, strict=True))


def _with_own_code(method: Any) -> MethodType:
    """Return a method with a code object of its own, as torch compiles eight versions of each."""
    function = method.__func__
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    return MethodType(own, method.__self__)


def _filled_up(part: Tensor, rows: int) -> Tensor:
    """Return a block [B, ...] with copies of its last row up to `rows`; contiguous."""
    missing = rows - len(part)
    if missing:
        part = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
    return part.contiguous()


def compile_for_sampling(
    flow: AugmentedFlow, rows: int, cuda_graphs: bool | None = None
) -> AugmentedFlow:
    """Return a frozen copy of a flow whose maps are compiled, or the flow where no compiler works.

    It takes a minute or two the first time on a machine: torch caches programs on disk. Where
    something does not work, a warning says what, and what is used instead.

    Parameters
    ----------
    flow
        A flow in float64 on the device on which it samples. The copy must not change or be moved,
        and has no derivatives: kernels that need them, such as latent MALA, refuse it.
    rows
        Configurations in a block. On a GPU all that are mapped at once, on a CPU 64.
    cuda_graphs
        Replay each map as one CUDA graph, instead of launching its kernels one by one; by default
        on a GPU. **Not tried on a GPU yet.**

    Raises
    ------
    RuntimeError
        If the programs are not each other's inverse within 1e-6, or not the flow's maps.

    Examples
    --------
    >>> from openmm_tsf.flows import TemperatureSteerableFlow
    >>> from openmm_tsf.flows.compilation import compile_for_sampling
    >>> flow = TemperatureSteerableFlow(2, 2, 1, (4,))
    >>> flow.programs is None
    True
    >>> compiled = compile_for_sampling(flow, rows=16)  # doctest: +SKIP
    """
    check_instance(flow, "flow", AugmentedFlow)
    rows = check_int(rows, "rows")
    if flow.programs is not None:
        raise ValueError("flow: expected one that is not compiled, got a compiled one")
    if flow.dtype != torch.float64:
        raise ValueError(f"flow: expected one in float64, got {flow.dtype}")
    if cuda_graphs is None:
        cuda_graphs = flow.device.type != "cpu"
    elif cuda_graphs and flow.device.type == "cpu":
        raise ValueError("cuda_graphs: expected None or False on a CPU, got True")
    frozen = copy.deepcopy(flow).requires_grad_(False)
    start = time.perf_counter()
    with log_while(logger, "compiling the flow: up to some minutes"):
        if cuda_graphs:
            try:
                frozen.programs = _try_programs(frozen, rows, True)
            except Exception as error:
                logger.warning("no CUDA graphs, launching kernels one by one: %s", _line(error))
        try:
            frozen.programs = frozen.programs or _try_programs(frozen, rows, False)
        except Exception as error:
            reason = missing_compiler_reason(error)
            if reason is None:
                raise
            logger.warning("the flow is not compiled, and evaluated eagerly: %s", reason)
            return flow
    logger.info("flow compiled in %.1f s", time.perf_counter() - start)
    return frozen


def _try_programs(flow: AugmentedFlow, rows: int, cuda_graphs: bool) -> FlowPrograms:
    """Compile both maps, and compare them with each other and with the flow's."""
    from torch._dynamo.utils import counters  # imports the compiler, which takes seconds

    skipped = counters["inductor"]["cudagraph_skips"]
    programs = FlowPrograms(flow, rows, cuda_graphs)
    for _ in range(_CALLS if cuda_graphs else 1):
        _compare(flow, programs)
    if cuda_graphs and counters["inductor"]["cudagraph_skips"] > skipped:
        raise RuntimeError("torch's compiler made none of a part of the flow")
    return programs


@torch.no_grad()
def _compare(flow: AugmentedFlow, programs: FlowPrograms) -> None:
    """Raise a RuntimeError if the programs disagree, on draws of the flow."""
    generator = torch.Generator(device=flow.device).manual_seed(1)
    v = flow.sample_prior(programs.rows, flow.reference_temperature, generator)
    (x, momenta), log_det = flow.forward_and_log_det(v)
    inside = log_det.isfinite()
    if not bool(inside.any()):
        raise RuntimeError("flow: expected draws inside the domain of its coordinates, got none")
    (x_new, momenta_new), log_det_new = programs.forward_and_log_det(v)
    if not torch.equal(log_det_new.isfinite(), inside):
        raise RuntimeError("compiled flow: other draws are outside the domain")
    x_new, momenta_new, log_det_new = x_new[inside], momenta_new[inside], log_det_new[inside]
    eager = (x_new - x[inside], momenta_new - momenta[inside], log_det_new - log_det[inside])
    _check_largest("differs from the flow", eager, _AGREEMENT)
    copies = None
    if flow.overlap:
        copies = flow.draw_copies(x_new, flow.reference_temperature, generator)[0]
    v_back, inverse_log_det = programs.inverse_and_log_det(x_new, momenta_new, copies)
    (x_back, momenta_back), log_det_back = programs.forward_and_log_det(v_back)
    x_back = flow.match_pose(x_back, like=x_new)
    both = (x_back - x_new, momenta_back - momenta_new, log_det_back + inverse_log_det)
    _check_largest("is not its own inverse", both, _ROUND_TRIP)


def _check_largest(what: str, differences: tuple[Tensor, ...], limit: float) -> None:
    largest = max(float(part.abs().max()) for part in differences if part.numel())
    if not largest <= limit:
        raise RuntimeError(f"compiled flow: it {what} by {largest:.3g}, expected {limit:g} at most")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
