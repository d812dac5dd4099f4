"""The experiment of the mixed double wells: its reference sampler, its flows, its picture."""

import math

import numpy as np
import pytest
import torch

from openmm_tsf.potentials import DoubleWell, MixedDoubleWell
from openmm_tsf.systems.dataset import MDDataset
from tests.support.examples import load_example


@pytest.fixture
def experiment():
    return load_example("paper/double_well_experiment.py")


@pytest.fixture
def double_wells(experiment):
    load_example("paper/double_wells_figure.py")
    return load_example("paper/double_wells.py")


def harmonic(d):
    """U = |x|²/2, which a flow that is the identity has exactly, at every temperature."""
    half = 0.5 * torch.ones(d, dtype=torch.float64)
    wells = DoubleWell(torch.zeros_like(half), half, torch.zeros_like(half))
    return MixedDoubleWell(wells, torch.eye(d, dtype=torch.float64))


def test_the_ladder(experiment):
    ladder = experiment.ladder()
    assert len(ladder) == len(set(ladder)) == 100
    assert (ladder[0], ladder[50], ladder[99]) == (0.1, 1.0, pytest.approx(10.0))
    ratios = np.diff(np.log(ladder)) / (math.log(100) / 99)
    assert 0.98 < ratios.min() <= ratios.max() < 1.03


@pytest.mark.parametrize("d", [5, 20])
def test_flows_are_of_comparable_size(experiment, double_wells, d):
    size = double_wells.SIZES[d]
    dataset = MDDataset(torch.randn(100, d, dtype=torch.float64), 1.0)
    arguments = (dataset, size.n_blocks, size.width, 1)
    flows = [experiment.make_flow(kind, *arguments) for kind in double_wells.KINDS]
    assert [flow.n_momenta for flow in flows] == [d, 0]
    counts = [flow.n_parameters for flow in flows]
    assert counts[0] == pytest.approx(counts[1], rel=0.03)


@pytest.mark.parametrize("kind", ["TSF", "RealNVP"])
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_an_exact_flow_has_the_entropy_as_its_nll(experiment, kind, temperature):
    potential = harmonic(4)
    frames = potential.sample(100, 1.0, torch.Generator().manual_seed(0))
    flow = experiment.make_flow(kind, MDDataset(frames, 1.0), 2, 8, 1)
    measured = experiment.measure(flow, potential, temperature, 2000, 3)
    for name in ("distance", "distance_tighter"):
        assert measured[name] == pytest.approx(0.0, abs=1e-9)
    assert abs(measured["nll"] - measured["entropy"]) < 4 * measured["nll_stderr"]
    assert measured["entropy"] == pytest.approx(2.0 + 2.0 * math.log(2 * math.pi * temperature))
    assert measured["reverse_ess"] == pytest.approx(1.0)
    assert measured["forward_ess"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["TSF", "RealNVP"])
def test_distances_of_a_flow_that_is_not_exact(experiment, kind):
    """Both estimates of the NLL agree, and more momenta cannot make a bound worse."""
    potential = MixedDoubleWell.random(4, 1)
    frames = potential.sample(100, 1.0, torch.Generator().manual_seed(0))
    flow = experiment.make_flow(kind, MDDataset(frames, 1.0), 2, 8, 1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(2)
            )
    measured = experiment.measure(flow, potential, 1.0, 20_000, 3)
    error = math.hypot(measured["nll_stderr"], measured["distance_stderr"])
    assert abs(measured["nll"] - measured["entropy"] - measured["distance"]) < 4 * error
    assert measured["distance"] > 0.05
    error = math.hypot(measured["distance_stderr"], measured["distance_tighter_stderr"])
    assert measured["distance_tighter"] < measured["distance"] + 4 * error
    if kind == "RealNVP":  # there are no momenta: the same number, of a tenth of the samples
        assert abs(measured["distance_tighter"] - measured["distance"]) < 4 * error


def test_frames_hold_out_whole_walkers(experiment):
    x = torch.randn(10, 8, 2, 3, dtype=torch.float64)
    samples = experiment.Reference((0.1, 1.0), x, None, None, 77)
    dataset = experiment.training_frames(samples)
    assert (len(dataset), dataset.temperature, dataset.n_evaluations) == (80, 1.0, 77)
    assert torch.equal(dataset[dataset.chains == 3].positions, x[:, 3, 1])


@pytest.mark.filterwarnings("ignore:tune")
def test_the_short_form(double_wells, tmp_path):
    """Reference, one training of each kind, table and picture: numbers mean nothing here."""
    from double_wells_figure import plot_double_wells

    size, rows, draws = double_wells.QUICK[5], [], {}
    reference = double_wells.sample_reference(5, size)
    z = [row["z"] for row in reference["rows"]]
    assert len(z) == 11 * 5 * 7
    assert np.isfinite(z).mean() > 0.9  # a fraction that never varies in so few frames has no error
    for kind in double_wells.KINDS:
        for seed in (1, 2):
            measured, training, draws[kind] = double_wells.train_and_measure(
                5, kind, seed, size, reference["dataset"]
            )
            rows += measured
            assert training["n_evaluations"] > 0
    table = double_wells.table(rows, size.temperatures).splitlines()
    assert [line.count("|") for line in table] == [table[0].count("|")] * 4
    potential = MixedDoubleWell.random(5, double_wells.POTENTIAL_SEED)
    marginals = {
        t: {"exact": double_wells.exact_marginals(potential, float(t)), "sampler": sampled}
        | {kind: draws[kind][t] for kind in double_wells.KINDS}
        for t, sampled in reference["marginals"].items()
    }
    path = tmp_path / "figure.png"
    plot_double_wells(path, {"rows": rows, "marginals": marginals})
    assert path.stat().st_size > 50_000


@pytest.mark.slow
def test_the_reference_sampler_agrees_with_the_quadrature(experiment):
    """Every marginal at every tenth temperature: mean, square and five cumulative probabilities."""
    potential = MixedDoubleWell.random(5, 0)
    samples = experiment.reference(potential, 16, 4000, 4000, seed=1)
    rows = experiment.reference_scores(potential, samples)
    worst = max(rows, key=lambda row: abs(row["z"]))
    assert abs(worst["z"]) < 4, worst
