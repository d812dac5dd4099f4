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
    """Draw one conformation, seen so that most of its heavy atoms spread out.

    Parameters
    ----------
    axis
        Where to draw; its frame is taken off.
    topology
        With bonds.
    positions
        [N, 3] in nm.
    dihedrals
        Labels and the four atoms each: a turning arrow goes round the middle bond.
    font_size
        Of the dihedrals' labels, in points.

    Raises
    ------
    ValueError
        If positions and topology differ in their numbers of atoms.
    """
    x = np.asarray(positions, dtype=np.float64)
    if x.shape != (topology.n_atoms, 3):
        raise ValueError(f"positions: expected shape ({topology.n_atoms}, 3), got {x.shape}")
    symbols = [atom.element.symbol if atom.element else "C" for atom in topology.atoms]
    radii = np.array([_RADII.get(s, _RADIUS) for s in symbols])
    seen = _seen(x, radii, np.array([s != "H" for s in symbols]))
    neighbours: list[int] = [0] * topology.n_atoms
    for first, second in topology.bonds:
        neighbours[first.index] += 1
        neighbours[second.index] += 1
    for first, second in topology.bonds:
        i, j = first.index, second.index
        ends = {symbols[i], symbols[j]}
        oxygen = i if symbols[i] == "O" else j
        double = ends == {"C", "O"} and neighbours[oxygen] == 1
        _draw_stick(axis, seen, symbols, i, j, double)
    for atom, place in enumerate(seen):
        _draw_ball(axis, place, symbols[atom])
        if symbols[atom] not in ("C", "H"):
            axis.text(
                place[0], place[1], symbols[atom], color="white", fontsize=0.75 * font_size,
                fontweight="bold", ha="center", va="center_baseline", zorder=_order(place[2]) + 0.1,
            )  # fmt: skip
    middles = {label: 0.5 * (seen[atoms[1]] + seen[atoms[2]]) for label, atoms in dihedrals.items()}
    labels = []
    for label, atoms in dihedrals.items():
        # A label keeps clear of atoms, and further from the other arrows, whose it is not.
        others = [middle[:2] for name, middle in middles.items() if name != label]
        labels.append(_draw_turn(axis, seen, atoms, label, others, font_size))
    everything = np.vstack([seen[:, :2] - 0.06, seen[:, :2] + 0.06, *(p[None] for p in labels)])
    (left, low), (right, high) = everything.min(axis=0), everything.max(axis=0)
    axis.set_xlim(left, right)
    axis.set_ylim(low - 0.02, high + 0.02)
    axis.set_aspect("equal")
    axis.set_axis_off()


def _seen(x: Array, radii: Array, heavy: npt.NDArray[np.bool_]) -> Array:
    """Rotated positions [N, 3]: widest extent to the right, depth towards the reader.

    Of the views that are tilted a little from there, the one in which balls hide each other least.
    """
    chosen = x[heavy] if heavy.sum() > 2 else x
    _, _, axes = np.linalg.svd(chosen - chosen.mean(axis=0))
    if axes[0] @ (x[-1] - x[0]) < 0:  # from the first atom to the last as one reads
        axes[0] = -axes[0]
    axes[2] = np.cross(axes[0], axes[1])  # a rotation: no mirror image in the figure
    flat = (x - chosen.mean(axis=0)) @ axes.T
    reach = radii[:, None] + radii
    above = np.triu_indices(len(x), 1)

    def hidden(view: Array) -> float:
        distance = np.linalg.norm(view[:, None, :2] - view[None, :, :2], axis=-1)
        return float(np.square(np.maximum(1.1 * reach - distance, 0.0))[above].sum())

    views = [
        _turned(_turned(flat, 1, 2, up), 0, 2, aside)
        for up in np.radians(np.arange(-50, 51, 5))
        for aside in np.radians(np.arange(-25, 26, 5))
    ]
    return min(views, key=hidden)


def _turned(x: Array, first: int, second: int, angle: float) -> Array:
    """x [N, 3] turned in the plane of two axes."""
    turned = x.copy()
    turned[:, first] = np.cos(angle) * x[:, first] - np.sin(angle) * x[:, second]
    turned[:, second] = np.sin(angle) * x[:, first] + np.cos(angle) * x[:, second]
    return turned


def _order(depth: float) -> float:
    """Drawing order of something at this depth (nm): what is nearer comes later."""
    return 100.0 + 100.0 * float(depth)


Colour = str | tuple[float, float, float]


def _mix(colour: Colour, other: Colour, share: float) -> tuple[float, float, float]:
    a, b = np.array(to_rgb(colour)), np.array(to_rgb(other))
    red, green, blue = (1 - share) * a + share * b
    return float(red), float(green), float(blue)


def _draw_ball(axis: Axes, place: Array, symbol: str) -> None:
    radius, colour = _RADII.get(symbol, _RADIUS), _COLOURS.get(symbol, "#b06fb0")
    order = _order(place[2])
    axis.add_patch(
        Circle((place[0], place[1]), radius, facecolor=_mix(colour, "black", 0.25),
               edgecolor=_mix(colour, "black", 0.65), lw=0.5, zorder=order)
    )  # fmt: skip
    for k in range(1, _SHADES + 1):  # light from the upper left
        share = k / _SHADES
        shift = 0.33 * radius * share
        shade = _mix(_mix(colour, "black", 0.25 * (1 - share)), "white", 0.55 * share**3)
        axis.add_patch(
            Circle((place[0] - shift, place[1] + shift), radius * (1 - 0.85 * share),
                   facecolor=shade, lw=0, zorder=order + 0.05 * share)
        )  # fmt: skip


def _draw_stick(axis: Axes, seen: Array, symbols: list[str], i: int, j: int, double: bool) -> None:
    start, end = seen[i], seen[j]
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
            # Behind its own ball, in front of what lies deeper than the half bond's middle.
            order = min(_order(near[2]), _order(0.5 * (near[2] + middle[2]))) - 0.2
            axis.add_patch(
                Polygon(corners, facecolor=_mix(colour, "white", 0.12),
                        edgecolor=_mix(colour, "black", 0.55), lw=0.35, zorder=order)
            )  # fmt: skip


def _draw_turn(
    axis: Axes,
    seen: Array,
    atoms: Sequence[int],
    label: str,
    others: list[Array],
    font_size: float,
) -> Array:
    """A turning arrow round the middle bond and its label; where the label stands [2]."""
    start, end = seen[atoms[1]], seen[atoms[2]]
    middle, along = 0.5 * (start + end), (end - start) / np.linalg.norm(end - start)
    first = np.cross(along, [0.0, 0.0, 1.0])
    first /= np.linalg.norm(first)
    second = np.cross(along, first)
    turn = np.linspace(-0.80 * np.pi, 0.80 * np.pi, 61)[:, None]
    ring = middle + _ARC_RADIUS * (np.cos(turn) * first + np.sin(turn) * second)
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

    def room(place: Array) -> float:
        to_atoms = np.linalg.norm(seen[:, :2] - place, axis=1).min()
        to_others = [0.6 * np.linalg.norm(other - place) for other in others]
        return float(min([to_atoms, *to_others]))

    place = max(choices, key=room)
    axis.text(
        place[0], place[1], label, fontsize=font_size + 2, fontstyle="italic", ha="center",
        va="center", color=colour, zorder=301,
    )  # fmt: skip
    return np.asarray(place + 0.04 * np.sign(place - middle[:2]))
