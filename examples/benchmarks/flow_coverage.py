"""Does a flow cover the target? Its draws and ln(p/q), basin by basin, beside the reference.

    python examples/benchmarks/flow_coverage.py run1/ flow.pt --frames run1/ --output coverage.json

At 300, 424.26 and 600 K, for each flow of alanine dipeptide, without Monte Carlo: P(phi > 0) and
the populations of four basins among its draws, divided by the reference's; effective sample sizes
of the joint weights of (x, p), reverse from the draws and forward from frames of the target; and
ln(p/q) at these frames: its median, 99th percentile and largest value in each basin, less the
overall median. A basin that a flow draws too rarely has a large one; a hole has a large maximum.
Single draws decide a reverse ESS and single frames a maximum: it also has the ESS without the ten
largest weights, and the acceptance of independence moves at the frames, all and basin by basin.

Frames are those of finished runs (`--frames`), of which a rare basin needs hundreds; without any,
those of the shipped reference at 300 and 600 K, which has few. Frames with a cis peptide bond are
left out: the reference has none. Existing flows of an output are not measured again.
"""

import argparse
import hashlib
import math
from pathlib import Path

import mdtraj
import numpy as np
import torch
from common import reference_frames

import openmm_tsf as tsf
from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.analysis.statistics import forward_ess, reverse_ess, reverse_ess_stderr
from openmm_tsf.analysis.uncertainty import estimate_mean
from openmm_tsf.flows.draws import draw_weighted, weigh
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.workflow.settings import LADDER_K

#: phi > 0 with |psi| > 120 degrees is the basin that flows tend to miss.
BASINS = ("phi < 0, alpha", "phi < 0, beta", "phi > 0, alpha", "phi > 0, beta")
#: CA-C-N-C of both peptide bonds.
OMEGAS = ((1, 4, 6, 8), (8, 14, 16, 18))
MISSED = BASINS[3]


def basin_of(phi, psi):
    """The index in BASINS of each conformation."""
    return 2 * (np.asarray(phi) > 0) + (np.abs(psi) > np.radians(120))


def angles_of(molecule, x):
    """phi, psi and both omegas [n, 4] in rad of x [n, N, 3]."""
    trajectory = mdtraj.Trajectory(np.asarray(x, dtype=np.float32), molecule.mdtraj_topology)
    quartets = [molecule.dihedrals["phi"], molecule.dihedrals["psi"], *OMEGAS]
    return mdtraj.compute_dihedrals(trajectory, quartets)


def reference_populations(kelvin):
    """P(phi > 0) and populations of the basins of the shipped reference, with standard errors."""
    reference = load_reference()
    rung = reference.rung(kelvin)
    basin = basin_of(reference.phi[:, :, rung], reference.psi[:, :, rung])
    estimates = {"phi > 0": reference.phi_positive(rung)}
    estimates |= {name: estimate_mean(basin == k) for k, name in enumerate(BASINS)}
    return {name: estimate.pair for name, estimate in estimates.items()}


def load_target_frames(runs, molecule, kelvin, n_per_basin):
    """Frames [n, N, 3] of the target, how many frames each stands for [n], and basins [n]."""
    if runs:
        parts = [tsf.load_run(run).trajectory(kelvin).xyz for run in runs]
        x = np.concatenate(parts).astype(np.float64)
    else:
        x = reference_frames(kelvin).numpy()
    angles = angles_of(molecule, x)
    is_trans = (np.abs(angles[:, 2:]) > math.pi / 2).all(axis=1)
    x, basin = x[is_trans], basin_of(angles[is_trans, 0], angles[is_trans, 1])
    chosen, weights = [], []
    for k in range(len(BASINS)):
        members = np.flatnonzero(basin == k)
        taken = members[np.unique(np.linspace(0, len(members) - 1, n_per_basin).astype(int))]
        chosen.append(taken if len(members) else members)
        weights.append(np.full(len(chosen[-1]), len(members) / max(1, len(chosen[-1]))))
    index = np.concatenate(chosen)
    return torch.from_numpy(x[index]), np.concatenate(weights), basin[index]


def weighted_median(values, weights):
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, 0.5 * cumulative[-1])])


def ratio(count, n, known):
    """Population of draws over the reference's, with the errors of both."""
    p, (value, stderr) = count / n, known
    relative = math.hypot(stderr / value, math.sqrt((1 - p) / max(count, 1)))
    return {"ratio": p / value, "stderr": p / value * relative, "draws": int(count)}


@torch.no_grad()
def measure(flow, molecule, potential, frames, known, kelvin, args):
    """Everything about one flow at one temperature."""
    generator = torch.Generator().manual_seed(args.seed)
    draws = draw_weighted(flow, potential, kelvin, args.draws, generator)
    inside = draws.inside.numpy()
    angles = angles_of(molecule, draws.x[draws.inside])
    basin = basin_of(angles[:, 0], angles[:, 1])
    n, logs = len(inside), draws.log_weights.numpy()
    measured = {
        "inside_domain": float(inside.mean()),
        "phi_positive": ratio((angles[:, 0] > 0).sum(), n, known["phi > 0"]),
        "basins_drawn": {
            name: ratio((basin == k).sum(), n, known[name]) for k, name in enumerate(BASINS)
        },
        "reverse_ess_joint": reverse_ess(logs).fraction,
        "reverse_ess_joint_stderr": reverse_ess_stderr(logs),
        "reverse_ess_joint_without_ten": reverse_ess(np.sort(logs)[:-10]).fraction,
        "largest_weight": reverse_ess(logs).largest_weight,
    }
    if kelvin not in frames:
        return measured
    x, weights, basin = frames[kelvin]
    reduced_energy = potential.energy(x) / (potential.boltzmann_constant * kelvin)
    log_ratio = weigh(flow, x, reduced_energy, kelvin, generator).numpy()
    outside = ~np.isfinite(log_ratio)
    log_ratio, weights, basin = log_ratio[~outside], weights[~outside], basin[~outside]
    median = weighted_median(log_ratio, weights)
    measured["frames"] = {"n": len(x), "outside_domain": int(outside.sum())}
    # Frames stand for different numbers of frames: E[w] and E[1/w] are sums by basin.
    picked = np.random.default_rng(args.seed).choice(
        len(weights), size=len(weights), p=weights / weights.sum()
    )
    measured["forward_ess_joint"] = forward_ess(log_ratio[picked]).fraction
    accepted = acceptance(logs, log_ratio)
    measured["independence"] = float((weights * accepted).sum() / weights.sum())
    measured["log_ratio_largest"] = float(log_ratio.max() - median)
    measured["log_ratio_by_basin"] = {
        name: {
            "n": int((basin == k).sum()),
            "median": float(np.median(log_ratio[basin == k]) - median),
            "percentile_99": float(np.percentile(log_ratio[basin == k], 99) - median),
            "largest": float(log_ratio[basin == k].max() - median),
            "independence": float(accepted[basin == k].mean()),
        }
        for k, name in enumerate(BASINS)
        if (basin == k).any()
    }
    return measured


def acceptance(log_weights, log_ratio):
    """Acceptance of independence moves from each frame [n], exact over all pairs with draws."""
    logs = np.sort(log_weights)  # draws outside the domain are -inf
    sums = np.logaddexp.accumulate(np.append(-np.inf, logs))
    n_below = np.searchsorted(logs, log_ratio)
    return (len(logs) - n_below + np.exp(sums[n_below] - log_ratio)) / len(logs)


def line_of(name, flow):
    """One line with what matters."""
    texts = []
    for kelvin, found in flow.items():
        low = found["basins_drawn"][MISSED]["ratio"]
        text = f"{kelvin} K: P {found['phi_positive']['ratio']:.2f} basin {low:.2f} "
        text += f"ESS {found['reverse_ess_joint']:.2f}"
        text += f" ({found['reverse_ess_joint_without_ten']:.2f})"
        if "log_ratio_largest" in found:
            by_basin = found["log_ratio_by_basin"].values()
            medians = "/".join(f"{basin['median']:.1f}" for basin in by_basin)
            text += f" acc {found['independence']:.2f} fwd {found['forward_ess_joint']:.2f}"
            text += f" max {found['log_ratio_largest']:.1f}"
            text += f" medians {medians}"
        texts.append(text)
    return f"{name}\n  " + "\n  ".join(texts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flows", nargs="+", type=Path, help="flow files, or directories of runs")
    parser.add_argument("--frames", nargs="+", default=[], help="finished runs of the molecule")
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--frames-per-basin", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--output", type=Path, default=Path("coverage.json"))
    args = parser.parse_args()
    molecule = tsf.systems.alanine_dipeptide()
    potential = molecule.potential(compile=True)
    arguments = {
        key: value for key, value in vars(args).items() if key not in ("flows", "output", "frames")
    }
    report = {"arguments": arguments, "reference": {}, "flows": {}}
    if args.output.is_file():
        report = read_json(args.output)
        if report["arguments"] != arguments:
            parser.error(f"--output: {args.output} was made with other arguments")
    temperatures = LADDER_K if args.frames else (300.0, 600.0)
    frames = {
        kelvin: load_target_frames(args.frames, molecule, kelvin, args.frames_per_basin)
        for kelvin in temperatures
    }
    known = {kelvin: reference_populations(kelvin) for kelvin in LADDER_K}
    report["reference"] = {f"{kelvin:g}": known[kelvin] for kelvin in LADDER_K}
    for given in args.flows:
        path = given / "flow.pt" if given.is_dir() else given
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        name = str(given)
        if report["flows"].get(name, {}).get("sha256") == digest:
            continue
        flow = load_flow(path, molecule)
        found = {
            f"{kelvin:g}": measure(flow, molecule, potential, frames, known[kelvin], kelvin, args)
            for kelvin in LADDER_K
        }
        report["flows"][name] = {"sha256": digest, "temperatures": found}
        write_json(args.output, report)
        print(line_of(name, found), flush=True)


if __name__ == "__main__":
    main()
