"""Local chains of a φ⁴ model, flows trained on them, and their acceptance as proposals."""

import numpy as np
import torch

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import reverse_ess, reverse_ess_stderr
from openmm_tsf.flows.draws import draw_weighted, weigh
from openmm_tsf.sampling.kernels import LatentHMC
from openmm_tsf.training.trainer import Trainer

N_DRAWS, N_GROUPS = 2000, 10


def gaussian_flow(base, temperature):
    """Return a flow that is the Gaussian of a base measure, untrained and of the smallest size."""
    frames = tsf.MDDataset(torch.zeros(1, *base.event_shape), temperature)
    return tsf.RealNVPFlow.from_dataset(frames, base=base, n_blocks=1, hidden=(1,))


def local_kernel(base, potential, temperature):
    """Return Hamiltonian Monte Carlo with the base measure's covariance as inverse mass matrix."""
    flow = gaussian_flow(base, temperature)
    return LatentHMC(flow, potential, (temperature,), sigma=0.5, n_leapfrog=4)


def local_chains(base, potential, temperature, start, n_tune, n_iterations, seed):
    """Return the frames of local chains from `start` [W, d], as a dataset."""
    kernel = local_kernel(base, potential, temperature)
    parts = (None, kernel.flow, (temperature,), len(start), [kernel], potential)
    sampler = tsf.ParallelTempering(*parts, seed=seed)
    sampler.set_positions(start[:, None])
    sampler.tune(n_tune)
    x = sampler.run(n_iterations, collect=True, progress=False)[:, :, 0]
    chains = torch.arange(len(start)).expand(x.shape[:2]).flatten()
    return tsf.MDDataset(x.flatten(0, 1), temperature, chains=chains)


def likelihood_settings(n_steps):
    """Return how the flows are trained: by the likelihood of frames, with path gradients.

    Differentiated directly, the likelihood of a hundred sites is soon overfitted; path gradients,
    which use the forces at the frames, are zero where the flow is right.
    """
    return tsf.FitSettings(
        n_steps=n_steps, estimator="path", lambda_max=0.0, learning_rate=2e-3, ema_decay=0.99
    )


@torch.no_grad()
def proposal_quality(flow, potential, temperature, held_out, generator, n_draws=N_DRAWS):
    """Return the acceptance and effective sample size of a flow's draws, with standard errors.

    The acceptance is E min(1, w'/w) of draws (w') proposed to held-out frames of the target (w);
    its error is from the spread of groups of both.
    """
    draws = draw_weighted(flow, potential, temperature, n_draws, generator).log_weights
    energy = potential.energy(held_out) / temperature
    at_frames = weigh(flow, held_out, energy, temperature, generator)
    groups = zip(draws.chunk(N_GROUPS), at_frames.chunk(N_GROUPS), strict=True)
    rates = [float((new - old[:, None]).clamp(max=0.0).exp().mean()) for new, old in groups]
    ess = reverse_ess(draws).fraction, reverse_ess_stderr(draws)
    return {
        "acceptance": [float(np.mean(rates)), float(np.std(rates, ddof=1) / N_GROUPS**0.5)],
        "ess": list(ess),
        "log_weight_variance": float(draws.var()),
        "forward_variance": float(at_frames.var()),
    }


def train(flow, dataset, potential, settings, n_measured, seed):
    """Train a flow by `settings`; return its quality at `n_measured` times from start to end."""
    temperature = dataset.temperature
    trainer = Trainer(flow, [dataset], potential, settings, seed)
    test = dataset.split().test.positions
    held_out = test[:: max(1, len(test) // N_DRAWS)][:N_DRAWS]
    generator = torch.Generator().manual_seed(seed)
    measured = np.linspace(0, settings.n_steps, n_measured).round().astype(int).tolist()
    rows = []
    while True:
        if trainer.step in measured:
            flow.network.load_state_dict(trainer.average.state_dict())
            quality = proposal_quality(flow, potential, temperature, held_out, generator)
            rows.append({"step": trainer.step, **quality})
        if trainer.is_complete:
            return rows
        trainer.train_step()
