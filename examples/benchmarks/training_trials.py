r"""What each part of the training is worth: the same flow trained in several ways.

    python examples/benchmarks/training_trials.py --output examples/results/training_trials.json

Every trial is the training of the presets with one part changed, for the same number of steps on
the shipped frames. Measured at frames of the reference, which no training uses: acceptance of
independence moves at 300 and 600 K and of the steered swap between the two, without a rung between
them; reverse ESS of the joint weights; P(phi > 0) of the flow's draws divided by the reference's,
also during the training. Trials in an existing output are not repeated. Writes JSON, and beside it
a table in Markdown and a picture.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import has_positive_phi, reference_frames, reference_population
from matplotlib.figure import Figure

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.io.files import read_json, write_json, write_text
from openmm_tsf.sampling.initial import starting_state
from openmm_tsf.sampling.kernels import FlowIndependence, SteeredSwap
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.train import build_flow

LADDER = (300.0, 600.0)
PRESET = preset("default")
FLOW, FIT = PRESET.flow, PRESET.fit

#: name: (changes of the flow's settings, changes of the training's).
ADAM = {"optimizer": "adam", "weight_decay": 0.0}
ADAM |= {"learning_rate": 5e-4, "final_learning_rate": 1e-5}
DIRECT = {"estimator": "direct", "n_chains": 0}
TRIALS = {
    "preset": ({}, {}),
    "Adam": ({}, ADAM),
    "direct gradients": ({}, DIRECT),
    "direct gradients, Adam": ({}, {**DIRECT, **ADAM}),
    "no chains": ({}, {"n_chains": 0}),
    "no population terms": ({}, {"log_variance": 0.0, "basin_balance": 0.0}),
    "log-variance term alone": ({}, {"basin_balance": 0.0}),
    "walls between copies": ({"overlap": False}, {}),
    "lambda 0.1": ({}, {"lambda_max": 0.1}),
    "lambda 0.25": ({}, {"lambda_max": 0.25}),
    "lambda 0.5": ({}, {"lambda_max": 0.5}),
    "lambda 0.5, weight decay 0.02": ({}, {"lambda_max": 0.5, "weight_decay": 0.02}),
    "lambda 0.5, weight decay 0.5": ({}, {"lambda_max": 0.5, "weight_decay": 0.5}),
    "basins as in the data": ({}, {"basin_share": 0.0}),
    "spread points in full": ({}, {"basin_weight": 1.0}),
    "log-variance 0.05": ({}, {"log_variance": 0.05}),
    "30 momenta": ({"n_momenta": 30}, {}),
    "8 blocks of width 96": ({"n_blocks": 8, "hidden": (96, 96)}, {}),
}


def quality(flow, potential, molecule, n_draws, generator):
    """Acceptance, ESS and population of a flow as a proposal."""
    x = torch.stack([reference_frames(kelvin) for kelvin in LADDER], dim=1)
    x = x[~(flow.is_mirror_image(x[:, 0]) | flow.is_mirror_image(x[:, 1]))]
    state = starting_state(x, torch.zeros_like(x), len(x), LADDER, flow, potential)

    def acceptance(kernel):
        info = kernel(state, generator)[1]
        return (info.accepted / info.proposed).flatten().tolist()

    independence = acceptance(FlowIndependence(flow, potential, LADDER))
    measured = {"swap": acceptance(SteeredSwap(flow, potential, LADDER))[0], "n_frames": len(x)}
    for rung, kelvin in enumerate(LADDER):
        draws = draw_weighted(flow, potential, kelvin, n_draws, generator, batch_size=n_draws)
        population = float(has_positive_phi(molecule, draws.x).mean())
        measured[f"{kelvin:g}"] = {
            "independence": independence[rung],
            "reverse_ess_joint": reverse_ess(draws.log_weights.numpy()).fraction,
            "p_over_reference": population / reference_population(kelvin).value,
        }
    return measured


def run_trial(name, molecule, potential, dataset, args):
    """Train one flow and measure it."""
    flow_changes, fit_changes = TRIALS[name]
    flow = build_flow(dataset, replace(FLOW, **flow_changes), args.seed)
    length = {"n_steps": args.steps, "validate_interval": max(1, args.steps // 10)}
    common = length | {"temperatures": PRESET.sampling.temperatures}
    settings = replace(FIT, **common | fit_changes)
    began, before = time.monotonic(), potential.n_evaluations
    result = tsf.fit(
        flow, dataset, potential, settings=settings, seed=args.seed, progress=not args.quiet
    )
    seconds, evaluations = time.monotonic() - began, potential.n_evaluations - before
    if args.flows is not None:
        args.flows.mkdir(parents=True, exist_ok=True)
        flow.save(args.flows / f"{name}.pt")
    generator = torch.Generator().manual_seed(args.seed)
    return {
        **quality(flow, potential, molecule, args.draws, generator),
        "n_parameters": flow.n_parameters,
        "n_steps": args.steps,
        "best_step": result.best.step,
        "seconds": seconds,
        "n_evaluations": evaluations,
        "steps": [validation.step for validation in result.history],
        # Of the basins of the shipped frames, from the most populated on, 2 and 3 have phi > 0.
        "basin_300K": [
            validation.basin_population["300K basin 2"]
            + validation.basin_population["300K basin 3"]
            for validation in result.history
        ],
    }


def table(trials):
    """A table in Markdown."""
    lines = [
        "| trial | parameters | s | swap 300 ↔ 600 | independence 300 / 600 K | reverse ESS "
        "| P(φ>0) / reference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, trial in trials.items():
        low, high = (trial[f"{t:g}"] for t in LADDER)
        pairs = [
            f"{low[key]:.2f} / {high[key]:.2f}"
            for key in ("independence", "reverse_ess_joint", "p_over_reference")
        ]
        lines.append(
            f"| {name} | {trial['n_parameters']} | {trial['seconds']:.0f} | {trial['swap']:.2f} | "
            + " | ".join(pairs)
            + " |"
        )
    return "\n".join(lines) + "\n"


def picture(trials, path):
    """The trials side by side, and the rare basin along the training."""
    figure = Figure(figsize=(11, 0.45 * len(trials) + 2.2), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(1.3, 1))
    names = list(trials)
    rows = np.arange(len(names))
    shown = (
        ("steered swap 300 \u2194 600 K", lambda t: t["swap"]),
        ("independence, 300 K", lambda t: t["300"]["independence"]),
        ("independence, 600 K", lambda t: t["600"]["independence"]),
        ("reverse ESS, 300 K", lambda t: t["300"]["reverse_ess_joint"]),
    )
    for k, (label, value) in enumerate(shown):
        heights = [value(trials[name]) for name in names]
        bars.barh(rows + 0.2 * (k - 1.5), heights, 0.2, label=label)
    bars.set_yticks(rows, names)
    bars.invert_yaxis()
    bars.set_xlabel("accepted, or effective, part of the proposals")
    bars.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    known = reference_population(LADDER[0])
    for k, name in enumerate(names):
        style = "-" if k < 7 else "--"
        lines.plot(trials[name]["steps"], trials[name]["basin_300K"], style, label=name)
    lines.axhspan(known.value - known.stderr, known.value + known.stderr, color="0.85")
    lines.set_yscale("log")
    lines.set_xlabel("training step")
    lines.set_ylabel("P(\u03c6 > 0) of the flow at 300 K; grey: reference")
    lines.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--stride", type=int, default=1, help="of the shipped frames")
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flows", type=Path, help="directory for the flows (flow_coverage.py)")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("training_trials.json"))
    args = parser.parse_args()
    molecule = tsf.systems.alanine_dipeptide()
    potential = molecule.potential(compile=True)
    dataset = tsf.MDDataset.shipped(molecule, stride=args.stride)
    arguments = {"steps": args.steps, "stride": args.stride, "seed": args.seed}
    before = read_json(args.output) if args.output.is_file() else {"trials": {}, **arguments}
    if any(before.get(key) != value for key, value in arguments.items()):
        parser.error(f"--output: {args.output} has trials of other steps, stride or seed")
    trials = before["trials"]
    for name in args.trials:
        if name not in trials:
            trials[name] = run_trial(name, molecule, potential, dataset, args)
            write_json(args.output, {**arguments, "trials": trials})
            print(name, trials[name], flush=True)
    write_text(args.output.with_suffix(".md"), table(trials))
    picture(trials, args.output.with_suffix(".png"))
    print(table(trials))


if __name__ == "__main__":
    main()
