"""Conversion of ``openmm.unit`` quantities to the internal units.

Internal units: nm, kJ/mol, ps, K, amu, radians.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import openmm.unit as unit

#: Boltzmann constant (molar gas constant) in kJ/(mol K).
KB = float(unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin))

#: Accepted temperatures in K: beyond them 1/kT overflows or names of files become useless.
_MIN_KELVIN, _MAX_KELVIN = 1e-6, 1e9

KELVIN = unit.kelvin
PICOSECOND = unit.picosecond
NANOMETER = unit.nanometer


def in_unit(value: Any, target: unit.Unit, name: str) -> Any:
    """Return the number of a Quantity in the unit `target`; numbers are returned unchanged.

    A Quantity of another dimension is a TypeError, which begins with `name`.
    """
    if not unit.is_quantity(value):
        return value
    if not value.unit.is_compatible(target):
        raise TypeError(f"{name}: expected a quantity in {target}, got one in {value.unit}")
    return value.value_in_unit(target)


def as_temperature(value: Any, name: str = "temperature") -> float:
    """Return one temperature in K, from 1e-6 to 1e9, of a number or Quantity."""
    number = in_unit(value, KELVIN, name)
    if isinstance(number, (str, bytes, bool)) or np.ndim(number) != 0:
        raise TypeError(f"{name}: expected a number in kelvin, got {value!r}")
    try:
        kelvin = float(number)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected a number in kelvin, got {value!r}") from error
    if not (np.isfinite(kelvin) and kelvin > 0):
        raise ValueError(f"{name}: expected a positive temperature in kelvin, got {value!r}")
    if not _MIN_KELVIN <= kelvin <= _MAX_KELVIN:
        raise ValueError(
            f"{name}: expected a temperature of {_MIN_KELVIN:g} to {_MAX_KELVIN:g} K, got {value!r}"
        )
    return kelvin


def as_temperatures(values: Any, name: str = "temperatures") -> tuple[float, ...]:
    """Return a ladder of temperatures in K, ascending and without duplicates; one is enough."""
    numbers = in_unit(values, KELVIN, name)
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name}: expected a sequence of temperatures in kelvin, got {values!r}")
    ladder = tuple(as_temperature(value, name) for value in numbers)
    if not ladder:
        raise ValueError(f"{name}: expected at least one temperature, got none")
    if any(high <= low for low, high in pairwise(ladder)):
        expected = "expected ascending temperatures without duplicates"
        raise ValueError(f"{name}: {expected}, got {ladder}")
    return ladder


def as_positions(positions: Any, n_atoms: int) -> np.ndarray:
    """Return one conformation (or a Quantity) as finite float64 numbers [n_atoms, 3] in nm."""
    xyz = np.asarray(in_unit(positions, NANOMETER, "positions"), dtype=np.float64)
    if xyz.shape != (n_atoms, 3):
        raise ValueError(f"positions: expected shape ({n_atoms}, 3) in nm, got {xyz.shape}")
    if not np.isfinite(xyz).all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return xyz
