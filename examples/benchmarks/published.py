r"""The System of the published Boltzmann-generator benchmarks, with all energy evaluations.

    python data/make_reference.py run --alanine-dipeptide ff96-obc1 --directory reference/ \
        --iterations 10000                                              # two hours on one core
    python examples/benchmarks/published.py run run/                                # half an hour
    python examples/benchmarks/published.py compare run/ reference/ \
        --output examples/results/published.json

``systems.alanine_dipeptide("ff96-obc1")``, d = 60. ``run`` is the preset ``thorough`` with its own
MD: unbiased samples at 300 and 600 K from one flow. The reference has no flow: Metropolised
dynamics with plain swaps. ``compare`` writes P(phi > 0), Delta F_phi and
ln Z(600 K) - ln Z(300 K) of both, and the total variation of the Ramachandran histograms beside
that of an exact sampler with as many decorrelated frames.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import has_positive_phi

import openmm_tsf as tsf
from openmm_tsf.analysis.mbar import solve_mbar
from openmm_tsf.analysis.ramachandran import ramachandran_distance
from openmm_tsf.analysis.statistics import reverse_ess
from openmm_tsf.flows.draws import draw_weighted
from openmm_tsf.flows.load import load_flow
from openmm_tsf.io.files import read_json, write_json
from openmm_tsf.utils.random import Seeds
from openmm_tsf.workflow import run as workflow
from openmm_tsf.workflow.frames import FrameSource
from openmm_tsf.workflow.md import run_md
from openmm_tsf.workflow.options import RunOptions
from openmm_tsf.workflow.presets import preset

FORCE_FIELD = "ff96-obc1"
LOW_K, HIGH_K = 300.0, 600.0
N_GROUPS = 16
#: Published for 300 K: target evaluations, reverse ESS of the marginal, Ramachandran TV.
PUBLISHED = {
    "reverse KL": (2.56e8, 0.941, 1.36e-2),
    "FAB": (2.13e8, 0.948, 1.03e-2),
    "TA-BG": (1e8, 0.958, 1.24e-2),
    "CMT": (1e8, 0.977, 9.43e-3),
}


def dynamics(molecule, directory, settings):
    """Run MD into a directory, or continue it."""
    options = RunOptions(resume=directory.exists())
    if run_md(molecule, directory, settings, options=options).interrupted:
        raise KeyboardInterrupt


def run(args):
    """Run the preset on this System."""
    molecule, settings = tsf.systems.alanine_dipeptide(FORCE_FIELD), preset("thorough")
    if args.iterations is not None:
        sampling = replace(settings.sampling, n_iterations=args.iterations)
        settings = replace(settings, sampling=sampling)
    frames = args.directory.with_name(args.directory.name + "_md")
    # 1.5 ns: OpenMM takes a millisecond for a step of this System on most platforms.
    md = replace(settings.md, n_frames=30_000, seed=Seeds(args.seed).next() % 2**31)
    dynamics(molecule, frames, md)
    workflow.run(
        args.directory,
        settings,
        molecule=molecule,
        frames=FrameSource(frames),
        options=RunOptions(seed=args.seed, resume=args.directory.exists(), progress=not args.quiet),
    )


def log_z(energy, betas):
    """ln Z at the last of the temperatures over that at the first, from energies [n, W, K], and SE.

    MBAR over all rungs; the error is from the spread between groups of walkers, which are
    independent.
    """
    # f = -ln Z, up to a constant
    value = -float(solve_mbar(energy, betas)[-1])
    groups = np.array_split(np.arange(energy.shape[1]), N_GROUPS)
    parts = np.array([-solve_mbar(energy[:, group], betas)[-1] for group in groups])
    return value, float(parts.std(ddof=1) / math.sqrt(N_GROUPS))


def estimates(run):
    """Populations, free energies and mean energies of a run directory."""
    value, stderr = log_z(run.energy.astype(float), run.betas)
    results = {"log_z_difference": {"value": value, "stderr": stderr}}
    for kelvin in (LOW_K, HIGH_K):
        p, energy = run.positive("phi", kelvin), run.mean_energy(kelvin)
        free_energy, free_energy_stderr = run.free_energy_positive("phi", kelvin)
        results[f"{kelvin:g}"] = {
            "p": p.value,
            "p_stderr": p.stderr,
            "n_eff": p.n_eff,
            "delta_F_phi_kT": free_energy,
            "delta_F_phi_stderr": free_energy_stderr,
            "mean_energy": energy.value,
            "mean_energy_stderr": energy.stderr,
        }
    return results


def flow_alone(flow, potential, molecule, n_draws, n_repeats, generator):
    """Reverse ESS of the joint weights, P(phi > 0), ln Z; means over repeats and their spread."""
    results = {}
    for kelvin in (LOW_K, HIGH_K):
        # The momenta's own density is normalised: what is left is ln Z of x alone.
        tau = kelvin / flow.reference_temperature
        norm = 0.5 * flow.n_momenta * math.log(2 * math.pi * tau)
        rows = []
        for _ in range(n_repeats):
            draws = draw_weighted(flow, potential, kelvin, n_draws, generator)
            weights, basin = draws.log_weights, has_positive_phi(molecule, draws.x)
            population = float(basin[torch.isfinite(weights)].mean())
            log_z = float(torch.logsumexp(weights, 0)) - math.log(n_draws) - norm
            rows.append((reverse_ess(weights.numpy()).fraction, population, log_z))
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1)
        results[f"{kelvin:g}"] = {
            "reverse_ess_joint": mean[0],
            "spread": spread[0],
            "p": mean[1],
            "log_z": mean[2],
            "log_z_stderr": spread[2] / math.sqrt(n_repeats),
        }
    low, high = results[f"{LOW_K:g}"], results[f"{HIGH_K:g}"]
    results["log_z_difference"] = {
        "value": high["log_z"] - low["log_z"],
        "stderr": math.hypot(low["log_z_stderr"], high["log_z_stderr"]),
    }
    return results


def z(a, b, value, error):
    return (a[value] - b[value]) / math.hypot(a[error], b[error])


def compare(args):
    """Compare a run with the reference."""
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide(FORCE_FIELD)
    result, reference_result = tsf.load_run(args.directory), tsf.load_run(args.reference)
    spent = read_json(args.directory / "summary.json")
    report = {
        "published_at_300K": {
            name: dict(zip(("evaluations", "reverse_ess_marginal", "tv"), row, strict=True))
            for name, row in PUBLISHED.items()
        },
        "evaluations": spent["energy_evaluations"]
        | {"all": sum(spent["energy_evaluations"].values())},
        "wall_seconds": spent["wall_seconds"],
        "acceptance": spent["acceptance"],
        "run": estimates(result),
        "reference": estimates(reference_result),
    }
    flow, potential = load_flow(args.directory / "flow.pt", molecule), molecule.potential()
    generator = torch.Generator().manual_seed(args.seed)
    report["flow"] = flow_alone(flow, potential, molecule, args.draws, args.repeats, generator)
    compared = {}
    for kelvin in (LOW_K, HIGH_K):
        distance = ramachandran_distance(
            *(result.dihedral(name, kelvin) for name in ("phi", "psi")),
            *(reference_result.dihedral(name, kelvin) for name in ("phi", "psi")),
        )
        a, b = report["run"][f"{kelvin:g}"], report["reference"][f"{kelvin:g}"]
        compared[f"{kelvin:g}"] = {
            "z_p": z(a, b, "p", "p_stderr"),
            "z_delta_F": z(a, b, "delta_F_phi_kT", "delta_F_phi_stderr"),
            "z_energy": z(a, b, "mean_energy", "mean_energy_stderr"),
            "tv": distance.total_variation,
            "tv_of_an_exact_sampler": distance.expected_total_variation,
            "n_decorrelated": distance.n_decorrelated,
            "n_decorrelated_reference": distance.n_decorrelated_reference,
        }
    values = [report[name]["log_z_difference"] for name in ("run", "reference", "flow")]
    compared["z_log_z_run_reference"] = z(values[0], values[1], "value", "stderr")
    compared["z_log_z_run_flow"] = z(values[0], values[2], "value", "stderr")
    report["compared"] = compared
    write_json(args.output, report)
    for name in ("evaluations", "run", "reference", "flow", "compared"):
        print(name, report[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function in (run, compare):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("directory", type=Path)
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--quiet", action="store_true")
        if function is run:
            command.add_argument("--iterations", type=int)
        else:
            command.add_argument("reference", type=Path)
            command.add_argument("--draws", type=int, default=100_000)
            command.add_argument("--repeats", type=int, default=5)
            command.add_argument("--output", default="published.json")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
