"""φ⁴ in one dimension: base measures, the free energy of two states, and a restraint.

    python examples/lecture/phi4_chain.py --output examples/results/lecture

The field on [0, 1] with φ(0) = φ(1) = 0, 100 sites, two states that no local move connects. Flows
on a coupled and on an uncoupled Gaussian base measure learn from local chains in both states. The
better one then samples under a field b it never saw, frozen: the free-energy difference of the
states, by weights of its draws and by Metropolis-Hastings, beside the exact one. Last, a flow for
the field with a restrained mean, and its profile. Writes phi4_chain.json and .png, in two
minutes.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from phi4_training import likelihood_settings, local_chains, local_kernel, train
from tasks import in_parallel

import openmm_tsf as tsf
from openmm_tsf.analysis.plots.style import FONT, REFERENCE_COLOUR, RUN_COLOUR, save_figure
from openmm_tsf.analysis.statistics import log_mean_weight, logit_free_energy, weighted_mean
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.io.files import write_json
from openmm_tsf.potentials import PhiFourChain
from openmm_tsf.sampling.kernels import FlowIndependence

N_SITES, TEMPERATURE, BASE_VARIANCE = 100, 0.01, 1.0
FIELDS = (0.0, 0.007, 0.014, 0.02)
RESTRAINT, RESTRAINED_MEAN = 10.0, 0.7
BLOCKS, HIDDEN = 4, (64, 64)
N_MEASURED = 9
BASES = {"coupled": RUN_COLOUR, "uncoupled": REFERENCE_COLOUR}


def profile(mean=None):
    """Return the field of least energy, [N]: that of the upper state, scaled to a mean."""
    s = torch.arange(1, N_SITES + 1, dtype=torch.float64) / (N_SITES + 1)
    width = math.sqrt(PhiFourChain(N_SITES).stiffness)
    field = torch.tanh(s / width) * torch.tanh((1.0 - s) / width)
    return field if mean is None else field * mean / (field.sum() / (N_SITES + 1))


def make_flow(chain, which, dataset, seed):
    """Return a flow on the coupled or on the uncoupled base measure."""
    base = getattr(chain, f"{which}_gaussian")(BASE_VARIANCE)
    sizes = {"n_blocks": BLOCKS, "hidden": HIDDEN}
    return tsf.RealNVPFlow.from_dataset(dataset, base=base, seed=seed, **sizes)


def learn(chain, which, start, options):
    """Return a flow trained on local chains, and its quality meanwhile."""
    base = chain.coupled_gaussian(BASE_VARIANCE)
    lengths = options.tuning, options.frames
    dataset = local_chains(base, chain, TEMPERATURE, start, *lengths, options.seed)
    flow = make_flow(chain, which, dataset, options.seed)
    settings = likelihood_settings(options.steps)
    return flow, train(flow, dataset, chain, settings, N_MEASURED, options.seed)


def positive(x):
    """Return whether the middle site is positive, of x [..., N], as numbers."""
    return (x[..., N_SITES // 2] > 0).double()


def mixed_chain(flow, chain, start, options):
    """Return frames [n, W, N] of local steps and proposals of a frozen flow; its acceptance."""
    ladder = (TEMPERATURE,)
    local = local_kernel(chain.coupled_gaussian(BASE_VARIANCE), chain, TEMPERATURE)
    moves = [FlowIndependence(flow, chain, ladder, n_steps=2), local]
    parts = (None, flow, ladder, len(start), moves, chain)
    sampler = tsf.ParallelTempering(*parts, seed=options.seed)
    sampler.set_positions(start[:, None])
    sampler.tune(options.tuning)
    x = sampler.run(options.iterations, collect=True, progress=False)[:, :, 0]
    return x, float(sampler.totals["flow_independent"].acceptance[0])


def free_energies(flow, start, options):
    """Return ln [P(up)/P(down)] under fields, by weights of draws and by Markov chains."""
    rows = []
    for number, field in enumerate(FIELDS):
        chain = PhiFourChain(N_SITES, field=field)
        p = float(chain.probability_positive(TEMPERATURE)[N_SITES // 2])
        generator = torch.Generator().manual_seed(options.seed + number)
        draws = draw_weighted(flow, chain, TEMPERATURE, options.draws, generator)
        weighted = weighted_mean(positive(draws.x), draws.log_weights)
        log_z = log_mean_weight(draws.log_weights)
        x, acceptance = mixed_chain(flow, chain, start, options)
        estimate = estimate_mean(positive(x).numpy())
        row = {"field": field, "exact": math.log(p / (1.0 - p)), "acceptance": acceptance}
        row |= {"g": estimate.g, "exact_log_z": chain.log_partition_function(TEMPERATURE)}
        for name, (mean, stderr) in (("weights", weighted), ("chain", estimate.pair)):
            value, error = logit_free_energy(mean, stderr)
            row[name] = {"value": -value, "stderr": error, "z": (-value - row["exact"]) / error}
        z = (log_z[0] - row["exact_log_z"]) / log_z[1]
        row["log_z"] = {"value": log_z[0], "stderr": log_z[1], "z": z}
        rows.append(row)
    return rows


def restrained(options):
    """Return the numbers of the field with a restrained mean, and its mean profile."""
    parts = {"restraint": RESTRAINT, "restrained_mean": RESTRAINED_MEAN}
    chain = PhiFourChain(N_SITES, **parts)
    start = profile(RESTRAINED_MEAN).repeat(options.walkers, 1)
    flow, history = learn(chain, "coupled", start, options)
    x, acceptance = mixed_chain(flow, chain, start[: options.walkers // 4], options)
    exact = chain.moment(1, TEMPERATURE)
    sites = [estimate_mean(x[..., i].numpy()).pair for i in range(N_SITES)]
    mean = estimate_mean(chain.integral(x.flatten(0, 1)).reshape(x.shape[:2]).numpy())
    means, errors = torch.tensor(sites, dtype=torch.float64).T
    exact_mean = chain.mean_field(TEMPERATURE)
    generator = torch.Generator().manual_seed(options.seed)
    draws = draw_weighted(flow, chain, TEMPERATURE, options.draws, generator)
    log_z, exact_log_z = log_mean_weight(draws.log_weights), chain.log_partition_function
    z = (log_z[0] - exact_log_z(TEMPERATURE)) / log_z[1]
    return {
        **parts, "training": history, "acceptance": acceptance,
        "mean": {
            "value": mean.value, "stderr": mean.stderr, "exact": exact_mean,
            "z": (mean.value - exact_mean) / mean.stderr,
        },
        "log_z": {"value": log_z[0], "stderr": log_z[1], "z": z},
        "profile": means.tolist(), "profile_stderr": errors.tolist(),
        "exact_profile": exact.tolist(), "largest_z": float(((means - exact) / errors).abs().max()),
    }  # fmt: skip


def run_part(options, which):
    """Return the training on a base measure, with estimates under fields; None: the restraint."""
    if which is None:
        return restrained(options)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(options.walkers // 2)
    start = sign[:, None] * profile()
    flow, history = learn(PhiFourChain(N_SITES), which, start, options)
    if which == "uncoupled":
        return history, None
    return history, free_energies(flow, start[: options.walkers // 4], options)


def plot(training, fields, restraint, path):
    """Draw acceptance while training, the free-energy differences, and the restrained profile."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for which, colour in BASES.items():
        steps = [row["step"] for row in training[which]]
        # On the logarithmic axis nothing is below 1e-6.
        rates = np.maximum([row["acceptance"][0] for row in training[which]], 1e-6)
        left.semilogy(steps, rates, "o-", color=colour, label=f"{which} base")
    left.set_ylim(5e-7, 1.0)
    left.set_xlabel("training step", fontsize=FONT)
    left.set_ylabel("acceptance (at least 1e-6)", fontsize=FONT)
    left.legend()
    b = [row["field"] for row in fields]
    middle.plot(b, [row["exact"] for row in fields], color="black", lw=1, label="transfer matrix")
    # Beside each other, so that both can be seen.
    for name, label, colour, shift in (
        ("weights", "weights of draws", REFERENCE_COLOUR, -2e-4),
        ("chain", "local + flow chain", RUN_COLOUR, 2e-4),
    ):
        values = [row[name]["value"] for row in fields]
        errors = [row[name]["stderr"] for row in fields]
        at = np.array(b) + shift
        middle.errorbar(at, values, errors, fmt="o", ms=4, color=colour, label=label)
    middle.set_xlabel("field b", fontsize=FONT)
    middle.set_ylabel("ln [P(φ > 0) / P(φ < 0)]", fontsize=FONT)
    middle.legend()
    s = np.arange(1, N_SITES + 1) / (N_SITES + 1)
    right.plot(s, restraint["exact_profile"], color="black", lw=1, label="transfer matrix")
    every = slice(None, None, 4)
    values, errors = (np.array(restraint[k])[every] for k in ("profile", "profile_stderr"))
    options = {"fmt": "o", "ms": 3, "color": RUN_COLOUR, "label": "local + flow chain"}
    right.errorbar(s[every], values, errors, **options)
    right.set_title(f"restraint λ = {RESTRAINT:g} to ∫φ = {RESTRAINED_MEAN:g}", fontsize=FONT)
    right.set_xlabel("s", fontsize=FONT)
    right.set_ylabel("⟨φ(s)⟩", fontsize=FONT)
    right.legend()
    figure.suptitle(f"φ⁴ in one dimension, {N_SITES} sites, T = {TEMPERATURE:g}")
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the JSON and the figure")
    parser.add_argument("--walkers", type=int, default=400, help="local chains to learn from")
    parser.add_argument("--frames", type=int, default=40, help="frames of each")
    parser.add_argument("--tuning", type=int, default=30, help="iterations before them")
    parser.add_argument("--steps", type=int, default=250, help="training steps")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of a flow")
    parser.add_argument("--iterations", type=int, default=120, help="of the Markov chains")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = in_parallel(partial(run_part, options), ("coupled", "uncoupled", None), options.jobs)
    (training_coupled, fields), (training_uncoupled, _), restraint = parts
    training = {"coupled": training_coupled, "uncoupled": training_uncoupled}
    for which, rows in training.items():
        for row in rows:
            print(f"{which:9s} base, step {row['step']:4d}: acceptance {row['acceptance'][0]:.2e}")
    for row in fields:
        shown = [f"{row[k]['value']:7.3f} ± {row[k]['stderr']:.3f}" for k in ("weights", "chain")]
        print(f"b = {row['field']:.3f}: exact {row['exact']:7.3f}, weights and chain", *shown)
    print(f"restraint: acceptance {restraint['acceptance']:.2f}, mean {restraint['mean']}")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(options).items() if k not in ("output", "jobs")}
    settings |= {"n_sites": N_SITES, "temperature": TEMPERATURE, "base_variance": BASE_VARIANCE}
    content = {**settings, "training": training, "fields": fields, "restrained": restraint}
    write_json(folder / "phi4_chain.json", content)
    plot(training, fields, restraint, folder / "phi4_chain.png")


if __name__ == "__main__":
    main()
