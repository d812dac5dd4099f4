"""Whether a flow, and an energy, belong to the System that a host simulates."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openmm
import openmm.app as app
import torch

from openmm_tsf.flows.load import load_flow
from openmm_tsf.hosts.constrained import check_constraints
from openmm_tsf.io.files import hash_of_file
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import SteerableMap, check_flow
from openmm_tsf.systems.molecule import MolecularSystem, is_stereoisomer
from openmm_tsf.units import KB, as_temperature

logger = logging.getLogger(__name__)

#: Platforms compute energies in single precision: differences that are accepted, relative to the
#: energy and in kT.
_RELATIVE, _IN_KT = 1e-5, 0.05


def match_flow(
    flow: Any, system: openmm.System, topology: app.Topology, positions: Any
) -> tuple[SteerableMap, MolecularSystem]:
    """Return the flow (or the one in a file of this name) and the molecule of a host's System.

    Masses and a CMMotionRemover do not enter the distribution of conformations: the flow may have
    been made for the System without the one, or with the masses of the elements. Where bonds are
    constrained masses enter it, and are the System's.

    Raises
    ------
    ValueError
        If the System is not one that flows describe (constrained angles, a periodic box, a
        barostat, ...; the message names it), or the flow was made for another System or Topology,
        other constraints, or the measure "stiff".
    """
    molecule = MolecularSystem(system, topology, positions)
    if isinstance(flow, (str, os.PathLike)):
        flow = load_flow(flow)
    check_flow(flow)
    if tuple(flow.event_shape) != (molecule.n_atoms, 3):
        raise ValueError(
            f"flow: expected configurations of the Simulation's {molecule.n_atoms} atoms, "
            f"got a flow for {tuple(flow.event_shape)}"
        )
    check_constraints(molecule, flow)
    if flow.coordinates is not None:
        molecule.check_pose_independent()
    fingerprint = getattr(flow, "fingerprint", None)
    if fingerprint is None:
        return flow, molecule
    for candidate in _same_ensembles(molecule):
        if candidate.fingerprint == fingerprint:
            return flow, candidate
        if is_stereoisomer(fingerprint, candidate.fingerprint):
            raise ValueError(
                "flow: it was made for another stereoisomer than the Simulation's positions show: "
                "the handedness of centres, or of labelled hydrogens, differs"
            )
    raise ValueError(
        "flow: it was made for another System or Topology than the Simulation's (another force "
        "field or solvent, other atom names, ...)"
    )


def _same_ensembles(molecule: MolecularSystem) -> Iterator[MolecularSystem]:
    """Yield the molecule, then without CMMotionRemovers, with the elements' masses, with both."""
    yield molecule
    for with_removers, with_masses in ((False, True), (True, False), (False, False)):
        if molecule.constraints is not None and not with_masses:
            continue
        system = openmm.XmlSerializer.clone(molecule.system)
        forces = list(enumerate(system.getForces()))
        for index, force in reversed(forces):
            if not with_removers and isinstance(force, openmm.CMMotionRemover):
                system.removeForce(index)
        for atom in molecule.topology.atoms():
            if not with_masses and atom.element is not None:
                system.setParticleMass(atom.index, atom.element.mass)
        yield MolecularSystem(system, molecule.topology, molecule.positions)


def compare_energies(
    potential: Potential, positions: Any, energies: Any, temperature: float, source: str
) -> float:
    """Return the largest difference (kJ/mol) between a potential's energies and those of a host.

    `positions` [F, N, 3] in nm, `energies` [F] in kJ/mol from `source`; `temperature` in K.

    Raises
    ------
    ValueError
        If an energy differs by more than the single precision of a platform explains.
    """
    x = torch.as_tensor(positions, dtype=torch.float64, device="cpu")
    expected = torch.as_tensor(energies, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        computed = evaluate.energy(potential, x)
    difference = (computed - expected).abs()
    allowed = _RELATIVE * computed.abs() + _IN_KT * KB * temperature
    wrong = (~(difference <= allowed)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{source}: expected the potential's energy of {float(computed[row]):.6g} kJ/mol, got "
            f"{float(expected[row]):.6g} kJ/mol ({len(wrong)} of {len(x)} conformations differ): "
            "another System, a parameter of the Context that was changed, or an added bias"
        )
    return float(difference.max())


def check_all_forces_integrated(integrator: openmm.Integrator, system: openmm.System) -> None:
    """Refuse dynamics that leave out force groups, and so sample another energy."""
    groups = integrator.getIntegrationForceGroups()
    for force in system.getForces():
        moves_only = isinstance(force, openmm.CMMotionRemover)
        if not (groups >> force.getForceGroup()) & 1 and not moves_only:
            raise ValueError(
                f"simulation: expected dynamics with all Forces, but the integrator's force groups "
                f"leave out {force.getName()} (group {force.getForceGroup()})"
            )


def check_checkpoints(states: list[openmm.State], n_steps: int) -> None:
    """Warn of checkpoints of other steps than the log's: the writer was killed before them."""
    steps = [state.getStepCount() for state in states]
    if len(set(steps)) > 1 or steps[0] < n_steps:
        logger.warning(
            "the replicas' checkpoints are of steps %s: if the run was killed before they were "
            "written, replicas may have the conformation of another temperature, and need "
            "equilibration",
            steps,
        )


def positions_of(state: openmm.State) -> Any:
    """Return the positions [N, 3] of a State in nm, float64."""
    return state.getPositions(asNumpy=True)._value  # in nm; value_in_unit takes longer than a step


def temperatures_of(states: list[dict[str, Any]]) -> list[float]:
    """Return the temperatures of states in K; refuse states with other properties."""
    for index, state in enumerate(states):
        if other := sorted(state.keys() - {"temperature"}):
            raise ValueError(
                "states: with a flow, expected states that differ in temperature alone, got "
                f"{', '.join(map(repr, other))} in state {index}"
            )
        if "temperature" not in state:
            raise ValueError(f"states: with a flow, expected a temperature, got none in {index}")
    return [as_temperature(state["temperature"], "states") for state in states]


def check_flow_file(path: Path, sha256: str, move: str) -> None:
    """Refuse a flow file that is missing, or is not the one that a move was made with."""
    try:
        digest = hash_of_file(path, "flow file")
    except FileNotFoundError as error:
        hint = "put it (or a link to it) there again"
        raise FileNotFoundError(
            f"flow: expected the flow file of this {move} at {path}, got none; {hint}"
        ) from error
    if digest != sha256:
        hint = "a run has samples of one flow, start a new one"
        raise ValueError(
            f"flow: expected the file with which this {move} was made (SHA-256 {sha256[:12]}), got "
            f"another (SHA-256 {digest[:12]}) at {path}; {hint}"
        )
