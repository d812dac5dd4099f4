"""The flow of the default run on three other force fields, beside replica exchange without a flow.

    python data/make_reference.py run --directory refs/amber14-obc2 --iterations 5000 \
        --walkers 32 --pdb data/ala2.pdb --forcefield amber14-all.xml implicit/obc2.xml
    python data/make_reference.py run --directory refs/amber14-gbn2 --iterations 5000 \
        --walkers 32 --pdb data/ala2.pdb --forcefield amber14-all.xml implicit/gbn2.xml
    python data/make_reference.py run --directory refs/ff96-obc1 --iterations 5000 \
        --walkers 32 --alanine-dipeptide ff96-obc1
    python examples/benchmarks/other_force_fields.py run/ --references refs/ --output retarget/

Retargets the run in `run/` (trained and sampled with amber99sbildn-obc2) to each System for which
`refs/` has a directory; the System is read from there. Writes other_force_fields.json: evaluations,
acceptance, free-energy differences, and z of <U> and P(dihedral > 0) at every common rung.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import openmm_tsf as tsf
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.systems.files import read_molecule
from openmm_tsf.workflow.options import RunOptions

#: Saved iterations (of 0.25 ps) that are left out of a reference: walkers start from 200 ps of MD.
_BURN_IN = 500


def compare(run, reference):
    """Return both estimates of each quantity and z of their difference, by temperature."""
    table = {}
    for kelvin in run.temperatures:
        if not np.isclose(reference.temperatures, kelvin, atol=0.01).any():
            continue
        pairs = {"energy_kJ_mol": [r.mean_energy(kelvin).pair for r in (run, reference)]}
        for name in run.dihedral_atoms:
            pairs[f"P({name} > 0)"] = [r.positive(name, kelvin).pair for r in (run, reference)]
        table[f"{kelvin:.2f}"] = {
            name: {
                "here": here, "reference": there,
                "z": (here[0] - there[0]) / np.hypot(here[1], there[1]),
            }
            for name, (here, there) in pairs.items()
        }  # fmt: skip
    return table


def measure(run, references, output, seed, progress):
    """Return the content of other_force_fields.json."""
    rows = {}
    for folder in sorted(path for path in references.iterdir() if (path / "segments").is_dir()):
        target = output / folder.name
        options = RunOptions(seed=seed, progress=progress, resume=target.exists())
        summary = tsf.retarget(run, read_molecule(folder), target, options=options)
        written = json.loads((target / "retarget.json").read_text())
        reference = tsf.load_run(folder, start=_BURN_IN)
        rows[folder.name] = {
            "verdict": summary["verdict"]["sentence"],
            "sampling_evaluations": summary["energy_evaluations"]["sampling"],
            "comparison_evaluations": written["energy_evaluations"],
            "wall_seconds": summary["wall_seconds"]["sampling"],
            "acceptance": summary["acceptance"],
            "delta_F_kT": {
                kelvin: entry["delta_F_kT"] for kelvin, entry in written["by_temperature"].items()
            },
            "reference_evaluations": reference.segments.n_evaluations,
            "beside_reference": compare(tsf.load_run(target), reference),
        }
    return {"run": run.name, "seed": seed, "force_fields": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    content = measure(args.run, args.references, args.output, args.seed, not args.quiet)
    text = json.dumps(json_ready(content), indent=1)
    (args.output / "other_force_fields.json").write_text(text + "\n")
    for name, row in content["force_fields"].items():
        print(f"{name}: {row['verdict']}; {row['sampling_evaluations']} evaluations")
        for kelvin, quantities in row["beside_reference"].items():
            parts = ", ".join(f"{q} z = {entry['z']:+.1f}" for q, entry in quantities.items())
            print(f"  {kelvin} K: {parts}")


if __name__ == "__main__":
    main()
