"""The benchmark of a GPU: its sections on the CPU, and those that fail, are late or die."""

import argparse
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from tests.support.examples import EXAMPLES, load_example

NAMES = ["tests", "energies", "device", "main_job"]


@pytest.fixture
def gpu():
    return load_example("benchmarks/gpu.py")


def supervise(gpu, tmp_path, monkeypatch, worker, seconds=20.0):
    """Return the report of the supervisor, with a `worker` of a few lines that gets its sections.

    It has the functions `tell` and `end`, and the list `names`.
    """
    source = f"""
import json, sys, time
from pathlib import Path
names = sys.argv[1].split(",")
def tell(**event):
    with open({str(tmp_path / "journal")!r}, "a") as file:
        file.write(json.dumps(event) + "\\n")
def end(name, **event):
    tell(section=name, ended=True, seconds=0.1, **event)
{worker}
"""
    started = []

    def start_worker(arguments, remaining, seconds, scratch):
        started.append(list(remaining))
        return subprocess.Popen([sys.executable, "-c", source, ",".join(remaining)])

    monkeypatch.setattr(gpu, "start_worker", start_worker)
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    report = {"sections": {}}
    arguments = argparse.Namespace(smoke=False, output=tmp_path / "report.json")
    gpu.supervise(report, arguments, NAMES, seconds, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    return report, started


def test_all_sections_end(gpu, tmp_path, monkeypatch):
    worker = """
tell(machine={"device": "none"})
for name in names:
    tell(section=name, limit=5)
    tell(section=name, entries={"first": {"us": 1.5}})
    end(name)
"""
    report, started = supervise(gpu, tmp_path, monkeypatch, worker)
    assert started == [NAMES]
    assert report["machine"] == {"device": "none"}
    assert report["sections"]["device"] == {"entries": {"first": {"us": 1.5}}, "seconds": 0.1}


@pytest.mark.parametrize("death", ["time.sleep(60)", "sys.exit(7)"])
def test_a_section_that_hangs_or_dies_costs_no_other(gpu, tmp_path, monkeypatch, death):
    worker = f"""
for name in names:
    tell(section=name, limit=0.3)
    tell(section=name, entries={{"first": {{"us": 1.5}}}})
    if name == "energies":
        {death}
    end(name)
"""
    start = time.monotonic()
    report, started = supervise(gpu, tmp_path, monkeypatch, worker)
    assert time.monotonic() - start < 15
    assert started == [NAMES, NAMES[2:]]
    status = "-9" if "sleep" in death else "7"
    failed = {name: section.get("failed") for name, section in report["sections"].items()}
    assert failed.pop("energies") == f"the process ended with exit status {status}"
    assert failed == dict.fromkeys(["tests", "main_job", "device"])
    assert report["sections"]["energies"]["entries"] == {"first": {"us": 1.5}}


def test_sections_after_the_end_of_the_time(gpu, tmp_path, monkeypatch, capsys):
    worker = """
tell(section="tests", limit=0.5)
end("tests")
tell(section="energies", limit=0.5)
time.sleep(60)
"""
    report, _ = supervise(gpu, tmp_path, monkeypatch, worker, seconds=0.3)
    failed = {name: section.get("failed") for name, section in report["sections"].items()}
    assert failed["tests"] is None
    assert failed["device"] == failed["main_job"] == "no time was left"
    gpu.print_table(report)
    assert "| device | failed | no time was left |" in capsys.readouterr().out


def test_a_section_that_fails_or_is_late(gpu, monkeypatch):
    def measure(bench):
        yield "first", {"us": 1.5}
        bench.seconds_left = -1.0
        yield "second", {"us": 2.5}
        yield "third", {"us": 3.5}

    def fail(bench):
        yield "first", {"us": 1.5}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(measure=measure, fail=fail))
    nothing = SimpleNamespace(seconds_left=1.0, synchronize=list, reset_memory=list)
    events = []
    for function in ("fail", "measure"):
        monkeypatch.setitem(gpu.SECTIONS, function, ("made_up", function, 1.0))
        assert gpu.run_section(function, nothing, lambda **event: events.append(event))
    report = {"sections": {}}
    remaining = ["fail", "measure"]
    for event in events:
        gpu.add_event(report, event, remaining)
    assert remaining == []
    fails, late = report["sections"]["fail"], report["sections"]["measure"]
    assert fails["failed"] == "RuntimeError: no such kernel"
    assert fails["entries"] == {"first": {"us": 1.5}}
    assert list(late["entries"]) == ["first", "second"]
    assert late["late"] == "stopped at its deadline"


@pytest.mark.slow
def test_every_section_runs_on_the_cpu(gpu, tmp_path):
    """A rehearsal, with tiny sizes; the tests that need a GPU are a section as well."""
    output = tmp_path / "report.json"
    command = [sys.executable, str(EXAMPLES / "benchmarks/gpu.py"), "--smoke", "--device", "cpu"]
    command += ["--minutes", "20", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert set(report["sections"]) == set(gpu.SECTIONS)
    for name, section in report["sections"].items():
        assert section["entries"], name
        assert not {"failed", "late"} & set(section), section
    for bits in report["sections"]["bits"]["entries"].values():
        assert bits == {"same_bits_twice": True, "same_bits_resumed": True}
    (compiled,) = report["sections"]["compiled_flow"]["entries"].values()
    assert compiled["programs"] == {"rows": 12, "cuda_graphs": False}
    decisions = report["sections"]["decisions"]["entries"].popitem()[1]
    assert decisions["first_other_decision"] is None
    assert "| main_job | 300.00 K | U_kJ_mol" in done.stdout
