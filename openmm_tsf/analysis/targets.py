"""Targets of precision in words, such as ``"dF(phi) < 0.05 kT"``, and whether a run meets them."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import (
    Assessment,
    assess_mean,
    assess_probability,
    assess_variance,
)
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.observables import DIHEDRAL, Observable
from openmm_tsf.analysis.run_data import TOLERANCE_K
from openmm_tsf.analysis.statistics import Array

#: The units of the quantities; a percentage of the value is possible for all of them but dF.
UNITS = {"dF": "kT", "P": "", "U": "kJ/mol", "C_V": "kJ/(mol K)", "cos": "", "sin": ""}
#: The quantity of a target about the mean of an observable.
_MEAN = "mean"
_MEAN_UNITS = ("nm", "rad")
_EXPECTED = (
    "dF(phi) < 0.05 kT, P(phi > 0) < 10 %, U < 0.1 kJ/mol, C_V < 2 %, cos(psi) < 0.01 or d < 0.01 "
    "nm of an observable d, with 'at 424.26 K' after it for another rung than the lowest"
)
_TARGET = re.compile(
    r"\s*(?:(?P<quantity>dF|P|U|C_V|cos|sin)\s*(?:\((?P<inside>[^()]*)\))?"
    r"|(?P<observable>[A-Za-z][\w.-]*))\s*<"
    r"\s*(?P<number>[-+.\deE]+)\s*(?P<unit>%|kT|kJ/mol|kJ/\(mol K\)|nm|rad)?"
    r"(?:\s+at\s+(?P<kelvin>[-+.\deE]+)(?:\s*K)?)?\s*"
)
_CONDITION = re.compile(
    r"\s*(?P<bar>\|?)\s*(?P<name>[^\s<>|,]+)\s*(?P<end>\|?)\s*"
    r"(?:(?P<sign>[<>])\s*(?P<limit>[-+.\deE]+))?\s*"
)


@dataclass(frozen=True)
class Condition:
    """``name > limit`` or ``name < limit`` of a torsion or observable, or of its absolute value.

    The limit of an angle is in degrees, that of another observable in its unit.
    """

    name: str
    above: bool
    limit: float
    absolute: bool = False

    def __str__(self) -> str:
        name = f"|{self.name}|" if self.absolute else self.name
        return f"{name} {'>' if self.above else '<'} {self.limit:g}"

    def holds(self, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return whether values in the unit of the limit fulfil it."""
        numbers = np.asarray(values, dtype=np.float64)
        numbers = np.abs(numbers) if self.absolute else numbers
        return numbers > self.limit if self.above else numbers < self.limit


@dataclass(frozen=True)
class Target:
    """The largest standard error that a quantity may have at one temperature.

    Parameters
    ----------
    quantity
        ``"dF"``, -ln[P/(1 - P)] of a state in kT; ``"P"``, its probability; ``"U"`` in kJ/mol;
        ``"C_V"`` in kJ/(mol K); ``"cos"`` or ``"sin"`` of a torsion; ``"mean"`` of an observable.
    tolerance
        The standard error, in the unit of the quantity, or as a fraction of its value.
    relative
        Whether it is a fraction of the value.
    conditions
        What defines the state: all of them must hold. For a cosine, sine or mean, one whose torsion
        or observable is meant.
    temperature
        In K; None for the lowest rung.
    unit
        Of a mean, where the text has one: ``"nm"`` or ``"rad"``.

    Examples
    --------
    >>> from openmm_tsf.analysis.targets import Target
    >>> target = Target.parse("dF(phi) < 0.05 kT")
    >>> target.quantity, target.tolerance, str(target)
    ('dF', 0.05, 'dF(phi > 0) < 0.05 kT')
    >>> str(Target.parse("P(phi>0, |psi|>120) < 10% at 424.26 K"))
    'P(phi > 0, |psi| > 120) < 10 % at 424.26 K'
    >>> Target.parse("d < 0.01 nm").names
    ('d',)
    """

    quantity: str
    tolerance: float
    relative: bool = False
    conditions: tuple[Condition, ...] = ()
    temperature: float | None = None
    unit: str = ""

    @classmethod
    def parse(cls, text: str, name: str = "until") -> Self:
        """Return the target that a text describes; ValueError with examples for any other text.

        A torsion alone, as in ``dF(phi)``, stands for phi > 0; angles are in degrees. Errors call
        the argument `name`.
        """
        match = _TARGET.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{name}: expected a target such as {_EXPECTED}, got {text!r}")
        quantity, unit = match["quantity"] or _MEAN, match["unit"] or ""
        inside = match["inside"] or match["observable"]
        needs_state = quantity in ("dF", "P", "cos", "sin", _MEAN)
        if needs_state == (inside is None):
            raise ValueError(f"{name}: expected a target such as {_EXPECTED}, got {text!r}")
        units = ("", *_MEAN_UNITS) if quantity == _MEAN else (UNITS[quantity],)
        if unit not in ("%", *units) or (quantity, unit) == ("dF", "%"):
            unit_expected = " or ".join(units) if units[0] else "% or none"
            raise ValueError(
                f"{name}: expected the unit {unit_expected} of {quantity}, got {text!r}"
            )
        conditions = () if inside is None else _parse_state(inside, quantity, text, name)
        tolerance = _number(match["number"], text, name) / (100.0 if unit == "%" else 1.0)
        kelvin = None if match["kelvin"] is None else _number(match["kelvin"], text, name)
        unit_of_mean = unit if unit in _MEAN_UNITS else ""
        return cls(quantity, tolerance, unit == "%", conditions, kelvin, unit_of_mean)

    def __str__(self) -> str:
        state = self.name
        unit = "%" if self.relative else UNITS.get(self.quantity, self.unit)
        number = f"{100 * self.tolerance:g}" if self.relative else f"{self.tolerance:g}"
        at = "" if self.temperature is None else f" at {self.temperature:g} K"
        return f"{state} < {number}{f' {unit}' if unit else ''}{at}"

    @property
    def name(self) -> str:
        """The quantity with its state, as ``dF(phi > 0)``."""
        if self.quantity in ("cos", "sin"):
            return f"{self.quantity}({self.conditions[0].name})"
        if self.quantity == _MEAN:
            return self.conditions[0].name
        state = ", ".join(map(str, self.conditions))
        return f"{self.quantity}({state})" if state else self.quantity

    @property
    def names(self) -> tuple[str, ...]:
        """The torsions and observables that the target is about."""
        return tuple(dict.fromkeys(condition.name for condition in self.conditions))

    def check_for(
        self,
        torsions: Collection[str],
        temperatures: Collection[float],
        name: str = "until",
        observables: Mapping[str, Observable] | None = None,
    ) -> None:
        """Refuse a target with torsions, observables or a temperature that a run does not have."""
        observed = observables or {}
        for each in self.names:
            if each not in torsions and each not in observed:
                known = ", ".join(torsions) or "none"
                known += f"; observables: {', '.join(observed)}" if observed else ""
                raise ValueError(
                    f"{name}: expected slow torsions of the molecule ({known}), got {each!r}; "
                    "others are defined by --observe (observe)"
                )
        for condition in self.conditions:
            self._check_condition(condition, observed.get(condition.name), name)
        self.rung(temperatures, name)

    def _check_condition(
        self, condition: Condition, observable: Observable | None, name: str
    ) -> None:
        """Refuse what does not fit a torsion (without an observable) or an observable."""
        what, limit = condition.name, condition.limit
        if (observable is None or observable.is_angle) and not -180.0 <= limit <= 180.0:
            raise ValueError(f"{name}: expected degrees in [-180, 180] of {what}, got {limit:g}")
        if observable is not None and observable.unit == "nm" and limit < 0:
            raise ValueError(f"{name}: expected a positive distance {what}, got {limit:g}")
        is_circular = observable is None or observable.kind == DIHEDRAL
        if self.quantity == _MEAN and is_circular:
            raise ValueError(
                f"{name}: expected cos({what}), sin({what}) or P({what} > 0) of a dihedral, which "
                f"has no mean, got {self.name!r}"
            )
        if self.quantity in ("cos", "sin") and observable is not None and not observable.is_angle:
            raise ValueError(f"{name}: expected an angle, got {self.name!r} of {what}")
        if self.unit and observable is not None and self.unit != observable.unit:
            expected = observable.unit or "none"
            raise ValueError(f"{name}: expected the unit {expected} of {what}, got {self.unit}")

    def rung(self, temperatures: Collection[float], name: str = "until") -> int:
        """Return the index of the target's rung in a ladder in K."""
        if self.temperature is None:
            return 0
        for index, kelvin in enumerate(temperatures):
            if abs(kelvin - self.temperature) <= TOLERANCE_K:
                return index
        ladder = ", ".join(f"{kelvin:g}" for kelvin in temperatures)
        raise ValueError(
            f"{name}: expected a temperature of the ladder ({ladder} K), got {self.temperature:g} K"
        )

    def series(
        self, energy: Array, angles: Mapping[str, Array], others: Mapping[str, Array] | None = None
    ) -> Array:
        """Return the observable whose mean it is, of energies and torsions of one shape.

        Angles are in rad, `others` are observables that are not angles. Of C_V the energy: its
        variance is meant.
        """
        others = others or {}
        if self.quantity in ("U", "C_V"):
            return energy
        if self.quantity in ("cos", "sin"):
            function = np.cos if self.quantity == "cos" else np.sin
            return np.asarray(function(angles[self.conditions[0].name]), dtype=np.float64)
        if self.quantity == _MEAN:
            name = self.conditions[0].name
            return np.asarray(others[name] if name in others else angles[name], dtype=np.float64)
        in_units = dict(others)
        for name in angles.keys() & set(self.names):
            in_units[name] = np.degrees(angles[name])
        holds = [condition.holds(in_units[condition.name]) for condition in self.conditions]
        return np.all(holds, axis=0).astype(np.float64)

    def error(self, value: float, stderr: float) -> float:
        """Return the standard error as it is compared with the tolerance; NaN if not known."""
        if not self.relative:
            return stderr
        return stderr / abs(value) if value else math.nan

    def assess(self, run: RunEstimates) -> "TargetAssessment":
        """Assess the target from the samples of its rung."""
        kelvin = float(run.temperatures[self.rung(run.temperatures.tolist())])
        observed = run.observables
        values = {name: run.observable(name, kelvin) for name in self.names}
        n = min((len(each) for each in values.values()), default=run.n_used)
        if n < run.n_used:  # what is not of frames is taken at the iterations that have some
            values = {
                name: run.match_frames(each, n) if len(each) == run.n_used else each
                for name, each in values.items()
            }
        others = {k: v for k, v in values.items() if k in observed and not observed[k].is_angle}
        angles = {k: v for k, v in values.items() if k not in others}
        energy = run.match_frames(run.energies(kelvin), n)
        series = self.series(energy, angles, others)
        if self.quantity in ("P", "dF"):
            assessment = assess_probability(series > 0, run.n_pieces)
            if self.quantity == "dF":
                assessment = assessment.free_energy()
        elif self.quantity == "C_V":
            assessment = assess_variance(energy, 1.0 / (run.boltzmann_constant * kelvin**2))
        else:
            assessment = assess_mean(series)
        assessment = run.in_saved_iterations(assessment, n)
        error = self.error(assessment.value, assessment.stderr)
        is_met = bool(
            assessment.converged and run.burn_in.is_equilibrated and error <= self.tolerance
        )
        return TargetAssessment(self, kelvin, assessment, error, is_met)


@dataclass(frozen=True)
class TargetAssessment:
    """A target beside what a run has: met only where the estimate counts as converged, too."""

    target: Target
    temperature: float
    assessment: Assessment
    error: float
    is_met: bool

    def __str__(self) -> str:
        """The value, its error and what is missing, in one line."""
        value, unit = self.assessment.value, UNITS.get(self.target.quantity, self.target.unit)
        words = f"{self.target.name} at {self.temperature:g} K: {value:.4g}"
        if math.isnan(self.error):
            words += f"{f' {unit}' if unit else ''}, its error is not known"
        else:
            words += f" ± {self.assessment.stderr:.2g}{f' {unit}' if unit else ''}"
            words += f" ({100 * self.error:.2g} %)" if self.target.relative else ""
        reasons = list(self.assessment.missing)
        if not self.error <= self.target.tolerance:
            reasons.insert(0, f"the target is {str(self.target).rpartition(' < ')[2]}")
        elif not self.is_met and not reasons:
            reasons = ["the run is not equilibrated"]
        return words + (f"; {'; '.join(reasons)}" if reasons else ", as precise as required")

    def n_iterations_needed(self, n_used: int) -> float:
        """Return the saved iterations after the start that would meet it; NaN if not known."""
        by_error = n_used * (self.error / self.target.tolerance) ** 2
        needed = self.assessment.n_iterations_needed
        return math.nan if needed is None else float(max(by_error, needed))


def parse_targets(texts: npt.ArrayLike, name: str = "until") -> tuple[str, ...]:
    """Return targets in their usual form, in a check of settings; ValueError for other texts."""
    if isinstance(texts, str) or not isinstance(texts, (list, tuple)):
        raise ValueError(f"{name}: expected a sequence of targets, got {texts!r}")
    return tuple(str(Target.parse(text, name)) for text in texts)


def _number(text: str, whole: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a positive number, got {text!r} in {whole!r}")
    return number


def _parse_state(inside: str, quantity: str, whole: str, name: str) -> tuple[Condition, ...]:
    """Return the conditions of a state, separated by commas."""
    conditions = []
    for part in inside.split(","):
        match = _CONDITION.fullmatch(part)
        if match is None or match["bar"] != match["end"] or (match["bar"] and not match["sign"]):
            raise ValueError(
                f"{name}: expected conditions such as phi > 0 or |psi| > 120, got {part.strip()!r} "
                f"in {whole!r}"
            )
        limit = 0.0 if match["limit"] is None else _limit(match["limit"], whole, name)
        above = match["sign"] != "<"
        conditions.append(Condition(match["name"], above, limit, bool(match["bar"])))
    is_angle = quantity in ("cos", "sin")
    if is_angle and (len(conditions) > 1 or "<" in inside or ">" in inside):
        raise ValueError(f"{name}: expected the name of one torsion, got {inside!r} in {whole!r}")
    return tuple(conditions)


def _limit(text: str, whole: str, name: str) -> float:
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise ValueError(f"{name}: expected a number, got {text!r} in {whole!r}")
    return limit
