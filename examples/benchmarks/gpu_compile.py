"""Compilation for gpu.py, in processes of their own: torch's disk cache serves the sections."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_energies import BATCHES, DTYPES, SMOKE_BATCHES, conformations
from gpu_sampling import compile_flow
from gpu_steps import Bench, Entries

from openmm_tsf.workflow.potential_choice import GPU_BLOCK, batch_of, gpu_block_size
from openmm_tsf.workflow.presets import preset

#: Threads of the compiler in each process.
_THREADS = "2"


def programs(bench: Bench) -> list[str]:
    """Return the names of all programs: energies and forces by block and precision, the flow."""
    blocks = {min(batch, 16384) for batch in (SMOKE_BATCHES if bench.smoke else BATCHES)}
    names = [f"energy {block} {dtype}" for block in sorted(blocks) for dtype in DTYPES]
    if bench.smoke:
        return [names[0], "flow"]
    # Those of the default's 64 walkers, and of many: half of 12 288 rows.
    for block in (GPU_BLOCK, gpu_block_size(batch_of(preset("gpu").sampling))):
        names += [f"energy {block} float64", f"single-precision-forces {block}"]
    return [*names, "flow", "flow-graphs"]


def start_compiling(bench: Bench) -> Entries:
    """Start the compilation of everything that later sections use, in the background."""
    if not bench.is_cuda:  # a rehearsal: C++ would take minutes
        yield "nothing", {"programs": 0}
        return
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": _THREADS}
    for number, name in enumerate(programs(bench)):
        command = [sys.executable, __file__, name, str(bench.directory), str(bench.device)]
        command += [str(bench.seed), str(number)] + ["--smoke"] * bench.smoke
        log = (bench.directory / f"compile_{number}.log").open("w")
        subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    yield "started", {"programs": len(programs(bench))}


def wait_for_compiling(bench: Bench) -> Entries:
    """Seconds of each compilation, as they end."""
    waiting = dict(enumerate(programs(bench))) if bench.is_cuda else {}
    start = time.monotonic()
    while waiting and bench.seconds_left > 0:
        for number in list(waiting):
            result = bench.directory / f"compiled_{number}.json"
            if result.is_file():
                yield waiting.pop(number), json.loads(result.read_text())
        time.sleep(0.1)
    for number, name in waiting.items():
        log = (bench.directory / f"compile_{number}.log").read_text()
        yield name, {"status": "not compiled yet", "output": log[-2000:]}
    yield "waited for", {"seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", help="a name that `programs` returns")
    parser.add_argument("directory", type=Path)
    parser.add_argument("device", type=torch.device)
    parser.add_argument("seed", type=int)
    parser.add_argument("number", type=int)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    signal.alarm(300)  # no process outlives the benchmark
    bench = Bench(arguments.device, arguments.smoke, arguments.seed, arguments.directory)
    try:
        seconds = bench.seconds(lambda: compile_program(bench, arguments.program))
        result: dict[str, Any] = {"seconds": round(seconds, 1)}
    except Exception:  # a result as well: nobody has to wait for it
        result = {"failed": traceback.format_exc()[-2000:]}
    temporary = arguments.directory / f"compiled_{arguments.number}.tmp"
    temporary.write_text(json.dumps(result))
    os.replace(temporary, temporary.with_suffix(".json"))


def compile_program(bench: Bench, name: str) -> None:
    """Compile one of the programs by using it."""
    what, *numbers = name.split()
    if what.startswith("flow"):
        flow = bench.untrained_flow(bench.settings.flow)
        compile_flow(bench, flow, bench.settings.sampling.n_walkers, what == "flow-graphs")
        return
    block = int(numbers[0])
    dtype = DTYPES[numbers[1]] if len(numbers) > 1 else torch.float64
    with bench.potential(block, dtype, compile=True) as potential:
        x = conformations(bench, 2 * block).to(dtype)
        if what == "energy":
            potential.energy(x[:block])
        else:
            potential.single_precision_forces(x)
        if what == "energy" and not potential.is_compiled:
            raise RuntimeError("no compiler for this device")


if __name__ == "__main__":
    main()
