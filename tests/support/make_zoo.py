"""Write zoo.json, the geometries of `tests.support.zoo`.

Needs RDKit (2026.09.1 was used), which the tests do not: ``python tests/support/make_zoo.py``.

One conformer by ETKDG (seed 1), minimised with MMFF94s, or UFF where MMFF94s has no parameters.
Positions in 1e-4 nm. A stereocentre without a label is as it comes.
"""

import json
import math
from math import cos, sin
from pathlib import Path
from typing import Any

from rdkit import Chem
from rdkit.Chem import AllChem

SMALL = {
    # chains
    "methane": "C",
    "ethane": "CC",
    "butane": "CCCC",
    "isobutane": "CC(C)C",
    "neopentane": "CC(C)(C)C",
    "ethene": "C=C",
    "isobutene": "CC(=C)C",
    "butadiene": "C=CC=C",
    # linear groups
    "propyne": "CC#C",
    "butyne": "CC#CC",
    "pentadiyne": "CC#CC#C",
    "vinylacetylene": "C=CC#C",
    "acetonitrile": "CC#N",
    "acetonitrile_oxide": "CC#[N+][O-]",
    "malononitrile": "N#CCC#N",
    "benzonitrile": "N#Cc1ccccc1",
    "methyl_azide": "CN=[N+]=[N-]",
    "hydrazoic_acid": "N=[N+]=[N-]",
    "allene": "C=C=C",
    "ketene": "C=C=O",
    "methyl_isothiocyanate": "CN=C=S",
    "isocyanic_acid": "N=C=O",
    "diazomethane": "C=[N+]=[N-]",
    "methyl_isocyanide": "C[N+]#[C-]",
    "carbodiimide": "N=C=N",
    "butatriene": "C=C=C=C",
    # rings of three, alone and fused
    "cyclopropane": "C1CC1",
    "cyclopropene": "C1=CC1",
    "oxirane": "C1OC1",
    "aziridine": "C1NC1",
    "thiirane": "C1SC1",
    "spiropentane": "C1CC12CC2",
    "housane": "C1CC2CC12",
    "bicyclobutane": "C1C2CC12",
    "propellane": "C1C23CC12C3",
    "tetrahedrane": "C12C3C1C23",
    "prismane": "C12C3C1C4C2C34",
    "quadricyclane": "C1C2C3C2C4C3C14",
    # other rings
    "cyclobutane": "C1CCC1",
    "cyclopentane": "C1CCCC1",
    "cyclohexane": "C1CCCCC1",
    "bicyclopentane": "C1C2CC1C2",
    "cubane": "C12C3C4C1C5C2C3C45",
    "benzene": "c1ccccc1",
    "pyridine": "c1ccncc1",
    "furan": "c1ccoc1",
    "thiophene": "c1ccsc1",
    "imidazole": "c1c[nH]cn1",
    "bifuran": "o1cccc1-c2ccco2",
    # nitrogen
    "ammonia": "N",
    "hydrazine": "NN",
    "hydroxylamine": "NO",
    "trimethylamine": "CN(C)C",
    "methylammonium": "C[NH3+]",
    "guanidinium": "NC(N)=[NH2+]",
    "formamide": "NC=O",
    "urea": "NC(N)=O",
    "nitromethane": "C[N+](=O)[O-]",
    # oxygen
    "methanol": "CO",
    "ethanol": "CCO",
    "hydrogen_peroxide": "OO",
    "dimethyl_ether": "COC",
    "formaldehyde": "C=O",
    "acetone": "CC(C)=O",
    "acetic_acid": "CC(=O)O",
    "acetate": "CC(=O)[O-]",
    # third row and further
    "dimethyl_sulfoxide": "CS(C)=O",
    "vinyl_sulfoxide": "C=C[S@](C)=O",
    "dimethyl_sulfone": "CS(C)(=O)=O",
    "methanethiol": "CS",
    "dimethyl_disulfide": "CSSC",
    "sulfuric_acid": "OS(=O)(=O)O",
    "phosphine": "P",
    "phosphoric_acid": "OP(=O)(O)O",
    "methylsilane": "C[SiH3]",
    "methylselenol": "C[SeH]",
    "borane": "B",
    "tetrafluoroborate": "F[B-](F)(F)F",
    "ammonia_borane": "[BH3-][NH3+]",
    "chloromethane": "CCl",
    "bromochlorofluoromethane": "F[C@H](Cl)Br",
    # chiral along an axis, by an isotope; a bead
    "difluoroallene": "FC=C=CF",
    "methanol_d3": "[2H]C([2H])([2H])O",
    "ethanol_d1": "C[C@H]([2H])O",
    "bead_ethanol": "FCCO",  # the fluorine becomes an atom without element
}
BEADS = {"bead_ethanol": 0}

#: Central atom, then length (nm), polar angle and azimuth (degrees) of each bond to a fluorine:
#: measured geometries, for which neither force field has parameters.
FLUORIDES = {
    "phosphorus_pentafluoride": "P 0.1577,0,0 0.1577,180,0 0.1534,90,0 0.1534,90,120 0.1534,90,240",
    "sulfur_hexafluoride": "S 0.1561,0,0 0.1561,180,0 "
    "0.1561,90,0 0.1561,90,90 0.1561,90,180 0.1561,90,270",
    "sulfur_tetrafluoride": "S 0.1646,86.5,90 0.1646,86.5,270 0.1545,50.8,0 0.1545,50.8,180",
    "chlorine_trifluoride": "Cl 0.1598,0,0 0.1698,87.5,0 0.1698,87.5,180",
    "xenon_tetrafluoride": "Xe 0.1935,90,0 0.1935,90,90 0.1935,90,180 0.1935,90,270",
}

#: SMILES, and residue and name of each heavy atom in its order.
PEPTIDES = {
    "hid": (
        "CC(=O)N[C@@H](Cc1cnc[nH]1)C(=O)NC",
        "ACE1:CH3,C,O HIS2:N,CA,CB,CG,CD2,NE2,CE1,ND1,C,O NME3:N,C",
    ),
    "hie": (
        "CC(=O)N[C@@H](Cc1c[nH]cn1)C(=O)NC",
        "ACE1:CH3,C,O HIS2:N,CA,CB,CG,CD2,NE2,CE1,ND1,C,O NME3:N,C",
    ),
    "hip": (
        "CC(=O)N[C@@H](Cc1c[nH]c[nH+]1)C(=O)NC",
        "ACE1:CH3,C,O HIS2:N,CA,CB,CG,CD2,NE2,CE1,ND1,C,O NME3:N,C",
    ),
    "cystine_ring": (
        "CC(=O)N[C@@H](CS1)C(=O)N[C@@H](CS1)C(=O)NC",
        "ACE1:CH3,C,O CYS2:N,CA,CB,SG,C,O CYS3:N,CA,CB,SG,C,O NME4:N,C",
    ),
    "primary_amide": ("CC(=O)N[C@@H](C)C(=O)N", "ACE1:CH3,C,O ALA2:N,CA,CB,C,O NHE3:N"),
    "zwitterion": ("[NH3+][C@@H](C)C(=O)NCC(=O)[O-]", "ALA1:N,CA,CB,C,O GLY2:N,CA,C,O,OXT"),
    "amino_acid": ("[NH3+][C@@H](C)C(=O)[O-]", "ALA1:N,CA,CB,C,O,OXT"),
    "cyclo_ala_gly": ("N1[C@@H](C)C(=O)NCC1=O", "ALA1:N,CA,CB,C,O GLY2:N,CA,C,O"),
    "cyclo_pro_gly": ("N12[C@@H](CCC1)C(=O)NCC2=O", "PRO1:N,CA,CB,CG,CD,C,O GLY2:N,CA,C,O"),
    "cyclo_gly3": ("N1CC(=O)NCC(=O)NCC1=O", "GLY1:N,CA,C,O GLY2:N,CA,C,O GLY3:N,CA,C,O"),
    "n_methylated": ("CC(=O)N(C)[C@@H](C)C(=O)NC", "ACE1:CH3,C,O MAA2:N,CN,CA,CB,C,O NME3:N,C"),
    "pyroglutamate": ("N1C(=O)CC[C@H]1C(=O)NC", "PCA1:N,CD,OE,CG,CB,CA,C,O NME2:N,C"),
    "lactam": (
        "CC(=O)N[C@@H](CC(=O)N2)C(=O)N[C@@H](C2)C(=O)NC",
        "ACE1:CH3,C,O ASP2:N,CA,CB,CG,OD1 DAB3:NG ASP2:C,O DAB3:N,CA,CB,C,O NME4:N,C",
    ),
    "beta_alanine": ("CC(=O)NCCC(=O)NC", "ACE1:CH3,C,O BAL2:N,CB,CA,C,O NME3:N,C"),
}
#: Numbers of the hydrogens of an atom that has so many.
NUMBERS = {1: [""], 2: ["2", "3"], 3: ["1", "2", "3"]}


def embed(name: str, smiles: str) -> Chem.Mol:
    """Return the molecule with hydrogens and one minimised conformer."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(molecule, randomSeed=1) == 0, name
    if AllChem.MMFFHasAllMoleculeParams(molecule):
        AllChem.MMFFOptimizeMolecule(molecule, mmffVariant="MMFF94s", maxIters=5000)
    else:
        print(name, "by UFF")
        AllChem.UFFOptimizeMolecule(molecule, maxIters=5000)
    return molecule


def describe(molecule: Chem.Mol, order: list[int]) -> dict[str, Any]:
    """Return elements, bonds and positions with the atoms in an order."""
    new = {old: index for index, old in enumerate(order)}
    atoms = [molecule.GetAtomWithIdx(old) for old in order]
    bonds = [(new[b.GetBeginAtomIdx()], new[b.GetEndAtomIdx()]) for b in molecule.GetBonds()]
    xyz = molecule.GetConformer().GetPositions()[order]
    return {
        "elements": " ".join("D" if a.GetIsotope() == 2 else a.GetSymbol() for a in atoms),
        "bonds": " ".join(f"{i}-{j}" for i, j in sorted(map(sorted, bonds))),
        "positions": [round(float(value) * 1000) for value in xyz.ravel()],
    }


def star(text: str) -> dict[str, Any]:
    """Return a central atom with fluorines, described by `text` as in `FLUORIDES`."""
    centre, *bonds = text.split()
    xyz = [0.0, 0.0, 0.0]
    for bond in bonds:
        length, polar, azimuth = map(float, bond.split(","))
        theta, phi = math.radians(polar), math.radians(azimuth)
        direction = sin(theta) * cos(phi), sin(theta) * sin(phi), cos(theta)
        xyz += [length * component for component in direction]
    return {
        "elements": " ".join([centre, *["F"] * len(bonds)]),
        "bonds": " ".join(f"0-{i + 1}" for i in range(len(bonds))),
        "positions": [round(value * 10_000) for value in xyz],
    }


def label(molecule: Chem.Mol, text: str) -> list[tuple[str, str]]:
    """Return residue and name of each atom, hydrogens after the atoms that they are bonded to."""
    parts = [part.split(":") for part in text.split()]
    labels = [(residue, name) for residue, names in parts for name in names.split(",")]
    for atom in list(molecule.GetAtoms())[: len(labels)]:
        residue, name = labels[atom.GetIdx()]
        hydrogens = [a for a in atom.GetNeighbors() if a.GetSymbol() == "H"]
        for hydrogen, number in zip(hydrogens, NUMBERS.get(len(hydrogens), []), strict=True):
            assert hydrogen.GetIdx() == len(labels)
            labels.append((residue, f"H{name[1:]}{number}"))
    assert len(labels) == molecule.GetNumAtoms(), text
    return labels


def main() -> None:
    """Write the file."""
    content: dict[str, dict[str, Any]] = {"small": {}, "peptides": {}}
    for name, smiles in SMALL.items():
        molecule = embed(name, smiles)
        entry = describe(molecule, list(range(molecule.GetNumAtoms())))
        if name in BEADS:
            elements = entry["elements"].split()
            elements[BEADS[name]] = "*"
            entry["elements"] = " ".join(elements)
        content["small"][name] = entry
    content["small"] |= {name: star(text) for name, text in FLUORIDES.items()}
    for name, (smiles, text) in PEPTIDES.items():
        molecule = embed(name, smiles)
        labels = label(molecule, text)
        order = sorted(range(len(labels)), key=lambda atom: int(labels[atom][0][3:]))
        atoms = " ".join(":".join(labels[old]) for old in order)
        content["peptides"][name] = {"atoms": atoms, **describe(molecule, order)}
    lines = [
        f'"{kind}": {{\n'
        + ",\n".join(
            f'"{name}": {json.dumps(entry, separators=(",", ":"))}'
            for name, entry in entries.items()
        )
        + "\n}"
        for kind, entries in content.items()
    ]
    path = Path(__file__).with_name("zoo.json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
