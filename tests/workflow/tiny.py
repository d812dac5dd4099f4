"""The smallest settings with which every stage of a run works."""

from dataclasses import replace

from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings

FIT = FitSettings(
    n_steps=6, batch_size=32, kl_batch_size=4, validate_interval=3, n_validation_draws=8,
    warmup_steps=2, ramp=(0.2, 0.5),
)  # fmt: skip
SETTINGS = RunSettings(
    md=MDSettings(n_frames=150, steps_per_frame=2, n_equilibration_steps=10),
    flow=FlowSettings(n_blocks=2, hidden=(16,)),
    fit=FIT,
    n_rounds=1,
    round_iterations=15,
    round_stride=1,
    refit=replace(FIT, ramp=(0.0, 0.0)),
    sampling=SamplingSettings(
        temperatures=(500.0, 600.0), n_walkers=8, n_iterations=12, n_tuning=3
    ),
)
QUIET = RunOptions(platform="Reference", progress=False)
RESUME = replace(QUIET, resume=True)
