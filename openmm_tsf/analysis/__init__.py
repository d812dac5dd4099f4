"""Trajectories, estimates, tables and figures of a run directory.

`load_run` reads a directory, finished or still growing. ``openmm-tsf analyze``, and every run of
the command line, writes into it (``analyze --output DIR``: into another folder, and the run is only
read)

``summary.json``
    All results as plain numbers; its keys are explained in `openmm_tsf.analysis.summary`. Its
    ``verdict`` says whether the run is converged, not yet, or wrong, with reasons
    (`openmm_tsf.analysis.verdict`); its ``monitor`` reports mirror images, proposals outside the
    domain, basins lost, branch cuts that leak, and cis bonds.
``report.html``
    The verdict, tables and figures on one page for a browser; it needs no network.
``ramachandran.png``
    (φ, ψ) of run and reference, histograms of φ and energy, per temperature; of the first residue
    whose φ and ψ were recorded.
``torsions.png``, ``torsions_2.png``, ...
    Of each residue: (φ, ψ), histograms of its torsions, running populations of their wells. Not of
    a run whose φ and ψ are all that it recorded.
``observables.png``
    Histograms and running estimates of U and of what is observed; if anything is, or there is no
    ``ramachandran.png``.
``diagnostics.png``
    Acceptance, exchange of replicas, running estimates.
``thermodynamics.csv``
    ⟨U⟩, the configurational C_V and ΔF_φ as functions of temperature by MBAR, with standard errors
    and Kish's effective sample size.
``thermodynamics.json``
    The same (``functions``), profiles of every rung (``profiles``) along a dihedral
    (``profile_of``: the first φ, unless it has one sign only), the values of the reference
    (``reference``) and their difference in standard errors (``z``).
``thermodynamics.png``
    The same as a figure.

Between the rungs
-----------------
`Run.at` returns the frames of all rungs with weights for any temperature of the ladder, `Run.curve`
the mean of any observable as a function of temperature with its error; `Run.thermodynamics`,
`Run.free_energy_difference` and `Run.profile` take any temperature, too. All are by MBAR.

Observables
-----------
``--observe`` of run, sample, analyze, at, certify and plan, or `Run.observe` and ``observe=`` from
Python, name what else is of interest: ``chi1=dihedral:6,8,10,13``, ``d=distance:ACE1:CH3,NME3:C``,
``bend=angle:4,6,8``, the name of a slow torsion, or any function of an mdtraj trajectory that
returns a number for each frame (``rg=file.py:function``, ``rg=module:function``); see
`openmm_tsf.analysis.observables`. Of a dihedral the probabilities of its wells and of a positive
angle are estimated, of all others the mean; they count for the verdict, and targets of precision
may be about them: ``d < 0.01 nm``, ``P(d < 0.35) < 10 %``, ``dF(chi1) < 0.1 kT``. run and sample
record the definitions. Functions are recorded by name only, and have to be given again: code that a
run directory names is never imported. All are evaluated from the frames, whose coordinates have
single precision.

Conventions
-----------
Energy evaluation
    One energy, or one energy with forces, of one conformation. A step of MD is one.
Start
    Every estimate, figure and comparison leaves out the iterations before the run had equilibrated,
    which are found from the data (`openmm_tsf.analysis.burn_in`): none of a stationary run. Costs,
    acceptance and exchange of replicas are those of all. ``load_run(path, start=0)`` keeps all.
ΔF_φ
    -ln[P(φ > 0)/P(φ < 0)] in kT. φ of alanine dipeptide: atoms 4 6 8 14; ψ: 6 8 14 16.
Standard errors
    From the statistical inefficiency g over all walkers around their pooled mean
    (``pymbar.timeseries.statistical_inefficiency_multiple``), and from the spread of the walkers'
    means; the larger of the two is reported. By MBAR: the same for the series of influences on the
    estimate (`openmm_tsf.analysis.mbar`).
N_eff
    p(1-p)/SE² of a probability; variance/SE² of any other mean.
Intervals
    95 %, by Student's distribution; of probabilities by Clopper and Pearson's for N_eff, with one
    more visit as long as the longest. States that were never visited have an upper bound.
Converged
    At least 100 effective samples, split-R̂ at most 1.05, halves that agree within 3 standard
    errors; of a probability also 16 effective successes and failures, and 50 independent visits
    (`openmm_tsf.analysis.convergence`).
Ramachandran distance
    Total variation ½Σ|p - q| on 64×64 bins, and KL(reference ‖ sample) with 1e-10 added to every
    bin, beside their floor: the same between two blocks of the reference that each have as many
    decorrelated frames as the run.
"""

from openmm_tsf.analysis.analyze import write_thermodynamics
from openmm_tsf.analysis.comparison import compare_thermodynamics, compare_with_reference
from openmm_tsf.analysis.curve import Curve
from openmm_tsf.analysis.importance import (
    ImportanceEstimate,
    importance_profile,
    importance_thermodynamics,
)
from openmm_tsf.analysis.load import Run, load_run
from openmm_tsf.analysis.plots.diagnostics import plot_diagnostics
from openmm_tsf.analysis.plots.ramachandran import plot_ramachandran
from openmm_tsf.analysis.plots.thermodynamics import plot_thermodynamics
from openmm_tsf.analysis.reference import Reference, load_reference
from openmm_tsf.analysis.summary import write_summary
from openmm_tsf.analysis.thermodynamics import Profile, Thermodynamics
from openmm_tsf.analysis.weighted_frames import WeightedTrajectory

__all__ = [
    "Curve",
    "ImportanceEstimate",
    "Profile",
    "Reference",
    "Run",
    "Thermodynamics",
    "WeightedTrajectory",
    "compare_thermodynamics",
    "compare_with_reference",
    "importance_profile",
    "importance_thermodynamics",
    "load_reference",
    "load_run",
    "plot_diagnostics",
    "plot_ramachandran",
    "plot_thermodynamics",
    "write_summary",
    "write_thermodynamics",
]
