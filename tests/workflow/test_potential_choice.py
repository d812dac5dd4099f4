"""Which potential a run uses."""

from openmm_tsf.sampling.kernels.schedule import SequenceSettings
from openmm_tsf.workflow.potential_choice import planned_sampling
from openmm_tsf.workflow.settings import SamplingSettings


def test_planned_evaluations_include_dynamics():
    numbers = {"n_walkers": 5, "n_iterations": 70, "n_tuning": 10, "temperatures": (300.0, 600.0)}
    without = SamplingSettings(**numbers, n_independent=2, local_interval=0)
    often = SamplingSettings(**numbers, n_independent=2, local_interval=4)
    of_dynamics = planned_sampling(often) - planned_sampling(without)
    assert of_dynamics == 5 * 2 * 80 // 4 * (SequenceSettings().local_steps + 1)
