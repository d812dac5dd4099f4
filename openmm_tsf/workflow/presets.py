"""The settings of the presets."""

from dataclasses import replace

from openmm_tsf.training import FitSettings
from openmm_tsf.workflow.settings import FlowSettings, MDSettings, RunSettings, SamplingSettings

# Path gradients, orthogonal steps and chains in place of rounds: the flow becomes good enough that
# most moves are independent draws. examples/benchmarks/training_trials.py leaves each of them out.
# What holds the rare basins: examples/results/ablations.md.
_FLOW = FlowSettings(n_blocks=6, overlap=True)
_FIT = FitSettings(
    batch_size=256,
    kl_batch_size=510,
    optimizer="muon",
    weight_decay=0.1,
    learning_rate=1e-2,
    final_learning_rate=1e-4,
    lambda_max=0.5,
    ramp=(0.08, 0.3),
    final_lambda=0.15,
    estimator="path",
    n_chains=2048,
    chain_share=0.8,
    basin_share=0.4,
    basin_weight=0.6,
    log_variance=0.3,
    basin_balance=1.0,
    n_validation_draws=2000,
)
_REFIT = replace(_FIT, n_steps=1000, warmup_steps=50, learning_rate=2e-3, ramp=(0.0, 0.0))
# By correlation times for each evaluation (examples/benchmarks/moves.py): the walk of the paper
# adds nothing to independent proposals; dynamics and swaps move walkers away from where the flow
# draws too rarely, and dynamics every fourth iteration is enough for that.
_SAMPLING = SamplingSettings(
    n_walkers=64, n_iterations=1000, n_tuning=100, n_independent=2, n_walk=0, local_interval=4
)

PRESETS: dict[str, RunSettings] = {
    # A minute for alanine dipeptide from the shipped frames: every stage at work, with poor
    # statistics, as the summary says. A run tells its own time first.
    "quick": RunSettings(
        md=MDSettings(n_frames=2000),
        stride=4,
        flow=FlowSettings(n_blocks=4, hidden=(64, 64)),
        fit=FitSettings(
            n_steps=400, batch_size=128, kl_batch_size=32, validate_interval=200, ramp=(0.5, 0.9)
        ),
        n_rounds=1,
        round_iterations=20,
        refit=FitSettings(
            n_steps=200, batch_size=128, kl_batch_size=32, validate_interval=100, ramp=(0.0, 0.0)
        ),
        # Few independent proposals of such a flow are accepted, and Crank-Nicolson steps move more.
        sampling=SamplingSettings(
            n_walkers=16,
            n_iterations=100,
            n_tuning=20,
            n_independent=2,
            n_crank_nicolson=2,
            n_walk=0,
        ),
    ),
    # Five minutes on two cores with the shipped frames, compiling included. Dynamics of its own
    # (10 ns) takes as long again: 2 ns left a basin nearly unvisited in three of ten trials
    # (examples/results/README.md).
    "default": RunSettings(
        flow=_FLOW, fit=replace(_FIT, n_steps=2500), n_rounds=0, refit=_REFIT, sampling=_SAMPLING
    ),
    # For one GPU, from what was measured on an H200 (examples/results/gpu.json), where launching
    # kernels decides: 9 us each, 4200 in a step of training and 6100 in an iteration, so that the
    # device computes in 9 and 5 percent of the time. A step with 510 draws takes 95 ms, one with
    # 8160 takes 129 ms: sixteen times the draws, for less noise, in a third more time. Whether
    # fewer steps are then enough is not known: 2500 stay. An iteration of 64 walkers takes 169 ms,
    # of which the device computes 9. With 1 us for each row and pass, as a draw takes in a step of
    # training, 4096 walkers at 3 temperatures are some 70 ms of computing: launching still decides,
    # and they cost about what 64 do. A fifth of the iterations gives 13 times the samples.
    # Not run on a GPU yet (examples/benchmarks/scaling_model.py has the formulas).
    "gpu": RunSettings(
        flow=_FLOW,
        fit=replace(_FIT, n_steps=2500, batch_size=4096, kl_batch_size=8160, n_chains=2 * 8160),
        n_rounds=0,
        refit=replace(_REFIT, batch_size=4096, kl_batch_size=8160, n_chains=2 * 8160),
        sampling=replace(_SAMPLING, n_walkers=4096, n_iterations=200),
    ),
    # About twice the default by the numbers of steps and walkers, not timed; and its own MD.
    "thorough": RunSettings(
        flow=_FLOW,
        fit=replace(_FIT, n_steps=4000),
        n_rounds=0,
        refit=_REFIT,
        sampling=replace(_SAMPLING, n_walkers=128),
    ),
}


def preset(name: str) -> RunSettings:
    """Return the settings of a preset: ``"quick"``, ``"default"``, ``"thorough"`` or ``"gpu"``.

    On two cores the first two take alanine dipeptide half a minute and five and a half minutes;
    larger molecules and MD of their own take longer: a run measures and logs its duration first.
    ``"gpu"`` has the draws and walkers that fill one GPU, where launching kernels takes the time.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
