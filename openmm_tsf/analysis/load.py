"""A run directory, finished or still growing, as numpy, mdtraj and pymbar objects."""

from pathlib import Path
from typing import Any

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.ramachandran import plot_ramachandran
from openmm_tsf.analysis.plots.thermodynamics import plot_thermodynamics
from openmm_tsf.analysis.reference import Reference, recorded_reference
from openmm_tsf.analysis.summary import summarize
from openmm_tsf.analysis.thermodynamics import Thermodynamics


class Run(RunEstimates):
    """What `load_run` returns.

    Saved iterations, walkers and rungs are the axes [n, W, R] of everything; temperatures in K,
    energies in kJ/mol, angles in rad, lengths in nm.

    Attributes
    ----------
    path
        The directory.
    config
        Its ``config.json``.
    temperatures
        [R] in K, ascending.
    n_walkers
        W.
    boltzmann_constant
        In kJ/(mol K), or 1 for toy systems.
    dihedral_atoms
        Named dihedrals and their atoms.
    segments
        The numbers written so far.
    """

    def reference(self) -> Reference | None:
        """The shipped reference data that the configuration names, if any."""
        return recorded_reference(self)

    def summary(self, reference: Reference | None = None) -> dict[str, Any]:
        """The figures of the run as plain numbers; see `openmm_tsf.analysis.summary`.

        They are compared with `reference`, or with the one that the configuration names.
        """
        return summarize(self, reference or self.reference())

    def plot(
        self,
        path: str | Path,
        reference: Reference | None = None,
        residue: int | None = None,
    ) -> None:
        """Ramachandran plots, φ and energy histograms of every rung as a PNG (or PDF, SVG).

        They are drawn beside `reference`, or beside the one that the configuration names, and are
        of the given residue (see `backbone`).
        """
        plot_ramachandran(self, path, reference or self.reference(), residue)

    def plot_thermodynamics(
        self, path: str | Path, reference: Reference | None = None
    ) -> Thermodynamics:
        """ΔF(T), ⟨U⟩(T), C_V(T) and φ profiles with their errors as a PNG (or PDF, SVG).

        Drawn beside `reference`, or beside the one that the configuration names. Returns what is
        drawn.
        """
        return plot_thermodynamics(self, path, reference or self.reference())


def load_run(path: str | Path) -> Run:
    """Read a run directory as it is at this moment; call again to see what has come since.

    Runs of the command line whose System is that of the shipped reference name it in their
    ``config.json`` (``reference``), and are compared with it. Runs made with the Python sampler
    name none: give one to `Run.summary`, `Run.plot` or `write_summary`, as in
    ``run.summary(reference=load_reference())``. It is for alanine dipeptide in the default force
    field only; this module does not know the System and cannot check that.

    Raises
    ------
    FileNotFoundError
        If the directory, its ``config.json`` or a segment is missing.
    ValueError
        If one of its files cannot be understood (the message names it).
    """
    return Run(path)
