"""The arguments of a molecule, and the molecule that they describe."""

import argparse
from typing import Any

#: The arguments of the molecule, beside --forcefield.
_MOLECULE = (
    "pdb", "system", "prmtop", "inpcrd", "top", "gro", "include_dir", "psf", "crd", "parameters",
    "implicit_solvent", "constraints",
)  # fmt: skip


_TITLE = "molecule (default: alanine dipeptide)"


def add_molecule_arguments(command: argparse.ArgumentParser, title: str = _TITLE) -> None:
    """Add the arguments of a molecule."""
    group = command.add_argument_group(
        title,
        "All atoms, without explicit solvent. One of --forcefield, --system, --prmtop,\n"
        "--top and --psf, with coordinates; or --peptide.",
    )

    def file(flag: str, text: str, **options: Any) -> None:
        group.add_argument(flag, help=text, **{"metavar": "FILE", **options})

    file(
        "--peptide",
        "one-letter codes, as AAA for ACE-AAA-NME, or ala4, ala6, ELIL (charged ends), chignolin; "
        "in amber99sbildn.xml and amber99_obc.xml, or those of --forcefield",
        metavar="SEQUENCE",
    )
    file("--pdb", "PDB or mmCIF file, with --forcefield or --system")
    file(
        "--forcefield",
        "OpenMM force field files. They may contain Python scripts, which OpenMM runs: use only "
        "files that you trust",
        nargs="+",
        metavar="XML",
    )
    file("--system", "serialized OpenMM System (XML)")
    file("--prmtop", "Amber topology")
    file("--inpcrd", "Amber coordinates (inpcrd, rst7), with --prmtop")
    file("--top", "GROMACS topology")
    file("--gro", "GROMACS coordinates, with --top")
    file("--include-dir", "folder of the files that --top includes", metavar="DIR")
    file("--psf", "CHARMM PSF")
    file("--crd", "CHARMM coordinates, with --psf; or --pdb")
    file("--parameters", "CHARMM parameters (prm, rtf, str), with --psf", nargs="+")
    file(
        "--implicit-solvent",
        "HCT, OBC1, OBC2, GBn or GBn2, or none for vacuum; not with --system",
        metavar="MODEL",
    )
    file(
        "--constraints",
        "constrained bonds: none (default), hbonds or allbonds; not with --system",
        metavar="BONDS",
    )


def add_measure_argument(command: argparse.ArgumentParser) -> None:
    """Add --measure."""
    command.add_argument(
        "--measure",
        choices=("rigid", "stiff"),
        help="target where bonds are constrained: what constrained dynamics samples (rigid, the "
        "default), or the limit of stiff bonds, without the metric of the constraints",
    )


def molecule_files(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the molecule that are given, by the names of `load_molecule`."""
    given = {name: getattr(args, name) for name in _MOLECULE} | {"force_field": args.forcefield}
    return {name: value for name, value in given.items() if value is not None}


def given_molecule(args: argparse.Namespace) -> Any:
    """The molecule that the arguments describe; None where they describe none.

    ValueError for --measure without a molecule.
    """
    molecule = _described(args)
    if molecule is None and args.measure is not None:
        raise ValueError("--measure: expected a molecule with constraints beside it, got none")
    return molecule


def names_molecule(args: argparse.Namespace) -> bool:
    """Whether the arguments describe a molecule."""
    return args.peptide is not None or bool(molecule_files(args))


def _described(args: argparse.Namespace) -> Any:
    from openmm_tsf.systems.files import load_molecule

    files = molecule_files(args)
    if args.peptide is not None:
        return with_measure(_peptide(args, files), args)
    return with_measure(load_molecule(**files), args) if files else None


def molecule_of(args: argparse.Namespace) -> Any:
    """The molecule of the arguments, or of the folder that is resumed; None for the default."""
    from openmm_tsf.systems.files import holds_molecule, read_molecule

    if (molecule := _described(args)) is not None:
        return molecule
    if getattr(args, "resume", False) and holds_molecule(args.output):
        return with_measure(read_molecule(args.output), args)
    return given_molecule(args)


def _peptide(args: argparse.Namespace, files: dict[str, Any]) -> Any:
    """The molecule of --peptide, with the force field and constraints of the arguments."""
    from openmm_tsf.systems.peptides import FORCE_FIELDS, PUBLISHED, capped_peptide

    others = files.keys() - {"force_field", "constraints"}
    if others:
        other = min(others).replace("_", "-")
        raise ValueError(f"--peptide: expected no --{other} beside it, got both")
    sequence, capped = PUBLISHED.get(args.peptide, (args.peptide, True))
    force_field = args.forcefield or next(iter(FORCE_FIELDS))
    return capped_peptide(sequence, force_field, args.constraints or "none", capped=capped)


def with_measure(molecule: Any, args: argparse.Namespace) -> Any:
    """The molecule with the measure of the arguments, if there is one."""
    from dataclasses import replace

    return molecule if args.measure is None else replace(molecule, measure=args.measure)


def read_other_system(args: argparse.Namespace) -> Any:
    """The molecule of a run with another System; of a run that is resumed, that in its folder.

    Atoms are the run's where no coordinates are given, and so is the measure of constraints.
    """
    from dataclasses import replace

    from openmm import unit
    from openmm.app import Modeller

    from openmm_tsf.systems.files import load_molecule, read_molecule

    if args.peptide is not None:
        raise ValueError("--peptide: the atoms are those of RUN, expected --forcefield alone")
    files = molecule_files(args)
    if not files and args.resume:
        return read_molecule(args.output)
    if not files:
        raise ValueError("--system, --forcefield, --prmtop, ...: expected the other one, got none")
    known = read_molecule(args.run)
    if not files.keys() & {"pdb", "inpcrd", "gro", "crd"}:
        atoms = Modeller(known.topology, known.positions * unit.nanometer)
        files = {"pdb": atoms, **files}
    molecule = load_molecule(**files)
    return replace(molecule, measure=known.measure) if molecule.constraints else molecule
