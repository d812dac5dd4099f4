"""Count how often the default preset waits for a GPU, on the simulated one.

    python -m tests.support.count_waits --output examples/results/waits.json

Alanine dipeptide with an untrained flow of the default size, everything on the device, eager. All
kinds of iterations of production, and steps of training. Batches are small, and the chains relaxed
in few steps: waits depend on neither, nor do the launches of a batch on its size.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import openmm_tsf as tsf
from openmm_tsf.training import path_objective
from openmm_tsf.training.trainer import Trainer
from openmm_tsf.utils.versions import package_versions
from openmm_tsf.workflow.presets import preset
from openmm_tsf.workflow.sample import make_sampler
from tests.support.simulated_cuda import simulated_cuda

N_WALKERS, N_ITERATIONS, N_STEPS = 4, 8, 3


def make_parts():
    """Return the molecule, frames, the flow and the potential on the simulated device."""
    molecule = tsf.systems.alanine_dipeptide()
    data = tsf.MDDataset.shipped(molecule, stride=40)
    sizes = preset("default").flow
    options = {"n_blocks": sizes.n_blocks, "hidden": sizes.hidden, "overlap": sizes.overlap}
    flow = tsf.TemperatureSteerableFlow.from_dataset(data, seed=1, **options).to("cuda")
    potential = tsf.TorchPotential.from_system(molecule.system, device="cuda")
    return molecule, data, flow, potential


def count_iterations(molecule, flow, potential, counts):
    """Return the waits and launches of each of some iterations of the default preset."""
    settings = replace(preset("default").sampling, n_walkers=N_WALKERS)
    start = torch.tensor(molecule.positions, dtype=torch.float64)
    start = start.expand(N_WALKERS, len(settings.temperatures), *start.shape).contiguous()
    sampler = make_sampler(molecule, flow, settings, potential, (1, None), start.to("cuda"))
    counted = []
    with sampler:
        sampler.run(1, progress=False)  # constants are copied to the device once
        for _ in range(N_ITERATIONS):
            counts.clear()
            sampler.run(1, progress=False)
            counted.append((counts.n_waits, counts.n_launches))
    return counted


def count_steps(data, flow, potential, counts):
    """Return the waits and launches of steps of training; the first one relaxes the chains."""
    settings = replace(
        preset("default").fit,
        n_steps=100, ramp=(0.0, 0.1), batch_size=32, kl_batch_size=30, n_chains=40,
        n_validation_draws=8, temperatures=preset("default").sampling.temperatures,
    )  # fmt: skip
    trainer, counted = Trainer(flow, [data], potential, settings, 3), []
    with mock.patch.object(path_objective, "RELAXATION_STEPS", 4):
        trainer.train_step()  # without draws, and constants are copied to the device once
        for _ in range(N_STEPS):
            counts.clear()
            trainer.train_step()
            counted.append((counts.n_waits, counts.n_launches))
    return counted


def describe(counted):
    """Return waits and launches in the order in which they were counted."""
    return {"waits": [waits for waits, _ in counted], "launches": [n for _, n in counted]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with simulated_cuda() as counts:
        molecule, data, flow, potential = make_parts()
        result = {
            "iterations": describe(count_iterations(molecule, flow, potential, counts)),
            "training_steps": describe(count_steps(data, flow, potential, counts)),
        }
    result |= {"command": "python -m tests.support.count_waits", "versions": package_versions()}
    print(json.dumps(result))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int({*result["iterations"]["waits"], *result["training_steps"]["waits"]} != {1})


if __name__ == "__main__":
    sys.exit(main())
