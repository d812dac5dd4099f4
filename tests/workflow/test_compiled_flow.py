"""Production with the flow compiled: recorded, resumed with the same bits; traced and not compiled.

:mod:`tests.flows.test_compilation` has the compiled flow itself.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openmm_tsf.analysis.load import load_run
from openmm_tsf.flows import TemperatureSteerableFlow
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.run import run
from openmm_tsf.workflow.sample import flow_for_production, sample
from tests.workflow import tiny

SETTINGS = replace(
    tiny.SETTINGS,
    stride=200,
    n_rounds=0,
    sampling=replace(tiny.SETTINGS.sampling, n_walkers=6, n_iterations=8, local_interval=2),
)


def test_what_the_latest_start_chose_is_what_a_resumed_run_does(monkeypatch):
    monkeypatch.setattr(
        "openmm_tsf.workflow.sample.compile_for_sampling", lambda flow, rows: f"{rows} rows"
    )
    flow, choices = TemperatureSteerableFlow(1, 1, 1, (2,)), {}
    cpu = torch.device("cpu")
    for chosen, compiled, recorded in (
        (None, False, {}),
        (False, False, {}),
        (True, True, {"compile_flow": True}),
        (None, True, {"compile_flow": True}),
        (False, False, {"compile_flow": False}),
        (None, False, {"compile_flow": False}),
    ):
        options = RunOptions(compile_flow=chosen)
        stage = SimpleNamespace(device=cpu, options=options, choices=choices)
        stage.record = choices.update
        assert flow_for_production(stage, flow, 4, 3) == ("12 rows" if compiled else flow)
        assert choices == recorded


@pytest.mark.slow
def test_production_with_a_compiled_flow_is_recorded_and_resumed(tmp_path, monkeypatch):
    def trace(function, *, fullgraph, dynamic, options):
        return torch._dynamo.optimize("eager", nopython=fullgraph, dynamic=dynamic)(function)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr("openmm_tsf.workflow.sample.analyze", lambda folder, **options: {})
    options = replace(tiny.QUIET, compile_flow=True)
    run(tmp_path / "whole", SETTINGS, options=options)
    short = replace(SETTINGS, sampling=replace(SETTINGS.sampling, n_iterations=5))
    run(tmp_path / "part", short, options=options)
    run(tmp_path / "part", SETTINGS, options=tiny.RESUME)  # compiled as at its start
    whole, part = (load_run(tmp_path / name) for name in ("whole", "part"))
    for kelvin in SETTINGS.sampling.temperatures:
        assert np.array_equal(whole.energies(kelvin), part.energies(kelvin))
    choices = json.loads((tmp_path / "part" / "config.json").read_text())["choices"]
    assert choices["compile_flow"] is True
    assert choices["flow_programs"] == {"rows": 12, "cuda_graphs": False}

    # Where no compiler works any more it goes on, and says so.
    def missing(function, **options):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.warns(UserWarning, match="flow_programs .* resumed with None"):
        sample(None, tmp_path / "part", replace(SETTINGS.sampling, n_iterations=9),
               options=tiny.RESUME)  # fmt: skip
    assert load_run(tmp_path / "part").n_iterations == 9
