"""Section of gpu.py on the same chain on a CPU and on a GPU, with the same random numbers."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_steps import Bench, Entries
from torch.overrides import TorchFunctionMode

from openmm_tsf.sampling import ParallelTempering
from openmm_tsf.sampling.state import WalkerState

_DRAWS = (torch.randn, torch.rand, torch.randint, torch.randperm)
#: A configuration is another one, and not rounded otherwise, from this distance on (nm).
_OTHER = 1e-3


class HostNoise(TorchFunctionMode):
    """Draw all random numbers from a CPU's generator, and bring them to the device requested."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _DRAWS:
            return func(*args, **kwargs)
        device = kwargs.pop("device", "cpu")
        kwargs["generator"] = self.generator
        return func(*args, **kwargs, device="cpu").to(device)


def measure_decisions(bench: Bench) -> Entries:
    """How far the chain on the device follows that on the CPU, and their first other decision."""
    flow, which = bench.flow()
    n_walkers, n = (4, 4) if bench.smoke else (64, 100)
    n_rows = n_walkers * len(bench.settings.sampling.temperatures)
    host = Bench(torch.device("cpu"), bench.smoke, bench.seed, bench.directory, bench.deadline)
    with (
        host.potential(n_rows) as host_potential,
        bench.potential(n_rows) as potential,
        host.sampler(flow.to("cpu"), host_potential, n_walkers) as on_host,
    ):
        state = on_host.state
        flow = bench.flow()[0]
        with bench.sampler(flow, potential, n_walkers) as on_device:
            yield f"{n_walkers} walkers, {which} flow", follow(bench, on_host, on_device, state, n)


def follow(
    bench: Bench, on_host: ParallelTempering, on_device: ParallelTempering, start: WalkerState,
    n: int,
) -> dict[str, Any]:  # fmt: skip
    """Run both chains until one decides otherwise, for n iterations, or to the deadline."""
    states = [start, start.to(bench.device)]
    draws = [HostNoise(torch.Generator().manual_seed(bench.seed)) for _ in range(2)]
    # Kernels work on the device of the generator that they are given; nothing is drawn from it.
    generators = [torch.Generator(device) for device in ("cpu", bench.device)]
    largest = 0.0
    result: dict[str, Any] = {"first_other_decision": None}
    for iteration in range(n):
        for i, sampler in enumerate((on_host, on_device)):
            with draws[i]:
                states[i] = iterate(sampler, states[i], generators[i])
        difference = (states[1].x.cpu() - states[0].x).abs().flatten(2).amax(dim=2)
        others = int((difference > _OTHER).sum())
        if others:
            result["first_other_decision"] = f"iteration {iteration + 1}: {others} configurations"
            break
        largest = max(largest, float(difference.max()))
        if bench.seconds_left < 0:
            break
    return result | {"iterations": iteration + 1, "largest_difference_before_nm": largest}


def iterate(
    sampler: ParallelTempering, state: WalkerState, generator: torch.Generator
) -> WalkerState:
    """Run the kernels of one iteration."""
    for entry in sampler.schedule:
        if state.iteration % entry.interval == 0:
            for _ in range(entry.repeats):
                state, _ = entry.kernel(state, generator)
    return state.evolve(iteration=state.iteration + 1)
