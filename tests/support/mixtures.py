"""Mixtures of the kernels in the table, each the schedule of one iteration."""

from collections.abc import Callable
from typing import Any

from openmm_tsf.sampling.kernels import Scheduled, SequenceSettings, default_kernels
from tests.support.exact_cases import TreeCase
from tests.support.invariance import KERNELS


def default(case: Any) -> list[Scheduled]:
    """Return the default sequence, with dynamics more often and at a larger step."""
    sigma, timestep = (0.17, 0.015) if isinstance(case, TreeCase) else (0.6, 0.45)
    settings = SequenceSettings(
        sigma=sigma, local_interval=2, local_steps=10, local_timestep=timestep
    )
    return default_kernels(case.potential, case.flow, case.ladder, case.masses, settings)


def whole(case: Any) -> list[Any]:
    """Return flow kernels, OpenMM's dynamics and both kinds of plain swaps, with a schedule."""
    return [
        KERNELS["independence"](case),
        Scheduled(KERNELS["walk"](case), repeats=3),
        KERNELS["langevin"](case, n_steps=12, timestep=0.012, friction=1.0),
        Scheduled(KERNELS["plain swap"](case), interval=2),
        KERNELS["plain swap, random"](case, name="swap_random"),
    ]


def through_flow(case: Any) -> list[Any]:
    """Return all kernels through the flow or whitened coordinates, and plain swaps."""
    first = ("steered swap, random", "latent mala", "plain swap, random", "walk of 4 steps")
    names = (*first, "latent hmc", "internal walk", "independence", "multiple try")
    return [KERNELS[name](case) for name in names]


def with_dynamics(case: Any) -> list[Any]:
    """Return flow kernels, Hamiltonian dynamics that keeps its velocities, and steered swaps."""
    step: Any = {"timestep": 0.012, "n_steps": 12} if isinstance(case, TreeCase) else {}
    return [
        Scheduled(KERNELS["crank nicolson"](case), repeats=2),
        KERNELS["hmc, persistent"](case, persistence=0.95, **step),
        KERNELS["steered swap, random"](case),
        KERNELS["latent mala"](case),
        KERNELS["batched langevin"](case),
    ]


def everything(case: Any) -> list[Any]:
    """Return all kernels of the table."""
    settings = "on_tree" if isinstance(case, TreeCase) else "on_model"
    return [
        entry(case, name=name)
        for name, entry in KERNELS.items()
        if getattr(entry, settings) is not None
    ]


#: Mixture, ladders and walkers on the molecule.
MIXTURES: dict[str, tuple[Callable[[Any], list[Any]], tuple[int, ...], int]] = {
    "default": (default, (3,), 700),
    "whole": (whole, (3,), 500),
    "through flow": (through_flow, (3,), 600),
    "with dynamics": (with_dynamics, (2, 3, 7), 500),
    "everything": (everything, (7,), 200),
}
