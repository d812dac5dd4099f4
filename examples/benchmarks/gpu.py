"""Everything that is measured on one GPU, in one run of at most eight minutes.

    python examples/benchmarks/gpu.py --flow run/flow.pt --output gpu.json    # on a CUDA device
    python examples/benchmarks/gpu.py --smoke                      # the same, tiny, in a minute
    python examples/benchmarks/gpu.py --smoke --device cpu         # a rehearsal without a GPU

Sections run one after the other in a process of their own, each with a deadline: one that fails
is recorded with its error (the traceback is printed), one that is late stops at its next step and
is ended if it does not, and the others run all the same; what a section leaves of its time goes to
those after it. Results are written to the JSON file as they come. The last lines printed are a
table of them in Markdown.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Sections in the order in which they run: (module, function, share of the time).
SECTIONS: dict[str, tuple[str, str, float]] = {
    "compiling": ("gpu_compile", "start_compiling", 2),
    "tests": ("gpu_jobs", "run_tests", 50),
    "energies": ("gpu_energies", "measure_energies", 40),
    "compilation": ("gpu_compile", "wait_for_compiling", 50),
    "compiled_energies": ("gpu_energies", "measure_compiled_energies", 25),
    "many_walkers": ("gpu_jobs", "run_many_walkers", 80),
    "iterations": ("gpu_sampling", "measure_iterations", 35),
    "training": ("gpu_jobs", "measure_training", 25),
    "round_trips": ("gpu_sampling", "measure_round_trips", 6),
    "bits": ("gpu_sampling", "measure_bits", 15),
    "decisions": ("gpu_decisions", "measure_decisions", 10),
    "compiled_flow": ("gpu_sampling", "measure_compiled_flow", 35),
    "device": ("gpu_energies", "measure_device", 6),
    "writing": ("gpu_sampling", "measure_writing", 11),
    "main_job": ("gpu_jobs", "run_main_job", 150),
}
#: These wait for a compiler, or are tests: with tiny sizes they get the time that is left.
LAST_IN_SMOKE = ("tests", "compilation", "compiled_energies", "compiled_flow")
#: Seconds that a late section has to end by itself.
GRACE = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, cpu")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, by name")
    parser.add_argument("--minutes", type=float, help="of all sections: 8; 1 with --smoke")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--flow", type=Path, help="a trained flow for the sections of sampling")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("gpu.json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        expected = ", ".join(SECTIONS)
        parser.error(f"--sections: expected some of {expected}, got {', '.join(sorted(unknown))}")
    minutes = arguments.minutes or (1.0 if arguments.smoke else 8.0)
    if arguments.worker is not None:
        work(arguments, names, 60 * minutes)
        return
    report: dict[str, Any] = {"command": " ".join(sys.argv), "seed": arguments.seed, "sections": {}}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.flow is not None:
            shutil.copy(arguments.flow, Path(scratch) / "flow.pt")
        supervise(report, arguments, names, 60 * minutes, Path(scratch))
    print_table(report)
    if any("failed" in section for section in report["sections"].values()):
        raise SystemExit(1)


def supervise(
    report: dict[str, Any], arguments: argparse.Namespace, names: list[str], seconds: float,
    scratch: Path,
) -> None:  # fmt: skip
    """Run sections in a worker; if it dies or one is late, those after it in another worker."""
    start, end = time.monotonic(), time.monotonic() + seconds
    remaining = [name for name in SECTIONS if name in names]
    if arguments.smoke:
        remaining = [name for name in remaining if name not in LAST_IN_SMOKE]
        remaining += [name for name in LAST_IN_SMOKE if name in names]
    while remaining and time.monotonic() < end:
        with (scratch / "journal").open("w+") as journal:
            worker = start_worker(arguments, remaining, end - time.monotonic(), scratch)
            for event in follow(worker, journal):
                add_event(report, event, remaining)
                report["seconds"] = round(time.monotonic() - start, 1)
                write(report, arguments.output)
            if worker.returncode == 0 or not remaining:
                break
            name = remaining.pop(0)
            lost = {"failed": f"the process ended with exit status {worker.returncode}"}
            report["sections"].setdefault(name, {}).update(lost)
            print(f"{name}: {lost['failed']}", flush=True)
    for name in remaining:
        report["sections"].setdefault(name, {})["failed"] = "no time was left"
    report["seconds"] = round(time.monotonic() - start, 1)
    write(report, arguments.output)


def start_worker(
    arguments: argparse.Namespace, names: list[str], seconds: float, scratch: Path
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--worker", str(scratch), "--sections", ",".join(names)]
    command += ["--minutes", str(seconds / 60), "--seed", str(arguments.seed)]
    command += ["--device", arguments.device] + ["--smoke"] * arguments.smoke
    return subprocess.Popen(command)


def follow(worker: "subprocess.Popen[bytes]", journal: Any) -> Iterator[dict[str, Any]]:
    """Yield what the worker writes, until it ends; end it if a section is late."""
    limit = time.monotonic() + 90.0  # to import everything
    running = True
    try:
        while running:
            running = worker.poll() is None
            while (line := journal.readline()).endswith("\n"):
                event = json.loads(line)
                if "limit" in event:
                    limit = time.monotonic() + event["limit"] + GRACE
                yield event
            if running and time.monotonic() > limit:
                worker.kill()
            time.sleep(0.1 if running else 0.0)
    finally:
        worker.kill()
        worker.wait()


def add_event(report: dict[str, Any], event: dict[str, Any], remaining: list[str]) -> None:
    """Add one event of the worker to the report."""
    if "machine" in event:
        report["machine"] = event["machine"]
        return
    section = report["sections"].setdefault(event["section"], {})
    for key in ("entries", "failed", "late", "seconds"):
        if key == "entries":
            section.setdefault(key, {}).update(event.get(key, {}))
        elif key in event:
            section[key] = event[key]
    if event.get("ended"):
        remaining.remove(event["section"])


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report at once: the file is whole at any time."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def work(arguments: argparse.Namespace, names: list[str], seconds: float) -> None:
    """Run sections and write their results, line by line, to the journal."""
    end = time.monotonic() + seconds
    import torch  # the supervisor does without
    from gpu_machine import describe_machine
    from gpu_steps import Bench

    with (arguments.worker / "journal").open("a", buffering=1) as journal:

        def tell(**event: Any) -> None:
            journal.write(json.dumps(event) + "\n")

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        device = torch.device(arguments.device)
        if device.type == "cpu":
            torch.set_num_threads(1)
        elif not torch.cuda.is_available():
            raise SystemExit("no CUDA device: --device cpu is for rehearsals")
        bench = Bench(device, arguments.smoke, arguments.seed, arguments.worker)
        tell(machine=describe_machine(device))
        for i, name in enumerate(names):
            shares = [SECTIONS[other][2] for other in names[i:]]
            limit = max(1.0, (end - time.monotonic()) * shares[0] / sum(shares))
            bench.deadline = time.monotonic() + limit
            tell(section=name, limit=limit)
            if not run_section(name, bench, tell):
                raise SystemExit(3)  # the device answers no more


def run_section(name: str, bench: Any, tell: Callable[..., None]) -> bool:
    """Run a section to its end or deadline; return whether the device still works."""
    module, function, _ = SECTIONS[name]
    start = time.monotonic()
    event: dict[str, Any] = {"section": name, "ended": True}
    try:
        for entry, numbers in getattr(__import__(module), function)(bench):
            shown = {key: value for key, value in numbers.items() if key != "output"}
            print(f"{name}: {entry}: {shown}", flush=True)
            tell(section=name, entries={entry: numbers})
            if bench.seconds_left < 0:
                event["late"] = "stopped at its deadline"
                break
    except Exception as error:  # whatever it is, the other sections run
        event["failed"] = f"{type(error).__name__}: {error}"
        print(f"{name} failed:\n{traceback.format_exc()}", flush=True)
    event["seconds"] = round(time.monotonic() - start, 1)
    tell(**event)
    try:
        bench.synchronize()
        bench.reset_memory()
    except Exception:
        return False
    return True


def print_table(report: dict[str, Any]) -> None:
    """Print all numbers as one table in Markdown."""
    machine = report.get("machine", {})
    print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}")
    print(f"{report['seconds']} s in all\n\n| section | | numbers |\n|---|---|---|")
    for name, section in report["sections"].items():
        for entry, numbers in section.get("entries", {}).items():
            cells = [f"{k} {show(v)}" for k, v in numbers.items() if k != "output"]
            print(f"| {name} | {entry} | {', '.join(cells)} |")
        if "failed" in section:
            print(f"| {name} | failed | {section['failed'].strip().splitlines()[-1]} |")
        if "late" in section:
            print(f"| {name} | {section['late']} | {section['seconds']} s |")


def show(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
