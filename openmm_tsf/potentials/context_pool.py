"""OpenMM Contexts of one System that evaluate the conformations of a batch in parallel."""

import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from weakref import WeakSet

import numpy as np
import openmm
from numpy.typing import NDArray

#: Words in OpenMM's exceptions when the conformation, not the machine, is at fault.
NUMERICAL_ERROR = re.compile(r"\bnan\b|infinit|overflow|non-?finite", re.IGNORECASE)

#: Rows that a thread takes at a time: large enough to hide the queue, small enough to balance.
_BLOCK_SIZE = 16

_contexts: "WeakSet[openmm.Context]" = WeakSet()
_kept_in_child: list[openmm.Context] = []

Array = NDArray[np.float64]
Rows = range | list[int]


def _keep_contexts_in_child() -> None:
    # Destroying a Context joins its threads, which do not exist in a forked child: it would hang.
    _kept_in_child.extend(_contexts)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_contexts_in_child)


@dataclass(frozen=True)
class PlatformChoice:
    """A Platform, those of its properties that differ from OpenMM's defaults, and the number of
    Contexts that share a batch, one thread each.
    """

    name: str
    properties: dict[str, str] = field(default_factory=dict)
    n_contexts: int = 1

    @property
    def n_threads(self) -> int:
        """The number of threads that compute at the same time (on a GPU, one for each Context)."""
        return self.n_contexts * int(self.properties.get("Threads", 1))

    def __str__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.properties.items()))
        return f"{self.name}({settings}) x {self.n_contexts}"


def build_context(
    system: openmm.System, integrator: openmm.Integrator, choice: PlatformChoice
) -> openmm.Context:
    """Return a Context of `system` on the chosen Platform; a forked child never destroys it."""
    platform = openmm.Platform.getPlatform(choice.name)
    context = openmm.Context(system, integrator, platform, dict(choice.properties))
    _contexts.add(context)
    return context


def open_pool(system: openmm.System, choice: PlatformChoice) -> "ContextPool":
    """Return a pool of new Contexts, as many as chosen."""
    integrators = (openmm.VerletIntegrator(0.001) for _ in range(choice.n_contexts))
    return ContextPool(build_context(system, integrator, choice) for integrator in integrators)


class ContextPool:
    """Contexts that evaluate batches of conformations, one thread each.

    ``getState`` releases the interpreter lock, so that threads overlap in it. The Contexts are of
    the same System, which must not change while the pool is open.
    """

    def __init__(self, contexts: Iterable[openmm.Context]) -> None:
        self._contexts = list(contexts)
        self._threads: ThreadPoolExecutor | None = None
        if len(self._contexts) > 1:
            self._threads = ThreadPoolExecutor(len(self._contexts) - 1, "openmm_tsf")
        self._valid_positions: Array | None = None

    def close(self) -> None:
        """Free Contexts and threads."""
        if self._threads is not None:
            self._threads.shutdown()
        self._contexts.clear()

    def evaluate(self, positions: Array, with_forces: bool) -> tuple[Array, Array | None, bool]:
        """Return energies and forces as OpenMM gives them, +inf where it raises.

        `positions` [B, N, 3] in nm are C-contiguous; rows that are not finite are not passed to
        OpenMM. Energies [B] are in kJ/mol, forces [B, N, 3] in kJ/(mol nm), None unless requested,
        and zero where the row was not passed to OpenMM or OpenMM raised. The last is whether every
        number is finite; it may be False although they are.
        """
        # Sums find non-finite numbers at a tenth of isfinite's cost for a single conformation.
        n_rows = len(positions)
        energies = np.empty(n_rows)
        forces = np.empty(positions.shape) if with_forces else None
        rows: Rows = range(n_rows)
        if not math.isfinite(positions.sum()):
            rows = np.flatnonzero(np.isfinite(positions).all(axis=(1, 2))).tolist()
            energies[:] = math.inf
            if forces is not None:
                forces[:] = 0.0
        n_workers = min(len(self._contexts), len(rows) // 2)
        if self._threads is None or n_workers < 2:
            self._run(self._contexts[0], rows, positions, energies, forces)
        else:
            self._run_threads(n_workers, rows, positions, energies, forces)
        total = energies.sum() if forces is None else energies.sum() + forces.sum()
        return energies, forces, math.isfinite(total)

    def _run_threads(
        self, n_workers: int, rows: Rows, positions: Array, energies: Array, forces: Array | None
    ) -> None:
        assert self._threads is not None
        size = min(_BLOCK_SIZE, -(-len(rows) // n_workers))
        blocks: SimpleQueue[Rows] = SimpleQueue()
        for start in range(0, len(rows), size):
            blocks.put(rows[start : start + size])

        def work(context: openmm.Context) -> None:
            try:
                while (block := _next_block(blocks)) is not None:
                    self._run(context, block, positions, energies, forces)
            except BaseException:
                while _next_block(blocks) is not None:
                    pass  # the other threads stop at the end of their block
                raise

        futures = [self._threads.submit(work, c) for c in self._contexts[1:n_workers]]
        try:
            work(self._contexts[0])
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def _run(
        self,
        context: openmm.Context,
        rows: Iterable[int],
        positions: Array,
        energies: Array,
        forces: Array | None,
    ) -> None:
        set_positions, get_state = context.setPositions, context.getState
        with_forces = forces is not None
        for row in rows:
            try:
                set_positions(positions[row])
                state = get_state(energy=True, forces=with_forces)
            except openmm.OpenMMException as error:
                if not self._is_conformation_at_fault(context, error):
                    raise
                energies[row] = math.inf
                if forces is not None:
                    forces[row] = 0.0
                continue
            energies[row] = energy = state.getPotentialEnergy()._value
            if self._valid_positions is None and math.isfinite(energy):
                self._valid_positions = positions[row].copy()
            if forces is not None:
                forces[row] = state.getForces(asNumpy=True)._value

    def _is_conformation_at_fault(
        self, context: openmm.Context, error: openmm.OpenMMException
    ) -> bool:
        # A lost GPU or an invalid Force raises too, and must not become an infinite energy: unless
        # the message is about numbers, a conformation that worked before is tried again.
        if NUMERICAL_ERROR.search(str(error)):
            return True
        if self._valid_positions is None:
            return False
        try:
            context.setPositions(self._valid_positions)
            context.getState(energy=True)
        except openmm.OpenMMException:
            return False
        return True


def _next_block(blocks: "SimpleQueue[Rows]") -> Rows | None:
    try:
        return blocks.get_nowait()
    except Empty:
        return None
