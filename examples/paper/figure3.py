"""Figure 3 of the paper (arXiv:2012.00429) from a finished run, with tables.

    python examples/paper/figure3.py run/ --output figure3.png

Draws from the run's flow at the lowest and the highest rung, scans the step size of the flow walk
from the run's own frames, and writes beside the figure: its caption and all tables (.md), and each
table as CSV.
"""

import argparse
import time
from pathlib import Path

import mdtraj
import numpy as np
import torch
from figure3_panels import FlowDraws, plot_figure3
from figure3_tables import caption, ladder_table, markdown, run_table, temperature_table, write_csv

import openmm_tsf as tsf
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.sampling.kernels import FlowWalk, WalkerState
from openmm_tsf.systems.files import holds_molecule, read_molecule

BATCH = 2000
SIGMAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)


def angles_of(run, x):
    """phi, psi [n, 2] of configurations [n, N, 3]."""
    frames = mdtraj.Trajectory(np.asarray(x), run.topology)
    quartets = [run.dihedral_atoms[name] for name in run.backbone()]
    return mdtraj.compute_dihedrals(frames, quartets, periodic=False)


def draw(run, flow, potential, kelvin, n, generator):
    """n independent draws, with the reverse ESS of the joint (x, p) weights."""
    draws = draw_weighted(flow, potential, kelvin, n, generator, batch_size=BATCH)
    finite = torch.isfinite(draws.energy)
    phi, psi = angles_of(run, draws.x[finite]).astype(np.float64).T
    weights = draws.log_weights.numpy()
    whole = reverse_ess(weights)
    tenths = [reverse_ess(part).fraction for part in np.array_split(weights, 10)]
    energy, spread = draws.energy[finite].numpy(), float(np.std(tenths, ddof=1))
    return FlowDraws(phi, psi, energy, n, whole.fraction, spread, whole.largest_weight)


def scan(run, flow, potential, kelvin, args, generator):
    """Acceptance of the flow walk from equilibrated frames, for each step size."""
    n_walkers, n_steps = args.scan_walkers, args.scan_steps
    frames = run.trajectory(kelvin)
    chosen = np.linspace(len(frames) // 2, len(frames) - 1, n_walkers).astype(int)
    x = torch.from_numpy(frames.xyz[chosen]).double()[:, None]
    start = WalkerState(
        x, None, potential.energy(x[:, 0])[:, None], torch.zeros(n_walkers, 1, dtype=torch.int64)
    )
    rows = []
    for sigma in args.sigmas:
        walk = FlowWalk(flow, potential, (kelvin,), sigma)
        state, moved, distances = start, [], []
        for _ in range(n_steps):
            before = state
            state, _ = walk(state, generator)
            moved.append((state.energy != before.energy)[:, 0].double())
            change = angles_of(run, state.x[:, 0]) - angles_of(run, before.x[:, 0])
            change = np.remainder(change + np.pi, 2 * np.pi) - np.pi
            distances.append((change**2).sum(axis=1))
        by_walker = torch.stack(moved).mean(dim=0).numpy()
        jump = np.mean(distances, axis=0)
        rows.append(
            {
                "temperature_K": kelvin,
                "sigma": sigma,
                "n_proposals": n_walkers * n_steps,
                "acceptance": float(by_walker.mean()),
                "acceptance_stderr": float(by_walker.std(ddof=1) / n_walkers**0.5),
                "squared_jump_phi_psi_rad2": float(jump.mean()),
                "squared_jump_stderr": float(jump.std(ddof=1) / n_walkers**0.5),
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="directory of a finished openmm-tsf run")
    parser.add_argument("--output", default="figure3.png", help="PNG, PDF or SVG")
    parser.add_argument("--draws", type=int, default=20_000, help="from the flow, per temperature")
    parser.add_argument("--scan-walkers", type=int, default=128)
    parser.add_argument("--scan-steps", type=int, default=8, help="proposals of each walker")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS))
    parser.add_argument("--no-reference", action="store_true", help="for other molecules")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.draws < 100 or args.scan_walkers < 2 or args.scan_steps < 1:
        parser.error("expected at least 100 draws, 2 walkers and 1 step")
    began, output = time.monotonic(), Path(args.output)
    run = tsf.load_run(args.run)
    if run.n_rungs < 2:
        parser.error(f"run: expected at least two rungs, got one at {run.temperatures[0]:.2f} K")
    reference = None if args.no_reference else run.reference()
    is_written = holds_molecule(run.path)
    molecule = read_molecule(run.path) if is_written else tsf.systems.alanine_dipeptide()
    flow = load_flow(run.path / "flow.pt", molecule).double()
    generator = torch.Generator().manual_seed(args.seed)
    temperatures = [float(run.temperatures[0]), float(run.temperatures[-1])]
    draws, scanned = {}, []
    with molecule.potential() as potential:
        for kelvin in temperatures:
            draws[kelvin] = draw(run, flow, potential, kelvin, args.draws, generator)
        for kelvin in temperatures:
            scanned += scan(run, flow, potential, kelvin, args, generator)
        evaluations = potential.n_evaluations
    text = caption(run, draws, reference)
    plot_figure3(run, draws, output, reference, text)
    costs = [
        *run_table(run),
        {"quantity": "energy evaluations, this figure", "value": evaluations},
        {"quantity": "seconds, this figure", "value": round(time.monotonic() - began, 1)},
    ]
    sources = temperature_table(run, draws, reference)
    tables = {
        "temperatures": ("Samples by temperature and source", sources),
        "ladder": ("Rungs, step sizes and acceptance in production", ladder_table(run)),
        "sigma": ("Acceptance of the flow walk against its step size", scanned),
        "run": ("The run", costs),
    }
    sections = [f"# Figure 3\n\n{text}"]
    for name, (title, rows) in tables.items():
        write_csv(output.with_name(f"{output.stem}_{name}.csv"), rows)
        sections.append(f"## {title}\n\n{markdown(rows)}")
    output.with_suffix(".md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
