"""What a user hands over as files: molecules, trajectories, and a place for the results."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openmm
import openmm.app as app

from openmm_tsf.dataset import MDDataset
from openmm_tsf.openmm_xml import read_openmm_xml
from openmm_tsf.systems import MolecularSystem, alanine_dipeptide

PathLike = str | os.PathLike[str]


def load_molecule(
    pdb: PathLike | None = None,
    system: PathLike | None = None,
    force_field: Sequence[str] | None = None,
) -> MolecularSystem:
    """A molecule from files; without any, the shipped alanine dipeptide.

    Parameters
    ----------
    pdb
        PDB file with all atoms: Topology and reference conformation.
    system
        Serialized System (XML), without constraints and periodic box.
    force_field
        Instead of `system`: names of OpenMM force field files, e.g.
        ``["amber14-all.xml", "implicit/obc2.xml"]``.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the combination makes no sense, a file cannot be read, or the System is not supported.
    """
    if pdb is None:
        if system is not None or force_field:
            raise ValueError("pdb: expected a PDB file beside the System or force field, got none")
        return alanine_dipeptide()
    if (system is None) == (not force_field):
        raise ValueError(
            "system, force_field: expected exactly one of the two with a PDB file, got "
            + ("none" if system is None else "both")
        )
    structure = _read_pdb(_existing(pdb, "pdb"))
    if system is not None:
        built = read_openmm_xml(system, openmm.System, "system")
    else:
        assert force_field is not None
        try:
            built = app.ForceField(*force_field).createSystem(
                structure.topology,
                nonbondedMethod=app.NoCutoff,
                constraints=None,
                rigidWater=False,
                removeCMMotion=False,
            )
        except Exception as error:
            raise ValueError(
                f"force_field: OpenMM cannot build a System for {pdb} with "
                f"{', '.join(force_field)}: {error}"
            ) from error
    return MolecularSystem(built, structure.topology, structure.positions)


def write_molecule(molecule: MolecularSystem, directory: PathLike) -> None:
    """Write ``topology.pdb`` and ``system.xml``, which :func:`load_molecule` reads back."""
    folder = Path(directory)
    with open(folder / "topology.pdb", "w") as file:
        app.PDBFile.writeFile(
            molecule.topology, 10.0 * molecule.positions, file, keepIds=True
        )  # PDB files are in Angstrom, which is what plain numbers mean to this writer
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(molecule.system))


def load_trajectory(
    trajectory: PathLike,
    molecule: MolecularSystem,
    temperature: float | None = None,
    stride: int = 1,
) -> MDDataset:
    """Frames of a trajectory file, or of a directory that the ``md`` stage wrote.

    Parameters
    ----------
    trajectory
        A file that mdtraj reads, or a directory of the ``md`` stage, which knows its temperature
        and its cost.
    molecule
        The molecule.
    temperature
        Temperature of a trajectory file in K.
    stride
        Keep every `stride`-th frame.

    Raises
    ------
    FileNotFoundError
        If there is no such file or directory.
    ValueError
        If the temperature is missing or contradicts the directory's, or the frames do not fit.
    """
    path = Path(trajectory)
    if not path.exists():
        raise FileNotFoundError(f"trajectory: no such file or directory {path}")
    if not path.is_dir():
        if temperature is None:
            raise ValueError(f"temperature: expected the temperature of {path} in K, got none")
        return MDDataset.load(path, molecule, temperature, stride=stride)
    if not (path / "md.dcd").is_file() or not (path / "config.json").is_file():
        raise ValueError(f"trajectory: {path} is no directory of the md stage (no md.dcd in it)")
    config = read_json(path / "config.json")
    known = float(config["settings"]["temperature"])
    if temperature is not None and abs(temperature - known) > 1e-6:
        raise ValueError(f"temperature: {path} was run at {known} K, got {temperature} K")
    return MDDataset.load(
        path / "md.dcd",
        molecule,
        known,
        stride=stride,
        n_evaluations=int(config["progress"]["n_evaluations"]),
    )


def claim_directory(output: PathLike) -> Path:
    """Create an output directory, or take an empty one.

    Raises
    ------
    FileExistsError
        If it is not empty: results are never mixed or overwritten.
    NotADirectoryError
        If the path is a file.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output: {path} is a file, expected a directory")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(
            f"output: {path} is not empty; choose another directory, or delete this one if its "
            f"results are no longer needed{_what_can_be_done(path)}"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def _what_can_be_done(path: Path) -> str:
    """How the results in a directory can be used or continued, as the end of a sentence."""
    possible = {
        "checkpoint.pt": "sampling in it continues with sample --resume",
        "training.pt": "training in it continues with train --resume",
        "checkpoint.xml": "MD in it continues with md --resume",
        "flow.pt": f"its flow can be used: sample --flow {path}",
        "md/md.dcd": f"its frames can be used: --trajectory {path / 'md'}",
    }
    there = [text for name, text in possible.items() if (path / name).is_file()]
    return "".join(f"; {text}" for text in there)


def check_platform(name: str | None) -> None:
    """Refuse a platform that this OpenMM does not have; None stands for a measurement.

    Raises
    ------
    ValueError
        If there is no platform of that name.
    """
    platforms = map(openmm.Platform.getPlatform, range(openmm.Platform.getNumPlatforms()))
    known = [found.getName() for found in platforms]
    if name is not None and name not in known:
        raise ValueError(f"platform: expected one of {', '.join(known)}, got {name!r}")


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{path}: no readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: PathLike, content: Any) -> None:
    """Write a JSON file atomically."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def package_versions() -> dict[str, str]:
    """Versions of this package and of what its numbers depend on."""
    names = ("openmm-tsf", "openmm", "torch", "numpy", "mdtraj", "pymbar")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _read_pdb(path: Path) -> app.PDBFile:
    try:
        with open(path) as file:
            if not any(line.startswith(("ATOM", "HETATM")) for line in file):
                raise ValueError("there are no atoms in it")
            file.seek(0)
            return app.PDBFile(file)
    except Exception as error:  # OpenMM's reader raises many kinds
        raise ValueError(f"pdb: OpenMM cannot read {path}: {error}") from error


def _existing(path: PathLike, argument: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument}: no such file {path}")
    return Path(path)
