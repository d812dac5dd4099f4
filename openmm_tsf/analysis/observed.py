"""Observables of a run: values of its frames, and what is known of their means."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.agreement import BASIN, MEAN, POSITIVE
from openmm_tsf.analysis.convergence import Assessment, assess_mean, assess_probability
from openmm_tsf.analysis.observables import (
    DIHEDRAL,
    Definition,
    Observable,
    check_definitions,
    define_observables,
    is_function,
)
from openmm_tsf.analysis.run_frames import RunFrames
from openmm_tsf.analysis.statistics import Array
from openmm_tsf.io.run_config import CONFIG
from openmm_tsf.utils.wells import Wells, count_angles, find_wells


class RunObservables(RunFrames):
    """The data of a run with the observables that it records, or that are given later."""

    def __init__(self, path: str | Path, start: int | None = None) -> None:
        super().__init__(path, start)
        self._given: dict[str, Observable] = {}
        self._values: dict[str, Array] = {}

    @property
    def observables(self) -> dict[str, Observable]:
        """The observables by name: those recorded with the run, and those of `observe`."""
        left_out = self.missing_observables
        return {k: v for k, v in self._recorded.items() if k not in left_out} | self._given

    @cached_property
    def _recorded(self) -> dict[str, Observable]:
        texts = self._recorded_definitions
        try:
            check_definitions(texts)
            return self._define({k: text for k, text in texts.items() if not is_function(text)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path / CONFIG}: damaged, observables: {error}") from error

    @property
    def _recorded_definitions(self) -> Mapping[str, str]:
        texts: Mapping[str, str] = self.config.get("choices", {}).get("observables", {})
        return texts

    @property
    def missing_observables(self) -> dict[str, str]:
        """Why recorded observables are left out, by name: functions, and those without frames.

        A function that a run directory names is not imported: the directory may come from others.
        """
        reasons = {}
        for name, text in self._recorded_definitions.items():
            if name in self._given:
                continue
            of_frames = is_function(text) or self._recorded[name].atoms not in self._torsion_atoms
            if is_function(text):
                reasons[name] = f"the function {text} is recorded by name only: give it again"
            elif of_frames and not self._has_frames:
                reasons[name] = "the trajectories are not there"
            elif of_frames and self.n_used and not self.n_framed:
                reasons[name] = "no frame has been saved yet"
        return reasons

    @cached_property
    def _has_frames(self) -> bool:
        return all(map(self.has_frames, self.temperatures))

    @cached_property
    def _torsion_atoms(self) -> dict[tuple[int, ...], str]:
        return {tuple(atoms): name for name, atoms in self.dihedral_atoms.items()}

    def observe(self, definitions: Mapping[str, Definition]) -> None:
        """Add observables to estimates, summary and report of this object.

        By name: a definition in words or a function, see
        :func:`openmm_tsf.analysis.observables.define_observables`. They replace recorded ones of
        the same names. The run directory does not change.
        """
        given = self._define(definitions)
        for name in given:
            self._values.pop(name, None)
        self._given |= given

    def observable(self, observable: Definition, temperature: Any = None) -> Array:
        """Return the values of an observable: [n, W, R], or [n, W] at one rung.

        If frames were saved less often than numbers, recorded torsions have values of all n
        iterations used; other observables of the m with frames, [m, W, R]: see `frame_index`.
        In rad, nm, or what a function returns. It is the name of an observable or of a recorded
        torsion, a definition in words such as ``"distance:ACE1:CH3,NME3:C"``, or a function of a
        trajectory of F frames that returns F numbers, called once per rung.
        """
        rungs: Any = slice(None) if temperature is None else self.rung(temperature)
        if isinstance(observable, str) and observable in self.observables:
            if observable not in self._values:
                missing = [each for n, each in self.observables.items() if n not in self._values]
                self._values |= self._evaluate(missing)
            return self._values[observable][:, :, rungs]
        if isinstance(observable, str) and observable in self.dihedral_atoms:
            return self.dihedral_at_all_rungs(observable)[:, :, rungs]
        if isinstance(observable, str) and ":" not in observable:
            known = ", ".join([*self.observables, *self.dihedral_atoms]) or "none (no torsion)"
            raise ValueError(
                f"observable: expected one of {known} or a definition such as distance:3,17, got "
                f"{observable!r}"
            )
        (values,) = self._evaluate([*self._define({"observable": observable}).values()]).values()
        return values[:, :, rungs]

    def _define(self, definitions: Mapping[str, Definition]) -> dict[str, Observable]:
        if not definitions:
            return {}
        if not self.has_structure:
            raise ValueError(f"observe: expected a run of a molecule, {self.path} has no structure")
        return define_observables(definitions, self.topology, self.dihedral_atoms)

    def _evaluate(self, observables: Sequence[Observable]) -> dict[str, Array]:
        """Return values [n, W, R] by name; frames are read once, recorded torsions not at all."""
        recorded = self._torsion_atoms
        of_frames = [each for each in observables if each.atoms not in recorded]
        values = {
            each.name: self.dihedral_at_all_rungs(recorded[each.atoms])
            for each in observables
            if each.atoms in recorded
        }
        if not of_frames:
            return values

        def evaluate(frames: mdtraj.Trajectory) -> Array:
            return np.stack([each.evaluate(frames) for each in of_frames], axis=-1)

        arrays = self.evaluate_frames(evaluate, "observe")
        if len(arrays) < self.n_framed:
            raise ValueError(
                f"{self.path}: expected frames of all {self.n_framed} iterations that are used, "
                f"got {len(arrays)}"
            )
        return values | {each.name: arrays[..., k] for k, each in enumerate(of_frames)}


def find_observed_wells(observable: Observable, values: Sequence[Array]) -> Wells | None:
    """Return the wells of a dihedral over all values; None of others, or where it has a single."""
    if observable.kind != DIHEDRAL:
        return None
    wells = find_wells(observable.name, sum(count_angles(each) for each in values))
    return wells if wells.names else None


def observed_states(
    observable: Observable, values: Array, wells: Wells | None
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return truth values [...] by the keys of ``quantities``: a dihedral's sign and its wells."""
    if observable.kind != DIHEDRAL:
        return {}
    states = {f"{observable.name}{POSITIVE}": values > 0}
    if wells is not None:
        labels = wells.labels(values)
        states |= {f"{BASIN}{name}": labels == k for k, name in enumerate(wells.names)}
    return states


def assess_observable(
    observable: Observable, values: Array, wells: Wells | None, n_pieces: float
) -> dict[str, Assessment]:
    """Return what is known of an observable from its values [n, W] at one temperature.

    By the keys of ``quantities``: of a dihedral the probabilities of `observed_states`, of others
    the mean.
    """
    if observable.kind != DIHEDRAL:
        return {f"{MEAN}{observable.name}": assess_mean(values)}
    states = observed_states(observable, values, wells)
    return {key: assess_probability(inside, n_pieces) for key, inside in states.items()}
