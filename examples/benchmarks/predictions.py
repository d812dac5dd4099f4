r"""Are the predictions of ``openmm-tsf plan`` right? Beside what runs have cost.

    openmm-tsf run --output run/
    python data/make_reference.py run --directory plain/ --iterations 10000
    python examples/benchmarks/predictions.py --output examples/results/predictions.json \
        --case "alanine dipeptide" "dF(phi)" run/ plain/

A case is a finished run with a flow and one of plain replica exchange of the same molecule, with a
ladder between the same ends (``--temperatures`` of ``data/make_reference.py``). Its standard error
of the quantity at the lowest temperature is the target of a plan with that ladder; the evaluations
that are predicted for it stand beside those spent. So do the evaluations of training and sampling
of the run with a flow: of as many iterations as it had, and of those that its own error would take
with the statistical inefficiency that plans assume. An error estimated from n independent visits
is itself known to 1/sqrt(2 n), its square to sqrt(2/n). Writes JSON, and prints a table in
Markdown.
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


def compare(name, quantity, folder, plain, args):
    """Return what one case has to say: a plan for the error of `plain`, beside what was spent."""
    run, error, _ = measured(quantity, folder)
    exchange_run, exchange_error, visits = measured(quantity, plain)
    settings = recorded_settings(folder, "run", RunSettings)
    predicted = plan(
        as_target(quantity, exchange_error),
        read_molecule(Path(folder)),
        settings,
        n_iterations=args.iterations,
        ladder=exchange_run.temperatures,
        options=RunOptions(seed=args.seed),
    )
    print(f"{name}\n{predicted}\n", flush=True)
    exchange, flow, n_rounds = predicted.exchange, predicted.flow, settings.n_rounds
    exchange_row = {
        "error": exchange_error,
        "temperatures": exchange_run.temperatures.tolist(),
        "evaluations": exchange_run.segments.n_evaluations
        * exchange_run.n_used
        / exchange_run.n_iterations,
        "predicted": exchange.energy_evaluations,
        "range": exchange.evaluations_range,
        # The square of an error of n independent visits is known to sqrt(2/n).
        "uncertain_by": 1 + math.sqrt(2 / visits) if visits else None,
    }
    # The plan is for the error of plain replica exchange: to that of this run 1/error^2 as many.
    before = settings.sampling.n_tuning * (1 + n_rounds) + settings.round_iterations * n_rounds
    needed = flow.n_iterations * (exchange_error / error) ** 2
    length = (before + needed) / (before + flow.n_iterations)
    summary = run.summary()
    rows = {}
    for stage, scale in (("training", 1.0), ("sampling", length)):
        rows[stage] = {
            "evaluations": summary["energy_evaluations"][stage],
            "predicted": scale * flow.energy_evaluations[stage],
            "seconds": summary["wall_seconds"][stage],
            "predicted_seconds": scale * flow.wall_seconds[stage],
        }
    # Of the same number of iterations: without what is assumed of the flow.
    rows["sampling"]["predicted_per_iteration"] = flow.energy_evaluations["sampling"] / (
        before + flow.n_iterations
    )
    rows["sampling"]["n_iterations"] = before + run.n_iterations
    rows["sampling"]["error"] = error
    return {
        "case": name,
        "quantity": quantity,
        "pilot_iterations": args.iterations,
        "seed": args.seed,
        "plan": predicted.to_dict(),
        "plain": exchange_row,
        "flow": rows,
    }


def table(cases):
    """Return the table in Markdown."""
    lines = [
        "| case | what | evaluations spent | predicted | predicted / spent |",
        "|---|---|---|---|---|",
    ]

    def add(case, what, spent, predicted, note=""):
        lines.append(
            f"| {case} | {what} | {spent:.2g} | {predicted:.2g}{note} | {predicted / spent:.2f} |"
        )

    for case in cases:
        name = f"{case['case']}, {case['quantity']}"
        row, low_high = case["plain"], case["plain"]["range"]
        what = f"plain, {len(row['temperatures'])} rungs, ± {row['error']:.2g}"
        add(
            name,
            what,
            row["evaluations"],
            row["predicted"],
            " ({:.2g} to {:.2g})".format(*low_high),
        )
        training, sampling = case["flow"]["training"], case["flow"]["sampling"]
        if training["evaluations"]:
            add(name, "flow, training", training["evaluations"], training["predicted"])
        same = sampling["predicted_per_iteration"] * sampling["n_iterations"]
        add(name, "flow, these iterations", sampling["evaluations"], same)
        what = f"flow, sampling, ± {sampling['error']:.2g}"
        add(name, what, sampling["evaluations"], sampling["predicted"], " (assumed)")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", nargs=4, action="append", required=True,
        metavar=("NAME", "QUANTITY", "RUN", "PLAIN"),
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=450,
        help="of each pilot; by default those of a minute of alanine dipeptide",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", default="predictions.json")
    args = parser.parse_args()
    for case in args.case:
        result = compare(*case, args)
        # Cases that the file has already stay, so that they can be run one by one.
        cases = read_json(args.output)["cases"] if Path(args.output).exists() else []
        same = (result["case"], result["quantity"])
        cases = [each for each in cases if (each["case"], each["quantity"]) != same]
        write_json(args.output, json_ready({"cases": [*cases, result]}))
    print(table(read_json(args.output)["cases"]))


if __name__ == "__main__":
    main()
