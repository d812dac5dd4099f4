"""Runs in shards with known numbers, written without any sampler."""

import json

import numpy as np

from openmm_tsf.io.shards import shard_directory
from openmm_tsf.io.tensors import write_tensors
from openmm_tsf.utils.random import Purpose, derive_seed
from tests.support.fabricate import chain_positions, write_run

SEED = 7
CHOICES = {
    "seed": SEED,
    "molecule": "four atoms",
    "flow": {"sha256": "0"},
    "sigma": {"flow_walk": [0.5, 0.25]},
}


def write_shards(path, temperatures, energy, phi, n_iterations=None, frames=True):
    """Write a run of S shards: energy and phi [S, n, w, R]; `n_iterations` of each, at most n."""
    n_shards, n, w = energy.shape[:3]
    path.mkdir()
    lengths = n_iterations or [n] * n_shards
    for number, length in enumerate(lengths):
        if length is None:
            continue
        seed = derive_seed(SEED, Purpose.SAMPLING, number)
        directory = shard_directory(path, number)
        write_run(
            directory,
            temperatures,
            energy[number, :length],
            {"phi": phi[number, :length]},
            positions=chain_positions(phi[number, :length]) if frames else None,
            per_segment=10,
            choices=CHOICES | {"sampler_seed": seed},
            energy_evaluations={"md": None, "training": 0, "sampling": 7},
            wall_seconds={"md": None, "training": 0, "sampling": 2.0},
        )
        counts = {"n_segments": -(-length // 10), "n_frames_written": length * w}
        write_tensors(directory / "checkpoint.pt", counts)
    settings = {"sampling": {"n_iterations": n}}
    config = json.loads((shard_directory(path, 0) / "config.json").read_text())
    config |= {
        "stage": "run",
        "n_walkers": n_shards * w,
        "n_shards": n_shards,
        "choices": CHOICES | {"settings": settings},
        "energy_evaluations": {"md": 100, "training": 50, "sampling": 3},
        "wall_seconds": {"md": 1.0, "training": 1.0, "sampling": 1.0},
    }
    (path / "config.json").write_text(json.dumps(config))
    if frames:
        pdb = (shard_directory(path, 0) / "topology.pdb").read_bytes()
        (path / "topology.pdb").write_bytes(pdb)
    return path


def join_walkers(series):
    """Return series [S, n, w, ...] of shards side by side, [n, S w, ...]."""
    return np.concatenate(list(series), axis=1)
