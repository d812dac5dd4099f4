"""Settings of a whole run, and those that come with the package."""

from dataclasses import dataclass, field, replace
from functools import partial

from openmm_tsf.io.run_config import check_distinct
from openmm_tsf.io.serialization import changed, plain
from openmm_tsf.training import FitSettings
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.validation import (
    check_fields,
    one_of,
    real_number,
    whole_number,
    whole_numbers,
)
from openmm_tsf.workflow.md import MDSettings

__all__ = [
    "PRESETS", "FlowSettings", "RunSettings", "SamplingSettings", "changed", "plain", "preset"
]  # fmt: skip

#: Three rungs a factor of sqrt(2) apart, all of them rungs of the reference.
LADDER_K = (300.0, 424.26, 600.0)
#: Walkers beyond this many fit no memory.
MOST_WALKERS = 2**24


@dataclass(frozen=True)
class FlowSettings:
    """Which flow.

    Parameters
    ----------
    kind
        ``"tsf"``, or ``"realnvp"`` for the paper's baseline.
    coordinates
        ``"volume"`` (constant Jacobian) or ``"plain"``.
    n_momenta
        Auxiliary momenta; None for as many as coordinates (a RealNVP has none).
    n_blocks, hidden
        Sizes of the network.
    conditioner_dtype
        Precision of the couplings' networks, ``"float32"`` or ``"float64"``. What they return is
        applied in float64 either way: the flow is as invertible, and faster, in float32.
    overlap
        Let the copies of a configuration that equivalent hydrogens make overlap, instead of each
        ending at a step (:meth:`openmm_tsf.InternalCoordinates.log_window`).

    Raises
    ------
    TypeError, ValueError
        If `kind`, `coordinates` or `conditioner_dtype` is unknown, or a size is none.
    """

    kind: str = "tsf"
    coordinates: str = "volume"
    n_momenta: int | None = None
    n_blocks: int = 8
    hidden: tuple[int, ...] = (128, 128)
    conditioner_dtype: str = "float32"
    overlap: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            kind=partial(one_of, allowed=("tsf", "realnvp")),
            coordinates=partial(one_of, allowed=("volume", "plain")),
            n_blocks=whole_number,
            hidden=whole_numbers,
            conditioner_dtype=partial(one_of, allowed=("float32", "float64")),
            overlap=partial(one_of, allowed=(False, True)),
        )
        if self.n_momenta is not None:
            check_fields(self, n_momenta=partial(whole_number, least=0))


@dataclass(frozen=True)
class SamplingSettings:
    """Replica exchange.

    Parameters
    ----------
    temperatures
        The ladder in K.
    n_walkers
        Independent ladders, run side by side.
    n_iterations
        Iterations of production.
    n_tuning
        Iterations before production in which step sizes are tuned, then frozen.
    n_independent, n_walk
        Independence proposals and walk steps in an iteration; 0: none.
    swap
        ``"plain"``, ``"steered"`` or ``"both"``.
    local_interval
        A leg of dynamics every so many iterations; 0: none.

    Raises
    ------
    TypeError, ValueError
        If a number is out of its range.
    """

    temperatures: tuple[float, ...] = LADDER_K
    n_walkers: int = 64
    n_iterations: int = 2000
    n_tuning: int = 200
    n_independent: int = 1
    n_walk: int = 4
    swap: str = "both"
    local_interval: int = 10

    def __post_init__(self) -> None:
        check_fields(
            self,
            temperatures=as_temperatures,
            n_walkers=partial(whole_number, most=MOST_WALKERS),
            n_iterations=whole_number,
            n_tuning=partial(whole_number, least=0),
            n_independent=partial(whole_number, least=0),
            n_walk=partial(whole_number, least=0),
            swap=partial(one_of, allowed=("plain", "steered", "both")),
            local_interval=partial(whole_number, least=0),
        )
        if not (self.n_independent or self.n_walk or self.local_interval):
            raise ValueError(
                "n_independent: expected proposals of some kind, got 0, with n_walk=0 and "
                "local_interval=0"
            )
        check_distinct(self.temperatures)


@dataclass(frozen=True)
class RunSettings:
    """Everything that :func:`openmm_tsf.workflow.run` does.

    Parameters
    ----------
    md
        Dynamics, where frames are not given.
    stride
        Keep every so many-th frame of the trajectory.
    flow
        The flow.
    fit
        The first training, on the trajectory.
    n_rounds
        Rounds of sampling all temperatures and training on the samples, before the flow is frozen.
    round_iterations, round_stride
        Replica-exchange iterations in each round; every so many-th is trained on.
    sample_share
        Share of the samples, all rungs together, in a batch of data; the rest is the trajectory's.
    refit
        The training in each round, on the trajectory and the samples of all rounds so far.
    sampling
        Production with the frozen flow.

    Raises
    ------
    TypeError, ValueError
        If a number is out of its range, or there are too few walkers to train on their samples.
    """

    md: MDSettings = field(default_factory=MDSettings)
    stride: int = 1
    flow: FlowSettings = field(default_factory=FlowSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    n_rounds: int = 3
    round_iterations: int = 200
    round_stride: int = 5
    sample_share: float = 0.4
    refit: FitSettings = field(default_factory=FitSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        check_fields(
            self,
            stride=whole_number,
            n_rounds=partial(whole_number, least=0),
            round_iterations=whole_number,
            round_stride=whole_number,
            sample_share=real_number,
        )
        if not 0 < self.sample_share < 1:
            raise ValueError(f"sample_share: expected a number in (0, 1), got {self.sample_share}")
        # Training on samples holds out whole walkers, for validation and test.
        if self.n_rounds > 0 and self.sampling.n_walkers < 3:
            raise ValueError(
                "n_walkers: expected at least 3 where the flow is trained on samples (or "
                f"n_rounds=0), got {self.sampling.n_walkers}"
            )


# Path gradients, orthogonal steps and chains in place of rounds, and so good proposals that most
# moves are independent draws: examples/training_trials.py leaves each out.
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
    estimator="path",
    n_chains=2048,
    chain_share=0.8,
    log_variance=0.05,
    basin_balance=0.3,
    n_validation_draws=2000,
)
_REFIT = replace(_FIT, n_steps=1000, warmup_steps=50, learning_rate=2e-3, ramp=(0.0, 0.0))
_SAMPLING = SamplingSettings(
    n_walkers=64,
    n_iterations=1000,
    n_tuning=100,
    n_independent=2,
    n_walk=1,
    swap="steered",
    local_interval=20,
)

PRESETS: dict[str, RunSettings] = {
    # Minutes: shows every stage at work; the statistics are poor, and the summary says so.
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
        sampling=SamplingSettings(n_walkers=16, n_iterations=100, n_tuning=20),
    ),
    # A quarter of an hour on two cores.
    "default": RunSettings(
        flow=_FLOW,
        fit=replace(_FIT, n_steps=2500),
        n_rounds=0,
        refit=_REFIT,
        sampling=_SAMPLING,
    ),
    # Twenty minutes on two cores, MD included.
    "thorough": RunSettings(
        md=MDSettings(n_frames=40_000, steps_per_frame=50),
        flow=_FLOW,
        fit=replace(_FIT, n_steps=4000),
        n_rounds=0,
        refit=_REFIT,
        sampling=replace(_SAMPLING, n_walkers=128),
    ),
}


def preset(name: str) -> RunSettings:
    """Settings by name.

    Raises
    ------
    ValueError
        If there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
