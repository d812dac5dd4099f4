"""OpenMM's tabulated functions as torch modules: cubic splines and tables of discrete values."""

from typing import Any

import numpy as np
import openmm
import torch
from scipy.sparse import diags  # type: ignore[import-untyped]
from scipy.sparse.linalg import splu  # type: ignore[import-untyped]
from torch import Tensor, nn

Array = np.ndarray
Point = tuple[float, float]
#: From values and derivatives at the ends of a unit interval to the coefficients of 1, t, t², t³.
HERMITE = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [-3, 3, -2, -1], [2, -2, 1, 1]], dtype=float)


def from_openmm(function: openmm.TabulatedFunction) -> nn.Module:
    """Return the same function in torch, with float64 buffers that ``Module.to`` converts.

    It takes one floating-point tensor for each of its ``n_arguments`` arguments, which broadcast;
    the result has the dtype of the first.
    """
    if not isinstance(function, openmm.TabulatedFunction):
        given = type(function).__name__
        raise TypeError(f"function: expected an openmm.TabulatedFunction, got {given}")
    if isinstance(function, openmm.Continuous1DFunction):
        values, low, high = function.getFunctionParameters()
        return Spline1D(np.array(values), low, high, function.getPeriodic())
    if isinstance(function, openmm.Continuous2DFunction):
        nx, ny, values, *limits = function.getFunctionParameters()
        low, high = (limits[0], limits[2]), (limits[1], limits[3])
        return Spline2D(np.array(values).reshape(ny, nx).T, low, high, function.getPeriodic())
    if isinstance(function, openmm.Discrete1DFunction):
        return Lookup(np.array(function.getFunctionParameters()))
    if isinstance(function, openmm.Discrete2DFunction | openmm.Discrete3DFunction):
        *sizes, values = function.getFunctionParameters()
        # The first argument varies fastest.
        return Lookup(np.array(values).reshape(sizes[::-1]).transpose())
    covered = "Continuous1D, Continuous2D and Discrete1D to Discrete3D are"
    raise ValueError(f"function: {type(function).__name__} is not covered; {covered}")


class Spline1D(nn.Module):
    """A cubic spline through equidistant points: natural and 0 outside them, or periodic.

    Its second derivative is continuous, the third piecewise constant.
    """

    n_arguments = 1
    knots: Tensor
    pieces: Tensor

    def __init__(self, values: np.ndarray, low: float, high: float, periodic: bool) -> None:
        super().__init__()
        knots = _points(low, high, len(values))
        second = _second_derivatives(knots, values, periodic)
        width = np.diff(knots)
        scaled = width**2 / 6.0
        curvatures = [scaled * second[:-1], scaled * second[1:]]
        pieces = [knots[1:], width, values[:-1], values[1:], *curvatures]
        self.axis = _Axis(knots, low, high, periodic)
        self.register_buffer(
            "pieces", torch.tensor(np.stack(pieces), dtype=torch.float64, device="cpu")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the values at x, of its shape and dtype."""
        t, outside, index = self.axis(x)
        upper, width, y0, y1, curvature0, curvature1 = self.pieces.to(x.dtype)[:, index].unbind(0)
        a = (upper - t) / width
        b = 1.0 - a
        inside = a * y0 + b * y1 + (a * a * a - a) * curvature0 + (b * b * b - b) * curvature1
        return inside if outside is None else torch.where(outside, 0.0, inside)


class Spline2D(nn.Module):
    """A bicubic spline through values [n_x, n_y] on a grid: natural and 0 outside it, or periodic.

    `low` and `high` are its ends (x, y). First derivatives are continuous; on the grid's lines
    second ones are as well.
    """

    n_arguments = 2
    patches: Tensor

    def __init__(self, values: np.ndarray, low: Point, high: Point, periodic: bool) -> None:
        super().__init__()
        x, y = (_points(low[i], high[i], values.shape[i]) for i in (0, 1))
        along_x = _derivatives(x, values, periodic)
        along_y = _derivatives(y, values.T, periodic).T
        both = _derivatives(x, along_y, periodic)
        spacing = np.diff(x)[:, None], np.diff(y)[None, :]
        data = bicubic_data(values, along_x, along_y, both, spacing)
        coefficients = np.einsum("ia,jb,abxy->ijxy", HERMITE, HERMITE, data)
        self.axis_x = _Axis(x, low[0], high[0], periodic)
        self.axis_y = _Axis(y, low[1], high[1], periodic)
        self.register_buffer(
            "patches", torch.tensor(coefficients, dtype=torch.float64, device="cpu")
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the values at (x, y), broadcast against each other."""
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
    """Values in a table of one to three dimensions, constant around each integer.

    As in OpenMM, arguments are rounded to the nearest integer, halves away from 0, and those beyond
    the table's ends to the ends. Derivatives are 0.
    """

    values: Tensor

    def __init__(self, values: np.ndarray) -> None:
        super().__init__()
        self.n_arguments = values.ndim
        self.register_buffer("values", torch.tensor(values, dtype=torch.float64, device="cpu"))

    def forward(self, *arguments: Tensor) -> Tensor:
        """Return the values at the arguments, broadcast against each other."""
        index = []
        for x, size in zip(arguments, self.values.shape, strict=True):
            x = x.detach()
            nearest = torch.trunc(x + torch.where(x < 0, -0.5, 0.5)).clamp(0, size - 1)
            index.append(nearest.long())
        return self.values.to(arguments[0].dtype)[tuple(index)]


class _Axis(nn.Module):
    """The points of a spline along one axis, and the intervals in which arguments lie."""

    knots: Tensor

    def __init__(self, knots: np.ndarray, low: float, high: float, periodic: bool) -> None:
        super().__init__()
        self.low, self.high, self.periodic = low, high, periodic
        self.register_buffer("knots", torch.tensor(knots, dtype=torch.float64, device="cpu"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return arguments within the points, which are outside (NaN is not), and intervals."""
        knots = self.knots.to(x.dtype)
        outside = None
        if self.periodic:
            period = self.high - self.low
            periods = (x - self.low) / period
            t = self.low + period * (periods - periods.detach().floor())
        else:
            outside = (x < self.low) | (x > self.high)
            t = torch.where(outside, self.low, x)
        above = torch.searchsorted(knots, t.detach().contiguous(), right=True)
        return t, outside, (above - 1).clamp(0, len(knots) - 2)

    def fraction(self, t: Tensor, index: Tensor) -> Tensor:
        """Return positions between 0 and 1 within the intervals."""
        knots = self.knots.to(t.dtype)
        lower = knots[index]
        return (t - lower) / (knots[index + 1] - lower)


def _points(low: float, high: float, n: int) -> np.ndarray:
    return low + np.arange(n) * (high - low) / (n - 1)


def bicubic_data(
    f: Array, fx: Array, fy: Array, fxy: Array, spacing: tuple[Any, Any] = (1.0, 1.0)
) -> Array:
    """Return values and derivatives [4, 4, n_x - 1, n_y - 1] at the corners of a grid's patches.

    In units of the spacing; the first two axes are values and derivatives at both ends, along x and
    along y.
    """

    def corners(g: np.ndarray) -> np.ndarray:
        return np.array([[g[:-1, :-1], g[:-1, 1:]], [g[1:, :-1], g[1:, 1:]]])

    dx, dy = spacing
    values = np.concatenate([corners(f), corners(fy) * dy], axis=1)
    derivatives = np.concatenate([corners(fx) * dx, corners(fxy) * dx * dy], axis=1)
    return np.concatenate([values, derivatives])


def _second_derivatives(x: np.ndarray, y: np.ndarray, periodic: bool) -> np.ndarray:
    """Return second derivatives at the points [n, ...] of the cubic splines through y [n, ...].

    The equations are those of OpenMM's SplineFitter: 0 at both ends, or smooth across them.
    """
    h = np.diff(x)
    secant = np.diff(y, axis=0) / h.reshape(-1, *[1] * (y.ndim - 1))
    lower, upper = np.append(h[:-1], 0.0), np.append(0.0, h[1:])
    diagonal = np.concatenate([[1.0], 2.0 * (h[1:] + h[:-1]), [1.0]])
    right = np.zeros(y.shape)
    right[1:-1] = 6.0 * np.diff(secant, axis=0)
    matrix = diags([lower, diagonal, upper], offsets=[-1, 0, 1], format="lil")
    if periodic:
        matrix[0, 0], matrix[-1, 0] = 2.0 * (h[0] + h[-1]), -1.0
        matrix[0, 1] = h[0]
        matrix[0, -2] += h[-1]  # of three points, the second is both neighbours of the first
        right[0] = 6.0 * (secant[0] - secant[-1])
    return np.asarray(splu(matrix.tocsc()).solve(right))


def _derivatives(x: np.ndarray, y: np.ndarray, periodic: bool) -> np.ndarray:
    """Return derivatives at the points [n] of the cubic splines through the columns of y [n, m]."""
    second = _second_derivatives(x, y, periodic)
    h = np.diff(x)[:, None]
    secant = np.diff(y, axis=0) / h
    left = secant - (2.0 * second[:-1] + second[1:]) * h / 6.0
    last = secant[-1:] + (second[-2:-1] + 2.0 * second[-1:]) * h[-1] / 6.0
    return np.concatenate([left, last])
