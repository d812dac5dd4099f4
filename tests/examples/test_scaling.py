"""The benchmark of growing runs: its model by hand, and its sections with tiny sizes."""

import json
import subprocess
import sys

import pytest

from tests.support.examples import EXAMPLES, load_example

RESULTS = EXAMPLES / "results"


def contents():
    """Return what the committed files say that the model reads."""
    names = "scaling.json", "gpu.json", "writing.json"
    return [json.loads((RESULTS / name).read_text()) for name in names]


@pytest.fixture
def inputs():
    model = load_example("benchmarks/scaling_model.py")
    return model.Inputs.from_results(*contents())


def test_the_model_of_many_gpus_by_hand(inputs):
    assert inputs.fixed_ms == 168.802
    assert inputs.busy_ms == pytest.approx(168.802 * 0.054)
    device_ms = 164.39 * 0.262 - 94.97 * 0.094
    assert inputs.row_us == pytest.approx(1e3 * device_ms / 32_130)
    # That of many walkers: of few it is mostly the cost of each call of `run`.
    assert inputs.write_us == contents()[2]["at_once"]["async"]["cpu_microseconds_per_frame"]
    few = inputs.rates(1, 64)
    assert few["frames/s"] == pytest.approx(64 * 3 / 0.168802)
    assert few["bytes/s"] == pytest.approx(few["frames/s"] * inputs.bytes_each)
    assert few["writer of a process"] == pytest.approx(few["frames/s"] * inputs.write_us / 1e6)
    assert few["training"] == pytest.approx(2500 * 0.09497 / 3600)
    many = inputs.rates(1000, 64)
    assert many["frames/s"] == pytest.approx(1000 * few["frames/s"])
    assert many["writer of a process"] == pytest.approx(few["writer of a process"])
    assert many["file system"] == pytest.approx(1000 * few["file system"])
    # Launching decides until computing takes longer, which then grows with the walkers.
    assert inputs.iteration_ms(4096) == inputs.fixed_ms
    more = [inputs.iteration_ms(n) for n in (2**16, 2**17)]
    assert inputs.fixed_ms < more[0] < more[1] < 2 * more[0]


def test_the_table_has_a_row_for_each_size(inputs, capsys):
    model = load_example("benchmarks/scaling_model.py")
    model.print_model(*contents())
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(model.GPUS) * len(model.WALKERS_OF_A_GPU)
    assert len({row.count("|") for row in rows}) == 1


@pytest.mark.slow
def test_every_section_runs_with_tiny_sizes(tmp_path):
    output = tmp_path / "scaling.json"
    command = [sys.executable, str(EXAMPLES / "benchmarks/scaling.py"), "--smoke"]
    done = subprocess.run(
        [*command, "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert set(report["walkers"]) == {"4 walkers", "8 walkers"}
    assert report["processes"]["efficiency_by_cpu_time"] > 0
    assert report["files"]["bytes_per_configuration"] > 22 * 3 * 4
    compiled = report["compiled_flow"]
    assert compiled["operations_per_iteration"]["compiled"] < (
        0.9 * compiled["operations_per_iteration"]["eager"]
    )


def test_the_committed_file_is_what_one_command_writes():
    report = contents()[0]
    assert report["command"] == "scaling.py"
    assert report["cpu_seconds"] < 8 * 60
    scaling = load_example("benchmarks/scaling.py")
    assert list(report["walkers"]) == [f"{n} walkers" for n in scaling.WALKERS]
    assert list(report["rungs"]) == [f"{n} rungs" for n in scaling.RUNGS]
    assert report["processes"]["measurements"] == {"1": scaling.PAIRS, "2": 2 * scaling.PAIRS}
    each = report["walkers"]["10000 walkers"]["cpu_us_of_a_row_ordinary"] * 3 * 100_000 / 1e6
    assert each > 32  # twice the budget
    ended = f"not run: an iteration would take {each:.0f} s"
    assert report["walkers"]["100000 walkers"] == {"ended": ended}
