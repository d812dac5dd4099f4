"""Parallel tempering: the loop over kernels, with tuning, output, resume and reporters."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from openmm_tsf.io.directory import DirectoryLock
from openmm_tsf.io.run_config import read_run_config
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.chain import TemperingChain
from openmm_tsf.sampling.consistency import check_potentials
from openmm_tsf.sampling.initial import restored_state
from openmm_tsf.sampling.kernels.base import Kernel, SteerableMap
from openmm_tsf.sampling.kernels.schedule import Scheduled
from openmm_tsf.sampling.provenance import (
    check_run_arguments,
    check_same,
    check_unchanged,
    sampling_choices,
)
from openmm_tsf.sampling.recorder import CHECKPOINT_SECONDS, Recorder
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.signals import DeferredInterrupt


class ParallelTempering(TemperingChain):
    """W walkers, each with one replica at every temperature, under a sequence of kernels.

    All walkers and temperatures are one batch for the flow and the potential. Walkers are
    independent of each other; swaps happen within a walker's ladder.

    Parameters
    ----------
    molecule
        The molecule; None for a potential on R^d, which must then be given.
    flow
        The flow, frozen: no kernel changes it, and nobody else may while sampling.
    temperatures
        The ladder, ascending, K (or a Quantity). One rung is allowed.
    n_walkers
        Number of walkers W.
    kernels
        Kernels, or kernels with a schedule (:class:`openmm_tsf.sampling.kernels.Scheduled`),
        applied in this order in every iteration; by default those of
        :func:`openmm_tsf.sampling.kernels.default_kernels`.
    potential
        The energy; ``molecule.potential()`` by default.
    seed
        Seed of everything random; drawn and recorded if None.

    Attributes
    ----------
    reporters : list
        Callables ``reporter(sampler, state)`` with an attribute ``interval``.
    totals : dict of str to KernelInfo
        What each kernel did since the last call of :meth:`run` or :meth:`tune` began.

    Raises
    ------
    TypeError, ValueError
        If arguments do not fit each other; the message names them.
    """

    def __init__(
        self,
        molecule: MolecularSystem | None,
        flow: SteerableMap,
        temperatures: Any,
        n_walkers: int,
        kernels: Sequence[Kernel | Scheduled] | None = None,
        potential: Potential | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(molecule, flow, temperatures, n_walkers, kernels, potential, seed)
        self._writer: RunWriter | None = None
        self._opened: dict[str, Any] = {}  # the choices that the writer's directory stands for

    @property
    def n_written(self) -> int:
        """Saved iterations in the run directory."""
        return 0 if self._writer is None else self._writer.n_saved

    def run(
        self,
        n_iterations: int,
        output: str | os.PathLike[str] | None = None,
        *,
        save_interval: int = 1,
        checkpoint_interval: int | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        progress: bool = True,
        collect: bool = False,
        choices: Mapping[str, Any] | None = None,
        entries: Mapping[str, Any] | None = None,
        allow_existing: bool = False,
        lock: DirectoryLock | None = None,
    ) -> Tensor | None:
        """Sample.

        Ctrl-C, or SIGTERM, ends after the current iteration; what was sampled is written and
        ``KeyboardInterrupt`` raised (a second one is immediate). After any exception the completed
        iterations are written, too.

        Parameters
        ----------
        n_iterations
            Iterations to add.
        output
            Run directory: new or empty, or the one that this sampler wrote last or resumed. None:
            nothing is written.
        save_interval
            Save the walkers every so many iterations.
        checkpoint_interval
            Write a segment, its frames and the checkpoint every so many iterations, too.
        checkpoint_seconds
            Write them after so many seconds (more, where writing would take over 2 percent of the
            time; less, where over 256 MiB would wait). This does not change the samples.
        progress
            Show a bar.
        collect
            Return the saved configurations.
        choices
            Further entries for ``choices`` in ``config.json``.
        entries
            Further entries for ``config.json``.
        allow_existing
            Let the new run directory hold files that are not a sampler's.
        lock
            The directory's lock, where the caller holds it; otherwise it is held during this call.

        Returns
        -------
        Tensor or None
            With `collect`, positions [n, W, R, *event] of the saved iterations.

        Raises
        ------
        FileExistsError
            If `output` has files.
        DirectoryInUse
            If another process, or another sampler's ``run``, is writing to it.
        RuntimeError
            If another sampler has continued the run since this one wrote to it.
        ValueError
            If a number is out of range, or the flow, the step sizes or the kernels are not those
            that `output` was started with.
        """
        check_run_arguments(
            n_iterations, save_interval, checkpoint_interval, checkpoint_seconds, self.reporters
        )
        if lock is not None and (output is None or not lock.is_of(output)):
            raise ValueError(f"lock: expected that of output, {output}, got {lock.directory}'s")
        _ = self.state  # the default start, before anything is written
        recorder: Recorder | None = None
        with ExitStack() as stack:
            if output is not None:
                stack.enter_context(lock or self._locked(output, allow_existing))
                recorder = Recorder(
                    self._open(output, save_interval, choices or {}, entries or {}, allow_existing),
                    self._zero,
                    self._checkpoint,
                    checkpoint_interval,
                    checkpoint_seconds,
                )
            return self._run(recorder, n_iterations, save_interval, progress, collect)

    def _run(
        self,
        recorder: Recorder | None,
        n_iterations: int,
        save_interval: int,
        progress: bool,
        collect: bool,
    ) -> Tensor | None:
        collected: list[Tensor] = []
        self.totals = self._zero()
        with (
            DeferredInterrupt() as interrupt,
            tqdm(total=n_iterations, desc="sample", disable=not progress) as bar,
        ):
            try:
                for _ in range(n_iterations):
                    if interrupt.requested:
                        break
                    start = time.perf_counter()
                    infos = self._advance()
                    state = self.state
                    saved = state.iteration % save_interval == 0
                    if recorder is not None:
                        recorder.add(infos, time.perf_counter() - start, state, saved)
                    if collect and saved:
                        collected.append(state.x)
                    for reporter in self.reporters:
                        if state.iteration % reporter.interval == 0:
                            reporter(self, state)
                    bar.update()
                    if recorder is not None:
                        recorder.write_if_due(state)
            finally:
                if recorder is not None:
                    recorder.write(self.state)
            if interrupt.requested:
                raise KeyboardInterrupt
        if not collect:
            return None
        shape = (0, *self.state.x.shape)
        return torch.stack(collected) if collected else torch.zeros(shape, dtype=torch.float64)

    # -- files -------------------------------------------------------------------------------

    def _checkpoint(self) -> dict[str, Any]:
        return {
            "state": self.state.state_dict(),
            "generator": self._generator.get_state(),
            "kernels": self._kernel_states(),
            "seed": self.seed,
        }

    @contextmanager
    def _locked(self, output: str | os.PathLike[str], allow_existing: bool) -> Iterator[None]:
        """Hold a directory's lock; one that is refused is left as it was."""
        if not allow_existing and not self._writes_to(output):
            self._new_writer(output).check_new()
        Path(output).mkdir(parents=True, exist_ok=True)
        with DirectoryLock(output):
            yield

    def _writes_to(self, output: str | os.PathLike[str]) -> bool:
        writer = self._writer
        return writer is not None and writer.directory.resolve() == Path(output).resolve()

    def _new_writer(self, output: str | os.PathLike[str]) -> RunWriter:
        return RunWriter(output, self.molecule, self.temperatures, self.n_walkers)

    def _open(
        self,
        output: str | os.PathLike[str],
        save_interval: int,
        choices: Mapping[str, Any],
        entries: Mapping[str, Any],
        allow_existing: bool,
    ) -> RunWriter:
        writer = self._writer
        if writer is not None and self._writes_to(output):
            writer.check_untouched()
            if save_interval != self._opened["save_interval"]:
                raise ValueError(
                    f"save_interval: this run was started with {self._opened['save_interval']}, "
                    f"got {save_interval}"
                )
            check_unchanged(output, self._opened, self._choices(save_interval))
            return writer
        writer = self._new_writer(output)
        own = self._choices(save_interval)
        constant = self.potential.boltzmann_constant
        writer.create(self.seed, constant, {**choices, **own}, allow_existing, entries)
        flow_file = writer.directory / "flow.pt"
        if hasattr(self.flow, "save") and not flow_file.exists():
            self.flow.save(flow_file)
        writer.write_first_checkpoint(self._checkpoint())
        self._writer, self._opened = writer, own
        return writer

    def _choices(self, save_interval: int) -> dict[str, Any]:
        return sampling_choices(
            self.molecule, self.flow, self.potential, self.schedule, save_interval
        )

    def resume(self, path: str | os.PathLike[str], *, lock: DirectoryLock | None = None) -> Self:
        """Continue a run directory from its checkpoint with ``run(n, output=path)``.

        The sampler must be made as the one that wrote it. On the same machine, with the same number
        of threads, samples are the same bit by bit as if it had not stopped. Frames and segments
        after the checkpoint are cut off.

        Parameters
        ----------
        path
            The run directory.
        lock
            Its lock, where the caller holds it; otherwise it is held during this call.

        Raises
        ------
        FileNotFoundError
            If there is no run directory or no checkpoint.
        DirectoryInUse
            If another process is writing to it.
        ValueError
            If this sampler is not the one that wrote it, or a file is damaged.
        """
        writer = self._new_writer(path)
        config = read_run_config(writer.directory)
        with lock or DirectoryLock(path):
            content = writer.read_checkpoint()
            choices = config["choices"]
            own = {
                "temperatures_K": list(self.temperatures),
                "n_walkers": self.n_walkers,
                "choices": self._choices(choices["save_interval"]),
            }
            check_same(path, config, own)
            before = self._generator.get_state(), self._kernel_states()
            try:
                state = restored_state(
                    content["state"], self.n_walkers, len(self.temperatures), self.potential
                )
                self._generator.set_state(content["generator"])
                self._load_kernel_states(content["kernels"])
                check_potentials(self.kernels.values(), self.potential, state)
                writer.cut_back(content["n_frames_written"], content["n_segments"])
            except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
                self._generator.set_state(before[0])
                self._load_kernel_states(before[1])
                raise ValueError(f"{path}: cannot be continued: {error}") from error
            self._state, self.seed = state, content["seed"]
            self._writer, self._opened = writer, self._choices(choices["save_interval"])
        return self
