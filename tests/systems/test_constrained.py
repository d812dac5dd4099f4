"""Molecules with constrained bonds: which are accepted, their identity, frames, files."""

import functools
import logging
from dataclasses import replace

import numpy as np
import openmm
import openmm.app as app
import pytest
import torch

import openmm_tsf as tsf
from openmm_tsf.io.files import write_json
from openmm_tsf.io.run_config import CONFIG, CONFIG_FORMAT
from openmm_tsf.systems.configurational_temperature import measure_temperature
from openmm_tsf.systems.equivalent_hydrogens import equivalent_hydrogens
from openmm_tsf.systems.files import read_molecule, write_molecule
from openmm_tsf.systems.molecule import is_stereoisomer
from openmm_tsf.workflow.settings import MDSettings
from tests.support.chain import N_ATOMS, chain_of, dynamics
from tests.support.molecules import capped, force_field
from tests.support.rigid_trimer import LIGHT, MEASURES, exact_frames, trimer

FORCES = "amber14/protein.ff14SB.xml"


@functools.cache
def alanine(constraints=app.HBonds, **options) -> tsf.MolecularSystem:
    shipped = tsf.systems.alanine_dipeptide()
    options = {"nonbondedMethod": app.NoCutoff, "constraints": constraints, **options}
    system = force_field(FORCES).createSystem(shipped.topology, **options)
    return tsf.MolecularSystem(system, shipped.topology, shipped.positions)


@functools.cache
def chain(measure="rigid", constrained=(0, 1)) -> tsf.MolecularSystem:
    """The chain of five atoms with two constrained bonds that share an atom."""
    free = chain_of()
    system = openmm.XmlSerializer.clone(free.system)
    for bond in constrained:
        system.addConstraint(bond, bond + 1, 0.15)
    return tsf.MolecularSystem(system, free.topology, free.positions, measure)


def frames_of(molecule, kelvin=500.0, n_frames=400):
    return torch.from_numpy(dynamics(molecule, kelvin, n_frames=n_frames))


class TestMolecules:
    @pytest.mark.parametrize(
        ("constraints", "number"), [(app.HBonds, 12), (app.AllBonds, 21), (None, 0)]
    )
    def test_bonds_are_constrained(self, constraints, number):
        molecule = alanine(constraints)
        assert molecule.n_degrees_of_freedom == 60 - number
        if number:
            assert molecule.constraints.n_constraints == number
        else:
            assert molecule.constraints is None
        layer = tsf.InternalCoordinates.from_topology(
            molecule.topology, molecule.positions, **molecule.constraint_options
        )
        assert layer.n_coordinates == molecule.n_degrees_of_freedom

    def test_flexible_constraints_keep_their_bond_terms(self):
        assert alanine(flexibleConstraints=True).constraints.n_constraints == 12

    def test_angles_and_rings_are_refused_by_name(self):
        with pytest.raises(ValueError, match="9 of 30 are of atoms that are not bonded, the first"):
            alanine(app.HAngles)
        topology, positions = capped("PRO")
        forces, options = force_field(FORCES), {"nonbondedMethod": app.NoCutoff}
        system = forces.createSystem(topology, constraints=app.AllBonds, **options)
        with pytest.raises(ValueError, match=r"rings of constrained bonds .*PRO2-.*=HBonds or"):
            tsf.MolecularSystem(system, topology, positions)
        system = forces.createSystem(topology, constraints=app.HBonds, **options)
        assert tsf.MolecularSystem(system, topology, positions).constraints is not None

    def test_rigid_water_is_refused(self):
        topology = app.Topology()
        residue = topology.addResidue("HOH", topology.addChain())
        atoms = [
            topology.addAtom(name, app.element.get_by_symbol(name[0]), residue)
            for name in ("O", "H1", "H2")
        ]
        for hydrogen in atoms[1:]:
            topology.addBond(atoms[0], hydrogen)
        system = force_field("amber14/tip3p.xml").createSystem(topology)
        positions = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
        with pytest.raises(ValueError, match="constrained angles are not supported"):
            tsf.MolecularSystem(system, topology, positions)

    def test_the_measure_is_a_part_of_the_identity(self):
        rigid, stiff = chain(), chain("stiff")
        assert rigid.measure == "rigid"
        assert rigid.fingerprint != stiff.fingerprint
        assert not is_stereoisomer(rigid.fingerprint, stiff.fingerprint)
        assert stiff.identity == {"molecule": stiff.fingerprint, "measure": "stiff"}
        assert chain_of().identity == {"molecule": chain_of().fingerprint}
        with pytest.raises(ValueError, match="measure: expected one of rigid, stiff, got 'soft'"):
            chain("soft")
        with pytest.raises(ValueError, match="measure: expected none for a System without const"):
            replace(chain_of(), measure="stiff")

    def test_masses_of_dynamics_are_those_of_the_metric(self):
        free, fixed = alanine(None), alanine()
        assert free.dynamics_masses.min() == 4.0
        np.testing.assert_array_equal(fixed.dynamics_masses, fixed.masses)
        assert fixed.dynamics_masses.min() < 1.1

    def test_time_step_of_md(self):
        steps = {None: 0.001, app.HBonds: 0.002, app.AllBonds: 0.002}
        for constraints, step in steps.items():
            assert MDSettings().completed_for(alanine(constraints)).timestep == step
        assert MDSettings(timestep=0.0005).completed_for(alanine()).timestep == 0.0005
        assert MDSettings().completed_for(chain()).timestep == 0.001  # no hydrogens

    def test_hydrogens_with_different_constraints_are_not_equivalent(self, caplog):
        molecule = alanine()
        groups = equivalent_hydrogens(molecule)
        assert len(groups) == 3
        system = openmm.XmlSerializer.clone(molecule.system)
        for index in range(system.getNumConstraints()):
            first, second, length = system.getConstraintParameters(index)
            if groups[0][1] in (first, second):
                system.setConstraintParameters(index, first, second, 1.001 * length)
        other = tsf.MolecularSystem(system, molecule.topology, molecule.positions)
        assert equivalent_hydrogens(other) == groups[1:]

    @pytest.mark.parametrize("measure", ["rigid", "stiff"])
    def test_in_the_directory_of_a_run(self, tmp_path, measure):
        molecule = chain(measure)
        write_molecule(molecule, tmp_path)
        config = {"format": CONFIG_FORMAT, "choices": molecule.identity}
        write_json(tmp_path / CONFIG, config)
        read = read_molecule(tmp_path)
        assert (read.measure, read.fingerprint) == (measure, molecule.fingerprint)
        write_json(tmp_path / CONFIG, {**config, "choices": {}})
        with pytest.raises(ValueError, match="measure: expected an entry, got none"):
            read_molecule(tmp_path)


class TestFrames:
    def test_those_of_constrained_dynamics_are_projected(self, caplog):
        caplog.set_level(logging.INFO)
        molecule = chain()
        frames = frames_of(molecule)
        before = molecule.constraints.deviations(frames).abs().max()
        assert 1e-9 < float(before) < 1e-5
        dataset = tsf.MDDataset(frames, 500.0, molecule)
        after = molecule.constraints.deviations(dataset.positions).abs().max()
        assert float(after) < 1e-14
        assert f"deviate by {float(before):.1e} nm at most" in caplog.text
        caplog.clear()
        assert torch.equal(dataset[10:20].positions, dataset.positions[10:20])
        assert "deviate" not in caplog.text

    def test_those_of_free_dynamics_are_refused(self):
        message = (
            r"positions: expected the 2 constrained distances of the System, to 0.0001 of them, "
            r"but 400 of 400 frames have others: .*dynamics without these constraints"
        )
        with pytest.raises(ValueError, match=message):
            tsf.MDDataset(frames_of(chain_of()), 500.0, chain())

    def test_those_of_other_constraints_are_refused(self):
        frames = frames_of(chain(constrained=(0, 1, 2)))
        with pytest.raises(ValueError, match="expected bonds that vibrate, but 1 of 2 keep their"):
            tsf.MDDataset(frames, 500.0, chain())
        with pytest.raises(ValueError, match="has no constraints of these bonds"):
            tsf.MDDataset(frames, 500.0, chain_of())

    def test_rounded_ones_are_refused(self):
        frames = (frames_of(chain()) * 1e4).round() / 1e4
        with pytest.raises(ValueError, match=r"constrained distances .* or were rounded"):
            tsf.MDDataset(frames, 500.0, chain())

    def test_flows_do_not_describe_the_constrained_bonds(self):
        molecule = chain()
        dataset = tsf.MDDataset(frames_of(molecule), 500.0, molecule)
        flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(4,))
        assert flow.n_coordinates == 3 * N_ATOMS - 6 - 2
        assert flow.coordinates.measure == "rigid"

    @pytest.mark.parametrize("of", MEASURES)
    def test_configurational_temperature(self, of):
        """With a light atom between the constrained bonds the metric is a part of it."""
        frames = exact_frames(of, 300.0, 2000, ratio=LIGHT)
        kelvin = {}
        for measure in MEASURES:
            kelvin[measure], error = measure_temperature(trimer(measure, LIGHT), frames, 2000)
        assert error < 10
        assert abs(kelvin[of] - 300) < 4 * error
        assert 3 < kelvin["rigid"] - kelvin["stiff"] < 20  # of the same frames: by the metric alone
