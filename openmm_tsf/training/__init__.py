"""Training a flow: (1 - lambda) likelihood + lambda energy (eqs. 5 and 6 of arXiv:2012.00429).

The presets ``default`` and ``thorough`` train with settings like these::

    settings = FitSettings(
        n_steps=2500, kl_batch_size=510, optimizer="muon", learning_rate=1e-2,
        final_learning_rate=1e-4, lambda_max=0.5, ramp=(0.08, 0.3), temperatures=(300, 424, 600),
        estimator="path", n_chains=2048, chain_share=0.8, log_variance=0.05, basin_balance=0.3,
    )
    flow = TemperatureSteerableFlow.from_dataset(dataset, n_blocks=6, overlap=True, seed=1)
    fit(flow, dataset, potential=molecule.potential(compile=True), settings=settings)

:class:`FitSettings` says what each of them does. Path gradients need the forces at the frames, and
chains 60 more evaluations each at temperatures without frames, once. ``overlap=True`` of the flow
lets the copies of a configuration that a methyl group's equivalent hydrogens make fade into each
other: with walls between them the density ends in a step that the flow cannot represent.

``examples/benchmarks/training_trials.py`` trains the same flow without each of them. After 500
steps on the shipped frames of alanine dipeptide (one seed each; reverse ESS is noisy), the
acceptance of steered swaps 300-600 K was 0.53 with all of them, 0.52 without the population terms,
0.44 with walls between copies, 0.41 with Adam, 0.36 without chains and 0.30 with direct gradients;
P(phi > 0) at 300 K, relative to the reference, was 0.27, 0.11, 0.24, 0.18, 0.06 and 0.03. So short
a training is far from converged.

The presets are tested on alanine dipeptide in two force fields. For other Systems look at
``training.csv`` first (the best weights are kept), and lower ``learning_rate`` or ``basin_balance``
where the validation gets worse.
"""

from openmm_tsf.training.fit import FitResult, fit
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.validation import Validation

__all__ = ["FitResult", "FitSettings", "Validation", "fit"]
