"""What the sections of gpu.py need: their device, sizes and deadline, and clocks of a device."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow, place_for_sampling
from openmm_tsf.potentials import TorchPotential
from openmm_tsf.potentials.blocks import bytes_per_conformation
from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import make_sampler
from openmm_tsf.workflow.settings import FlowSettings, RunSettings, SamplingSettings
from openmm_tsf.workflow.train import build_flow

#: What a section yields: the name of a result, and its numbers.
Entries = Iterator[tuple[str, dict[str, Any]]]

#: The most memory of one block of energies: 27 000 conformations of alanine dipeptide in float64.
_BLOCK_BYTES = 2**33


@dataclass
class Bench:
    """The device, the sizes and the deadline of a section, and what sections share.

    `smoke` is for tiny sizes, `directory` for files, `deadline` a reading of time.monotonic().
    """

    device: torch.device
    smoke: bool
    seed: int
    directory: Path
    deadline: float = 0.0

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device_option(self) -> dict[str, str]:
        """The device for a stage's RunOptions."""
        return {"device": str(self.device)} if self.is_cuda else {}

    @cached_property
    def molecule(self) -> MolecularSystem:
        return alanine_dipeptide()

    @cached_property
    def frames(self) -> MDDataset:
        return MDDataset.shipped(self.molecule, stride=40 if self.smoke else 1)

    @property
    def settings(self) -> RunSettings:
        """The default preset, or with `smoke` the same with tiny sizes."""
        settings = preset("default")
        if not self.smoke:
            return settings
        fit = replace(
            settings.fit, n_steps=8, warmup_steps=2, batch_size=32, kl_batch_size=30, n_chains=60,
            n_validation_draws=30, validate_interval=8,
        )  # fmt: skip
        return replace(
            settings,
            stride=40,
            flow=replace(settings.flow, n_blocks=2, hidden=(16,)),
            fit=fit,
            sampling=replace(settings.sampling, n_walkers=4, n_iterations=12, n_tuning=8),
        )

    @property
    def flow_file(self) -> Path:
        """Where a flow that was given is."""
        return self.directory / "flow.pt"

    def flow(self) -> tuple[AugmentedFlow, str]:
        """Return the flow that was given, or an untrained one, and which of them it is."""
        file = self.flow_file
        if file.is_file():
            return place_for_sampling(load_flow(file, self.molecule), self.device), "trained"
        return self.untrained_flow(self.settings.flow), "untrained"

    def untrained_flow(self, settings: FlowSettings) -> AugmentedFlow:
        return place_for_sampling(build_flow(self.frames, settings, self.seed), self.device)

    def potential(
        self, batch: int, dtype: torch.dtype = torch.float64, compile: bool = False
    ) -> TorchPotential:
        """Return energies whose blocks hold a batch of this size, as far as memory allows."""
        needed = max(64, batch) * bytes_per_conformation(self.molecule.n_atoms, dtype)
        return TorchPotential.from_system(
            self.molecule.system,
            dtype,
            self.device,
            compile,
            positions=self.molecule.positions,
            memory=min(_BLOCK_BYTES, needed),
        )

    def sampler(
        self, flow: AugmentedFlow, potential: TorchPotential, n_walkers: int, **changes: Any
    ) -> ParallelTempering:
        """Return a new sampler of the settings' kernels, started from frames and draws."""
        settings = replace(self.settings.sampling, n_walkers=n_walkers, **changes)
        seeds = self.seed, self.seed + 1
        return make_sampler(self.molecule, flow, settings, potential, seeds, self.frames)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the time of one call, the device's work included."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def median_seconds(self, work: Callable[[], object], most: float = 2.0) -> tuple[float, int]:
        """Return the median time of up to 20 calls within `most` seconds, after a first one."""
        self.seconds(work)
        times: list[float] = []
        most = min(most, max(0.0, self.seconds_left))
        while len(times) < 20 and (len(times) < 3 or sum(times) < most):
            times.append(self.seconds(work))
            if self.seconds_left < 0:
                break
        return float(np.median(times)), len(times)

    def reset_memory(self) -> None:
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mib(self) -> float | None:
        """Return the most memory that tensors took since `reset_memory`; None on the CPU."""
        if not self.is_cuda:
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)

    def count_waits(self, work: Callable[[], object]) -> int | None:
        """Return how often the host waits for the device in a call; None on the CPU."""
        if not self.is_cuda:
            work()
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    def profile(self, work: Callable[[], object]) -> dict[str, float] | None:
        """Return the device's busy seconds and the kernels of a call; None on the CPU."""
        if not self.is_cuda:
            return None
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            work()
            self.synchronize()
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {
            "busy_seconds": sum(event.self_device_time_total for event in events) / 1e6,
            "kernels": len(events),
        }


def sampling_sizes(settings: SamplingSettings) -> tuple[int, int]:
    """Return the number of rungs, and of iterations after which the kernels repeat."""
    return len(settings.temperatures), max(1, settings.local_interval)
