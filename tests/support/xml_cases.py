"""XML text and nested Forces for the tests of reading XML files."""

import openmm

from openmm_tsf.io.openmm_xml import read_openmm_xml

BOX = (
    '<PeriodicBoxVectors><A x="2" y="0" z="0"/><B x="0" y="2" z="0"/><C x="0" y="0" z="2"/>'
    "</PeriodicBoxVectors>"
)
EMPTY = f"""<?xml version="1.0" ?>
<System openmmVersion="8.1" type="System" version="1">
 {BOX}
 <Particles><Particle mass="1"/></Particles>
 <Constraints/><Forces>{{}}</Forces>
</System>
"""
SPRING = (
    '<Force energy="x^2" forceGroup="0" name="{}" type="{}" version="1"><PerParticleParameters/>'
    '<GlobalParameters/><Particles><Particle index="0"/></Particles></Force>'
)


def system_with(*forces):
    system = openmm.System()
    system.addParticle(1.0)
    for force in forces:
        system.addForce(force)
    return system


def nested_in_cv(force):
    outer = openmm.CustomCVForce("a")
    outer.addCollectiveVariable("a", force)
    return outer


def nested_in_atm(force):
    outer = openmm.ATMForce(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    outer.addForce(force)
    outer.addParticle()
    return outer


def read(tmp_path, content, expected=openmm.System):
    path = tmp_path / "given.xml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_openmm_xml(path, expected, "system")
