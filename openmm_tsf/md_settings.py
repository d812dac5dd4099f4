"""What molecular dynamics to run."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openmm_tsf.units import PICOSECOND, as_temperature, in_unit
from openmm_tsf.utils.validation import check_fields, positive_number, seed_number, whole_number

#: Steps between frames, and before the first.
_MOST_STEPS = 10**9
#: In ps: a thousand times what molecules stand.
_LONGEST_STEP = 1.0


def _time_step(value: Any, name: str) -> float:
    step = positive_number(in_unit(value, PICOSECOND, name), name)
    if step > _LONGEST_STEP:
        raise ValueError(f"{name}: expected at most {_LONGEST_STEP:g} ps, got {value!r}")
    return step


@dataclass(frozen=True)
class MDSettings:
    """Langevin dynamics at one temperature.

    Parameters
    ----------
    temperature
        In K.
    n_frames
        Frames to write in all.
    steps_per_frame
        Time steps between frames.
    timestep
        In ps.
    friction
        In 1/ps.
    n_equilibration_steps
        Time steps before the first frame, after a minimization.
    seed
        Seed of velocities and noise.

    Raises
    ------
    TypeError, ValueError
        If a number is none, or out of its range.
    """

    temperature: float = 600.0
    n_frames: int = 40_000
    steps_per_frame: int = 250
    timestep: float = 0.001
    friction: float = 1.0
    n_equilibration_steps: int = 20_000
    seed: int = field(default=1)

    def __post_init__(self) -> None:
        check_fields(
            self,
            temperature=as_temperature,
            # The header of a DCD file counts in 32 bits.
            n_frames=partial(whole_number, most=2**31 - 1),
            steps_per_frame=partial(whole_number, most=_MOST_STEPS),
            timestep=_time_step,
            friction=lambda value, name: positive_number(
                in_unit(value, 1 / PICOSECOND, name), name
            ),
            n_equilibration_steps=partial(whole_number, least=0, most=_MOST_STEPS),
            seed=seed_number,
        )
