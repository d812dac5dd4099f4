"""Time, memory and files as a run grows: walkers, rungs, processes; and 1 000 GPUs on paper.

    python examples/benchmarks/scaling.py                # everything: scaling.json, six minutes
    python examples/benchmarks/scaling.py --smoke        # tiny: does everything run?
    python examples/benchmarks/scaling.py --model        # only the table of 1 000 GPUs

One command writes the whole file, and prints the tables of examples/results/README.md. Each size
runs in a process of its own, with one thread and a time budget: one that is late is ended and
recorded as such. Programs that no earlier run compiled are compiled before. Times are of CPU and
wall; on a machine that others use as well only the former mean something. Energies are those of a
run: compiled. The flow is that of the default preset, not trained, which takes as long. The model
reads its inputs from the JSON file and from gpu.json and writing.json, and its formulas are in
scaling_model.py.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
WALKERS = (10, 100, 1000, 10_000, 100_000)
RUNGS = (1, 3, 8)
#: Walkers of the other sections: those of the default preset.
N_WALKERS = 64
#: How often one process, and two at once, are measured in turn.
PAIRS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--model", action="store_true", help="only print the model's table")
    parser.add_argument("--budget", type=float, default=16.0, help="seconds of CPU of each size")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--gpu", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--writing", type=Path, default=RESULTS / "writing.json")
    arguments = parser.parse_args()
    if not arguments.model:
        report: dict[str, Any] = {"command": " ".join(["scaling.py", *sys.argv[1:]])}
        if not arguments.smoke:
            finish(start(with_time(arguments), "files", walkers=10))  # one call compiles
        for name, section in (
            ("walkers", measure_walkers),
            ("rungs", measure_rungs),
            ("processes", measure_processes),
            ("files", measure_files),
            ("compiled_flow", measure_compiled_flow),
        ):
            report[name] = section(arguments)
            print_section(name, report[name])
            report["cpu_seconds"] = round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]))
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    from scaling_model import print_model

    files = arguments.output, arguments.gpu, arguments.writing
    scaling, gpu, writing = (json.loads(path.read_text()) for path in files)
    print_walkers(scaling)
    print_model(scaling, gpu, writing)


def start(arguments: argparse.Namespace, what: str, **numbers: int) -> "subprocess.Popen[str]":
    """Start a measurement in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("scaling_steps.py")), what]
    if numbers.pop("ordinary", 0):
        command.append("--ordinary")
    command += [f"--{name}={value}" for name, value in numbers.items()]
    command += [f"--budget={arguments.budget}"] + ["--smoke"] * arguments.smoke
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=os.environ | threads, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return what a measurement printed, or how it ended."""
    output, errors = process.communicate()
    if process.returncode == 0:
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result
    if process.returncode in (-24, -9):  # SIGXCPU, SIGKILL: the limit of CPU time, or of memory
        return {"ended": "over its budget of CPU time" if process.returncode == -24 else "killed"}
    raise RuntimeError(f"exit status {process.returncode}: {errors[-2000:]}")


def measure_walkers(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU and wall milliseconds of an iteration, and memory, by the number of walkers.

    Of sizes for which six iterations would take longer than the budget, one without dynamics; where
    that alone would take more than twice the budget, none.
    """
    results: dict[str, Any] = {}
    for n in (4, 8) if arguments.smoke else WALKERS:
        last = next(reversed(results.values()), {})
        each = n * 3 * last.get("cpu_us_of_a_row_ordinary", 0.0) / 1e6
        if each > 2 * arguments.budget:
            results[f"{n} walkers"] = {"ended": f"not run: an iteration would take {each:.0f} s"}
            continue
        few = {"ordinary": 1} if 6 * each > arguments.budget else {}
        results[f"{n} walkers"] = finish(start(arguments, "iterations", walkers=n, **few))
        print(f"{n} walkers: {results[f'{n} walkers']}", flush=True)
    return results


def measure_rungs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same by the number of rungs."""
    walkers = 4 if arguments.smoke else N_WALKERS
    counts = (1, 2) if arguments.smoke else RUNGS
    return {
        f"{n} rungs": finish(start(arguments, "iterations", walkers=walkers, rungs=n))
        for n in counts
    }


def measure_processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Weak scaling: one process, and two at once with other seeds, in turn.

    The efficiency is the time of an iteration alone over that of two at once.
    """
    walkers = 4 if arguments.smoke else N_WALKERS
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for repeat in range(1 if arguments.smoke else PAIRS):
        for n in (1, 2):
            seeds = [1 + 2 * repeat + i for i in range(n)]
            started = [start(arguments, "iterations", walkers=walkers, seed=s) for s in seeds]
            done = [finish(process) for process in started]
            times[n] += [(each["cpu_ms"], each["wall_ms"]) for each in done]
    cpu, wall = ([sum(t[i] for t in times[n]) / len(times[n]) for n in (1, 2)] for i in (0, 1))
    return {
        "walkers_of_each": walkers,
        "measurements": {str(n): len(values) for n, values in times.items()},
        "cpu_ms": {"1 process": round(cpu[0], 2), "2 processes": round(cpu[1], 2)},
        "wall_ms": {"1 process": round(wall[0], 2), "2 processes": round(wall[1], 2)},
        "efficiency_by_cpu_time": round(cpu[0] / cpu[1], 3),
        "efficiency_by_wall_time": round(wall[0] / wall[1], 3),
        "load_of_the_machine": [round(load, 1) for load in os.getloadavg()],
        "cores": os.cpu_count(),
    }


def measure_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes and time to write a configuration, and files."""
    walkers = 4 if arguments.smoke else N_WALKERS
    return finish(start(arguments, "files", walkers=walkers))


def measure_compiled_flow(arguments: argparse.Namespace) -> dict[str, Any]:
    """An iteration with the flow compiled against the same with the flow as it is."""
    walkers = 4 if arguments.smoke else N_WALKERS
    return finish(start(with_time(arguments), "compiled-flow", walkers=walkers))


def with_time(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with a budget that is enough to compile."""
    return argparse.Namespace(**vars(arguments) | {"budget": max(600.0, arguments.budget)})


def print_walkers(report: dict[str, Any]) -> None:
    """Print what depends on walkers and rungs as tables in Markdown."""
    rows = {
        "CPU ms of an iteration": "cpu_ms",
        "without dynamics": "cpu_ms_ordinary",
        "µs a walker and rung, without dynamics": "cpu_us_of_a_row_ordinary",
        "most memory, MiB": "peak_MiB",
    }
    for name in ("walkers", "rungs"):
        sizes = {k: v for k, v in report[name].items() if "ended" not in v}
        print(f"\n| | {' | '.join(sizes)} |\n|{'---|' * (len(sizes) + 1)}")
        for label, key in rows.items():
            cells = [f"{v[key]:.0f}" if key in v else "" for v in sizes.values()]
            print(f"| {label} | {' | '.join(cells)} |")


def print_section(name: str, entries: dict[str, Any]) -> None:
    print(f"\n{name}", flush=True)
    for key, value in entries.items():
        print(f"  {key}: {value}", flush=True)


if __name__ == "__main__":
    main()
