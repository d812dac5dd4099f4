"""Parallel tempering: the loop over kernels, with tuning, output, resume and reporters."""

import copy
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from openmm_tsf.io.directory import CHECKPOINT_SECONDS, DirectoryLock
from openmm_tsf.sampling.chain import TemperingChain
from openmm_tsf.sampling.consistency import check_potentials
from openmm_tsf.sampling.initial import check_generator, restored_state
from openmm_tsf.sampling.provenance import (
    check_intervals,
    check_run_arguments,
    check_same,
    check_same_intervals,
    check_unchanged,
    read_sampler_config,
    recorded_intervals,
    sampling_choices,
)
from openmm_tsf.sampling.recorder import Recorder, SaveIntervals
from openmm_tsf.sampling.run_writer import RunWriter
from openmm_tsf.utils.devices import describe_device
from openmm_tsf.utils.progress import progress_bar
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
        The flow, frozen: it must not change while sampling. A flow of a molecule needs an energy
        that does not depend on position and orientation
        (:meth:`openmm_tsf.MolecularSystem.check_pose_independent`).
    temperatures
        The ladder, ascending, K (or a Quantity). One rung is allowed.
    n_walkers, seed
        Number of walkers W; seed of everything random, drawn and recorded if None.
    generator
        Where all random numbers come from, on the flow's device; by default one that `seed` makes.
    kernels
        Kernels, or kernels with a schedule (:class:`openmm_tsf.sampling.kernels.Scheduled`),
        applied in this order in every iteration; by default those of
        :func:`openmm_tsf.sampling.kernels.default_kernels`.
    potential
        The energy; ``molecule.potential()`` by default.

    Attributes
    ----------
    reporters : list
        Callables ``reporter(sampler, state)`` with an attribute ``interval``.
    totals : dict of str to KernelInfo
        What each kernel did since the last call of :meth:`run` or :meth:`tune` began.
    device : torch.device
        The flow's, on which the walkers are and random numbers are drawn. The potential should be
        there, too: otherwise configurations and energies are copied in every evaluation.

    Examples
    --------
    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials import DoubleWell
    >>> well = DoubleWell(0.1, -1.0, 0.3)
    >>> flow = tsf.TemperatureSteerableFlow(1, 2, 1, (4,))
    >>> sampler = tsf.ParallelTempering(None, flow, [1.0, 2.0], 8, potential=well, seed=1)
    >>> sampler.set_positions(torch.zeros(8, 2, 1))
    >>> sampler.run(5, "run", progress=False)
    >>> tsf.load_run("run").n_iterations
    5
    """

    _writer: RunWriter | None = None
    _opened: Mapping[str, Any] | None = None  # the choices when it opened the writer's directory
    _lock: DirectoryLock | None = None  # of a directory whose lock the caller holds
    _first_iteration = 0  # at which the writer's directory was started

    @property
    def n_written(self) -> int:
        """The number of iterations with frames in the run directory."""
        return 0 if self._writer is None else self._writer.n_saved

    @property
    def n_done(self) -> int:
        """The number of iterations since the run directory was started, saved or not."""
        return 0 if self._writer is None else self.state.iteration - self._first_iteration

    def run(
        self,
        n_iterations: int,
        output: str | os.PathLike[str] | None = None,
        *,
        save_interval: int = 1,
        numbers_interval: int | None = None,
        checkpoint_interval: int | None = None,
        checkpoint_seconds: Any = CHECKPOINT_SECONDS,
        progress: bool = True,
        collect: bool = False,
    ) -> Tensor | None:
        """Sample.

        Ctrl-C, or SIGTERM, ends after the current iteration; what was sampled is written and
        ``KeyboardInterrupt`` raised (a second one is immediate). After any exception the completed
        iterations are written, too.

        Parameters
        ----------
        n_iterations
            Iterations to add.
        save_interval, numbers_interval
            Iterations from one saved frame to the next; and from one to the next whose energies,
            replicas and torsions are saved, by default the same: a divisor of `save_interval`, so
            that each frame has its numbers. They do not change the chain.
        output
            Run directory: new, empty, or the one that this sampler wrote last or resumed; or None.
        checkpoint_interval, checkpoint_seconds
            Iterations (None: any number) and time in s between checkpoints: a segment, its frames
            and the state to continue from. The time is longer where they would take over 2 percent
            of it, shorter where over 256 MiB would wait. Neither changes the samples.
        progress, collect
            Show a progress bar; return the saved positions [n, W, R, *event].

        Raises
        ------
        FileExistsError, DirectoryInUse, RuntimeError
            If `output` has files, another process or sampler is writing to it, or another sampler
            has continued the run since this one wrote to it.
        ValueError
            If the flow, step sizes or kernels are not those that `output` was started with.
        """
        intervals = check_intervals(save_interval, numbers_interval)
        n_iterations, checkpoint_interval, seconds = check_run_arguments(
            n_iterations, checkpoint_interval, checkpoint_seconds, self.reporters
        )
        _ = self.state  # the default start, before anything is written
        recorder: Recorder | None = None
        with ExitStack() as stack:
            if output is not None:
                lock = stack.enter_context(self._lock_of(output))
                writer = self._open(output, intervals)
                writer.check_held = lock.check_held
                recorder = Recorder(
                    writer, self._zero, self._checkpoint, checkpoint_interval, seconds, intervals
                )
                stack.enter_context(recorder)
            return self._run(recorder, n_iterations, intervals, progress, collect)

    def start(
        self,
        lock: DirectoryLock,
        config: Mapping[str, Any],
        save_interval: int = 1,
        numbers_interval: int | None = None,
    ) -> None:
        """Start a run in the directory of a stage, which may hold other files but none of a run.

        ``run(n, lock.directory, ...)`` with the same intervals then samples. The caller holds the
        `lock`, in later calls too, and the sampler adds its entries to the stage's `config`.
        """
        intervals = check_intervals(save_interval, numbers_interval)
        _ = self.state  # the default start, before anything is written
        self._lock = lock
        with lock:
            self._create(lock.directory, intervals, config)

    def _run(
        self,
        recorder: Recorder | None,
        n_iterations: int,
        intervals: SaveIntervals,
        progress: bool,
        collect: bool,
    ) -> Tensor | None:
        collected: list[Tensor] = []
        self.totals = self._zero()
        bar = progress_bar("sample", n_iterations, show=progress)
        with DeferredInterrupt() as interrupt, bar:
            try:
                for _ in range(n_iterations):
                    if interrupt.requested:
                        break
                    start = time.perf_counter()
                    infos = self._advance()
                    state = self.state
                    saved = state.iteration % intervals.numbers == 0
                    if recorder is not None:
                        recorder.add(infos, time.perf_counter() - start, state, saved)
                    if collect and state.iteration % intervals.frames == 0:
                        collected.append(state.x)
                    for reporter in self.reporters:
                        if state.iteration % reporter.interval == 0:
                            reporter(self, state)
                    bar.update()
                    if recorder is not None:
                        recorder.write_if_due(state)
            finally:
                if recorder is not None:
                    recorder.finish(self.state)
            if interrupt.requested:
                raise KeyboardInterrupt
        if not collect:
            return None
        shape = (0, *self.state.x.shape)
        none = torch.zeros(shape, dtype=torch.float64, device=self.device)
        return torch.stack(collected) if collected else none

    def _checkpoint(self) -> dict[str, Any]:
        """The state to continue from; a thread may write it while the next iteration runs."""
        is_thinned = self._opened is not None and self._opened["save_interval"] > 1
        first = {"first_iteration": self._first_iteration} if is_thinned else {}
        return {
            "state": self.state.state_dict(),
            "generator": self._generator.get_state(),
            "generator_device": self._generator.device.type,
            "device": describe_device(self.device),
            "kernels": copy.deepcopy(self._kernel_states()),
            "seed": self.seed,
            **first,
        }

    def _lock_of(self, output: str | os.PathLike[str]) -> DirectoryLock:
        """The directory's lock; a directory that is refused is left as it was."""
        if self._lock is not None and self._lock.is_of(output):
            return self._lock
        if not self._writes_to(output):
            self._new_writer(output).check_new()
        Path(output).mkdir(parents=True, exist_ok=True)
        return DirectoryLock(output)

    def _writes_to(self, output: str | os.PathLike[str]) -> bool:
        writer = self._writer
        return writer is not None and writer.directory.resolve() == Path(output).resolve()

    def _new_writer(self, output: str | os.PathLike[str]) -> RunWriter:
        return RunWriter(output, self.molecule, self.temperatures, self.n_walkers)

    def _open(self, output: str | os.PathLike[str], intervals: SaveIntervals) -> RunWriter:
        writer = self._writer
        if writer is None or self._opened is None or not self._writes_to(output):
            return self._create(output, intervals, None)
        writer.check_untouched()
        check_same_intervals(self._opened, intervals)
        check_unchanged(output, self._opened, self.choices(*intervals))
        return writer

    def _create(
        self,
        output: str | os.PathLike[str],
        intervals: SaveIntervals,
        config: Mapping[str, Any] | None,
    ) -> RunWriter:
        writer, choices = self._new_writer(output), self.choices(*intervals)
        device = describe_device(self.device)
        writer.create(self.seed, self.potential.boltzmann_constant, choices, config, device)
        flow_file = writer.directory / "flow.pt"
        if hasattr(self.flow, "save") and not flow_file.exists():
            self.flow.save(flow_file)
        before = self._opened, self._first_iteration
        self._opened, self._first_iteration = choices, self.state.iteration
        try:
            writer.write_first_checkpoint(self._checkpoint())
        except BaseException:
            self._opened, self._first_iteration = before
            raise
        self._writer = writer
        return writer

    def choices(
        self, save_interval: int = 1, numbers_interval: int | None = None
    ) -> dict[str, Any]:
        """Return every choice of this sampler, as ``config.json`` records them."""
        intervals = check_intervals(save_interval, numbers_interval)
        return sampling_choices(self.molecule, self.flow, self.potential, self.schedule, intervals)

    def resume(self, path: str | os.PathLike[str], *, lock: DirectoryLock | None = None) -> Self:
        """Continue a run directory from its checkpoint with ``run(n, output=path)``.

        The sampler must be made as the one that wrote it, on the same kind of device. On the same
        machine, with the same number of threads, samples are the same bit by bit as if it had not
        stopped. Frames and segments after the checkpoint are cut off.

        Parameters
        ----------
        path, lock
            The run directory; its lock, if the caller holds it, in later calls too.

        Raises
        ------
        DirectoryInUse
            If another process is writing to it.
        ValueError
            If this sampler is not the one that wrote it, or a file is damaged.
        """
        writer = self._new_writer(path)
        config = read_sampler_config(writer.directory)
        with lock or DirectoryLock(path):
            content = writer.read_checkpoint()
            intervals = recorded_intervals(config["choices"])
            choices = self.choices(*intervals)
            ladder = {"temperatures_K": list(self.temperatures), "n_walkers": self.n_walkers}
            check_same(path, config, {**ladder, "choices": choices})
            before = self._generator.get_state(), self._kernel_states()
            try:
                check_generator(content, self._generator)
                n_rungs = len(self.temperatures)
                state = restored_state(
                    content["state"], self.n_walkers, n_rungs, self.potential, self.device
                )
                self._generator.set_state(content["generator"])
                self._load_kernel_states(content["kernels"])
                check_potentials(self.kernels.values(), self.potential, state)
                writer.cut_back(content["n_frames_written"], content["n_segments"])
            except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
                self._generator.set_state(before[0])
                self._load_kernel_states(before[1])
                raise ValueError(f"{path}: cannot be continued: {error}") from error
            writer.dihedrals = config["dihedrals"]
            self._state, self.seed, self._lock = state, content["seed"], lock
            self._writer, self._opened = writer, self.choices(*intervals)
            n_saved = writer.n_saved * intervals.frames
            self._first_iteration = content.get("first_iteration", state.iteration - n_saved)
        return self
