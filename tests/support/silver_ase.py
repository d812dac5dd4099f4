"""Writes ``silver_ase.json``: energies (eV) and forces (eV/Å) of ASE's EMT.

pip install ase==3.29.0 && python tests/support/silver_ase.py
"""

import json
from pathlib import Path

import ase
import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.optimize import BFGS


def evaluate(atoms):
    atoms.calc = EMT()
    return {
        "positions": atoms.positions.tolist(),
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces().tolist(),
    }


def relaxed(positions):
    atoms = Atoms(f"Ag{len(positions)}", positions, calculator=EMT())
    BFGS(atoms, logfile=None).run(fmax=1e-6)
    return evaluate(atoms)


rng = np.random.default_rng(1)
corners = 1.93 * np.concatenate([np.eye(3), -np.eye(3)])
# Three tetrahedra about a common edge, atoms 4 and 5: a pentagonal bipyramid without a corner.
ring = np.deg2rad(72.0) * np.arange(4)
open_ring = 2.35 * np.stack([np.cos(ring), np.sin(ring), np.zeros(4)], axis=1)
bipyramid = np.concatenate([open_ring, [[0, 0, 1.4], [0, 0, -1.4]]])
content = {"ase": ase.__version__, "isomers": {}, "others": []}
content["isomers"] = {"octahedron": relaxed(corners), "bipyramid": relaxed(bipyramid)}
for width in (0.1, 0.3, 0.6):
    content["others"].append(evaluate(Atoms("Ag6", corners + width * rng.normal(size=(6, 3)))))
content["others"].append(evaluate(Atoms("Ag6", bipyramid + 0.4 * rng.normal(size=(6, 3)))))
content["others"].append(evaluate(Atoms("Ag6", 1.3 * corners)))  # far, in the cutoff's tail
content["others"].append(evaluate(Atoms("Ag2", [[0, 0, 0], [0, 0, 2.5]])))
content["others"].append(evaluate(Atoms("Ag5", rng.normal(size=(5, 3)) * 1.5)))
path = Path(__file__).with_suffix(".json")
path.write_text(json.dumps(content) + "\n")
