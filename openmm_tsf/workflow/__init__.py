"""The stages of a run: MD, training, replica exchange, analysis; and all of them in one.

Functions are imported from their modules::

    from openmm_tsf.workflow.run import run
    from openmm_tsf.workflow.md import run_md
    from openmm_tsf.workflow.train import train
    from openmm_tsf.workflow.sample import sample
    from openmm_tsf.workflow.adapt import adapt
    from openmm_tsf.workflow.at import sample_at
    from openmm_tsf.workflow.retarget import retarget
    from openmm_tsf.workflow.plan import plan
    from openmm_tsf.workflow.temperatures import choose_temperatures

All but ``adapt``, adaptive MCMC, are the commands of ``openmm-tsf``, with
:class:`openmm_tsf.workflow.options.RunOptions`. An error of a command is one line and exit status
2; ``--debug`` shows the traceback.

The run directory
-----------------
``topology.pdb``, ``system.xml``, ``positions.npz``, ``topology.json``
    The molecule. The package reads the last three, with all bonds as given; the first is for other
    programs.
``T300.00K.dcd``, ...
    One trajectory per temperature: frames iteration by iteration, with the walkers inside.
``segments/``
    Energies, replicas, dihedrals [n_iterations, walkers, rungs] and the counts of every kernel.
    Where frames were saved less often, ``frame_iteration`` says which iterations have some.
``flow.pt``, ``training.csv``
    The flow and the log of its training.
``checkpoint.pt``
    The state that production continues from.
``config.json``
    The settings of the stage and every choice made since, measured ones included; see
    :mod:`openmm_tsf.io.run_config`. All stages write it, and it is the first file of each.
``summary.json``, ``report.html``, ``ramachandran.png``, ``torsions*.png``, ``observables.png``,
``diagnostics.png``, ``thermodynamics.{csv,json,png}``
    The analysis: the report is a page for a browser; thermodynamics has ΔF of φ, ⟨U⟩ and C_V at
    all temperatures by MBAR.

The md stage continues from ``checkpoint.npz``, the train stage from ``training.pt``; ``run`` keeps
theirs in ``md/`` and ``training/``.

``openmm-tsf at`` (``tsf.sample_at``) writes no directory but two files, ``350K.dcd`` and
``350K.json``: frames drawn at one temperature with a run's flow, and their record. Both appear at
the end, together, so that what is stopped starts again: 10 000 frames of alanine dipeptide take
less than a minute.

Another System with the same flow
---------------------------------
``openmm-tsf retarget run/ --output other/`` (``tsf.retarget``) with another force field, model of
the solvent or restraint samples it with the flow of a run, without training: the flow proposes, and
the other System's energy decides. ``other/`` is a run directory, with ``retarget.json``: the
free-energy difference of both Systems and their averages side by side. By default some 2e5
evaluations. Where few proposals are accepted, the Systems are too far apart for this flow: train
one on MD of the other System.

Planning, and stopping when it is enough
----------------------------------------
``plan "dF(phi) < 0.05 kT"`` predicts from a pilot of a minute what a standard error costs, by plain
replica exchange of dynamics and by a run, and says whether a flow pays. ``--until`` with the same
words stops production once the error is reached by a converged estimate; ``--iterations`` is then
the most. The words are those of :class:`openmm_tsf.analysis.targets.Target`; why stopping does not
bias the estimate is said in :mod:`openmm_tsf.workflow.until`. ``--temperatures auto 300 600``
chooses the ladder between two ends from the rejections of swaps in a pilot of ten seconds.

On a GPU
--------
``--device cuda`` (``RunOptions(device="cuda")``) keeps the flow, its training, the walkers and
their energies on a GPU, which an iteration waits for once; few walkers do not fill it. Its random
numbers are others than the CPU's, so that a run goes on with the kind of device on which it
started; ``config.json`` and the checkpoint say which. Files hold nothing of the GPU, and are read
on any machine. MD, pilots and analysis stay as they are. Energies that torch does not cover are
OpenMM's, one conformation after the other, and a warning says so.

Writing
-------
Frames are 12 bytes an atom, walker, temperature and iteration; numbers are some 20 bytes.
``--save-interval 10 --numbers-interval 1`` saves every tenth frame and all numbers, which ⟨U⟩, MBAR
and recorded torsions are estimated from; without ``--numbers-interval`` both are thinned. Either
leaves the chain as it is. A thread writes while the next iterations are sampled: at most one
segment (256 MiB) is under way, and a disk that is slower than the sampler holds it up. A checkpoint
is written after what it claims.

Many walkers in shards
----------------------
``--shards S`` divides the walkers of a run into S parts (``SamplingSettings(n_shards=S)``), fixed
when it begins. MD, training and tuning are done once; then each shard is sampled by itself in
``run/shards/0000/``, ..., a run directory as above with its own random numbers, lock and
checkpoint. This process samples them one after the other; ``--prepare`` stops before, and then one
process for each ``--shard K`` samples (a job array); the ranks of ``torchrun`` or ``srun`` divide
them. Whoever samples a shard gets the same bits, and the number of processes may change on resume.
``tsf.load_run("run")``, ``analyze run/`` and the report read all shards as one run, and say which
were left out, and why; ``doctor run/`` lists their states. One that fails leaves the others going
on, and the exit status is 2. A run in shards is lengthened by ``run --output run/ --iterations 5000
--resume``; ``--until`` needs a single shard. See :mod:`openmm_tsf.workflow.shards`.

Stopping and resuming
---------------------
``--resume`` (``RunOptions(resume=True)``) continues wherever a stage stopped: in MD, training, a
round, or production. Where nothing was started yet, it starts, so that a job script may always pass
it. Ctrl-C and SIGTERM end a stage with everything written. After ``kill -9``, a crash or a full
disk at most the work since the last checkpoint is repeated (``--checkpoint-seconds``, 30 by
default). Tuning and the sampling of a round start again, and MD on a GPU has checkpoints every
million steps only.

On the same machine with as many threads the result is the same, bit by bit, as without the stop:
what was measured at the first start, such as the platform, is read from ``config.json``. MD on
several threads of OpenMM's CPU platform is the exception, since its sums depend on the order in
which the threads end; it has one thread by default.

Other arguments need not be repeated. Those that are must be the same, but for two totals that may
grow, the frames of MD and the iterations of production, and for ``--until``.
``sample --output run/ --iterations 5000 --resume`` lengthens a run that is complete.

A directory belongs to one process at a time. A second one is refused, with the name of the first;
the lock of a process that ended has no effect. (It is ``flock``: on a file system without it, the
``.lock`` of another host may have to be deleted. Where two hosts do not see each other's locks, the
process whose directory was taken over stops before its next checkpoint, by the token of the owner
beside the lock.) A directory that is not empty is refused
without ``--resume``. Every file is either complete or absent, except trajectories, which grow and
are cut back to their checkpoint; ``tsf.load_run`` can read at any moment. No file is unpickled, and
OpenMM's XML is read without the parts that may contain Python code: directories from untrusted
sources can be opened, analysed and resumed.
"""
