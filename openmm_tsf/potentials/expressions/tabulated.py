"""OpenMM's tabulated functions as torch modules: cubic splines and lookups."""

from typing import Any

import numpy as np
import openmm
import torch
from scipy.sparse import diags  # type: ignore[import-untyped]
from scipy.sparse.linalg import splu  # type: ignore[import-untyped]
from torch import Tensor, nn

# Value and slope at the two ends of a unit interval to the coefficients of 1, t, t², t³.
_HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=float)


def from_openmm(function: openmm.TabulatedFunction) -> nn.Module:
    """The same function in torch, in float64 buffers that ``Module.to`` moves.

    Called with one floating tensor for each of its ``n_arguments`` arguments, which broadcast; the
    result has the dtype of the first.

    Raises
    ------
    TypeError
        If `function` is not a TabulatedFunction.
    ValueError
        If it is of a kind that has no counterpart here (Continuous3DFunction).
    """
    if not isinstance(function, openmm.TabulatedFunction):
        raise TypeError(
            f"function: expected an openmm.TabulatedFunction, got {type(function).__name__}"
        )
    if isinstance(function, openmm.Continuous1DFunction):
        values, low, high = function.getFunctionParameters()
        return Spline1D(np.array(values), low, high, function.getPeriodic())
    if isinstance(function, openmm.Continuous2DFunction):
        nx, ny, values, *limits = function.getFunctionParameters()
        table = np.array(values).reshape(ny, nx).T
        return Spline2D(
            table, (limits[0], limits[2]), (limits[1], limits[3]), function.getPeriodic()
        )
    if isinstance(function, openmm.Discrete1DFunction):
        return Lookup(np.array(function.getFunctionParameters()))
    if isinstance(function, openmm.Discrete2DFunction | openmm.Discrete3DFunction):
        *sizes, values = function.getFunctionParameters()
        # The first argument runs fastest.
        return Lookup(np.array(values).reshape(sizes[::-1]).transpose())
    raise ValueError(
        f"function: {type(function).__name__} is not covered; Continuous1D, Continuous2D and "
        "Discrete1D to Discrete3D are"
    )


class Spline1D(nn.Module):
    """A cubic spline through equidistant points: natural and 0 outside them, or periodic.

    Its second derivative is continuous, the third piecewise constant.

    Parameters
    ----------
    values
        The points' values [n].
    low, high
        The first and the last point.
    periodic
        Whether the function repeats with period `high` - `low`.
    """

    n_arguments = 1
    knots: Tensor
    pieces: Tensor

    def __init__(self, values: np.ndarray, low: float, high: float, periodic: bool) -> None:
        super().__init__()
        knots = _points(low, high, len(values))
        second = _second_derivatives(knots, values, periodic)
        width = np.diff(knots)
        bend = width**2 / 6.0
        pieces = [knots[1:], width, values[:-1], values[1:], bend * second[:-1], bend * second[1:]]
        self.axis = _Axis(knots, low, high, periodic)
        self.register_buffer("pieces", torch.tensor(np.stack(pieces)))

    def forward(self, x: Tensor) -> Tensor:
        """Values at x, of its shape and dtype."""
        t, outside, index = self.axis(x)
        upper, width, y0, y1, bend0, bend1 = self.pieces.to(x.dtype)[:, index].unbind(0)
        a = (upper - t) / width
        b = 1.0 - a
        inside = a * y0 + b * y1 + (a * a * a - a) * bend0 + (b * b * b - b) * bend1
        return inside if outside is None else torch.where(outside, 0.0, inside)


class Spline2D(nn.Module):
    """A bicubic spline through a grid: natural and 0 outside it, or periodic.

    Its first derivatives are continuous; on the grid's lines the second ones are as well.

    Parameters
    ----------
    values
        The grid's values [n_x, n_y].
    low, high
        Its first and last point, (x, y) each.
    periodic
        Whether the function repeats with period `high` - `low` along both axes.
    """

    n_arguments = 2
    patches: Tensor

    def __init__(
        self,
        values: np.ndarray,
        low: tuple[float, float],
        high: tuple[float, float],
        periodic: bool,
    ) -> None:
        super().__init__()
        x, y = (_points(low[i], high[i], values.shape[i]) for i in (0, 1))
        along_x = _slopes(x, values, periodic)
        along_y = _slopes(y, values.T, periodic).T
        both = _slopes(x, along_y, periodic)
        dx, dy = np.diff(x)[:, None], np.diff(y)[None, :]

        def corners(f: np.ndarray) -> list[list[np.ndarray]]:
            return [[f[:-1, :-1], f[:-1, 1:]], [f[1:, :-1], f[1:, 1:]]]

        # [4, 4, n_x - 1, n_y - 1]: values and slopes along x by values and slopes along y.
        f, fx, fy, fxy = (np.array(corners(g)) for g in (values, along_x, along_y, both))
        data = np.concatenate(
            [np.concatenate([f, fy * dy], axis=1), np.concatenate([fx * dx, fxy * dx * dy], axis=1)]
        )
        coefficients = np.einsum("ia,jb,abxy->ijxy", _HERMITE, _HERMITE, data)
        self.axis_x = _Axis(x, low[0], high[0], periodic)
        self.axis_y = _Axis(y, low[1], high[1], periodic)
        self.register_buffer("patches", torch.tensor(coefficients))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Values at (x, y), broadcast against each other."""
        t, outside_x, i = self.axis_x(x)
        u, outside_y, j = self.axis_y(y)
        a, b = self.axis_x.fraction(t, i), self.axis_y.fraction(u, j)
        patch = self.patches.to(x.dtype)[:, :, i, j]
        inside: Any = 0.0
        for row in reversed(patch.unbind(0)):
            inside = a * inside + ((row[3] * b + row[2]) * b + row[1]) * b + row[0]
        if outside_x is None or outside_y is None:
            return inside
        return torch.where(outside_x | outside_y, 0.0, inside)


class Lookup(nn.Module):
    """Values in a table of one to three dimensions; constant around each whole number.

    Arguments are rounded to the nearest whole number, halves away from 0, and those beyond the
    table's ends taken to the ends: OpenMM's behaviour. Derivatives are 0.

    Parameters
    ----------
    values
        The table.
    """

    values: Tensor

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.n_arguments = values.ndim
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64))

    def forward(self, *arguments: Tensor) -> Tensor:
        """Values at the arguments, broadcast against each other."""
        index = []
        for x, size in zip(arguments, self.values.shape, strict=True):
            x = x.detach()
            nearest = torch.trunc(x + torch.where(x < 0, -0.5, 0.5)).clamp(0, size - 1)
            index.append(nearest.long())
        return self.values.to(arguments[0].dtype)[tuple(index)]


class _Axis(nn.Module):
    """Where arguments lie among the points of a spline."""

    knots: Tensor

    def __init__(self, knots: np.ndarray, low: float, high: float, periodic: bool) -> None:
        super().__init__()
        self.low, self.high, self.periodic = low, high, periodic
        self.register_buffer("knots", torch.tensor(knots))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Arguments within the points, which of `x` are outside, and their intervals.

        NaN is not outside: it stays NaN.
        """
        knots = self.knots.to(x.dtype)
        outside = None
        if self.periodic:
            period = self.high - self.low
            turns = (x - self.low) / period
            t = self.low + period * (turns - turns.detach().floor())
        else:
            outside = (x < self.low) | (x > self.high)
            t = torch.where(outside, self.low, x)
        found = torch.searchsorted(knots, t.detach().contiguous(), right=True)
        return t, outside, (found - 1).clamp(0, len(knots) - 2)

    def fraction(self, t: Tensor, index: Tensor) -> Tensor:
        """Positions between 0 and 1 within the intervals."""
        knots = self.knots.to(t.dtype)
        lower = knots[index]
        return (t - lower) / (knots[index + 1] - lower)


def _points(low: float, high: float, n: int) -> np.ndarray:
    return low + np.arange(n) * (high - low) / (n - 1)


def _second_derivatives(x: np.ndarray, y: np.ndarray, periodic: bool) -> np.ndarray:
    """Second derivatives at the points [n, ...] of the cubic splines through y [n, ...].

    The equations are those of OpenMM's SplineFitter: 0 at both ends, or smooth across them.
    """
    h = np.diff(x)
    slope = np.diff(y, axis=0) / h.reshape(-1, *[1] * (y.ndim - 1))
    lower, upper = np.append(h[:-1], 0.0), np.append(0.0, h[1:])
    diagonal = np.concatenate([[1.0], 2.0 * (h[1:] + h[:-1]), [1.0]])
    right = np.zeros(y.shape)
    right[1:-1] = 6.0 * np.diff(slope, axis=0)
    matrix = diags([lower, diagonal, upper], offsets=[-1, 0, 1], format="lil")
    if periodic:
        matrix[0, 0], matrix[-1, 0] = 2.0 * (h[0] + h[-1]), -1.0
        matrix[0, 1] = h[0]
        matrix[0, -2] += h[-1]  # of three points the second is both neighbours of the first
        right[0] = 6.0 * (slope[0] - slope[-1])
    return np.asarray(splu(matrix.tocsc()).solve(right))


def _slopes(x: np.ndarray, y: np.ndarray, periodic: bool) -> np.ndarray:
    """First derivatives at the points [n] of the cubic splines through the columns of y [n, m]."""
    second = _second_derivatives(x, y, periodic)
    h = np.diff(x)[:, None]
    secant = np.diff(y, axis=0) / h
    left = secant - (2.0 * second[:-1] + second[1:]) * h / 6.0
    last = secant[-1:] + (second[-2:-1] + 2.0 * second[-1:]) * h[-1] / 6.0
    return np.concatenate([left, last])
