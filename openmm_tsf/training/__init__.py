"""Training a flow: (1 - lambda) likelihood + lambda energy (eqs. 5 and 6 of arXiv:2012.00429).

The presets ``default`` and ``thorough`` train with settings like these::

    settings = FitSettings(
        n_steps=2500, kl_batch_size=510, optimizer="muon", learning_rate=1e-2,
        final_learning_rate=1e-4, lambda_max=0.5, ramp=(0.08, 0.3), temperatures=(300, 424, 600),
        estimator="path", n_chains=2048, chain_share=0.8, log_variance=0.05, basin_balance=0.3,
    )
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=6, overlap=True, seed=1)
    fit(flow, dataset, potential=molecule.potential(compile=True), settings=settings)

What each part does:

- ``estimator="direct"`` differentiates both losses directly. The norm of a sample's gradient does
  not shrink as the flow improves, so late training fits noise.
- ``estimator="path"`` uses path gradients of both divergences (arXiv:1703.09194, 2403.15881): the
  same mean, but zero at every point of an exact flow. They need the forces at the frames, once. Two
  threads are used, one for data and one for draws.
- ``optimizer="muon"`` makes the step of every weight matrix orthogonal, so that all its directions
  move equally; with path gradients a step is worth many steps of Adam.
- ``n_chains`` Markov chains at each temperature take the flow's draws as independence proposals,
  without further evaluations. Their states are data at temperatures without frames and hold the
  basins that energy training loses. They start at frames of another temperature, which 60 Langevin
  steps (one evaluation each) relax to the chain's: without them, chains in a rare basin, which
  accept few proposals, would keep the frames' temperature for most of the training.
- ``log_variance`` and ``basin_balance`` weight two terms that make ln(p/q) constant, over the data
  and from basin to basin. The ratio of a basin's probabilities under the Boltzmann density and
  the flow is Bennett's estimate from data and draws; the correction uses grad ln q at the flow's
  draws, which path gradients compute anyway
  (:class:`openmm_tsf.training.basin_populations.Populations`).
- ``overlap=True`` of the flow lets the copies of a configuration overlap that differ by the labels
  of equivalent hydrogens. If they are disjoint, the density ends abruptly at their boundary, which
  the flow cannot represent, and its draws beyond the boundary are lost. With overlap, one copy of a
  configuration is drawn by a smooth partition of unity, as momenta are drawn, and the Metropolis
  test includes its weight.

``examples/benchmarks/training_trials.py`` trains the same flow without each of them. After 500
steps on the shipped frames of alanine dipeptide (one seed each; reverse ESS is noisy), the
acceptance of steered swaps 300-600 K was 0.53 with all of them, 0.52 without the population terms,
0.44 without overlap of copies, 0.41 with Adam, 0.36 without chains and 0.30 with direct gradients;
P(phi > 0) at 300 K, relative to the reference, was 0.27, 0.11, 0.24, 0.18, 0.06 and 0.03. So short
a training is far from converged.

A flow and a potential on a GPU (``flow.to("cuda")``, ``molecule.potential(device="cuda")``) are
trained there, with the random numbers of that device; frames are moved to it. A step waits for the
GPU once. Checkpoints hold CPU tensors, and continue on the kind of device where they were made.

The presets are tested on alanine dipeptide in two force fields. For other Systems look at
``training.csv`` first (the best weights are kept), and lower ``learning_rate`` or ``basin_balance``
where the validation gets worse.
"""

from openmm_tsf.training.fit import FitResult, fit
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.validation import Validation

__all__ = ["FitResult", "FitSettings", "Validation", "fit"]
