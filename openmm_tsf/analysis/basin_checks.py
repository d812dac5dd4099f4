"""Populations of basins, and those that a run has lost, is losing, or populates unexpectedly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from openmm_tsf.analysis.convergence import MIN_VISITS, Assessment, assess_probability
from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.statistics import MIN_EFFECTIVE_SAMPLES, Array
from openmm_tsf.analysis.uncertainty import estimate_mean

#: A function of the recorded torsions (name to array in rad) with truth values of their shape.
Basin = Callable[[Mapping[str, Array]], npt.ArrayLike]
Inside = npt.NDArray[np.bool_]

#: A basin counts as missed where at least this many frames are expected in it but none occurs.
MIN_EXPECTED_FRAMES = 20.0
#: A population is too small below this fraction of the expected one, and this many standard errors.
LOW_RATIO, LOW_Z = 0.5, 4.0


@dataclass(frozen=True)
class _Expected:
    """The population that a basin should have; NaN if it is not known."""

    p: float = np.nan
    stderr: float = np.nan
    source: str | None = None


class BasinCheck:
    """Checks the basins of a run against a reference, the training frames, and its other rungs.

    The expected population of a rung is that of the reference, where it has the rung and the
    basin's torsions; else that of the training frames, where they are of the rung's temperature and
    visit the basin; else that of the other rungs by MBAR, where the rung's own samples do not tell
    it: these are left out, as those of a rung that hardly visits the basin would outweigh others.
    """

    def __init__(self, run: RunEstimates, reference: Reference | None = None) -> None:
        self.run, self.reference = run, reference

    def check(
        self, name: str, basin: Basin | Inside | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the populations of a basin per rung beside those expected, and what is wrong.

        The basin is one of ``run.basins``, that of a function of the torsions, or truth values
        [n, W, R] of a state that neither reference nor frames tell anything about, of all
        iterations or of those with frames. The table has
        for each rung ``p``, the fields of `Assessment`, ``expected_p``, ``expected_stderr`` and
        ``expected_from`` (None if not known), the number of ``walkers`` that visited the basin, and
        of ``crossings`` between saved iterations at the rung.
        """
        run = self.run
        if isinstance(basin, np.ndarray):
            inside = basin
        else:
            inside = run.in_basin(name) if basin is None else _evaluate(name, basin, run.angles())
        n = len(inside)
        crossings = _count_crossings(inside, run.match_frames(run.replica, n))
        table: dict[str, Any] = {}
        warnings: list[str] = []
        for rung, temperature in enumerate(map(float, run.temperatures)):
            assessed = assess_probability(inside[:, :, rung], run.n_pieces)
            assessed = run.in_saved_iterations(assessed, n)
            expected = self._expected(name, basin, rung, inside, assessed)
            visitors = int(inside[:, :, rung].any(axis=0).sum())
            table[f"{temperature:.2f}"] = {
                "p": assessed.value,
                **assessed.to_dict(),
                "expected_p": expected.p,
                "expected_stderr": expected.stderr,
                "expected_from": expected.source,
                "walkers": visitors,
                "crossings": int(crossings[rung]),
            }
            known = assessed.value if expected.source is None else expected.p
            n_samples = inside[:, :, rung].size
            if min(known, 1 - known) * n_samples < MIN_EXPECTED_FRAMES:
                continue  # too rare for a warning to mean anything
            where = f"{temperature:.2f} K: the basin {name}"
            warnings += _population_warnings(where, assessed, n_samples, expected)
            if assessed.value > 0 and visitors == 1 and run.n_walkers > 1:
                warnings.append(f"{where} was visited by only 1 of {run.n_walkers} walkers")
            if assessed.value > 0 and crossings.any() and not crossings[rung]:
                warnings.append(
                    f"{where}: no replica entered or left it at this temperature; it is populated "
                    "by exchanges with other rungs only"
                )
        if inside.any() and not inside.all() and not crossings.any() and run.n_used > 1:
            warnings.append(
                f"all rungs: no replica ever entered or left the basin {name}; its populations are "
                "those of the start"
            )
        return table, warnings

    def _expected(
        self,
        name: str,
        basin: Basin | Inside | None,
        rung: int,
        inside: Inside,
        assessed: Assessment,
    ) -> _Expected:
        run, temperature = self.run, float(self.run.temperatures[rung])
        expected = _Expected()
        if not isinstance(basin, np.ndarray):
            expected = self._of_reference(temperature, name, basin)
        if expected.source is None and basin is None:
            expected = self._of_frames(temperature, name)
        elsewhere = np.delete(inside, rung, axis=2).any()
        if expected.source is None and not assessed.converged and elsewhere:
            others = run.mbar_without(rung, len(inside)).reweight(float(run.betas[rung]))
            if others.kish >= MIN_EFFECTIVE_SAMPLES:
                by_mbar = others.mean(np.delete(inside, rung, axis=2))
                expected = _Expected(by_mbar.value, by_mbar.stderr, "the other rungs (MBAR)")
        return expected

    def _of_frames(self, temperature: float, name: str) -> _Expected:
        frames, basins = self.run.training_basins, self.run.basins
        if frames is None or nearest_rung(np.array([frames.temperature]), temperature) is None:
            return _Expected()
        population = frames.populations.get(name)
        if not population or not population["p"] or not basins.has_borders_of(frames.basins, name):
            return _Expected()
        stderr = population["stderr"]
        return _Expected(
            population["p"], np.nan if stderr is None else stderr, "the training frames"
        )

    def _of_reference(self, temperature: float, name: str, basin: Basin | None) -> _Expected:
        reference, run = self.reference, self.run
        rung = None if reference is None else reference.rung(temperature)
        used = run.dihedral_atoms if basin is not None else run.basins.torsions_of(name)
        if reference is None or rung is None or not {"phi", "psi"} >= set(used):
            return _Expected()  # the reference has phi and psi only
        angles = {"phi": reference.phi[:, :, rung], "psi": reference.psi[:, :, rung]}
        if basin is None:
            inside = run.basins.inside(name, angles)
        else:
            inside = _evaluate(name, basin, angles)
        estimate = estimate_mean(inside)
        return _Expected(estimate.value, estimate.stderr, "reference")


def _evaluate(name: str, basin: Basin, angles: Mapping[str, Array]) -> Inside:
    inside = np.asarray(basin(angles))
    shape = next(iter(angles.values())).shape if angles else ()
    if inside.dtype != np.bool_ or inside.shape != shape:
        got = f"{inside.dtype} of shape {inside.shape}"
        raise ValueError(f"basins: {name!r}: expected truth values of shape {shape}, got {got}")
    return inside


def _count_crossings(inside: Inside, replica: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how often a replica crossed between two saved iterations at each rung [R].

    Replicas that arrive by an exchange crossed at another rung: they do not count.
    """
    stayed = replica[1:] == replica[:-1]
    return np.asarray((stayed & (inside[1:] != inside[:-1])).sum(axis=(0, 1)), dtype=np.int64)


def _population_warnings(
    where: str, assessed: Assessment, n_samples: int, expected: _Expected
) -> list[str]:
    if expected.source is None:
        return []
    source = "the reference" if expected.source == "reference" else expected.source
    if assessed.value == 0:
        frames = expected.p * n_samples
        return [
            f"{where} was never visited; {frames:,.0f} of {n_samples:,} frames are "
            f"expected from {source}: the basin is lost"
        ]
    z = (assessed.value - expected.p) / np.hypot(assessed.stderr, expected.stderr)
    if assessed.value < LOW_RATIO * expected.p and z < -LOW_Z:
        few = (assessed.n_visits or 0) < MIN_VISITS  # their spread tells no error
        by = f"in {assessed.n_visits} independent visits" if few else f"{z:+.1f} standard errors"
        return [
            f"{where} holds {assessed.value:.2g} of the frames; {expected.p:.2g} is expected from "
            f"{source} ({by}): the basin is being lost"
        ]
    return []
