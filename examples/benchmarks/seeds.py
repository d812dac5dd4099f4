"""The spread of runs against the standard errors of each, and their mean against the reference.

    python examples/benchmarks/seeds.py run/ --output seeds/             # one flow, twenty seeds
    python examples/benchmarks/seeds.py run1/ run2/ run3/ --output seeds/  # finished runs

With one folder: replica exchange of the default preset with its flow, once for each seed; a
complete run is not repeated, an interrupted one is continued; one that was made with another flow
or other settings is refused. With several: finished runs, of a flow each. For delta F_phi,
P(phi > 0), <U> and C_V at every rung: chi2 of the spread of the runs against their standard errors,
and z and p of their mean against the reference by the same errors. Writes seeds.json and seeds.png.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import chi2, norm

from openmm_tsf.analysis import load_reference, load_run
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.serialization import to_plain_data
from openmm_tsf.sampling.provenance import hash_of
from openmm_tsf.systems.files import holds_molecule, read_molecule
from openmm_tsf.systems.library import alanine_dipeptide
from openmm_tsf.units import KB
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import sample

#: Name; key in summary.json; keys of value and error.
QUANTITIES = (
    ("delta_F_phi_kT", "delta_F_phi_kT", "value", "stderr"),
    ("delta_F_phi_mbar_kT", "delta_F_phi_kT", "mbar_value", "mbar_stderr"),
    ("phi_positive", "phi_positive", "p", "stderr"),
    ("energy_kJ_mol", "energy_kJ_mol", "mean", "stderr"),
    ("heat_capacity_kJ_mol_K", "heat_capacity_kJ_mol_K", "value", "stderr"),
)


def digest_of(flow):
    """SHA-256 of the flow of a folder, as config.json of its runs has it."""
    home = Path(flow)
    if home.is_file():
        home = home.parent
    molecule = read_molecule(home) if holds_molecule(home) else alanine_dipeptide()
    file = Path(flow) / "flow.pt" if Path(flow).is_dir() else Path(flow)
    return hash_of(load_flow(file, molecule))


def check_same(run, settings, seed, digest):
    """Refuse a folder whose run was made with another flow, seed or other settings."""
    choices = run.config["choices"]
    made_with = dict(choices.get("settings", {}), seed=run.config["seed"])
    made_with["flow (sha256)"] = choices.get("flow", {}).get("sha256")
    expected = to_plain_data(settings) | {"seed": seed, "flow (sha256)": digest}
    different = [
        f"{name}: expected {value!r}, got {made_with.get(name)!r}"
        for name, value in expected.items()
        if made_with.get(name) != value
    ]
    if run.n_iterations > settings.n_iterations:
        expected, made = settings.n_iterations, run.n_iterations
        different.append(f"iterations made: expected {expected}, got {made}")
    if different:
        words = f"was made with other settings ({'; '.join(different)}); choose another --output"
        raise ValueError(f"{run.path}: {words}")


def one_run(flow, folder, settings, seed, digest, progress):
    """Run, resume or read one run, and return its summary."""
    if (folder / "checkpoint.pt").is_file():
        existing = load_run(folder)
        check_same(existing, settings, seed, digest)
        if existing.n_iterations == settings.n_iterations:
            return existing.summary()
    options = RunOptions(seed=seed, resume=True, progress=progress)
    return sample(flow, folder, settings, options=options)


def spread(values, errors, reference):
    """chi2 of runs around their mean, and z of the mean against the reference's (value, error)."""
    known = np.isfinite(values) & np.isfinite(errors) & (errors > 0)
    v, e = values[known], errors[known]
    n = len(v)
    # Runs are not weighted: errors are correlated with values, so that weights would bias.
    mean = v.mean() if n else math.nan
    result = {"n_runs": n, "n_unknown": int(len(values) - n), "mean": float(mean)}
    if n < 2:
        return result
    deviation, sum_of_squares = v.std(ddof=1), float((((v - mean) / e) ** 2).sum())
    result |= {
        "stderr_of_mean": float(deviation / math.sqrt(n)),
        "spread": float(deviation),
        "claimed_rms": float(np.sqrt((e**2).mean())),
        "chi2": sum_of_squares,
        "degrees_of_freedom": n - 1,
        "p_value": float(chi2.sf(sum_of_squares, n - 1)),
    }
    if reference is not None and np.isfinite(reference).all():
        # By the errors that the runs claim: the spread of a few runs is a poor error.
        z = (mean - reference[0]) / math.hypot(np.sqrt((e**2).mean() / n), reference[1])
        result |= {
            "reference": float(reference[0]),
            "reference_stderr": float(reference[1]),
            "z_against_reference": float(z),
            "p_against_reference": float(2 * norm.sf(abs(z))),
        }
    return result


def reference_values(run):
    """(value, error) of the reference by quantity and rung, where it has the rung."""
    if run.config.get("reference") is None:
        return {}
    reference = load_reference(run.config["reference"])
    table = reference.thermodynamics(KB)
    values = {}
    for t in map(float, run.temperatures):
        k = reference.rung(t)
        if k is None:
            continue
        delta_f = (table.delta_f[k], table.delta_f_stderr[k])
        values |= {
            ("delta_F_phi_kT", f"{t:.2f}"): delta_f,
            ("delta_F_phi_mbar_kT", f"{t:.2f}"): delta_f,
            ("phi_positive", f"{t:.2f}"): reference.phi_positive(k).pair,
            ("energy_kJ_mol", f"{t:.2f}"): reference.mean_energy(k).pair,
        }
        capacity = (table.heat_capacity[k], table.heat_capacity_stderr[k])
        values["heat_capacity_kJ_mol_K", f"{t:.2f}"] = capacity
    return values


def number(value):
    return math.nan if value is None else float(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", help="one with flow.pt (of run or train), or several finished runs"
    )
    parser.add_argument("--output", default="seeds", help="folder of the runs")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--walkers", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", metavar="K")
    parser.add_argument("--seed", type=int, default=1000, help="of the first run; then one more")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs: expected at least 1, got {args.runs}")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    if len(args.folders) == 1:
        runs = sample_seeds(args, output)
    else:
        runs = [load_run(folder) for folder in args.folders]
    summaries, first = [run.summary() for run in runs], runs[0]
    reference = reference_values(first)
    rungs = [f"{t:.2f}" for t in first.temperatures]
    report = {
        "one_flow": len(args.folders) == 1,
        "seeds": [summary["seed"] for summary in summaries],
        "verdicts": [summary["verdict"]["status"] for summary in summaries],
        "temperatures_K": first.temperatures.tolist(),
        "n_iterations": first.n_iterations,
        "n_walkers": first.n_walkers,
        "spread": {},
        "runs": {},
    }
    for name, key, value, error in QUANTITIES:
        if key not in summaries[0]:
            continue  # a molecule without a φ
        report["runs"][name] = {
            rung: [[s[key][rung][value], s[key][rung][error]] for s in summaries] for rung in rungs
        }
        report["spread"][name] = {}
        for rung in rungs:
            pairs = np.array([list(map(number, p)) for p in report["runs"][name][rung]])
            report["spread"][name][rung] = spread(
                pairs[:, 0], pairs[:, 1], reference.get((name, rung))
            )
    report = json_ready(report)
    (output / "seeds.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(json.dumps(report["spread"], indent=1))
    draw(report, output / "seeds.png")


def sample_seeds(args, output):
    """Sample with the flow of a folder, once for each seed, and return the runs."""
    (flow,) = args.folders
    settings = replace(
        preset("default").sampling,
        n_walkers=args.walkers,
        n_iterations=args.iterations,
        n_tuning=args.tuning,
    )
    if args.temperatures:
        settings = replace(settings, temperatures=tuple(args.temperatures))
    digest, runs = digest_of(flow), []
    for seed in range(args.seed, args.seed + args.runs):
        folder = output / f"seed_{seed}"
        one_run(flow, folder, settings, seed, digest, not args.quiet)
        runs.append(load_run(folder))
        print(f"seed {seed}: {runs[-1].n_iterations} iterations", flush=True)
    return runs


def draw(report, path):
    names = [n for n in ("delta_F_phi_mbar_kT", "energy_kJ_mol") if n in report["runs"]]
    rungs = list(report["runs"][names[0]])
    figure = Figure(figsize=(3.8 * len(rungs), 3.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(rungs), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, rung in zip(row, rungs, strict=True):
            pairs = np.array([list(map(number, p)) for p in report["runs"][name][rung]])
            statistics = report["spread"][name][rung]
            axis.errorbar(range(len(pairs)), pairs[:, 0], pairs[:, 1], fmt="o", ms=3, capsize=2,
                          color="#0b5394", label="runs")  # fmt: skip
            axis.axhline(number(statistics["mean"]), color="#0b5394", lw=1, label="their mean")
            if "reference" in statistics:
                value, error = statistics["reference"], statistics["reference_stderr"]
                axis.axhspan(value - error, value + error, color="#c0392b", alpha=0.25, lw=0,
                             label="reference ± SE")  # fmt: skip
            title = [f"{rung} K"]
            if "chi2" in statistics:
                title.append(f"χ²/dof {statistics['chi2'] / statistics['degrees_of_freedom']:.2f}")
                title.append(f"p {statistics['p_value']:.2f}")
            if "z_against_reference" in statistics:
                title.append(f"z {statistics['z_against_reference']:+.1f}")
            axis.set_title(", ".join(title), fontsize=10)
            axis.set_xlabel("run")
        row[0].set_ylabel({"delta_F_phi_mbar_kT": "ΔF(φ) by MBAR (kT)",
                           "energy_kJ_mol": "⟨U⟩ (kJ/mol)"}[name])  # fmt: skip
    axes[0, 0].legend(frameon=False, fontsize=8)
    flows = "one flow" if report["one_flow"] else "a flow each"
    figure.suptitle(
        f"{len(report['seeds'])} runs of {report['n_walkers']} walkers × "
        f"{report['n_iterations']} iterations from {flows}; bars: claimed SE"
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
