"""The benchmark of growing chains: its fit by hand, and two tiny sizes."""

import json
import subprocess
import sys

import pytest

from tests.support.examples import EXAMPLES, load_example


@pytest.fixture
def chains():
    load_example("benchmarks/scaling_steps.py")  # which it imports
    return load_example("benchmarks/chains.py")


def test_exponents_of_powers_are_exact(chains):
    rows = [{"n_atoms": n, "t": 3.0 * n**2, "u": 5.0 * n + 200.0} for n in (22, 42, 102, 212)]
    assert chains.exponents(rows, "t") == {"all": 2.0, "larger_half": 2.0}
    fitted = chains.exponents(rows, "u")
    assert 0.4 < fitted["all"] < fitted["larger_half"] < 1.0


@pytest.mark.slow
def test_two_tiny_sizes(tmp_path):
    output = tmp_path / "chains.json"
    command = [sys.executable, str(EXAMPLES / "benchmarks/chains.py"), "--smoke"]
    subprocess.run([*command, "--output", str(output)], check=True, timeout=600)
    report = json.loads(output.read_text())
    assert [row["n_atoms"] for row in report["sizes"]] == [22, 32]
    for row in report["sizes"]:
        assert all(row[name] > 0 for name in ("energy_us", "training_step_ms", "iteration_ms"))
        assert 50 < row["energy_MiB"] <= row["training_MiB"] <= row["iteration_MiB"]
    assert report["exponents"].keys() == {"energy_us", "training_step_ms", "iteration_ms"}
