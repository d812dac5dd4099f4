"""How numbers and arrays with a unit come in: quantities of ``openmm.unit`` become plain numbers.

Internal units: nm, kJ/mol, ps, K, amu, radians.
"""

import numbers
from collections.abc import Iterable
from itertools import pairwise
from operator import is_
from typing import Any

import numpy as np
import openmm.unit as unit

#: Boltzmann constant (molar gas constant) in kJ/(mol K).
KB = float(unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin))

#: Accepted temperatures in K: beyond them 1/kT overflows or names of files become useless.
_MIN_KELVIN, _MAX_KELVIN = 1e-6, 1e9

KELVIN = unit.kelvin
PICOSECOND = unit.picosecond
#: 1 / PICOSECOND would be a Quantity.
PER_PICOSECOND = unit.picosecond**-1
SECOND = unit.second
NANOMETER = unit.nanometer
AMU = unit.amu
RADIAN = unit.radian
KJ_PER_MOLE = unit.kilojoule_per_mole
DIMENSIONLESS = unit.dimensionless


def in_unit(value: Any, target: unit.Unit, name: str) -> Any:
    """Return the numbers of a Quantity in the unit `target`; numbers are returned unchanged.

    Lists and tuples, nested or not, and arrays of objects may contain quantities. A Quantity of
    another dimension is a TypeError, which begins with `name`.
    """
    if unit.is_quantity(value):
        if not value.unit.is_compatible(target):
            raise TypeError(f"{name}: expected a quantity in {target}, got one in {value.unit}")
        return value.value_in_unit(target)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return in_unit(value.tolist(), target, name)
    if isinstance(value, (list, tuple)):
        items = [in_unit(item, target, name) for item in value]
        return value if all(map(is_, items, value)) else items
    return value


def as_array(values: Any, target: unit.Unit, name: str) -> np.ndarray:
    """Return numbers, quantities or tensors as a writable float64 array in the unit `target`.

    A float64 array is not copied. What is not numbers is a TypeError, which begins with `name`.
    """
    plain = in_unit(values, target, name)
    got = repr(plain) if isinstance(plain, (str, bytes)) else type(plain).__name__
    try:
        if hasattr(plain, "detach"):  # a tensor, of any dtype and on any device
            plain = plain.detach().cpu().double().numpy()
        array = np.asarray(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {got} ({error})") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected numbers, got {got}")
    array = array.astype(np.float64, copy=False)
    # torch takes no array with negative strides, such as frames in reverse.
    fits = array.flags.writeable and min(array.strides, default=0) >= 0
    return array if fits else array.copy()


def as_temperature(value: Any, name: str = "temperature") -> float:
    """Return one temperature in K, from 1e-6 to 1e9, of a number or Quantity."""
    number = in_unit(value, KELVIN, name)
    if getattr(number, "ndim", None) == 0:  # numpy's scalars, arrays and tensors of no dimension
        number = number.item()
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name}: expected a number in kelvin, got {value!r}")
    kelvin = float(number)
    if not (np.isfinite(kelvin) and kelvin > 0):
        raise ValueError(f"{name}: expected a positive temperature in kelvin, got {value!r}")
    if not _MIN_KELVIN <= kelvin <= _MAX_KELVIN:
        raise ValueError(
            f"{name}: expected a temperature of {_MIN_KELVIN:g} to {_MAX_KELVIN:g} K, got {value!r}"
        )
    return kelvin


def as_temperatures(values: Any, name: str = "temperatures") -> tuple[float, ...]:
    """Return a ladder of temperatures in K, ascending and without duplicates; one is enough."""
    kelvins = in_unit(values, KELVIN, name)
    is_sequence = isinstance(kelvins, Iterable) and getattr(kelvins, "ndim", 1) > 0
    if isinstance(kelvins, (str, bytes)) or not is_sequence:
        raise TypeError(f"{name}: expected a sequence of temperatures in kelvin, got {values!r}")
    ladder = tuple(as_temperature(value, name) for value in kelvins)
    if not ladder:
        raise ValueError(f"{name}: expected at least one temperature, got none")
    if any(high <= low for low, high in pairwise(ladder)):
        expected = "expected ascending temperatures without duplicates"
        raise ValueError(f"{name}: {expected}, got {ladder}")
    return ladder


def as_positions(positions: Any, n_atoms: int) -> np.ndarray:
    """Return one conformation (or a Quantity) as finite float64 numbers [n_atoms, 3] in nm."""
    xyz = as_array(positions, NANOMETER, "positions")
    if xyz.shape != (n_atoms, 3):
        raise ValueError(f"positions: expected shape ({n_atoms}, 3) in nm, got {xyz.shape}")
    if not np.isfinite(xyz).all():
        raise ValueError("positions: expected finite numbers, got NaN or infinity")
    return xyz


def in_md_units(value: Any) -> Any:
    """Return the number of a Quantity in OpenMM's unit system, as a Context takes a parameter.

    Pressures are in bar there.
    """
    if not unit.is_quantity(value):
        return value
    if value.unit.is_compatible(unit.bar):
        return value.value_in_unit(unit.bar)
    return value.value_in_unit_system(unit.md_unit_system)
