"""Files of GROMACS and CHARMM for a molecule of the zoo, written from its System.

They are made here, so that the energy that they must give is known: that of the System.
"""

from collections.abc import Iterable, Sequence
from math import degrees
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import openmm.unit as unit

from tests.support.zoo import Specimen

_KCAL, _RMIN = 4.184, 2 ** (1 / 6)


class Tables:
    """The bonded terms and nonbonded parameters of a harmonic System, in nm, kJ/mol, degrees."""

    def __init__(self, specimen: Specimen) -> None:
        forces = {type(force): force for force in specimen.system.getForces()}
        expected = {
            openmm.HarmonicBondForce,
            openmm.HarmonicAngleForce,
            openmm.PeriodicTorsionForce,
            openmm.NonbondedForce,
        }
        assert forces.keys() == expected, "other Forces have no counterpart here"
        bond, angle = forces[openmm.HarmonicBondForce], forces[openmm.HarmonicAngleForce]
        torsion, pair = forces[openmm.PeriodicTorsionForce], forces[openmm.NonbondedForce]
        n_atoms = pair.getNumParticles()
        self.atoms = list(specimen.topology.atoms())
        self.masses = [specimen.system.getParticleMass(i)._value for i in range(n_atoms)]
        self.nonbonded = _plain(pair.getParticleParameters(i) for i in range(n_atoms))
        self.bonds = _plain(bond.getBondParameters(i) for i in range(bond.getNumBonds()))
        self.angles = _plain(angle.getAngleParameters(i) for i in range(angle.getNumAngles()))
        self.torsions = _plain(
            torsion.getTorsionParameters(i) for i in range(torsion.getNumTorsions())
        )
        #: Factors of Coulomb and Lennard-Jones energies of the pairs at the ends of a torsion.
        self.pairs, self.qq, self.lj = [], 1.0, 1.0
        for index in range(pair.getNumExceptions()):
            i, j, qq, _, epsilon = _plain([pair.getExceptionParameters(index)])[0]
            if epsilon:
                self.pairs.append((i, j))
                self.qq = qq / (self.nonbonded[i][0] * self.nonbonded[j][0])
                self.lj = epsilon / np.sqrt(self.nonbonded[i][2] * self.nonbonded[j][2])


def _plain(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    return [[v._value if unit.is_quantity(v) else v for v in row] for row in rows]


def _text(*values: Any) -> str:
    return " ".join(f"{v:.12g}" if isinstance(v, float) else str(v) for v in values)


def write_gromacs(folder: Path, specimen: Specimen, box: float = 0.0, water: int = 0) -> None:
    """Write ``a.top``, which includes ``types.itp`` of the folder ``ff``, and ``a.gro``."""
    t = Tables(specimen)
    (folder / "ff").mkdir()
    types = [
        _text(f"t{i}", a.element.atomic_number, t.masses[i], "0.000", "A", *t.nonbonded[i][1:])
        for i, a in enumerate(t.atoms)
    ]
    types += ["OW 8 15.9994 0.0 A 0.315 0.636", "HW 1 1.008 0.0 A 0.0 0.0"]
    top = ["; written by a test", '#include "types.itp"', "[ moleculetype ]", "ETH 3", "[ atoms ]"]
    top += [
        _text(i + 1, f"t{i}", 1, "ETH", a.name, i + 1, t.nonbonded[i][0], t.masses[i])
        for i, a in enumerate(t.atoms)
    ]
    top += ["[ bonds ]", *(_text(i + 1, j + 1, 1, r, k) for i, j, r, k in t.bonds)]
    top += ["[ pairs ]", *(_text(i + 1, j + 1, 1) for i, j in t.pairs), "[ angles ]"]
    top += [_text(i + 1, j + 1, k + 1, 1, degrees(a), c) for i, j, k, a, c in t.angles]
    top += ["[ dihedrals ]"]
    top += [
        _text(i + 1, j + 1, k + 1, m + 1, 9, degrees(phase), c, n)
        for i, j, k, m, n, phase, c in t.torsions
    ]
    top += ["[ moleculetype ]", "SOL 2", "[ atoms ]", "1 OW 1 SOL OW 1 -0.8 16", "2 HW 1 SOL HW1 1"]
    top[-1] += " 0.4 1.008"
    top += ["3 HW 1 SOL HW2 1 0.4 1.008", "[ bonds ]", "1 2 1 0.1 3e5", "1 3 1 0.1 3e5"]
    top += ["[ angles ]", "2 1 3 1 109.5 400", "[ system ]", "a test", "[ molecules ]", "ETH 1"]
    top += [f"SOL {water}"] * bool(water)
    defaults = ["[ defaults ]", _text(1, 2, "yes", float(t.lj), float(t.qq)), "[ atomtypes ]"]
    (folder / "ff" / "types.itp").write_text("\n".join([*defaults, *types, ""]))
    (folder / "a.top").write_text("\n".join([*top, ""]))
    rows = [(1, "ETH", a.name, x) for a, x in zip(t.atoms, specimen.positions, strict=True)]
    for molecule in range(water):
        corner = np.array([1.0 + 0.4 * molecule, 1.0, 1.0])
        for name, shift in (("OW", 0.0), ("HW1", 0.1), ("HW2", -0.08)):
            rows.append((molecule + 2, "SOL", name, corner + shift * np.array([1.0, 0.2, 0.0])))
    lines = ["a test", f"{len(rows):5d}"]
    for index, (number, residue, name, x) in enumerate(rows):
        place = "".join(f"{v:8.3f}" for v in x)
        lines.append(f"{number:5d}{residue:<5}{name:>5}{index + 1:5d}{place}")
    (folder / "a.gro").write_text("\n".join([*lines, " ".join([f"{box:.5f}"] * 3), ""]))


def _sections(rows: list[list[int]], per_line: int) -> list[str]:
    flat = [f"{atom + 1:8d}" for row in rows for atom in row]
    size = per_line * (len(rows[0]) if rows else 1)
    return ["".join(flat[k : k + size]) for k in range(0, len(flat), size)] or [""]


def write_charmm(folder: Path, specimen: Specimen) -> None:
    """Write ``a.psf``, ``a.prm``, ``a.rtf`` (masses) and ``a.crd``."""
    t = Tables(specimen)
    psf = ["PSF", "", f"{1:8d} !NTITLE", " REMARKS a test", "", f"{len(t.atoms):8d} !NATOM"]
    for i, atom in enumerate(t.atoms):
        numbers = f"{t.nonbonded[i][0]:14.6f}{t.masses[i]:14.4f}{0:12d}"
        psf.append(f"{i + 1:8d} MAIN 1    ETH  {atom.name:<4} T{i:<4}{numbers}")
    for name, rows, per_line in (
        ("NBOND: bonds", [row[:2] for row in t.bonds], 4),
        ("NTHETA: angles", [row[:3] for row in t.angles], 3),
        ("NPHI: dihedrals", [row[:4] for row in t.torsions], 2),
        ("NIMPHI: impropers", [], 2),
        ("NDON: donors", [], 4),
        ("NACC: acceptors", [], 4),
        ("NNB", [], 8),
    ):
        psf += ["", f"{len(rows):8d} !{name}", *_sections(rows, per_line)]
    psf += ["", f"{1:8d}{0:8d} !NGRP NST2", f"{0:8d}{1:8d}{0:8d}", ""]
    (folder / "a.psf").write_text("\n".join(psf))
    masses = [f"MASS {i + 1} T{i} {mass:.5f} {t.atoms[i].element.symbol}"
              for i, mass in enumerate(t.masses)]  # fmt: skip
    (folder / "a.rtf").write_text("\n".join(["* a test", "*", "36 1", "", *masses, "", "END", ""]))
    prm = ["* a test", "*", "", "BONDS"]
    prm += [f"T{i} T{j} {k / 2 / _KCAL / 100:.9g} {10 * r:.9g}" for i, j, r, k in t.bonds]
    prm += ["", "ANGLES"]
    prm += [f"T{i} T{j} T{k} {c / 2 / _KCAL:.9g} {degrees(a):.9g}" for i, j, k, a, c in t.angles]
    prm += ["", "DIHEDRALS"]
    prm += [
        f"T{i} T{j} T{k} T{m} {c / _KCAL:.9g} {n} {degrees(phase):.9g}"
        for i, j, k, m, n, phase, c in t.torsions
    ]
    prm += ["", "NONBONDED nbxmod 5 atom cdiel fshift vatom vdistance vfswitch -"]
    prm += [f"cutnb 14.0 ctofnb 12.0 ctonnb 10.0 eps 1.0 e14fac {t.qq:.9g} wmin 1.5"]
    for i, (_, sigma, epsilon) in enumerate(t.nonbonded):
        radius, energy = 10 * sigma * _RMIN / 2, -epsilon / _KCAL
        well = f"0.0 {energy:.9g} {radius:.9g}"
        prm.append(f"T{i} {well} 0.0 {energy * t.lj:.9g} {radius:.9g}")
    (folder / "a.prm").write_text("\n".join([*prm, "", "END", ""]))
    crd = ["* A TEST", "*", f"{len(t.atoms):5d}"]
    for i, (atom, x) in enumerate(zip(t.atoms, 10 * specimen.positions, strict=True)):
        place = "".join(f"{v:10.5f}" for v in x)
        crd.append(f"{i + 1:5d}{1:5d} ETH  {atom.name:<4}{place} MAIN 1    {0:10.5f}")
    (folder / "a.crd").write_text("\n".join([*crd, ""]))
