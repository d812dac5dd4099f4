"""Is any number wrong that a run calls converged? Runs beside references without a flow.

    python examples/benchmarks/cases.py --output examples/results/cases.json \
        --case "alanine dipeptide, default" run/ data/ala2_reference.npz \
        --case "ACE-ALA3-NME, quick" ala4_run/ ala4_reference.npz

A reference is a file of ``data/make_reference.py export``, or a directory of its ``run``, of the
same molecule. Of <U> and of every
basin, at each temperature that both have: z of the run less the reference, and whether the run
calls the number converged. Wrong is what is converged and has |z| >= 4, or is only bounded and has
an interval apart from that of the reference. Writes JSON, and prints a table in Markdown.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.convergence import assess_mean, assess_probability
from openmm_tsf.analysis.run_data import nearest_rung
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.io.files import write_json

WRONG_Z = 4.0


def read_series(path, torsions):
    """Return temperatures [R], energies [F, W, R] and angles of the same shape of a reference."""
    if Path(path).is_dir():
        run = load_run(path)
        angles = {name: run.dihedral_at_all_rungs(name) for name in torsions}
        return run.temperatures, run.energy, angles
    with np.load(path, allow_pickle=False) as data:
        temperatures, energy = data["temperatures_K"], data["energy"].astype(float)
        return temperatures, energy, {name: data[name].astype(float) for name in torsions}


def rows_of(run, summary, path):
    """Return one dictionary for each number of run and reference."""
    temperatures, energy, angles = read_series(path, run.basins.torsions)
    rows = []
    for kelvin in map(float, run.temperatures):
        rung, key = nearest_rung(temperatures, kelvin), f"{kelvin:.2f}"
        if rung is None:
            continue
        expected = {"energy_kJ_mol": assess_mean(energy[..., rung])}
        at_rung = {name: values[..., rung] for name, values in angles.items()}
        for name in run.basins.names:
            expected[f"basin {name}"] = assess_probability(run.basins.inside(name, at_rung))
        for name, reference in expected.items():
            entry = summary["quantities"][name][key]
            value, stderr = entry["value"], entry["stderr"] or math.nan
            z = (value - reference.value) / math.hypot(stderr, reference.stderr)
            outside = entry["high"] is not None and (
                entry["high"] < reference.low or entry["low"] > reference.high
            )
            rows.append(
                {
                    "temperature_K": kelvin,
                    "quantity": name,
                    "status": entry["status"],
                    "value": value,
                    "stderr": stderr,
                    "interval": [entry["low"], entry["high"]],
                    "reference": reference.value,
                    "reference_stderr": reference.stderr,
                    "z": z,
                    "intervals_apart": outside,
                }
            )
    return rows


def compare(name, folder, path):
    """Return what one case has to say."""
    run = load_run(folder)
    summary = run.summary()
    rows = rows_of(run, summary, path)
    called = [row for row in rows if row["status"] == "converged"]
    z = [abs(row["z"]) for row in called if math.isfinite(row["z"])]
    wrong = [row for row in called if abs(row["z"]) >= WRONG_Z]
    wrong += [row for row in rows if row["status"] == "bounded" and row["intervals_apart"]]
    others = [abs(row["z"]) for row in rows if row not in called and math.isfinite(row["z"])]
    return {
        "case": name,
        "verdict": summary["verdict"]["sentence"],
        "n_numbers": len(rows),
        "n_called_converged": len(called),
        "largest_z_of_these": max(z, default=math.nan),
        "largest_z_of_others": max(others, default=math.nan),
        "wrong_and_called_converged": [
            f"{row['quantity']} at {row['temperature_K']:.2f} K" for row in wrong
        ],
        "numbers": rows,
    }


def table(cases):
    """Return the table in Markdown."""
    lines = [
        "| case | verdict | numbers called converged | largest abs(z) of these | of the others "
        "| wrong and called converged |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        z, other = (
            "" if math.isnan(value) else f"{value:.1f}"
            for value in (case["largest_z_of_these"], case["largest_z_of_others"])
        )
        wrong = "; ".join(case["wrong_and_called_converged"]) or "none"
        numbers = f"{case['n_called_converged']} of {case['n_numbers']}"
        lines.append(
            f"| {case['case']} | {case['verdict']} | {numbers} | {z} | {other} | {wrong} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=3, action="append", required=True,
                        metavar=("NAME", "RUN", "REFERENCE"))  # fmt: skip
    parser.add_argument("--output", default="cases.json")
    args = parser.parse_args()
    cases = [compare(*case) for case in args.case]
    write_json(args.output, json_ready({"cases": cases}))
    print(table(cases))


if __name__ == "__main__":
    main()
