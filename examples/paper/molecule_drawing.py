"""A molecule as balls and sticks in a matplotlib axis, with dihedrals marked."""

from collections.abc import Mapping, Sequence

import mdtraj
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Circle, FancyArrowPatch, Polygon

Array = npt.NDArray[np.float64]

_COLOURS = {"C": "#5f6672", "N": "#3f6fd8", "O": "#d8402f", "H": "#eef0f2", "S": "#d9b327"}
_RADII = {"H": 0.029}  # nm, of the balls
_RADIUS, _STICK, _GAP = 0.044, 0.012, 0.016
_SHADES = 10
_ARC_RADIUS, _LABEL_DISTANCE = 0.062, 0.135


def draw_molecule(
    axis: Axes,
    topology: mdtraj.Topology,
    positions: npt.ArrayLike,
    dihedrals: Mapping[str, Sequence[int]],
    font_size: float = 7.0,
) -> None:
    """Draw one conformation, from the side on which its heavy atoms spread out most.

    Positions are [N, 3] in nm; the topology has bonds. The dihedrals are labels with their four
    atoms: an arrow is drawn around the middle bond. The axis loses its frame.
    """
    x = np.asarray(positions, dtype=np.float64)
    if x.shape != (topology.n_atoms, 3):
        raise ValueError(f"positions: expected shape ({topology.n_atoms}, 3), got {x.shape}")
    symbols = [atom.element.symbol if atom.element else "C" for atom in topology.atoms]
    radii = np.array([_RADII.get(s, _RADIUS) for s in symbols])
    view = project(x, radii, np.array([s != "H" for s in symbols]))
    neighbours: list[int] = [0] * topology.n_atoms
    for first, second in topology.bonds:
        neighbours[first.index] += 1
        neighbours[second.index] += 1
    for first, second in topology.bonds:
        i, j = first.index, second.index
        ends = {symbols[i], symbols[j]}
        oxygen = i if symbols[i] == "O" else j
        double = ends == {"C", "O"} and neighbours[oxygen] == 1
        _draw_stick(axis, view, symbols, i, j, double)
    for symbol, ball in zip(symbols, view, strict=True):
        _draw_ball(axis, ball, symbol)
        if symbol not in ("C", "H"):
            axis.text(
                ball[0], ball[1], symbol, color="white", fontsize=0.75 * font_size,
                fontweight="bold", ha="center", va="center_baseline", zorder=_order(ball[2]) + 0.1,
            )  # fmt: skip
    middles = {label: 0.5 * (view[atoms[1]] + view[atoms[2]]) for label, atoms in dihedrals.items()}
    labels = []
    for label, atoms in dihedrals.items():
        # A label keeps its distance from atoms, and more of it from the other arrows.
        others = [middle[:2] for name, middle in middles.items() if name != label]
        labels.append(_draw_arrow(axis, view, atoms, label, others, font_size))
    everything = np.vstack([view[:, :2] - 0.06, view[:, :2] + 0.06, *(p[None] for p in labels)])
    (left, low), (right, high) = everything.min(axis=0), everything.max(axis=0)
    axis.set_xlim(left, right)
    axis.set_ylim(low - 0.02, high + 0.02)
    axis.set_aspect("equal")
    axis.set_axis_off()


def project(x: Array, radii: Array, heavy: npt.NDArray[np.bool_]) -> Array:
    """Rotated positions [N, 3]: widest extent to the right, depth towards the reader.

    Among views tilted a little from that one, the one with the least overlap of the balls.
    """
    chosen = x[heavy] if heavy.sum() > 2 else x
    _, _, axes = np.linalg.svd(chosen - chosen.mean(axis=0))
    if axes[0] @ (x[-1] - x[0]) < 0:  # from the first atom to the last as one reads
        axes[0] = -axes[0]
    axes[2] = np.cross(axes[0], axes[1])  # a rotation: no mirror image in the figure
    flat = (x - chosen.mean(axis=0)) @ axes.T
    reach = radii[:, None] + radii
    above = np.triu_indices(len(x), 1)

    def hidden(candidate: Array) -> float:
        distance = np.linalg.norm(candidate[:, None, :2] - candidate[None, :, :2], axis=-1)
        return float(np.square(np.maximum(1.1 * reach - distance, 0.0))[above].sum())

    views = [
        _rotate(_rotate(flat, 1, 2, up), 0, 2, aside)
        for up in np.radians(np.arange(-50, 51, 5))
        for aside in np.radians(np.arange(-25, 26, 5))
    ]
    return min(views, key=hidden)


def _rotate(x: Array, first: int, second: int, angle: float) -> Array:
    """Return x [N, 3] rotated in the plane of two axes."""
    rotated = x.copy()
    rotated[:, first] = np.cos(angle) * x[:, first] - np.sin(angle) * x[:, second]
    rotated[:, second] = np.sin(angle) * x[:, first] + np.cos(angle) * x[:, second]
    return rotated


def _order(depth: float) -> float:
    """Drawing order at a depth (nm): nearer parts are drawn later."""
    return 100.0 + 100.0 * float(depth)


Colour = str | tuple[float, float, float]


def _mix(colour: Colour, other: Colour, fraction: float) -> tuple[float, float, float]:
    a, b = np.array(to_rgb(colour)), np.array(to_rgb(other))
    red, green, blue = (1 - fraction) * a + fraction * b
    return float(red), float(green), float(blue)


def _draw_ball(axis: Axes, position: Array, symbol: str) -> None:
    radius, colour = _RADII.get(symbol, _RADIUS), _COLOURS.get(symbol, "#b06fb0")
    order = _order(position[2])
    axis.add_patch(
        Circle((position[0], position[1]), radius, facecolor=_mix(colour, "black", 0.25),
               edgecolor=_mix(colour, "black", 0.65), lw=0.5, zorder=order)
    )  # fmt: skip
    for k in range(1, _SHADES + 1):  # light from the upper left
        fraction = k / _SHADES
        shift = 0.33 * radius * fraction
        shade = _mix(_mix(colour, "black", 0.25 * (1 - fraction)), "white", 0.55 * fraction**3)
        axis.add_patch(
            Circle((position[0] - shift, position[1] + shift), radius * (1 - 0.85 * fraction),
                   facecolor=shade, lw=0, zorder=order + 0.05 * fraction)
        )  # fmt: skip


def _draw_stick(axis: Axes, view: Array, symbols: list[str], i: int, j: int, double: bool) -> None:
    start, end = view[i], view[j]
    flat = end[:2] - start[:2]
    length = float(np.linalg.norm(flat))
    if length == 0.0:
        return  # along the line of sight
    across = np.array([-flat[1], flat[0]]) / length
    middle = 0.5 * (start + end)
    width = 0.6 * _STICK if double else _STICK
    for offset in (-_GAP, _GAP) if double else (0.0,):
        for near, atom in ((start, i), (end, j)):
            colour = _COLOURS.get(symbols[atom], "#b06fb0")
            ends = [near[:2] + offset * across, middle[:2] + offset * across]
            corners = [ends[0] + width * across, ends[1] + width * across,
                       ends[1] - width * across, ends[0] - width * across]  # fmt: skip
            # Behind its ball, in front of everything deeper than the middle of the half bond.
            order = min(_order(near[2]), _order(0.5 * (near[2] + middle[2]))) - 0.2
            axis.add_patch(
                Polygon(corners, facecolor=_mix(colour, "white", 0.12),
                        edgecolor=_mix(colour, "black", 0.55), lw=0.35, zorder=order)
            )  # fmt: skip


def _draw_arrow(
    axis: Axes, view: Array, atoms: Sequence[int], label: str, others: list[Array], font_size: float
) -> Array:
    """Draw an arrow around the middle bond and its label; return a point beyond the label [2]."""
    start, end = view[atoms[1]], view[atoms[2]]
    middle, along = 0.5 * (start + end), (end - start) / np.linalg.norm(end - start)
    first = np.cross(along, [0.0, 0.0, 1.0])
    first /= np.linalg.norm(first)
    second = np.cross(along, first)
    angles = np.linspace(-0.80 * np.pi, 0.80 * np.pi, 61)[:, None]
    ring = middle + _ARC_RADIUS * (np.cos(angles) * first + np.sin(angles) * second)
    colour = "#111111"
    for part in (slice(0, 31), slice(30, 59)):
        order = _order(float(ring[part, 2].mean()))
        front = ring[part, 2].mean() > middle[2]
        axis.plot(
            ring[part, 0], ring[part, 1], color=colour, lw=0.9, solid_capstyle="round",
            zorder=order + (5 if front else -5),
        )  # fmt: skip
    axis.add_patch(
        FancyArrowPatch(
            (ring[-4, 0], ring[-4, 1]), (ring[-1, 0], ring[-1, 1]), arrowstyle="-|>",
            mutation_scale=4.5, lw=0.6, color=colour, shrinkA=0, shrinkB=0, zorder=300,
        )
    )  # fmt: skip
    flat = along[:2] / np.linalg.norm(along[:2])
    across = np.array([-flat[1], flat[0]])
    choices = [
        middle[:2] + _LABEL_DISTANCE * (np.cos(angle) * across + np.sin(angle) * flat)
        for angle in np.linspace(-np.pi, np.pi, 24, endpoint=False)
        if abs(np.cos(angle)) > 0.5
    ]

    def clearance(position: Array) -> float:
        to_atoms = np.linalg.norm(view[:, :2] - position, axis=1).min()
        to_others = [0.6 * np.linalg.norm(other - position) for other in others]
        return float(min([to_atoms, *to_others]))

    position = max(choices, key=clearance)
    axis.text(
        position[0], position[1], label, fontsize=font_size + 2, fontstyle="italic", ha="center",
        va="center", color=colour, zorder=301,
    )  # fmt: skip
    return np.asarray(position + 0.04 * np.sign(position - middle[:2]))
