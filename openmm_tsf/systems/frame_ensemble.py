"""Checks that frames are of the Boltzmann ensemble that a molecule's System has."""

import logging
import math

from torch import Tensor

from openmm_tsf.coordinates import InternalCoordinates
from openmm_tsf.systems.configurational_temperature import measure_temperature
from openmm_tsf.systems.mean_torques import measure_torques
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.utils.topology import atom_label

logger = logging.getLogger(__name__)

#: Deviations of the temperature, relative and in standard errors, of which both must be exceeded.
#: Leapfrog dynamics have 9 % more in bonds to hydrogen at a time step of 1 fs.
_REFUSED, _WARNED = (0.2, 6.0), (0.05, 4.0)
#: Of frames that are all in a minimum, without any force, in K.
_LEAST_KELVIN = 1e-9
#: Standard errors of the largest mean torque; in equilibrium they are about 3 at most.
_TORQUE_ERRORS = 6.0


def check_ensemble(molecule: MolecularSystem, positions: Tensor, temperature: float) -> None:
    """Refuse frames [F, N, 3] (nm) of another handedness or, by the forces, temperature (K).

    It takes a second or two: for frames that come from outside, before work begins. Significant but
    small deviations of the temperature are logged as a warning, and mean torques that are not those
    of equilibrium (another solvent, other torsions): sampling is exact with such frames, too, but
    the flow learns another ensemble.
    """
    _check_handedness(molecule, positions)
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
    measured = measure_temperature(molecule, positions)
    if measured is None:
        return
    kelvin, error = (max(value, _LEAST_KELVIN) for value in measured)
    relative = abs(kelvin / temperature - 1)
    significance = abs(kelvin - temperature) / error
    # The error of few frames is about proportional to what they give.
    of_logarithm = abs(math.log(kelvin / temperature)) * kelvin / error
    message = (
        f"temperature: expected frames of {temperature:g} K, but by this System's forces they are "
        f"of {kelvin:.0f} +- {error:.0f} K (configurational temperature): "
        "another temperature, unit or force field, frames that are minimised or not equilibrated, "
        "or dynamics with a time step that is too long"
    )
    if relative > _REFUSED[0] and min(significance, of_logarithm) > _REFUSED[1]:
        raise ValueError(message)
    if relative > _WARNED[0] and significance > _WARNED[1]:
        logger.warning("%s", message)
