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
