"""Conversion of quantities to internal units, and checks of temperatures."""

import math

import numpy as np
import openmm.unit as unit
import pytest

from openmm_tsf import units


def test_boltzmann_constant():
    assert abs(units.KB / 8.31446261815324e-3 - 1) < 1e-8  # CODATA 2018


def test_numbers_are_unchanged_and_quantities_converted():
    assert units.in_unit(1.5, units.NANOMETER, "r") == 1.5
    assert units.in_unit(1.5 * unit.angstrom, units.NANOMETER, "r") == pytest.approx(0.15)
    positions = np.ones((2, 3)) * unit.angstrom
    np.testing.assert_allclose(units.in_unit(positions, units.NANOMETER, "x"), 0.1)


def test_wrong_dimension_names_the_argument():
    with pytest.raises(TypeError, match="timestep: expected a quantity in picosecond"):
        units.in_unit(1.0 * unit.nanometer, units.PICOSECOND, "timestep")


@pytest.mark.parametrize("value", [300, 300.0, np.float32(300), np.array(300.0), 300 * unit.kelvin])
def test_temperature(value):
    assert units.as_temperature(value) == 300.0


@pytest.mark.parametrize(
    ("value", "error"),
    [(wrong, TypeError) for wrong in ("300", True, None, [300.0], 300 * unit.nanometer, 1j)]
    + [(wrong, ValueError) for wrong in (0.0, -300.0, math.nan, math.inf)],
)
def test_invalid_temperatures(value, error):
    with pytest.raises(error, match="T_md: expected"):
        units.as_temperature(value, "T_md")


def test_ladders():
    assert units.as_temperatures([300, 424.3, 600]) == (300.0, 424.3, 600.0)
    assert units.as_temperatures([300, 600] * unit.kelvin) == (300.0, 600.0)
    assert units.as_temperatures((300.0 * unit.kelvin,)) == (300.0,)
