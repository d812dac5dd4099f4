"""Molecules available by name."""

from importlib.resources import as_file, files

import openmm.app as app

from openmm_tsf.systems.molecule import MolecularSystem


def alanine_dipeptide(force_field: str = "amber99sbildn-obc2") -> MolecularSystem:
    """Return alanine dipeptide (ACE-ALA-NME, 22 atoms) in implicit solvent, without constraints.

    Parameters
    ----------
    force_field
        ``"amber99sbildn-obc2"``: ``amber99sbildn.xml`` with ``amber96_obc.xml``, the System of
        Dibak, Klein and Noé (arXiv:2012.00429). ``"ff96-obc1"``:
        ``openmmtools.testsystems.AlanineDipeptideImplicit(constraints=None)``, the System of the
        published Boltzmann-generator benchmarks.

    Examples
    --------
    >>> import openmm_tsf as tsf
    >>> tsf.systems.alanine_dipeptide().dihedrals
    {'phi': (4, 6, 8, 14), 'psi': (6, 8, 14, 16)}
    """
    if force_field == "amber99sbildn-obc2":
        with as_file(files("openmm_tsf.data") / "ala2.pdb") as path:
            pdb = app.PDBFile(str(path))
        xml = app.ForceField("amber99sbildn.xml", "amber96_obc.xml")
        system = xml.createSystem(
            pdb.topology, nonbondedMethod=app.NoCutoff, constraints=None, removeCMMotion=False
        )
        return MolecularSystem(system, pdb.topology, pdb.positions)
    if force_field == "ff96-obc1":
        from openmmtools.testsystems import AlanineDipeptideImplicit

        test = AlanineDipeptideImplicit(constraints=None)
        return MolecularSystem(test.system, test.topology, test.positions)
    expected = "'amber99sbildn-obc2' or 'ff96-obc1'"
    raise ValueError(f"force_field: expected {expected}, got {force_field!r}")
