r"""Are the predictions of ``openmm-tsf plan`` right? Beside what runs have cost.

    openmm-tsf run --output run/
    python data/make_reference.py run --directory plain/ --iterations 10000
    python examples/benchmarks/predictions.py --output examples/results/predictions.json \
        --case "alanine dipeptide" "dF(phi)" run/ plain/ \
        --case "the same, OpenMM's sampler" "dF(phi)" run/ examples/results/cost.json

A case is a finished run with a flow and one of plain replica exchange of the same molecule: a
directory of ``data/make_reference.py``, or the JSON file of ``cost.py``, of which each ladder of
OpenMM's sampler is a row. Each of them has a standard error of the quantity at the lowest
temperature, which is the target of a plan; the evaluations and the time that are predicted for it
are divided by those that were spent. Of plain replica exchange, and of the production of the run
with a flow, also the ranges that the measured errors leave: an error estimated from n independent
visits is itself known to 1/sqrt(2 n), so that its square is known to sqrt(2/n). Writes JSON, and
prints a table in Markdown.
"""

import argparse
import math
from pathlib import Path

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.analysis.targets import UNITS, Target
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.systems.files import read_molecule
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.plan import plan
from openmm_tsf.workflow.record import recorded_settings
from openmm_tsf.workflow.settings import RunSettings


def as_target(quantity, error):
    """Return the text of a target."""
    return f"{quantity} < {error:.6g} {UNITS[quantity.partition('(')[0]]}"


def measured(quantity, folder):
    """Return the standard error that a run has, and how many independent visits it rests on."""
    run = load_run(folder)
    assessed = Target.parse(as_target(quantity, 1.0)).assess(run).assessment
    return run, assessed.stderr, assessed.n_visits


def plain_rows(quantity, path):
    """Return what runs of plain replica exchange cost: evaluations, error, visits."""
    if Path(path).is_dir():
        run, error, visits = measured(quantity, path)
        evaluations = run.segments.n_evaluations * run.n_used / run.n_iterations
        rungs = f"{run.n_rungs} rungs, {run.temperatures[0]:g} to {run.temperatures[-1]:g} K"
        return [{"what": rungs, "evaluations": evaluations, "error": error, "visits": visits}]
    if quantity != "dF(phi)":
        raise ValueError(f"{path}: expected the quantity dF(phi), got {quantity}")
    rows = []
    samplers = read_json(path)["samplers"]
    for rungs in sorted(name for name in samplers if name.isdigit()):
        entry = samplers[rungs]
        p, stderr = entry["p"], entry["stderr"]
        rows.append(
            {
                "what": f"OpenMM's sampler, {rungs} rungs",
                "evaluations": entry["n_evaluations"],
                "error": stderr / (p * (1 - p)),
                "visits": p**2 * (1 - p) / stderr**2,  # effective successes
            }
        )
    return rows


def compare(name, quantity, folder, plain, args):
    """Return what one case has to say."""
    run, error, _ = measured(quantity, folder)
    summary = run.summary()
    settings = recorded_settings(folder, "run", RunSettings)
    predicted = plan(
        as_target(quantity, error),
        read_molecule(Path(folder)),
        settings,
        seconds=args.seconds,
        options=RunOptions(seed=args.seed),
    )
    print(f"{name}\n{predicted}\n", flush=True)
    exchange, flow = predicted.exchange, predicted.flow
    rows = []
    for row in plain_rows(quantity, plain):
        # As 1/error², the same as of a plan for this error.
        evaluations = exchange.energy_evaluations * (error / row["error"]) ** 2
        rows.append(
            row
            | {
                "predicted": evaluations,
                "ratio": evaluations / row["evaluations"],
                "uncertain_by": 1 + math.sqrt(2 / row["visits"]),
            }
        )
    production = summary["production"]
    spent = {
        "training": (
            summary["energy_evaluations"]["training"],
            summary["wall_seconds"]["training"],
        ),
        "sampling": (production["energy_evaluations"], production["wall_seconds"]),
    }
    stages = {
        stage: {
            "evaluations": evaluations,
            "predicted_evaluations": flow.energy_evaluations[stage],
            "seconds": seconds,
            "predicted_seconds": flow.wall_seconds[stage],
        }
        for stage, (evaluations, seconds) in spent.items()
    }
    return {
        "case": name,
        "error": error,
        "plan": predicted.to_dict(),
        "plain": rows,
        "flow": stages,
    }


def table(cases):
    """Return the table in Markdown."""
    lines = [
        "| case | what | evaluations spent | predicted | predicted / spent | uncertain by |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        for row in case["plain"]:
            lines.append(
                f"| {case['case']} | plain, {row['what']} | {row['evaluations']:.2g} | "
                f"{row['predicted']:.2g} | {row['ratio']:.2f} | × {row['uncertain_by']:.2f} |"
            )
        for stage, row in case["flow"].items():
            spent, predicted = row["evaluations"], row["predicted_evaluations"]
            lines.append(
                f"| {case['case']} | flow, {stage} | {spent:.2g} | {predicted:.2g} | "
                f"{predicted / spent:.2f} | |"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", nargs=4, action="append", required=True,
        metavar=("NAME", "QUANTITY", "RUN", "PLAIN"),
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=60.0, help="of each pilot")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="predictions.json")
    args = parser.parse_args()
    cases = [compare(*case, args) for case in args.case]
    write_json(args.output, json_ready({"seconds": args.seconds, "cases": cases}))
    print(table(cases))


if __name__ == "__main__":
    main()
