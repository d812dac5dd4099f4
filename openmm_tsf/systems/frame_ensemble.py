"""Checks that frames are of the Boltzmann ensemble that a molecule's System has."""

import logging
import math

from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.potentials import OpenMMPotential
from openmm_tsf.systems.configurational_temperature import evenly_spaced, measure_temperature
from openmm_tsf.systems.mean_torques import measure_torques
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.activity import log_while
from openmm_tsf.utils.topology import atom_label

logger = logging.getLogger(__name__)

#: Standard errors of the temperature from which on a deviation is refused, or a warning.
_REFUSED_ERRORS, _WARNED_ERRORS = 6.0, 4.0
#: Relative deviation that is a warning.
_WARNED = 0.05
#: Ratios to the temperature given below and above which frames are refused. Leapfrog dynamics have
#: 9 % more in bonds to hydrogen at a time step of 1 fs, and in all other directions at 2 fs.
_ACCEPTED, _ACCEPTED_WITH_HYDROGENS = (0.8, 1.2), (0.9, 1.15)
#: Frames that heavy atoms, moved with their hydrogens, are judged by: fewer for more atoms.
_MOST_FRAMES, _LEAST_FRAMES, _ATOMS_IN_ALL = 1024, 256, 22_000
#: Frames of which given energies are compared, and their largest typical difference in kJ/mol:
#: positions in single precision make 0.01.
_ENERGIES, _ENERGY_DIFFERENCE = 64, 0.5
#: Of frames that are all in a minimum, without any force, in K.
_LEAST_KELVIN = 1e-9
#: Standard errors of the largest mean torque. In equilibrium the largest of 49, with errors from 32
#: blocks of frames, is above 5 once in a thousand times.
_TORQUE_ERRORS = 5.0


def check_ensemble(molecule: MolecularSystem, positions: Tensor, temperature: float) -> None:
    """Refuse frames [F, N, 3] (nm) of another handedness or, by the forces, temperature (K).

    It takes a second or two: for frames that come from outside, before work begins. Significant but
    small deviations of the temperature are logged as a warning, and mean torques that are not those
    of equilibrium (another solvent, other torsions): sampling is exact with such frames, too, but
    the flow learns another ensemble.
    """
    _check_handedness(molecule, positions)
    with log_while(logger, "comparing the frames with the System's forces", announce=False):
        _check_temperature(molecule, positions, temperature)
        deviation = measure_torques(molecule, positions, temperature)
    if deviation is not None and deviation.n_errors > _TORQUE_ERRORS:
        logger.warning(
            "frames of %g K: expected the equilibrium of this System's torques, but about %s they "
            "deviate by %.2f kT, %.0f standard errors: another force field (torsions, charges) or "
            "solvent, another temperature, or biased or too short dynamics",
            temperature,
            deviation.bond,
            abs(deviation.torque),
            deviation.n_errors,
        )


def check_energies(molecule: MolecularSystem, positions: Tensor, energies: Tensor) -> None:
    """Refuse energies [F] (kJ/mol) of frames [F, N, 3] (nm) that are not those of the System."""
    number = min(len(positions), _ENERGIES)
    x = evenly_spaced(positions, number)
    given = evenly_spaced(energies[:, None], number)[:, 0]
    settings = {"Threads": "1", "DeterministicForces": "true"}
    with OpenMMPotential(molecule.system, "CPU", settings, n_contexts=1) as potential:
        difference = given - potential.energy(x)
    typical = float(difference.abs().median())
    if typical > _ENERGY_DIFFERENCE:
        raise ValueError(
            "energies: expected the potential energies of the frames by the molecule's System, got "
            f"some that differ by {typical:.3g} kJ/mol (the median of {number}): another force "
            "field or unit, kinetic energy included, or energies of other frames"
        )


def _check_handedness(molecule: MolecularSystem, positions: Tensor) -> None:
    """Refuse frames in which a centre is the mirror image of the reference's."""
    try:
        layer = InternalCoordinates.from_topology(molecule.topology, molecule.positions)
    except ValueError:
        return  # without internal coordinates there is no flow, which says why
    mirrored = layer.is_mirror_image(positions.to("cpu")).nonzero().flatten()
    if not len(mirrored):
        return
    first = int(mirrored[0])
    labels = [atom_label(atom) for atom in molecule.topology.atoms()]
    inverted = layer.chirality.similarity(positions[first : first + 1].to("cpu"))[:, 0] <= 0
    names = [labels[atom] for atom in layer.chirality.centres[inverted, 0].tolist()]
    raise ValueError(
        "positions: expected the handedness of the molecule's reference positions, but "
        f"{len(mirrored)} of {len(positions)} frames have another; the first is frame {first}, "
        f"at {', '.join(names)}: give reference positions of the "
        "stereoisomer that was simulated, with hydrogens of a group (CH2, CH3) in the same order"
    )


def _check_temperature(molecule: MolecularSystem, positions: Tensor, temperature: float) -> None:
    """Refuse frames that the System's forces show to be of another temperature."""
    whole = measure_temperature(molecule, positions)
    if whole is None:
        return
    number = min(max(_ATOMS_IN_ALL // molecule.n_atoms, _LEAST_FRAMES), _MOST_FRAMES)
    heavy = None
    if molecule.constraints is None:
        heavy = measure_temperature(molecule, positions, number, with_hydrogens=True)
    checks = [(whole, _ACCEPTED)] + ([(heavy, _ACCEPTED_WITH_HYDROGENS)] if heavy else [])
    messages = []
    for measured, (low, high) in checks:
        kelvin, error = (max(value, _LEAST_KELVIN) for value in measured)
        ratio, significance = kelvin / temperature, abs(kelvin - temperature) / error
        # The error of few frames is about proportional to what they give.
        of_logarithm = abs(math.log(ratio)) * kelvin / error
        message = (
            f"temperature: expected frames of {temperature:g} K, but by this System's forces they "
            f"are of {kelvin:.0f} +- {error:.0f} K (configurational temperature): "
            "another temperature, unit or force field, frames that are minimised or not "
            "equilibrated, or dynamics with a time step that is too long"
        )
        if not low < ratio < high and min(significance, of_logarithm) > _REFUSED_ERRORS:
            raise ValueError(message)
        if abs(ratio - 1) > _WARNED and significance > _WARNED_ERRORS:
            messages.append(message)
    if messages:
        logger.warning("%s", messages[0])
