"""Whether two Systems have the same energy, and which Forces differ where they do not."""

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Iterable

import openmm

#: Forces without a potential energy.
_WITHOUT_ENERGY = (openmm.AndersenThermostat, openmm.CMMotionRemover)
_OPENMM_VERSION = re.compile(r'\sopenmmVersion="[^"]*"')


def energy_terms(system: openmm.System) -> list[str]:
    """Return what determines the density of a System's positions, as names with hashes, sorted.

    One entry for each Force but thermostats and removers of the centre's motion; one for the
    number of particles, and two for the constraints if there are any: their lengths, and the masses
    of their atoms, which enter the density of positions. Other masses, the groups and the order of
    Forces, and OpenMM's version do not count.

    Examples
    --------
    >>> import openmm
    >>> from openmm_tsf.hosts.energy_terms import energy_terms
    >>> system = openmm.System()
    >>> _ = system.addParticle(12.0), system.addForce(openmm.CMMotionRemover())
    >>> energy_terms(system)
    ['1 particles']
    """
    terms = [f"{system.getNumParticles()} particles"]
    for force in system.getForces():
        if not isinstance(force, _WITHOUT_ENERGY):
            force = copy.deepcopy(force)
            force.setForceGroup(0)
            terms.append(f"{force.getName()} {_digest(openmm.XmlSerializer.serialize(force))}")
    if n_constraints := system.getNumConstraints():
        pairs = [system.getConstraintParameters(i) for i in range(n_constraints)]
        rows = sorted(f"{i} {j} {length._value!r}" for i, j, length in pairs)
        terms.append(f"{n_constraints} constraints {_digest(' '.join(rows))}")
        atoms = sorted({atom for pair in pairs for atom in pair[:2]})
        masses = (f"{atom} {system.getParticleMass(atom)._value!r}" for atom in atoms)
        terms.append(f"mass metric of the constraints {_digest(' '.join(masses))}")
    return sorted(terms)


def differing_terms(expected: Iterable[str], given: Iterable[str]) -> list[str]:
    """Return in words which terms differ; nothing if all are the same.

    Examples
    --------
    >>> from openmm_tsf.hosts.energy_terms import differing_terms
    >>> differing_terms(["A 12", "B 34"], ["A 12", "B 56", "C 78"])
    ['another B', 'C in addition']
    """
    before, after = Counter(expected), Counter(given)
    missing, extra = (sorted(map(_name, c.elements())) for c in (before - after, after - before))
    changed = [name for name in missing if name in extra]
    for name in changed:
        extra.remove(name)
    return (
        [f"another {name}" for name in changed]
        + [f"no {name}" for name in missing if name not in changed]
        + [f"{name} in addition" for name in extra]
    )


def _digest(text: str) -> str:
    return hashlib.sha256(_OPENMM_VERSION.sub("", text, count=1).encode()).hexdigest()[:16]


def _name(term: str) -> str:
    """Return a term without its hash."""
    return term if term.endswith(" particles") else term.rpartition(" ")[0]
