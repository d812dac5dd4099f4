r"""Are the predictions of ``openmm-tsf plan`` right? Beside what runs have cost.

    openmm-tsf run --output run/
    python data/make_reference.py run --directory plain/ --iterations 10000
    python examples/benchmarks/predictions.py --output examples/results/predictions.json \
        --case "alanine dipeptide" "dF(phi); U" run/ plain/

A case is a finished run with a flow and one of plain replica exchange of the same molecule, with a
ladder between the same ends (``--temperatures`` of ``data/make_reference.py``). Its standard error
of a quantity at the lowest temperature is the target of a plan with that ladder; the evaluations
that are predicted for it stand beside those spent. So do the evaluations of training and sampling
of the run with a flow: of as many iterations as it had, and of those that its own error would take
with the statistical inefficiency that plans assume. An error estimated from n independent visits
is itself known to 1/sqrt(2 n), its square to sqrt(2/n). Without a run (``-``) only the plain side
is compared: each of ``--seeds`` has one pilot for all quantities of a molecule, kept in
``--pilots`` to be used again when the run is longer. Writes JSON, and prints a table in Markdown;
cases that the file has already stay.
"""

import argparse
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.analysis.targets import UNITS, Target
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.systems.files import read_molecule
from openmm_tsf.workflow.exchange_plan import plan_exchange
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.pilot import run_pilot
from openmm_tsf.workflow.plan import plan
from openmm_tsf.workflow.potential_choice import COMPILE_BATCH, COMPILE_FROM, open_potential
from openmm_tsf.workflow.record import recorded_settings
from openmm_tsf.workflow.sample import sampling_threads
from openmm_tsf.workflow.settings import RunSettings

#: Plans are for errors that are smaller by this factor, and costs go as 1/error^2: short runs have
#: fewer visits than a plan asks for, as converged.
TIGHTER = 10
#: What tells one result from the others.
KEYS = ("case", "quantity", "seed")


def as_target(quantity, error):
    """Return the text of a target."""
    return f"{quantity} < {error:.6g} {UNITS[quantity.partition('(')[0]]}"


def measured(quantity, folder):
    """Return the standard error that a run has, and how many independent visits it rests on."""
    run = load_run(folder)
    assessed = Target.parse(as_target(quantity, 1.0)).assess(run).assessment
    return run, assessed.stderr, assessed.n_visits


def compare(name, quantities, folder, plain, args):
    """Yield what a case has to say of each seed and quantity: plans beside what was spent."""
    molecule = read_molecule(Path(plain))
    ladder = load_run(plain).temperatures.tolist()
    for seed, quantity in itertools.product(args.seeds, map(str.strip, quantities.split(";"))):
        run, error, visits = measured(quantity, plain)
        target = as_target(quantity, error / TIGHTER)
        flow = {}
        if folder == "-":
            pilot = pilot_of(molecule, ladder, seed, args)
            exchange = plan_exchange(pilot, Target.parse(target), ladder)[1]
        else:
            settings = recorded_settings(folder, "run", RunSettings)
            choices = {"n_iterations": args.iterations, "ladder": ladder}
            options = RunOptions(seed=seed)
            predicted = plan(target, molecule, settings, **choices, options=options)
            print(f"{name}\n{predicted}\n", flush=True)
            exchange = predicted.exchange
            flow = flow_rows(quantity, folder, settings, predicted.flow, error)
        yield {
            "case": name,
            "quantity": quantity,
            "pilot_iterations": args.iterations,
            "seed": seed,
            "exchange": exchange.to_dict(),
            "plain": {
                "error": error,
                "temperatures": ladder,
                "evaluations": run.segments.n_evaluations * run.n_used / run.n_iterations,
                "predicted": exchange.energy_evaluations / TIGHTER**2,
                "range": [each / TIGHTER**2 for each in exchange.evaluations_range],
                "visits": visits,
            },
            "flow": flow,
        }


def pilot_of(molecule, ladder, seed, args):
    """Return the pilot that a plan starts from, kept from before or run."""
    path = Path(args.pilots, f"{molecule.fingerprint[:12]}_{args.iterations}_{seed}.pickle")
    if path.exists():
        return pickle.loads(path.read_bytes())
    with sampling_threads(), open_potential(molecule, None, COMPILE_FROM, COMPILE_BATCH) as energy:
        ends = (ladder[0], ladder[-1])
        pilot = run_pilot(molecule, energy, *ends, n_iterations=args.iterations, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Frames are for timing a training.
    path.write_bytes(pickle.dumps(replace(pilot, frames=pilot.frames[:0])))
    return pilot


def flow_rows(quantity, folder, settings, flow, planned_error):
    """Return what training and sampling of a run took, beside what was predicted."""
    run, error, _ = measured(quantity, folder)
    n_rounds, summary = settings.n_rounds, run.summary()
    before = settings.sampling.n_tuning * (1 + n_rounds) + settings.round_iterations * n_rounds
    needed = flow.n_iterations * (planned_error / TIGHTER / error) ** 2
    rows = {}
    for stage, iterations in (("training", None), ("sampling", needed)):
        planned = before + flow.n_iterations
        scale = 1.0 if iterations is None else (before + iterations) / planned
        rows[stage] = {
            "evaluations": summary["energy_evaluations"][stage],
            "predicted": scale * flow.energy_evaluations[stage],
            "seconds": summary["wall_seconds"][stage],
            "predicted_seconds": scale * flow.wall_seconds[stage],
        }
    # Of the same number of iterations: without what is assumed of the flow.
    rows["sampling"] |= {
        "predicted_for_its_iterations": flow.energy_evaluations["sampling"]
        * (before + run.n_iterations)
        / (before + flow.n_iterations),
        "error": error,
    }
    return rows


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
        name = f"{case['case']}, {case['quantity']}, seed {case['seed']}"
        row, low_high = case["plain"], case["plain"]["range"]
        what = f"plain, {len(row['temperatures'])} rungs, ± {row['error']:.2g}"
        add(
            name,
            what,
            row["evaluations"],
            row["predicted"],
            " ({:.2g} to {:.2g})".format(*low_high),
        )
        if not case["flow"]:
            continue
        training, sampling = case["flow"]["training"], case["flow"]["sampling"]
        if training["evaluations"]:
            add(name, "flow, training", training["evaluations"], training["predicted"])
        same = sampling["predicted_for_its_iterations"]
        add(name, "flow, its iterations", sampling["evaluations"], same)
        what = f"flow, sampling, ± {sampling['error']:.2g}"
        add(name, what, sampling["evaluations"], sampling["predicted"], " (assumed)")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", nargs=4, action="append", required=True,
        metavar=("NAME", "QUANTITIES", "RUN", "PLAIN"),
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=450,
        help="of each pilot; by default those of a minute of alanine dipeptide",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the pilots")
    parser.add_argument("--pilots", default="pilots", help="the folder of those that are kept")
    parser.add_argument("--output", default="predictions.json")
    args = parser.parse_args()
    for case in args.case:
        for result in compare(*case, args):
            # Cases that the file has already stay, so that they can be run one by one.
            cases = read_json(args.output)["cases"] if Path(args.output).exists() else []
            cases = [each for each in cases if any(each[k] != result[k] for k in KEYS)]
            write_json(args.output, json_ready({"cases": [*cases, result]}))
    print(table(read_json(args.output)["cases"]))


if __name__ == "__main__":
    main()
