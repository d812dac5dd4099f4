"""Molecules: a System, its Topology and one conformation, checked at construction."""

import hashlib
import logging
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mdtraj
import numpy as np
import openmm
import openmm.app as app
import openmm.unit as unit

from openmm_tsf.coordinates.bond_graph import centres_of
from openmm_tsf.coordinates.chirality import handedness_signs
from openmm_tsf.coordinates.constraints import MEASURES, Constraints
from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.forces.base import NotCovered
from openmm_tsf.potentials.openmm_potential import OpenMMPotential
from openmm_tsf.potentials.torch_potential import TooLarge, TorchPotential
from openmm_tsf.systems.consistency import check_no_solvent, check_reference, check_same_molecule
from openmm_tsf.systems.constrained import check_constraints
from openmm_tsf.systems.pose import pose_dependent_force
from openmm_tsf.units import as_positions
from openmm_tsf.utils.topology import backbone_dihedrals, bonds_of
from openmm_tsf.utils.validation import check_choice

logger = logging.getLogger(__name__)

_OPENMM_OPTIONS = {"platform", "platform_properties", "n_contexts"}
_TORCH_OPTIONS = {"compile", "device", "dtype", "force_groups", "memory", "positions", "tolerance"}
#: Mass of hydrogens in dynamics that only samples positions.
_HEAVY_HYDROGEN_AMU = 4.0
#: Digits of a fingerprint that do not depend on the handedness.
_N_DIGITS = 48
_OPENMM_VERSION = re.compile(r'\sopenmmVersion="[^"]*"')


@dataclass(frozen=True)
class MolecularSystem:
    """One molecule in vacuum or implicit solvent.

    Parameters
    ----------
    system
        The OpenMM System: not periodic, no virtual sites, thermostat, barostat or fixed particles.
        Bonds may be constrained (HBonds; AllBonds without rings), angles not. A CMMotionRemover is
        allowed, and left out of the dynamics. An energy that depends on the molecule's position or
        orientation is for Cartesian kernels only: see :meth:`check_pose_independent`.
    topology
        Its Topology, bonds included, in the System's order of atoms. Water and ions are refused,
        also the few of a hydrate; a water molecule or an ion alone is a molecule.
    positions
        One conformation [N, 3] in nm (or a Quantity), the reference for handedness.
    measure
        The target where bonds are constrained: ``"rigid"``, what constrained dynamics samples,
        exp(-U/kT) |Z|^(1/2) with the metric Z of the constraints
        (:mod:`openmm_tsf.coordinates.constraints`), which the masses enter; or ``"stiff"``,
        exp(-U/kT) alone, the limit of stiff bonds, as of published flows for constrained molecules.

    Raises
    ------
    ValueError
        If the System has something that is not supported (named in the message); if System,
        Topology and positions differ in their numbers of atoms or bonds; if atoms overlap.

    Examples
    --------
    >>> import openmm.app as app
    >>> import openmm_tsf as tsf
    >>> shipped = tsf.systems.alanine_dipeptide()
    >>> force_field = app.ForceField("amber14-all.xml", "implicit/obc2.xml")
    >>> system = force_field.createSystem(shipped.topology)
    >>> molecule = tsf.MolecularSystem(system, shipped.topology, shipped.positions)
    >>> molecule.n_atoms
    22
    """

    system: openmm.System
    topology: app.Topology
    positions: np.ndarray = field(repr=False)
    measure: str = "rigid"

    def __post_init__(self) -> None:
        if not isinstance(self.system, openmm.System):
            raise TypeError(f"system: expected an openmm.System, got {type(self.system).__name__}")
        if not isinstance(self.topology, app.Topology):
            got = f"{type(self.topology).__name__} (mdtraj's has a method to_openmm)"
            raise TypeError(f"topology: expected an openmm.app.Topology, got {got}")
        check_no_solvent(self.topology)
        n_atoms, number = self.system.getNumParticles(), self.topology.getNumAtoms()
        if number != n_atoms:
            raise ValueError(f"topology: expected the System's {n_atoms} atoms, got {number}")
        if any(index != atom.index for index, atom in enumerate(self.topology.atoms())):
            raise ValueError(
                "topology: expected atoms in the order of their chains and residues, got an atom "
                "that was added to a residue before the last"
            )
        positions = as_positions(self.positions, n_atoms).copy()
        positions.flags.writeable = False
        object.__setattr__(self, "positions", positions)
        object.__setattr__(self, "measure", check_choice(self.measure, "measure", MEASURES))
        self._check_supported()
        check_same_molecule(self.system, self.topology)
        if self.constraints is not None:
            check_constraints(self.constraints, self.topology)
        elif self.measure != MEASURES[0]:
            raise ValueError(
                f"measure: expected none for a System without constraints, got {self.measure!r}"
            )
        check_reference(self.system, self.topology, positions)

    def _check_supported(self) -> None:
        system = self.system
        for force in system.getForces():
            if "Barostat" in type(force).__name__:
                raise ValueError(f"system: barostats are not supported, got {force.getName()}")
            if isinstance(force, openmm.AndersenThermostat):
                hint = f"{force.getName()}; leave it out, the sampler sets the temperatures"
                raise ValueError(f"system: thermostats are not supported, got {hint}")
            if force.usesPeriodicBoundaryConditions():
                hint = (
                    "uses one; build it for the molecule alone, in an implicit solvent, with "
                    "nonbondedMethod=NoCutoff"
                )
                raise ValueError(f"system: expected no periodic box, but {force.getName()} {hint}")
        for index in range(system.getNumParticles()):
            if system.isVirtualSite(index):
                raise ValueError(
                    f"system: virtual sites are not supported, particle {index} is one"
                )
            if system.getParticleMass(index) <= 0 * unit.amu:
                fixed = f"particle {index} has no mass"
                raise ValueError(f"system: fixed particles are not supported, {fixed}")

    @property
    def n_atoms(self) -> int:
        """The number of atoms."""
        return int(self.system.getNumParticles())

    @cached_property
    def masses(self) -> np.ndarray:
        """The masses [N] in amu."""
        return np.array(
            [self.system.getParticleMass(i).value_in_unit(unit.amu) for i in range(self.n_atoms)]
        )

    @cached_property
    def constraints(self) -> Constraints | None:
        """The constrained bonds; None without any."""
        return Constraints.from_system(self.system) if self.system.getNumConstraints() else None

    @property
    def constraint_options(self) -> dict[str, Any]:
        """The arguments `constraints` and `measure` of coordinates and of kernels of dynamics."""
        return {"constraints": self.constraints, "measure": self.measure}

    @property
    def n_degrees_of_freedom(self) -> int:
        """The number of internal coordinates: 3N - 6, less one for each constrained bond."""
        return 3 * self.n_atoms - 6 - int(self.system.getNumConstraints())

    @cached_property
    def dynamics_masses(self) -> np.ndarray:
        """The masses [N] in amu for dynamics that only sample positions, with steps of 2 fs.

        With constraints they are the System's own, which enter the distribution of positions by the
        metric of the constraints. Without, masses do not enter it, and hydrogens have 4 amu.
        """
        return self.masses if self.constraints is not None else self.heavy_hydrogen_masses

    @cached_property
    def heavy_hydrogen_masses(self) -> np.ndarray:
        """The masses [N] in amu, but 4 amu for hydrogens: see :attr:`dynamics_masses`."""
        symbols = [atom.element.symbol if atom.element else "" for atom in self.topology.atoms()]
        return np.where([symbol == "H" for symbol in symbols], _HEAVY_HYDROGEN_AMU, self.masses)

    @cached_property
    def mdtraj_topology(self) -> mdtraj.Topology:
        """The Topology as an mdtraj.Topology."""
        return mdtraj.Topology.from_openmm(self.topology)

    @cached_property
    def dihedrals(self) -> dict[str, tuple[int, int, int, int]]:
        """Named backbone dihedrals: phi and psi of each peptide residue that has them, by bonds.

        If both belong to the same, only residue, the names are ``phi`` and ``psi``; otherwise each
        ends with its residue's number in the Topology, counted from 1: ``phi2``, ``psi2``, ...
        """
        return backbone_dihedrals(self.topology)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the serialized System, the Topology's atoms and bonds, and the handedness.

        64 hexadecimal digits; the first 48 do not depend on the handedness of tetrahedral centres
        in `positions`. Atoms are known by their labels: exchanging the two hydrogens of CH2 is
        another handedness as well, because the flow's coordinates keep it. OpenMM's version is
        left out, so that flows remain valid when it is upgraded. With constraints the measure is a
        part of it.
        """
        xml = openmm.XmlSerializer.serialize(self.system)
        digest = hashlib.sha256(_OPENMM_VERSION.sub("", xml, count=1).encode())
        for atom in self.topology.atoms():
            element = atom.element.symbol if atom.element is not None else "-"
            digest.update(f"{atom.index} {atom.name} {element} {atom.residue.name}\n".encode())
        # Sorted, each once: files list the same bonds in another order, or some of them twice.
        bonds = {(min(pair), max(pair)) for pair in bonds_of(self.topology).tolist()}
        for first, second in sorted(bonds):
            digest.update(f"{first} {second}\n".encode())
        if self.constraints is not None:
            digest.update(f"measure {self.measure}\n".encode())
        signs = handedness_signs(self.positions, centres_of(self.topology))
        handedness = hashlib.sha256(digest.digest() + signs.astype("<i8").tobytes())
        return digest.hexdigest()[:_N_DIGITS] + handedness.hexdigest()[_N_DIGITS:]

    @property
    def identity(self) -> dict[str, str]:
        """What ``config.json`` says of the molecule: the fingerprint, the measure if it has one."""
        measure = {} if self.constraints is None else {"measure": self.measure}
        return {"molecule": self.fingerprint, **measure}

    def check_pose_independent(self) -> None:
        """Refuse (ValueError) an energy that depends on the molecule's position or orientation.

        A flow describes conformations without these, so that it would be trained and weighted with
        the energies of an arbitrary pose. Whether energies change is tested with random rigid
        motions, once; the message names the Force.

        Examples
        --------
        >>> import openmm_tsf as tsf
        >>> tsf.systems.alanine_dipeptide().check_pose_independent()
        """
        if self._pose_dependence is None:
            return
        name, change = self._pose_dependence
        raise ValueError(
            "molecule: expected an energy that does not depend on position and orientation, which "
            f"a flow does not describe, but that of {name} changes by {change:.3g} kJ/mol when the "
            "molecule is moved as a rigid body; leave this Force out, or restrain the conformation "
            "instead (RMSDForce in a CustomCVForce, distances, dihedrals); Cartesian kernels and "
            "MD sample the System as it is"
        )

    @cached_property
    def _pose_dependence(self) -> tuple[str, float] | None:
        return pose_dependent_force(self.system, self.positions)

    def potential(self, kind: str = "auto", **options: Any) -> Potential:
        """Return the best potential of this System on this machine; the choice is logged.

        Parameters
        ----------
        kind
            ``"torch"``: :class:`openmm_tsf.TorchPotential`, whole batches per call, differentiable
            to any order. ``"openmm"``: :class:`openmm_tsf.OpenMMPotential`, OpenMM's Contexts.
            ``"auto"``: the first if it covers every Force of the System (and one conformation
            fits in its memory), the second if not or if `options` name a platform.
        **options
            Passed to ``TorchPotential.from_system`` or ``OpenMMPotential``.
        """
        if kind not in ("auto", "torch", "openmm"):
            raise ValueError(f"kind: expected 'auto', 'torch' or 'openmm', got {kind!r}")
        given = {name: value for name, value in options.items() if value is not None}
        for_openmm = kind == "openmm" or (kind == "auto" and not _OPENMM_OPTIONS.isdisjoint(given))
        known = _OPENMM_OPTIONS if for_openmm else _TORCH_OPTIONS
        if not given.keys() <= known:
            other, expected = (", ".join(sorted(names)) for names in (given.keys() - known, known))
            library = "OpenMM" if for_openmm else "torch"
            raise TypeError(f"options: expected some of {expected} for {library}, got {other}")
        if for_openmm:
            return OpenMMPotential(self.system, **given)
        try:
            options = {"positions": self.positions, **given}
            potential = TorchPotential.from_system(self.system, **options)
        except (NotCovered, TooLarge) as reason:
            # OpenMM's Contexts have no options for torch; compile alone may be dropped.
            if kind == "torch" or given.keys() - {"compile"}:
                raise
            logger.info("energies by OpenMM's Contexts: %s", reason)
            return OpenMMPotential(self.system)
        logger.info("energies by torch: %r", potential)
        return potential


def is_stereoisomer(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints differ in the handedness of centres alone."""
    return fingerprint != other and fingerprint[:_N_DIGITS] == other[:_N_DIGITS]
