"""Time of a step of Langevin dynamics with and without constrained bonds to hydrogen.

Alanine dipeptide, 192 walkers at 600 K, trajectories of 25 steps of 2 fs, metropolised. One process
and one thread; processor time of several trajectories, the two kernels in turn, so that other
programs on the machine disturb little. Prints and writes ms per step of all walkers, the median and
the least of all trajectories, and the ratio of the medians.

    python examples/benchmarks/constrained_step.py --compile
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import openmm.app as app
import torch

import openmm_tsf as tsf
from openmm_tsf.io.files import write_json
from openmm_tsf.sampling.initial import maxwell_boltzmann
from openmm_tsf.sampling.kernels import TorchLangevin, WalkerState
from openmm_tsf.units import KB

TEMPERATURE, N_STEPS, TIMESTEP = 600.0, 25, 0.002


def make(molecule, n_walkers, compiled, single_precision):
    """Return the kernel and its walkers after a short equilibration, with a generator."""
    generator = torch.Generator().manual_seed(1)
    potential = molecule.potential("torch", compile=compiled)
    x = torch.tensor(molecule.positions)[None]
    if molecule.constraints is not None:
        x = molecule.constraints.project(x)
    x = x.repeat(n_walkers, 1, 1)[:, None]
    kt = torch.tensor([KB * TEMPERATURE], dtype=torch.float64)
    v = maxwell_boltzmann(tuple(x.shape), kt, molecule.dynamics_masses, generator)
    energy = potential.energy(x[:, 0])[:, None].detach()
    state = WalkerState(x, v, energy, torch.zeros(n_walkers, 1, dtype=torch.int64))
    settings = {"n_steps": N_STEPS, "timestep": TIMESTEP, "single_precision": single_precision}
    kernel = TorchLangevin(
        potential, (TEMPERATURE,), molecule.dynamics_masses,
        constraints=molecule.constraints, **settings,
    )  # fmt: skip
    for _ in range(4):
        state, _ = kernel(state, generator)
    return kernel, state, generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walkers", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--single-precision", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file for the times")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    free = tsf.systems.alanine_dipeptide()
    xml = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
    system = xml.createSystem(free.topology, constraints=app.HBonds)
    molecules = {"free": free, "HBonds": tsf.MolecularSystem(system, free.topology, free.positions)}
    options = arguments.walkers, arguments.compile, arguments.single_precision
    made = {name: make(molecule, *options) for name, molecule in molecules.items()}
    measured: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(arguments.repeats):
        for name, (kernel, state, generator) in made.items():
            begin = time.process_time()
            kernel(state, generator)
            measured[name].append(1e3 * (time.process_time() - begin) / N_STEPS)
    times = {n: {"median": statistics.median(ms), "least": min(ms)} for n, ms in measured.items()}
    for name, ms in times.items():
        print(f"{name:8s} {ms['median']:7.2f} ms per step (least {ms['least']:.2f})")
    ratio = times["HBonds"]["median"] / times["free"]["median"]
    print(f"ratio    {ratio:7.2f}")
    if arguments.output is not None:
        settings = {k: v for k, v in vars(arguments).items() if k != "output"}
        load = os.getloadavg()[0]
        content = {"settings": settings, "ms_per_step": times, "ratio": ratio, "load": load}
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
