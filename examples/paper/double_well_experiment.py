"""The experiment of the mixed double wells, for the figure and the benchmark.

The ladder and the reference sampler of arXiv:2012.00429, section 3, the two flows, and what is
measured of a flow at a temperature.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import forward_ess, reverse_ess
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.sampling.kernels import InternalWalk, PlainSwap, WhitenedCoordinates
from openmm_tsf.training.losses import marginal_nll_bound

#: Where flows are compared; T = 1 is where they were trained.
TEMPERATURES = (0.1, 0.14, 0.2, 0.3, 0.45, 0.67, 1.0, 1.5, 2.2, 3.0, 4.5, 6.7, 10.0)
#: Coefficients and mixing of every potential in the figure and the benchmark.
POTENTIAL_SEED = 0
#: Steps of the reference walk in an iteration; iterations between the samples that are kept.
N_WALK_STEPS, INTERVAL = 2, 4
#: Batches of draws for the reverse ESS; draws of the momenta for the tighter bound.
N_REPEATS, N_MOMENTA = 5, 16
#: Probabilities whose quantiles cut a marginal for its comparison.
CUTS = (0.1, 0.3, 0.5, 0.7, 0.9)


def ladder():
    """100 temperatures from 0.1 to 10, T = 1 among them: geometric below it and above it.

    One geometric series of 100 from 0.1 to 10 has no rung at 1, where the flows' frames come from.
    """
    return (*np.geomspace(0.1, 1.0, 51).tolist(), *np.geomspace(1.0, 10.0, 50).tolist()[1:])


@dataclass
class Reference:
    """Samples of the reference sampler at some rungs."""

    temperatures: tuple  # of the rungs kept [K]
    x: torch.Tensor  # [n, W, K, d]
    swap_acceptance: torch.Tensor  # of every pair of neighbours
    walk_acceptance: torch.Tensor  # of every rung
    n_evaluations: int  # of the whole ladder, tuning included


class _Kept:
    """A reporter that keeps the configurations of some rungs."""

    def __init__(self, rungs, interval):
        self.rungs, self.interval, self.x = rungs, interval, []

    def __call__(self, sampler, state):
        self.x.append(state.x[:, self.rungs].clone())


def walk_sampler(potential, temperatures, n_walkers, seed, n_steps=1):
    """Gaussian increments and swaps of neighbours; walkers start far from equilibrium, N(0, 1)."""
    identity = WhitenedCoordinates.identity(potential.event_shape[0])
    walk = InternalWalk(identity, potential, temperatures, name="walk", n_steps=n_steps)
    swap = PlainSwap(temperatures, potential.boltzmann_constant)
    return start_sampler(potential, identity, temperatures, [walk, swap], n_walkers, seed)


def start_sampler(potential, flow, temperatures, kernels, n_walkers, seed):
    """A sampler of these kernels whose walkers start from N(0, 1)."""
    arguments = (None, flow, temperatures, n_walkers, kernels, potential)
    sampler = tsf.ParallelTempering(*arguments, seed=seed)
    shape = (n_walkers, len(temperatures), *potential.event_shape)
    generator = torch.Generator().manual_seed(seed)
    sampler.set_positions(torch.randn(shape, dtype=torch.float64, generator=generator))
    return sampler


def kept_run(sampler, rungs, n_iterations, interval=1):
    """Run a sampler and return the configurations [n, W, K, d] of some of its rungs."""
    kept = _Kept(rungs, interval)
    sampler.reporters = [kept]
    sampler.run(n_iterations, progress=False)
    return torch.stack(kept.x)


def reference(potential, n_walkers, n_burn, n_iterations, seed):
    """The reference sampler's samples at every tenth rung (T = 1 is one of them) and the last."""
    temperatures = ladder()
    rungs = [*range(0, 100, 10), 99]
    sampler = walk_sampler(potential, temperatures, n_walkers, seed, N_WALK_STEPS)
    before = potential.n_evaluations
    # Also the burn-in, which is slow in 20-d: replicas that start in the wrong wells leave the cold
    # rungs by exchanges only. After 4000 iterations |z| was 5.4 at T = 0.1, after 8000 it was 4.2.
    sampler.tune(n_burn)
    x = kept_run(sampler, rungs, n_iterations, INTERVAL)
    return Reference(
        tuple(temperatures[rung] for rung in rungs),
        x,
        sampler.totals["swap_plain"].acceptance,
        sampler.totals["walk"].acceptance,
        potential.n_evaluations - before,
    )


def quantiles(potential, coordinate, temperature, mean, spread):
    """Points at about the probabilities of `CUTS`, and their exact probabilities."""
    grid = mean + spread * torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
    cumulative = potential.marginal(coordinate, grid, temperature)[1]
    cuts = torch.searchsorted(cumulative, torch.tensor(CUTS, dtype=torch.float64))
    return grid[cuts], cumulative[cuts]


def normal_score(estimate, exact, n_walkers):
    """Deviation in standard errors, on the scale of a normal distribution.

    A standard error from the spread of W walkers' means is itself known from W - 1 degrees of
    freedom only: the deviation over it has Student's distribution.
    """
    t = (estimate.value - exact) / estimate.stderr
    if estimate.stderr_groups < estimate.stderr_correlation:
        return t
    return math.copysign(stats.norm.isf(stats.t.sf(abs(t), n_walkers - 1)), t)


def reference_scores(potential, samples):
    """Rows of z values: every marginal against the quadrature at every temperature kept."""
    rows = []
    for k, temperature in enumerate(samples.temperatures):
        means, squares = (potential.moment(order, temperature) for order in (1, 2))
        for j in range(potential.event_shape[0]):
            values = samples.x[:, :, k, j]
            checks = [("mean", values, means[j]), ("square", values**2, squares[j])]
            spread = (squares[j] - means[j] ** 2).sqrt()
            points, probabilities = quantiles(potential, j, temperature, means[j], spread)
            for cut, point, probability in zip(CUTS, points, probabilities, strict=True):
                checks.append((f"P(x < q{100 * cut:.0f})", (values < point).double(), probability))
            for name, series, exact in checks:
                estimate = estimate_mean(series.numpy())
                rows.append(
                    {
                        "dimension": potential.event_shape[0],
                        "temperature": temperature,
                        "coordinate": j,
                        "quantity": name,
                        "exact": float(exact),
                        "found": estimate.value,
                        "stderr": estimate.stderr,
                        "z": normal_score(estimate, float(exact), samples.x.shape[1]),
                    }
                )
    return rows


# -- flows -------------------------------------------------------------------------------------


def training_frames(samples):
    """The reference's samples at T = 1; whole walkers are held out."""
    x = samples.x[:, :, samples.temperatures.index(1.0)]
    chains = torch.arange(x.shape[1]).expand(x.shape[:2])
    return tsf.MDDataset(
        x.flatten(0, 1), 1.0, n_evaluations=samples.n_evaluations, chains=chains.flatten()
    )


def make_flow(kind, dataset, n_blocks, width, seed):
    """A TSF of this width, with d momenta, or the RealNVP closest to it in parameters."""
    if kind == "TSF":
        return tsf.TemperatureSteerableFlow.from_dataset(
            dataset, n_blocks=n_blocks, hidden=(width, width), seed=seed
        )
    target = make_flow("TSF", dataset, n_blocks, width, seed).n_parameters
    flows = [
        tsf.RealNVPFlow.from_dataset(dataset, n_blocks=n_blocks, hidden=(w, w), seed=seed)
        for w in range(width, 2 * width, 4)
    ]
    return min(flows, key=lambda flow: abs(flow.n_parameters - target))


def train(kind, potential, dataset, size, settings, seed):
    """A flow of a size with ``n_blocks`` and ``width``, trained; and the result of ``fit``."""
    flow = make_flow(kind, dataset, size.n_blocks, size.width, seed)
    return flow, tsf.fit(flow, dataset, potential, settings=settings, seed=seed, progress=False)


def log_target(potential, x, momenta, temperature):
    """ln of the normalised density of (x, p) at T (T_ref = 1): the best that a flow can be."""
    log_z = potential.log_partition_function(temperature)
    log_z = log_z + 0.5 * momenta.shape[1] * math.log(2.0 * math.pi * temperature)
    return log_weight(potential.energy(x) / temperature, momenta, temperature, log_z)


def mean_and_stderr(values):
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def measure(flow, potential, temperature, n, seed):
    """NLL, its distance to the entropy, and ESS of a flow, from exact samples and from draws.

    The distance is the mean of ln(target/flow) over exact samples, momenta included: the NLL (for
    a TSF, the bound on it) less the entropy, without the noise of the energies. ``tighter`` is the
    same with `N_MOMENTA` draws of the momenta a sample, -ln of their mean weight: a TSF's NLL is
    below that, too, and a RealNVP's is that.
    """
    generator = torch.Generator().manual_seed(seed)
    x = potential.sample(n, temperature, generator)

    def weights_of(x):
        noise = torch.randn(len(x), flow.n_momenta, generator=generator, dtype=torch.float64)
        momenta = noise * temperature**0.5
        log_prob = flow.log_prob(x, momenta, temperature)
        return log_prob, log_target(potential, x, momenta, temperature) - log_prob

    log_prob, forward = weights_of(x)
    tau = torch.full((n,), temperature, dtype=torch.float64)
    nll, nll_stderr = mean_and_stderr(marginal_nll_bound(-log_prob, flow.n_momenta, tau))
    gap, gap_stderr = mean_and_stderr(forward)
    some = x[: n // 20]
    many = torch.stack([-weights_of(some)[1] for _ in range(N_MOMENTA)])
    tighter, tighter_stderr = mean_and_stderr(math.log(N_MOMENTA) - many.logsumexp(dim=0))
    reverse = []
    for _ in range(N_REPEATS):
        drawn, momenta, log_prob = flow.sample(n // N_REPEATS, temperature, generator)
        weight = log_target(potential, drawn, momenta, temperature) - log_prob
        reverse.append(reverse_ess(weight.numpy()))
    return {
        "nll": nll,
        "nll_stderr": nll_stderr,
        "entropy": potential.entropy(temperature),
        "distance": gap,
        "distance_stderr": gap_stderr,
        "distance_tighter": tighter,
        "distance_tighter_stderr": tighter_stderr,
        "reverse_ess": float(np.mean([ess.fraction for ess in reverse])),
        "reverse_ess_spread": float(np.std([ess.fraction for ess in reverse], ddof=1)),
        "largest_weight": max(ess.largest_weight for ess in reverse),
        "forward_ess": forward_ess(forward.numpy()).fraction,
    }
