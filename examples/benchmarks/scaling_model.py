"""A thousand GPUs on paper: rates and the first bottleneck, from what was measured on one."""

from dataclasses import dataclass
from typing import Any

#: Sizes of a run: GPUs, and walkers of each; three rungs.
GPUS, RUNGS = (1, 8, 64, 1000), 3
WALKERS_OF_A_GPU = (64, 1024, 4096)
#: Passes of a row through flow and energies in an iteration, each as long as that of a draw.
PASSES = 5
#: Assumed, not measured: a parallel file system of a cluster writes so many bytes, and makes so
#: many files, in a second.
FILE_SYSTEM_BYTES, FILE_SYSTEM_FILES = 100e9, 1e4
#: Of a run, files of a shard at its start (cluster.md: at most 10), and hours of production.
FILES_OF_A_SHARD, HOURS = 10, 1.0


@dataclass(frozen=True)
class Inputs:
    """What was measured, and where.

    From gpu.json (one H200): `fixed_ms` of an iteration of 64 walkers, which launches bind;
    `busy_ms`, of it the time in which the device computes; `row_us`, the device's time for each
    further draw of a training step, forward, backward and forces, which stands in for that of a
    proposal: iterations of more walkers have not been measured yet; `step_ms`, a training step.
    From scaling.json: bytes of a configuration on disk. From writing.json: the CPU time to write
    one of 4096 walkers, in a thread beside the sampler. (That of 64 walkers in scaling.json is
    mostly what a call of `run` costs whatever their number.)
    """

    fixed_ms: float
    busy_ms: float
    row_us: float
    step_ms: float
    bytes_each: float
    write_us: float

    @classmethod
    def from_results(
        cls, scaling: dict[str, Any], gpu: dict[str, Any], writing: dict[str, Any]
    ) -> "Inputs":
        """Read them from the content of the three files."""
        sections = gpu["sections"]
        iteration = _first(sections["compiled_flow"]["entries"])
        steps = sections["training"]["entries"]
        few, many = steps["510 draws"], steps["32640 draws"]
        busy = [each["ms"] * each["busy_share"] for each in (few, many)]
        return cls(
            fixed_ms=iteration["ms"],
            busy_ms=iteration["ms"] * iteration["busy_share"],
            row_us=1e3 * (busy[1] - busy[0]) / (32640 - 510),
            step_ms=few["ms"],
            bytes_each=scaling["files"]["bytes_per_configuration"],
            write_us=writing["at_once"]["async"]["cpu_microseconds_per_frame"],
        )

    def iteration_ms(self, walkers: int) -> float:
        """Return the time of an iteration: launching, or computing where that takes longer."""
        rows = RUNGS * (walkers - 64)
        # The inverse, two proposals, a swap, and the forces of dynamics in every fourth iteration.
        return max(self.fixed_ms, self.busy_ms + PASSES * 1e-3 * self.row_us * rows)

    def rates(self, gpus: int, walkers: int) -> dict[str, float]:
        """Return configurations and bytes a second, and the shares of what may be the bottleneck.

        A share is the time that a part needs for what the GPUs make in a second: above 1 it
        decides. `files` are those of all shards made within a minute.
        """
        frames = gpus * walkers * RUNGS / (1e-3 * self.iteration_ms(walkers))
        n_bytes = frames * self.bytes_each
        return {
            "frames/s": frames,
            "bytes/s": n_bytes,
            "writer of a process": frames / gpus * 1e-6 * self.write_us,
            "file system": n_bytes / FILE_SYSTEM_BYTES,
            "training": 2500 * 1e-3 * self.step_ms / (3600 * HOURS),
            "files": gpus * FILES_OF_A_SHARD / (60 * FILE_SYSTEM_FILES),
        }


def _first(entries: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = next(iter(entries.values()))
    return first


def print_model(scaling: dict[str, Any], gpu: dict[str, Any], writing: dict[str, Any]) -> None:
    """Print the inputs, and a table in Markdown."""
    inputs = Inputs.from_results(scaling, gpu, writing)
    print(f"\nmodel, {RUNGS} rungs, {HOURS:g} h of production; every configuration written")
    print(f"  measured: {inputs}")
    print(
        f"  assumed: a file system of {FILE_SYSTEM_BYTES:g} bytes/s, {FILE_SYSTEM_FILES:g} files/s"
    )
    names = list(inputs.rates(1, 64))
    print(f"\n| GPUs | walkers of each | ms an iteration | {' | '.join(names)} | largest share |")
    print(f"|{'---|' * (len(names) + 4)}")
    for gpus in GPUS:
        for walkers in WALKERS_OF_A_GPU:
            rates = inputs.rates(gpus, walkers)
            shares = {name: rates[name] for name in names[2:]}
            worst = max(shares, key=lambda name: shares[name])
            cells = [f"{rates[name]:.2g}" for name in names]
            time = f"{inputs.iteration_ms(walkers):.0f}"
            print(f"| {gpus} | {walkers} | {time} | {' | '.join(cells)} | {worst} |")
