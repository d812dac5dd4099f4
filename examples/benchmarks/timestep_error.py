r"""How far off is the mean energy of dynamics that is not Metropolised?

    python examples/benchmarks/timestep_error.py --output timestep_error.json  # half an hour

Walkers start at frames of the reference at 300 K, which was made with steps of 2 fs and hydrogens
of 4 amu (data/README.md), and continue without exchange, each in its basin: with the same
integrator (BAOAB, whose positions are those of LangevinMiddle) at several time steps, and with
Metropolised dynamics, which has no error of the time step. The error is from the spread of the
walkers' means of U: the effect of the time step, without the slow exchange between basins.
"""

import argparse
import math
from pathlib import Path

import torch
from common import reference_frames
from tqdm import trange

import openmm_tsf as tsf
from openmm_tsf.analysis.reference import load_reference
from openmm_tsf.io.files import write_json
from openmm_tsf.sampling.initial import starting_state, with_velocities
from openmm_tsf.sampling.kernels import InternalWalk, TorchLangevin

KELVIN, FRICTION, SEGMENT_PS = 300.0, 1.0, 0.1
#: Timestep in ps, and integrator: "verlet" is Metropolised.
SIDES = {
    "Metropolised, 2 fs": (0.002, "verlet"),
    "BAOAB, 2 fs": (0.002, "baoab"),
    "BAOAB, 1 fs": (0.001, "baoab"),
}


def frames(layers, n, generator):
    """Frames [n, N, 3] of the reference at 300 K, of the handedness that walkers keep."""
    x = reference_frames(KELVIN)
    x = x[~layers.is_mirror_image(x)]
    return x[torch.randperm(len(x), generator=generator)[:n]]


def mean_energy(x, side, molecule, potential, layers, args):
    """Mean of U [n] over the walkers' dynamics, kJ/mol, and the acceptance."""
    timestep, integrator = SIDES[side]
    masses = molecule.heavy_hydrogen_masses
    kernel = TorchLangevin(
        potential,
        (KELVIN,),
        masses,
        flow=layers,
        n_steps=round(SEGMENT_PS / timestep),
        timestep=timestep,
        friction=FRICTION,
        integrator=integrator,
    )
    generator = torch.Generator().manual_seed(args.seed + 1)
    mass = torch.tensor(masses, dtype=torch.float64)
    start = x[:, None]
    state = starting_state(start, None, len(x), (KELVIN,), layers, potential)
    state = with_velocities(state, (KELVIN,), potential, mass, generator)
    total, accepted, proposed = torch.zeros(len(x), dtype=torch.float64), 0.0, 0.0
    for segment in trange(args.relax + args.legs, desc=side, disable=args.quiet):
        state, info = kernel(state, generator)
        if segment >= args.relax:
            total += state.energy[:, 0]
            accepted += float(info.accepted.sum())
            proposed += float(info.proposed.sum())
    return total / args.legs, accepted / max(1.0, proposed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walkers", type=int, default=512)
    parser.add_argument("--legs", type=int, default=300, help="segments of 0.1 ps, averaged over")
    parser.add_argument("--relax", type=int, default=30, help="segments before those")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("timestep_error.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    molecule = tsf.systems.alanine_dipeptide()
    potential = molecule.potential(compile=True)
    frames_600 = tsf.MDDataset.shipped(molecule, stride=40)
    layers = InternalWalk.from_dataset(frames_600, potential, (KELVIN,)).layers
    x = frames(layers, args.walkers, torch.Generator().manual_seed(args.seed))
    means, report = {}, {"temperature_K": KELVIN, "n_walkers": len(x), "legs": args.legs}
    report["legs_before"], report["sides"] = args.relax, {}
    for side in args.sides:
        mean, acceptance = mean_energy(x, side, molecule, potential, layers, args)
        means[side] = mean
        report["sides"][side] = {
            "mean_energy": float(mean.mean()),
            "stderr": float(mean.std()) / math.sqrt(len(x)),
            "acceptance": acceptance,
        }
    exact = means[args.sides[0]]
    for side, mean in means.items():
        # Walker by walker: both began at one frame, and the basin is common to both.
        difference = mean - exact
        report["sides"][side]["above_first"] = float(difference.mean())
        report["sides"][side]["above_stderr"] = float(difference.std()) / math.sqrt(len(x))
    known = load_reference()
    rung = known.rung(KELVIN)
    report["reference"] = {
        "mean_energy": known.mean_energy(rung).value,
        "stderr": known.mean_energy(rung).stderr,
    }
    write_json(args.output, report)
    for side, measured in report["sides"].items():
        print(
            f"{side:20s} {measured['mean_energy']:8.3f} +- {measured['stderr']:.3f} kJ/mol, above "
            f"the first by {measured['above_first']:6.3f} +- {measured['above_stderr']:.3f}"
        )


if __name__ == "__main__":
    main()
