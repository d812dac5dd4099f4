"""The scripts of the lecture, in a short form."""

import json
import sys

import pytest
import torch

from openmm_tsf.potentials import GaussianWell
from tests.support.examples import load_example


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Run a script of the lecture in one process, with constants changed; return its JSON."""

    def run(name, changes, *arguments):
        for module in ("tasks", "phi4_training"):
            load_example(f"lecture/{module}.py")
        script = load_example(f"lecture/{name}.py")
        for constant, value in changes.items():
            monkeypatch.setattr(script, constant, value)
        given = ["script", "--output", str(tmp_path), "--jobs", "1", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", given)
        script.main()
        assert (tmp_path / f"{name}.png").exists()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_importance_sampling_fails_in_two_ways(tmp_path, monkeypatch):
    script = load_example("lecture/importance_sampling.py")
    monkeypatch.setattr(script, "WIDTHS", (0.1, 0.9, 8.0))
    arguments = ["script", "--output", str(tmp_path), "--draws", "4000"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    narrow, right, wide = json.loads((tmp_path / "importance_sampling.json").read_text())[
        "proposals"
    ]
    # Too narrow: the other wells are never drawn, and the draws do not tell.
    assert narrow["ess"] > 10 * narrow["exact_ess"]
    assert narrow["p_deepest"] == [1.0, 0.0]
    # Too wide: nearly all draws are wasted, which they do tell.
    assert wide["ess"] < 0.1 * right["ess"]
    assert wide["largest_weight"] > 10 / 4000
    assert 0.03 < right["exact_ess"] < 0.1
    assert 0.5 < right["ess"] / right["exact_ess"] < 2.0
    assert all(abs(z) < 4 for z in (*right["z"].values(), *wide["z"].values()))
    assert (tmp_path / "importance_sampling.png").exists()


def test_two_gaussians(tmp_path, monkeypatch):
    script = load_example("lecture/two_gaussians.py")
    monkeypatch.setattr(script, "LOCAL_STEPS", 3)
    sizes = ["--walkers", "16", "--adaptation", "80", "--iterations", "40"]
    monkeypatch.setattr(sys, "argv", ["script", "--output", str(tmp_path), *sizes])
    script.main()
    content = json.loads((tmp_path / "two_gaussians.json").read_text())
    local, adaptive, one = (content["chains"][k] for k in ("local", "adaptive", "one_walker"))
    assert local["jumps"] == 0
    assert local["population"] == {"value": 0.5, "stderr": None, "z": None}  # of the start
    # Walkers in both modes: they move between these, and the population changes to the exact one.
    assert adaptive["jumps"] > 20
    assert abs(adaptive["population"]["z"]) < 4
    assert not adaptive["flow"]["missing"]
    # One walker: nothing looks wrong but ln Z, and the script says so.
    assert one["jumps"] == 0
    assert one["acceptance_flow_independent"] > 0.5
    assert one["flow"]["ess"] > 0.4
    assert one["flow"]["missing"]
    assert 0.65 < one["flow"]["missing_mass"] < 0.75
    assert one["flow"]["verdict"].startswith("mass is missing: 0.")
    assert "all walkers start from one configuration" in one["warnings"][0]
    assert adaptive["warnings"] == []
    log_z, stderr = content["sequential_monte_carlo"]["log_z"]
    assert abs(log_z) < 4 * stderr < 0.5
    assert (tmp_path / "two_gaussians.png").exists()


def test_explore_exploit_visits_more_modes_than_neutra(run_script):
    changes = {"DIMENSIONS": (8,), "N_TUNING": 10}
    sizes = "--frames 2000 --steps 150 --walkers 12 --iterations 20"
    for row in run_script("explore_exploit", changes, *sizes.split())["dimensions"]:
        chains = row["chains"]
        assert chains["local"]["visited"] == 1.0
        assert chains["explore_exploit"]["visited"] > 3.0
        assert chains["explore_exploit"]["visited"] > chains["neutra_hmc"]["visited"]
        # The same number of evaluations; proposals outside a domain would have none.
        for name in ("explore_exploit", "neutra_hmc", "neutra_mala"):
            assert chains[name]["evaluations_per_chain"] == 20 * 9
        assert chains["local"]["evaluations_per_chain"] == 20 * 8


def test_acceptance_of_draws_is_that_of_the_chain():
    """Draws of N(0, 1/2) as proposals to N(0, 1) in two dimensions: accepted with 2/3."""
    phi4 = load_example("lecture/phi4_training.py")
    target, base = GaussianWell(torch.eye(2)), GaussianWell(2.0 * torch.eye(2))
    generator = torch.Generator().manual_seed(1)
    frames = target.sample(10_000, 1.0, generator)
    quality = phi4.proposal_quality(
        phi4.gaussian_flow(base, 1.0), target, 1.0, frames, generator, n_draws=10_000
    )
    # ln w = |x|²/2; |x|² is exponential with rate 1 (s) in draws and 1/2 (r) in frames, and
    # E min(1, exp((s - r)/2)) = 1/3 + 1/3. With s and r exchanged it is 8/9.
    value, stderr = quality["acceptance"]
    assert abs(value - 2 / 3) < 4 * stderr
    assert abs(value - 8 / 9) > 6 * stderr


@pytest.mark.slow
def test_phi4_chain(run_script):
    """A coupled base is accepted sooner, and the frozen flow agrees with the transfer matrix."""
    changes = {"N_SITES": 16, "TEMPERATURE": 0.05, "N_MEASURED": 2, "FIELDS": (0.0, 0.05)}
    sizes = "--walkers 100 --frames 30 --tuning 20 --steps 60 --draws 2000 --iterations 100"
    content = run_script("phi4_chain", changes, *sizes.split())
    last = {which: rows[-1]["acceptance"][0] for which, rows in content["training"].items()}
    assert last["coupled"] > 2 * last["uncoupled"]
    assert content["training"]["coupled"][0]["acceptance"][0] < last["coupled"]
    for row in content["fields"]:
        assert all(abs(row[name]["z"]) < 4 for name in ("weights", "chain", "log_z"))
    without, tilted = content["fields"]
    # Against the exact value of the other field both are wrong, and know it.
    for name in ("weights", "chain"):
        assert abs(tilted[name]["value"] - without["exact"]) > 6 * tilted[name]["stderr"]
    assert abs(content["restrained"]["mean"]["z"]) < 4
    assert abs(content["restrained"]["log_z"]["z"]) < 4


def test_free_energies(run_script):
    for module in ("tasks", "phi4_training", "free_energies"):
        systems = getattr(load_example(f"lecture/{module}.py"), "SYSTEMS", None)
    two = {name: systems[name] for name in ("mixture", "phi4")}
    sizes = "--draws 20000 --particles 400 --fractions 8 --iterations 60"
    content = run_script("free_energies", {"SYSTEMS": two}, *sizes.split())
    assert {row["method"] for row in content["estimates"]} >= {"smc", "mbar"}
    assert all(abs(row["z"]) < 4 for row in content["estimates"])
