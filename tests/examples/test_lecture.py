"""The scripts of the lecture, in a short form."""

import json
import sys

from tests.support.examples import load_example


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
    sizes = ["--walkers", "16", "--adaptation", "120", "--iterations", "60"]
    monkeypatch.setattr(sys, "argv", ["script", "--output", str(tmp_path), *sizes])
    script.main()
    content = json.loads((tmp_path / "two_gaussians.json").read_text())
    local, adaptive, one = (content["chains"][k] for k in ("local", "adaptive", "one_walker"))
    assert local["jumps"] == 0
    assert local["population"]["value"] == 0.5
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


def test_explore_exploit_visits_more_modes_than_neutra(tmp_path, monkeypatch):
    script = load_example("lecture/explore_exploit.py")
    monkeypatch.setattr(script, "DIMENSIONS", (2, 8))
    monkeypatch.setattr(script, "N_TUNING", 10)
    sizes = ["--frames", "2000", "--steps", "150", "--walkers", "12", "--iterations", "20"]
    sizes += ["--jobs", "1"]  # in this process, where the constants are changed
    monkeypatch.setattr(sys, "argv", ["script", "--output", str(tmp_path), *sizes])
    script.main()
    rows = json.loads((tmp_path / "explore_exploit.json").read_text())["dimensions"]
    for row in rows:
        chains = row["chains"]
        assert chains["local"]["visited"] == 1.0
        assert chains["explore_exploit"]["visited"] > 3.0
        assert chains["explore_exploit"]["visited"] > chains["neutra_hmc"]["visited"]
        # The same number of evaluations; proposals outside a domain would have none.
        for name in ("explore_exploit", "neutra_hmc", "neutra_mala"):
            assert chains[name]["evaluations_per_chain"] == 20 * 9
    assert (tmp_path / "explore_exploit.png").exists()
