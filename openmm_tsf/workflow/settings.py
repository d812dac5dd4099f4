"""Settings of a whole run, and those that come with the package."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from openmm_tsf.analysis.targets import parse_targets
from openmm_tsf.io.run_config import check_distinct_temperatures
from openmm_tsf.io.serialization import OMIT_DEFAULT
from openmm_tsf.sampling.provenance import check_intervals
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.training import FitSettings
from openmm_tsf.units import PER_PICOSECOND, PICOSECOND, as_temperature, as_temperatures, in_unit
from openmm_tsf.utils.validation import (
    check_bool,
    check_choice,
    check_fields,
    check_float,
    check_int,
    check_ints,
    check_positive,
    check_seed,
    optional,
)

#: The most steps between frames, and before the first.
_MOST_STEPS = 10**9
#: ps; with vibrating bonds to hydrogen, and without.
_FREE_STEP, _CONSTRAINED_STEP = 0.001, 0.002
#: ps; a thousand times the stable time step of molecules.
_LONGEST_STEP = 1.0

_check_count = partial(check_int, least=0)


def _time_step(value: Any, name: str) -> float:
    step = check_positive(in_unit(value, PICOSECOND, name), name)
    if step > _LONGEST_STEP:
        raise ValueError(f"{name}: expected at most {_LONGEST_STEP:g} ps, got {value!r}")
    return step


@dataclass(frozen=True)
class MDSettings:
    """Langevin dynamics at one temperature.

    Parameters
    ----------
    temperature, timestep, friction
        In K, ps and 1/ps (or Quantities). The time step is 0.001 ps by default, 0.002 ps where all
        bonds to hydrogen are constrained.
    n_frames, steps_per_frame
        Frames to write in all, and time steps between them.
    n_equilibration_steps
        Time steps before the first frame, after a minimization.
    seed
        Seed of velocities and noise.
    """

    temperature: float = 600.0
    n_frames: int = 40_000
    steps_per_frame: int = 250
    timestep: float | None = None
    friction: float = 1.0
    n_equilibration_steps: int = 20_000
    seed: int = 1

    def __post_init__(self) -> None:
        check_fields(
            self,
            temperature=as_temperature,
            # The header of a DCD file counts in 32 bits.
            n_frames=partial(check_int, most=2**31 - 1),
            steps_per_frame=partial(check_int, most=_MOST_STEPS),
            timestep=optional(_time_step),
            friction=lambda value, name: check_positive(in_unit(value, PER_PICOSECOND, name), name),
            n_equilibration_steps=partial(check_int, least=0, most=_MOST_STEPS),
            seed=check_seed,
        )

    def completed_for(self, molecule: MolecularSystem) -> Self:
        """Return the settings with a time step for the molecule, where none is given."""
        if self.timestep is not None:
            return self
        hydrogens = {
            atom.index
            for atom in molecule.topology.atoms()
            if atom.element is not None and atom.element.symbol in ("H", "D")
        }
        pairs = [] if molecule.constraints is None else molecule.constraints.pairs.tolist()
        are_fixed = bool(hydrogens) and hydrogens <= {atom for pair in pairs for atom in pair}
        return replace(self, timestep=_CONSTRAINED_STEP if are_fixed else _FREE_STEP)


#: Three rungs a factor of sqrt(2) apart, which the reference has, too.
LADDER_K = (300.0, 424.26, 600.0)
#: More walkers than this do not fit into memory.
MOST_WALKERS = 2**24
#: More directories than this are too many for a file system.
MOST_SHARDS = 10**5


@dataclass(frozen=True)
class FlowSettings:
    """The kind and the sizes of a flow.

    Parameters
    ----------
    kind
        ``"tsf"``, or ``"realnvp"`` for the paper's baseline.
    metric
        ``"volume"`` (constant Jacobian) or ``"polar"``.
    n_momenta
        Auxiliary momenta; None for as many as coordinates (a RealNVP has none).
    n_blocks, hidden
        Sizes of the network.
    conditioner_dtype
        Of the couplings' networks, ``"float32"`` or ``"float64"``; their output is float64.
    overlap
        Let the copies of a configuration that equivalent hydrogens make overlap, instead of each
        ending at a step (:meth:`openmm_tsf.InternalCoordinates.log_partition`).
    """

    kind: str = "tsf"
    metric: str = "volume"
    n_momenta: int | None = None
    n_blocks: int = 8
    hidden: tuple[int, ...] = (128, 128)
    conditioner_dtype: str = "float32"
    overlap: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            kind=partial(check_choice, allowed=("tsf", "realnvp")),
            metric=partial(check_choice, allowed=("volume", "polar")),
            n_blocks=check_int,
            hidden=check_ints,
            conditioner_dtype=partial(check_choice, allowed=("float32", "float64")),
            overlap=check_bool,
            n_momenta=optional(_check_count),
        )


@dataclass(frozen=True)
class SamplingSettings:
    """Replica exchange.

    Parameters
    ----------
    temperatures
        The ladder in K.
    n_walkers
        Independent ladders, run side by side.
    n_iterations, n_tuning
        Iterations of production, and those before it in which step sizes are tuned, then frozen.
    until
        Targets of precision, as ``"dF(phi) < 0.05 kT"``
        (:class:`openmm_tsf.analysis.targets.Target`). Production stops once all are met, and every
        basin of the training frames was visited; `n_iterations` is then the most.
    n_independent, n_crank_nicolson, n_walk
        Independence proposals, Crank-Nicolson steps between them and a walk, and steps of the walk
        in an iteration; 0: none.
    swap
        ``"plain"``, ``"steered"`` or ``"both"``.
    local_interval
        Iterations between pieces of dynamics; 0: none.
    n_shards
        Parts of the walkers, equally large, each with its own directory and random numbers, which
        are sampled independently (:mod:`openmm_tsf.workflow.shards`). Rounds before production
        have the walkers of one.
    save_interval, numbers_interval
        Iterations from one saved frame of every walker to the next; and from one to the next whose
        energies, replicas and torsions are saved, by default the same: a divisor of
        `save_interval`. They do not change the chain.
    """

    temperatures: tuple[float, ...] = LADDER_K
    n_walkers: int = 64
    n_iterations: int = 2000
    n_tuning: int = 200
    until: tuple[str, ...] = ()
    n_independent: int = 1
    n_crank_nicolson: int = 0
    n_walk: int = 4
    swap: str = "both"
    local_interval: int = 2
    n_shards: int = field(default=1, metadata=OMIT_DEFAULT)
    save_interval: int = field(default=1, metadata=OMIT_DEFAULT)
    numbers_interval: int | None = field(default=None, metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        check_fields(
            self,
            temperatures=as_temperatures,
            n_walkers=partial(check_int, most=MOST_WALKERS),
            n_iterations=check_int,
            n_tuning=_check_count,
            until=parse_targets,
            n_independent=_check_count,
            n_crank_nicolson=_check_count,
            n_walk=_check_count,
            swap=partial(check_choice, allowed=("plain", "steered", "both")),
            local_interval=_check_count,
            n_shards=partial(check_int, most=MOST_SHARDS),
            save_interval=check_int,
            numbers_interval=optional(check_int),
        )
        if self.n_walkers % self.n_shards:
            raise ValueError(
                f"n_shards: expected a divisor of n_walkers, {self.n_walkers}, got {self.n_shards}"
            )
        if self.n_shards > 1 and self.until:
            raise ValueError(
                f"until: expected none with n_shards={self.n_shards}, which know nothing of each "
                f"other, got {self.until}; give n_iterations, and resume with more of them"
            )
        check_intervals(self.save_interval, self.numbers_interval)
        if self.save_interval > 1 and 2 * self.save_interval > self.n_iterations:
            raise ValueError(
                f"save_interval: expected at most half of n_iterations, {self.n_iterations}, got "
                f"{self.save_interval}"
            )
        moves = (self.n_independent, self.n_crank_nicolson, self.n_walk, self.local_interval)
        if not any(moves):
            raise ValueError(
                "n_independent: expected proposals, got 0, with n_crank_nicolson=0, n_walk=0 and "
                "local_interval=0"
            )
        check_distinct_temperatures(self.temperatures)


@dataclass(frozen=True)
class RunSettings:
    """Everything that :func:`openmm_tsf.workflow.run.run` does.

    Parameters
    ----------
    md, stride
        Dynamics, where frames are not given; every `stride`-th frame of the trajectory is kept.
    flow, fit
        The flow, and its first training, on the trajectory.
    n_rounds
        Rounds of sampling all temperatures and training on the samples before the flow is frozen.
    round_iterations, round_stride
        Replica-exchange iterations in each round, and the distance of those trained on.
    sample_share
        Fraction of the samples, all rungs together, in a batch of data; the rest is frames of MD.
    refit
        The training in each round, on the trajectory and the samples of all rounds so far.
    sampling
        Production with the frozen flow.
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
            stride=check_int,
            n_rounds=_check_count,
            round_iterations=check_int,
            round_stride=check_int,
            sample_share=check_float,
        )
        if not 0 < self.sample_share < 1:
            raise ValueError(f"sample_share: expected a number in (0, 1), got {self.sample_share}")
        # Training on samples holds out whole walkers, for validation and test.
        n_walkers = self.sampling.n_walkers // self.sampling.n_shards
        if self.n_rounds > 0 and n_walkers < 3:
            of = "" if self.sampling.n_shards == 1 else " in each shard"
            raise ValueError(
                f"n_walkers: expected at least 3{of} where the flow is trained on samples (or "
                f"n_rounds=0), got {n_walkers}"
            )
