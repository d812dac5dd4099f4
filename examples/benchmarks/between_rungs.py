"""Any temperature of a run three ways: weighted frames, new draws, and a run with that rung.

    python examples/benchmarks/between_rungs.py run/ --temperatures 350 500 --output between/

Replica exchange with the flow of the finished run, on its ladder with the temperatures as further
rungs, gives the samples of those rungs alone. Beside them: `Run.curve` of the finished run, which
has no such rungs (MBAR over its own), and `tsf.sample_at`, draws of the flow at that very
temperature, Metropolised there. Each pair is compared in standard errors, for <U> and
P(dihedral > 0). A complete run with rungs is not repeated, an interrupted one is continued. Writes
between_rungs.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import openmm_tsf as tsf
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.record import recorded_settings
from openmm_tsf.workflow.sample import sample
from openmm_tsf.workflow.settings import SamplingSettings


def compare(run, with_rungs, drawn, kelvin):
    """Return the three estimates of each quantity at a temperature, and z of each pair."""
    quantities = {"energy_kJ_mol": ("energy", with_rungs.mean_energy(kelvin), drawn.energy)}
    for name in run.dihedral_atoms:
        inside = run.dihedral_at_all_rungs(name) > 0
        quantities[f"P({name} > 0)"] = inside, with_rungs.positive(name, kelvin), name
    table = {}
    for name, (observable, rung, key) in quantities.items():
        curve = run.curve(observable, kelvin)
        record = drawn.record
        entry = (
            record["dihedral_positive"][key] if isinstance(key, str) else record["energy_kJ_mol"]
        )
        estimates = {
            "mbar": (curve.value[0], curve.stderr[0]),
            "drawn": (entry["value"], entry["stderr"]),
            "rung": rung.pair,
        }
        table[name] = {way: {"value": v, "stderr": s} for way, (v, s) in estimates.items()}
        for first, second in (("mbar", "rung"), ("drawn", "rung"), ("drawn", "mbar")):
            (a, sa), (b, sb) = estimates[first], estimates[second]
            table[name][f"z_{first}_{second}"] = (a - b) / np.hypot(sa, sb)
    return table


def measure(path, kelvins, output, n_frames, n_iterations, seed, progress):
    """Return the content of between_rungs.json."""
    run, folder = tsf.load_run(path), output / "rungs"
    settings = recorded_settings(path, "sample", SamplingSettings) or SamplingSettings()
    ladder = tuple(sorted({*run.temperatures.tolist(), *kelvins}))
    settings = replace(settings, temperatures=ladder, n_iterations=n_iterations)
    options = RunOptions(seed=seed, progress=progress, resume=(folder / "checkpoint.pt").is_file())
    sample(path, folder, settings, options=options)
    with_rungs = tsf.load_run(folder)
    result = {
        "run": {"temperatures_K": run.temperatures.tolist(), "n_iterations": run.n_used},
        "with_rungs": {"temperatures_K": list(ladder), "n_iterations": with_rungs.n_used},
        "seed": seed,
        "temperatures": {},
    }
    for kelvin in kelvins:
        options = RunOptions(seed=seed, progress=progress)
        drawn = tsf.sample_at(path, kelvin, n_frames=n_frames, options=options)
        result["temperatures"][f"{kelvin:.2f}"] = {
            "quantities": compare(run, with_rungs, drawn, kelvin),
            "mbar_n_eff": run.curve("energy", kelvin).n_eff[0],
            "drawn": {
                key: drawn.record[key]
                for key in ("n_frames", "acceptance", "energy_evaluations", "wall_seconds")
            },
        }
    return json_ready(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="finished run directory with its flow")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[350.0, 500.0])
    parser.add_argument("--frames", type=int, default=10_000, help="draws at each temperature")
    parser.add_argument("--iterations", type=int, default=1000, help="of the run with the rungs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    result = measure(
        args.run, args.temperatures, args.output, args.frames, args.iterations, args.seed,
        not args.quiet,
    )  # fmt: skip
    (args.output / "between_rungs.json").write_text(json.dumps(result, indent=1) + "\n")
    for kelvin, table in result["temperatures"].items():
        for name, entry in table["quantities"].items():
            ways = "  ".join(
                f"{way} {entry[way]['value']:.4f} ± {entry[way]['stderr']:.4f}"
                for way in ("mbar", "drawn", "rung")
            )
            z = ", ".join(f"{entry[key]:+.1f}" for key in entry if key.startswith("z_"))
            print(f"{kelvin} K {name}: {ways}  z {z}")


if __name__ == "__main__":
    main()
