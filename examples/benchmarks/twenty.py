"""Twenty-five molecules from PDB to a finished run, one command each, and what the runs say.

    python examples/benchmarks/twenty.py twenty/ --references

does what is left of everything, one process after another, and writes ``twenty.json``, and the
tables in ``twenty.md`` beside it, after each run (``--output`` names them). It can be stopped with
Ctrl-C or killed at any time, and goes on where it was; a second instance of the same folder is
refused. ``--only ace_val_nme toluene`` takes some molecules, ``--jobs 2 --threads 1`` has two
molecules at a time on one core each, ``--collect`` runs nothing and writes the tables only. Rows
that ``--output`` has of molecules not begun in this folder are kept: machines can share the work.

The molecules are the capped amino acids, ACE-ALA3-NME, Met-enkephalin, toluene and two drugs, in
``molecules/``; their force field is amber14 with OBC2 (GAFF or GAFF2 with OBC2 for the last three).
Each is one call of ``openmm-tsf run``, with its own MD at 600 K, meant to end within a quarter of
an hour on one free core. The table has the seconds that the run itself counted, and the time of
the CPU, which other jobs on the machine do not change.

With ``--references``, six molecules also have replica exchange of Metropolised dynamics without a
flow (``data/make_reference.py``), from another start and up to 848 K; z is of <U> and every
basin of the slow torsions at 300, 424.26 and 600 K, see ``cases.py``. What a run calls converged is
wrong with abs(z) >= 4.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from cases import compare

from openmm_tsf.analysis import load_run
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.analysis.summary import json_ready
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.directory import DirectoryInUse, DirectoryLock
from openmm_tsf.io.files import read_json, write_json, write_text
from openmm_tsf.systems.files import read_molecule

HERE = Path(__file__).resolve().parent
MOLECULES = HERE / "molecules"
FORCE_FIELD = ("amber14-all.xml", str(MOLECULES / "gbsa_obc2.xml"))
AMINO_ACIDS = "GLY ALA SER CYS ASP ASN THR PRO GLU VAL HIS GLN MET ILE LEU PHE TYR LYS ARG TRP"
CAPPED = [f"ace_{name.lower()}_nme" for name in AMINO_ACIDS.split()]
#: These have a System beside the PDB file.
WITH_SYSTEM = ("toluene", "paracetamol", "ibuprofen")
REFERENCES = (
    "toluene", "ace_ala_nme", "ace_pro_nme", "ace_val_nme", "ace_trp_nme", "ace_ala3_nme",
)  # fmt: skip
OTHERS = ("paracetamol", *CAPPED, "ibuprofen", "met_enkephalin")
#: In the order in which they are run.
NAMES = (*REFERENCES, *(name for name in OTHERS if name not in REFERENCES))
REFERENCE_WALKERS = 16
REFERENCE_ITERATIONS, REFERENCE_CHUNK, BURN_IN = 6000, 3000, 1500  # of 25 steps of 2 fs
N_DRAWS = 20_000


@dataclass(frozen=True)
class Lengths:
    """How long the parts of a run are; the rest is the default preset."""

    frames: int  # of 0.25 ps
    steps: int
    iterations: int

    @classmethod
    def of(cls, n_atoms):
        """The lengths for a molecule: at most a quarter of an hour of one free core.

        MD: 1.5 ns of tryptophan, 4 of alanine. Short MD is what most often misses a basin
        (examples/results/README.md, "What 2 ns of MD are worth").
        """
        frames = round(6_000 * (36 / n_atoms) ** 2, -2)
        if n_atoms <= 36:
            return cls(min(int(frames), 20_000), steps=1500, iterations=800)
        if n_atoms <= 45:
            return cls(int(frames), steps=1200, iterations=600)
        return cls(frames=4000, steps=500, iterations=300)


def molecule_options(name):
    """The molecule in the options of ``openmm-tsf`` and ``make_reference.py``."""
    options = ["--pdb", str(MOLECULES / f"{name}.pdb")]
    if name in WITH_SYSTEM:
        return [*options, "--system", str(MOLECULES / f"{name}.xml")]
    return [*options, "--forcefield", *FORCE_FIELD]


def n_atoms_of(name):
    """The number of atoms of the PDB file."""
    lines = (MOLECULES / f"{name}.pdb").read_text().split("\n")
    return sum(line.startswith(("ATOM", "HETATM")) for line in lines)


def run_command(name, folder, args):
    """The one command of a molecule."""
    lengths = Lengths.of(n_atoms_of(name))
    command = [sys.executable, "-m", "openmm_tsf", "run", "--output", str(folder), "--resume"]
    command += molecule_options(name)
    for option in ("frames", "steps", "iterations"):
        command += [f"--{option}", str(getattr(args, option) or getattr(lengths, option))]
    for option in ("preset", "threads", "walkers", "tuning", "seed"):
        if (value := getattr(args, option)) is not None:
            command += [f"--{option}", str(value)]
    return command


class Queue:
    """A folder with runs and references, and ``state.json``: what they took, over all starts."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.state_file = self.folder / "state.json"
        self.state = read_json(self.state_file) if self.state_file.exists() else {}
        self.changes = threading.RLock()  # of the state
        self.processes, self.interrupted = [], False

    def call(self, key, command):
        """Run a command with its output in a log; note its time and exit status."""
        start = time.monotonic()
        with open(self.folder / f"{key}.log", "a") as log:
            print("$", *command, file=log, flush=True)
            with self.changes:
                if self.interrupted:
                    return None
                entry = self.state.setdefault(key, {"cpu_seconds": 0.0, "wall_seconds": 0.0})
                entry["command"] = command
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
                self.processes.append(process)
            _, status, usage = os.wait4(process.pid, 0)  # the times of this process alone
        with self.changes:
            process.returncode = entry["status"] = os.waitstatus_to_exitcode(status)
            self.processes.remove(process)
            entry["cpu_seconds"] += usage.ru_utime + usage.ru_stime
            entry["wall_seconds"] += time.monotonic() - start
            write_json(self.state_file, self.state)
        return entry["status"]

    def stop(self):
        """Start nothing more, and end what runs."""
        with self.changes:
            self.interrupted = True
            for process in self.processes:
                process.terminate()

    def run(self, name, args):
        """Finish the run of a molecule."""
        entry = self.state.get(name, {})
        if entry.get("status") == 0:
            return
        self.wait_for(self.folder / name)
        print(f"{time.strftime('%H:%M')} {name}: run", flush=True)
        status = self.call(name, run_command(name, self.folder / name, args))
        if status not in (0, None):
            print(f"{name}: exit status {status}, see {name}.log", flush=True)

    def wait_for(self, folder):
        """Wait until a run that outlived a killed queue has ended."""
        while folder.exists() and not self.interrupted:
            try:
                with DirectoryLock(folder):
                    return
            except DirectoryInUse as error:
                print(error, flush=True)
                time.sleep(10.0)

    def extend_reference(self, name, iterations):
        """Bring the reference of a molecule to a number of iterations."""
        key = f"{name}_reference"
        entry = self.state.get(key, {})
        if entry.get("iterations", 0) >= iterations:
            return
        print(f"{time.strftime('%H:%M')} {name}: reference to {iterations}", flush=True)
        script = [sys.executable, str(HERE.parents[1] / "data" / "make_reference.py")]
        folder = str(self.folder / key)
        command = [*script, "run", "--directory", folder, "--iterations", str(iterations)]
        command += ["--walkers", str(REFERENCE_WALKERS), *molecule_options(name)]
        self.wait_for(self.folder / key)
        status = self.call(key, command)
        if status == 0:
            command = [*script, "export", "--directory", folder, "--burn-in", str(BURN_IN)]
            status = self.call(f"{name}_export", [*command, "--output", f"{folder}.npz"])
        if status == 0:
            with self.changes:
                self.state[key]["iterations"] = iterations
                write_json(self.state_file, self.state)
        elif status is not None:
            print(f"{key}: exit status {status}, see the logs of {name}", flush=True)


def measure_ess(folder, temperatures, n_draws):
    """Reverse effective sample sizes of the joint weights, by temperature."""
    molecule = read_molecule(folder)
    flow = load_flow(folder / "flow.pt", molecule)
    measured = {}
    with molecule.potential() as potential:
        for kelvin in temperatures:
            generator = torch.Generator().manual_seed(1)
            draws = draw_weighted(flow, potential, kelvin, n_draws, generator)
            measured[f"{kelvin:.2f}"] = reverse_ess(draws.log_weights.numpy()).fraction
    return measured


def recorded_options(command):
    """The numbers among the options of a command."""
    pairs = pairwise(command)
    return {key[2:]: value for key, value in pairs if key[:2] == "--" and value.isdigit()}


def total_minutes(row):
    """The time of MD, training and sampling."""
    return sum(row["minutes"][stage] for stage in ("md", "training", "sampling"))


def row_of(name, folder, entry, n_draws=N_DRAWS):
    """What one finished run says about itself."""
    run = load_run(folder)
    summary = run.summary()
    cold, hot = (f"{t:.2f}" for t in (run.temperatures[0], run.temperatures[-1]))
    training = run.training_basins
    seconds = summary["wall_seconds"]
    return {
        "molecule": name,
        "n_atoms": run.topology.n_atoms,
        "settings": recorded_options(entry["command"]),
        "minutes": {key: (value or 0.0) / 60.0 for key, value in seconds.items()},
        "cpu_minutes": entry["cpu_seconds"] / 60.0,
        "energy_evaluations": summary["energy_evaluations"],
        "independence": summary["acceptance"]["flow_independent"],
        "swap_steered": summary["acceptance"]["swap_steered"],
        "swap_plain": summary["acceptance"]["swap_plain"],
        "reverse_ess": measure_ess(folder, run.temperatures, n_draws),
        "basins": {
            "torsions": list(run.basins.torsions),
            "in_training_frames": 0 if training is None else len(training.basins.names),
            "in_all": len(run.basins.names),
            "visited_at": {
                key: int(sum(bool(run.in_basin(n)[..., k].any()) for n in run.basins.names))
                for key, k in ((cold, 0), (hot, -1))
            },
        },
        "statuses": {
            status: sum(
                e["status"] == status for q in summary["quantities"].values() for e in q.values()
            )
            for status in ("converged", "bounded", "not yet", "wrong")
        },
        "verdict": summary["verdict"],
        "notes": summary["monitor"]["notes"],
    }


def collect(queue, output, n_draws):
    """Write the tables of what has finished; rows of unchanged runs are kept."""
    cache = queue.folder / "rows.json"
    rows = read_json(cache) if cache.exists() else {}
    for name in NAMES:
        entry, folder = queue.state.get(name, {}), queue.folder / name
        reference = queue.state.get(f"{name}_reference", {}).get("iterations", 0)
        key = [entry.get("wall_seconds"), reference]
        if entry.get("status") != 0 or rows.get(name, {}).get("made_of") == key:
            continue
        try:
            kept = rows.get(name, {})
            if kept.get("made_of", [None])[0] != key[0]:
                kept = row_of(name, folder, entry, n_draws)
            if reference:
                case = compare(name, folder, queue.folder / f"{name}_reference.npz")
                kept["reference"] = {"iterations": reference, **case}
        except (OSError, ValueError) as error:
            print(f"{name}: no row: {error}", flush=True)
            continue
        rows[name] = json_ready(kept | {"made_of": key})
        write_json(cache, rows)
    failed = {
        name: {"status": queue.state[name]["status"], "log": last_line(queue.folder, name)}
        for name in NAMES
        if queue.state.get(name, {}).get("status", 0) not in (0, 130)
    }
    if output.exists():
        kept = {row["molecule"]: row for row in read_json(output)["rows"]}
        rows = {name: row for name, row in kept.items() if name not in queue.state} | rows
    in_order = [rows[name] for name in NAMES if name in rows]
    write_json(output, {"rows": in_order, "failed": failed})
    write_text(output.with_suffix(".md"), tables(in_order, failed))


def last_line(folder, name):
    """The last line of a log, which says why a command failed."""
    lines = (folder / f"{name}.log").read_text().replace("\r", "\n").strip().split("\n")
    return lines[-1]


def rates(values):
    """Rates in one cell."""
    values = values.values() if isinstance(values, dict) else np.ravel(values)
    return " ".join("-" if v is None else f"{v:.2f}" for v in values)


def tables(rows, failed):
    """Both tables in Markdown."""
    lines = [
        "| molecule | atoms | minutes (of a core) | evaluations | independence 300/424/600 K "
        "| steered swaps | reverse ESS 300/424/600 K | basins visited at 300 K, at 600 K, "
        "of the frames | numbers converged, bounded, not yet, wrong | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        basins, statuses = row["basins"], row["statuses"]
        visited = ", ".join(str(v) for v in basins["visited_at"].values())
        evaluations = sum(v or 0 for v in row["energy_evaluations"].values())
        cells = (
            row["molecule"],
            row["n_atoms"],
            f"{total_minutes(row):.1f} ({row['cpu_minutes']:.1f})",
            f"{evaluations:.2g}",
            rates(row["independence"]),
            rates(row["swap_steered"]),
            rates(row["reverse_ess"]),
            f"{visited}, {basins['in_training_frames']} ({len(basins['torsions'])} torsions)",
            ", ".join(map(str, statuses.values())),
            row["verdict"]["sentence"],
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, entry in failed.items():
        lines.append(f"| {name} | | | | | | | | | exit status {entry['status']}: {entry['log']} |")
    lines += [f"\n{row['molecule']}: {note}" for row in rows for note in row["notes"]]
    lines += [
        "",
        "| molecule | iterations of the reference | numbers called converged | largest abs(z) "
        "of these | of the others | wrong and called converged |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if (case := row.get("reference")) is None:
            continue
        largest = [case["largest_z_of_these"], case["largest_z_of_others"]]
        z = ["" if value is None or not math.isfinite(value) else f"{value:.1f}"
             for value in largest]  # fmt: skip
        called = f"{case['n_called_converged']} of {case['n_numbers']}"
        wrong = "; ".join(case["wrong_and_called_converged"]) or "none"
        cells = (row["molecule"], case["iterations"], called, *z, wrong)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="folder of all runs; continued where it has some")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="some molecules")
    parser.add_argument("--references", action="store_true", help="references of six of them, too")
    parser.add_argument("--reference-iterations", type=int, default=REFERENCE_ITERATIONS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--draws", type=int, default=N_DRAWS, help="for the reverse ESS")
    parser.add_argument("--output", default="twenty.json", help="JSON file; the tables beside it")
    for option in ("frames", "steps", "iterations", "threads", "walkers", "tuning", "seed"):
        parser.add_argument(f"--{option}", type=int, help="as of openmm-tsf run, for all molecules")
    parser.add_argument("--preset", choices=("quick", "default", "thorough"))
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    return args


def main():
    args = parse_arguments()
    names = [name for name in NAMES if args.only is None or name in args.only]
    os.makedirs(args.directory, exist_ok=True)
    output = Path(args.output)
    with DirectoryLock(args.directory):
        queue = Queue(args.directory)
        collect(queue, output, args.draws)
        if args.collect:
            return
        referred = [name for name in names if name in REFERENCES and args.references]
        chunks = range(REFERENCE_CHUNK, args.reference_iterations, REFERENCE_CHUNK)
        ends = [*chunks, args.reference_iterations]
        collecting = threading.Lock()

        def do(task):
            task()
            with collecting:
                collect(queue, output, args.draws)

        # First what has references, the runs and then all references to the same length.
        others = [name for name in names if name not in referred]
        rounds = [[partial(queue.run, name, args) for name in referred]]
        rounds += [[partial(queue.extend_reference, n, end) for n in referred] for end in ends]
        rounds += [[partial(queue.run, name, args) for name in others]]
        with ThreadPoolExecutor(args.jobs) as pool:
            try:
                for tasks in rounds:
                    list(pool.map(do, tasks))
            except BaseException:
                queue.stop()
                raise


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
