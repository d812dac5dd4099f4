"""Load a run directory, finished or still growing."""

from pathlib import Path
from typing import Any

from openmm_tsf.analysis.estimates import RunEstimates
from openmm_tsf.analysis.plots.ramachandran import plot_ramachandran
from openmm_tsf.analysis.plots.thermodynamics import plot_thermodynamics
from openmm_tsf.analysis.plots.torsions import plot_observables
from openmm_tsf.analysis.reference import Reference
from openmm_tsf.analysis.summary import summarize
from openmm_tsf.analysis.thermodynamics import Thermodynamics


class Run(RunEstimates):
    """A run directory as numpy, mdtraj and pymbar objects, as `load_run` returns it.

    Arrays have the axes [n, W, R]: saved iterations, walkers, rungs. Temperatures are in K,
    energies in kJ/mol, angles in rad, lengths in nm. Iterations before the start of equilibrated
    sampling are left out of every array and estimate; costs, acceptance and exchange of replicas
    are those of all.

    Attributes
    ----------
    path, config
        The directory, and the content of its ``config.json``.
    temperatures, n_walkers
        [R] in K, ascending; W.
    boltzmann_constant
        In kJ/(mol K), or 1 for toy systems.
    start, burn_in
        The first saved iteration that is used; what was found in the data (a `BurnIn`).
    n_iterations, n_used
        Iterations saved so far, and those of them from the start on, n.
    energy, dihedrals, replica, iteration
        Of the iterations that are used: energies [n, W, R], dihedrals [n, W, R, D], the replica at
        each rung [n, W, R], and the sampler's count of iterations [n].
    dihedral_atoms, segments
        Names of the recorded dihedrals and their atoms; all numbers written so far.
    shards
        Of a run in shards, which of them are used and why others are not
        (`openmm_tsf.io.sharded_segments.ShardedSegments`); else None. The walkers are those of all
        shards that are used, side by side.
    topology, structure
        The molecule as an mdtraj.Topology, with the bonds that the sampler was given, and its
        reference conformation as one frame.

    Examples
    --------
    A short run on a double well, without a molecule:

    >>> import torch
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.potentials.toy import DoubleWell
    >>> flow = tsf.TemperatureSteerableFlow(1, 2, 1, (4,))
    >>> well = DoubleWell(0.0, -1.0, 0.25)
    >>> sampler = tsf.ParallelTempering(
    ...     None, flow, [1.0, 2.0], n_walkers=16, potential=well, seed=1
    ... )
    >>> sampler.set_positions(torch.zeros(16, 2, 1))
    >>> _ = sampler.run(20, output="run", progress=False)

    >>> run = tsf.load_run("run")
    >>> run.energies(temperature=2.0).shape
    (20, 16)
    >>> run.mean_energy(1.0).value < run.mean_energy(2.0).value
    True
    >>> u_kn, n_k = run.u_kn()
    >>> u_kn.shape, n_k.tolist()
    ((2, 640), [320, 320])

    Any observable at any temperature, by MBAR over all rungs:

    >>> curve = run.curve("energy", [1.2, 1.6])
    >>> curve.value.shape == curve.stderr.shape == (2,)
    True

    Of a molecule's run, ``run.trajectory(300)`` has the frames of a rung, ``run.at(350)`` those of
    all rungs with their weights at 350 K, ``run.ramachandran(300)`` φ and ψ,
    ``run.observable("distance:3,17")`` the values of an observable in all samples, and
    ``run.free_energy_difference(lambda frames: ..., 350)`` a free-energy difference. What
    ``run.observe({"d": "distance:3,17"})`` names is in the summary, too.
    """

    def summary(self, reference: Reference | None = None) -> dict[str, Any]:
        """Return the content of ``summary.json``; see `openmm_tsf.analysis.summary`.

        The run is compared with `reference`, by default with the one that its configuration names.
        """
        return summarize(self, reference or self.reference())

    def plot(
        self, path: str | Path, reference: Reference | None = None, residue: int | None = None
    ) -> None:
        """Plot Ramachandran maps and histograms of φ and energy of every rung (PNG, PDF or SVG).

        Of the given residue (see `backbone`), beside `reference`, by default the one that the
        configuration names. Of a run without any φ and ψ of one residue: histograms and running
        estimates of the energy, of the recorded torsions and of the observables.
        """
        if residue is None and not self.has_backbone:
            plot_observables(self, path, self.dihedral_atoms)
        else:
            plot_ramachandran(self, path, reference or self.reference(), residue)

    def plot_thermodynamics(
        self, path: str | Path, reference: Reference | None = None
    ) -> Thermodynamics:
        """Plot ΔF(T), ⟨U⟩(T), C_V(T) and φ profiles with their errors, and return them.

        They are drawn beside `reference`, by default the one that the configuration names.
        """
        return plot_thermodynamics(self, path, reference or self.reference())


def load_run(path: str | Path, start: int | None = None) -> Run:
    """Read a run directory as it is now; call again to see what was written since.

    Its first `start` saved iterations are left out of every array and estimate. By default they are
    found from the data (see `openmm_tsf.analysis.burn_in`); 0 keeps all.

    Runs of the command line whose System is that of the shipped reference name it in their
    ``config.json`` (``reference``), and are compared with it. Runs of the Python sampler name none:
    pass one to `Run.summary`, `Run.plot` or `write_summary`, as in
    ``run.summary(reference=load_reference())``. It is valid only for alanine dipeptide in the
    default force field, which is not checked there.
    """
    return Run(path, start)
