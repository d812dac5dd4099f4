"""Potential energies: batched, differentiable, counting their evaluations.

:class:`Potential` is the interface: configurations [B, *event] in, energies [B] (and forces) out.

:class:`TorchPotential`
    An implicit-solvent OpenMM System as a torch function, on the CPU or a GPU, differentiable to
    any order.
:class:`OpenMMPotential`
    Any System without a periodic box, evaluated by OpenMM's Contexts, one conformation at a time;
    differentiable once.
:class:`GaussianWell`, :class:`DoubleWell`, :class:`MixedDoubleWell`
    Toy potentials on R^d with exact thermodynamics, k_B = 1.
:class:`MullerBrown`, :class:`GaussianMixture`, :class:`PhiFourChain`, :class:`PhiFourTorus`,
:class:`RadialVelocity`
    The systems of M. Gabrié's lecture on sampling with generative models (2022), k_B = 1: exact by
    quadrature, by construction or by a transfer matrix. The two of φ⁴ make Gaussian base measures,
    coupled and uncoupled.
:class:`SilverCluster`
    Silver atoms in effective medium theory, with two isomers of Ag6; nm, kJ/mol and K.

``molecule.potential()`` returns a TorchPotential where it covers the System and an OpenMMPotential
otherwise, and logs which. The command line compiles it when a million evaluations or more are
planned, and uses OpenMM's Contexts for shorter runs; ``config.json`` records the choice.

Any implicit-solvent System as a torch function
-----------------------------------------------
::

    potential = tsf.TorchPotential.from_system(system, positions=positions)
    energies = potential.energy(x)  # x [B, N, 3] in nm; [B] in kJ/mol
    energies, forces = potential.energy_and_forces(x)  # detached
    print(potential.agreement)  # errors of each Force against OpenMM's Reference platform
    fast = tsf.TorchPotential.from_system(system, positions=positions, compile=True)

Covered Forces
    HarmonicBond, HarmonicAngle, PeriodicTorsion, RBTorsion, CMAPTorsion, Nonbonded (with
    exceptions and parameter offsets), GBSAOBC, and CustomBond, CustomAngle, CustomTorsion,
    CustomExternal, CustomNonbonded and CustomGB with OpenMM's expression language and tabulated
    functions; without a cutoff or with CutoffNonPeriodic (reaction field, switching function).
    Anything else raises NotCovered, which names the Force and the feature.
Verification
    OpenMM is the reference: ``from_system`` compares energies and forces of every Force with the
    Reference platform, in double precision, and raises Disagreement if they differ.
    :meth:`TorchPotential.check` repeats the comparison at any time, also on given conformations.
Force groups, memory, compilation
    Arguments of :meth:`TorchPotential.from_system`. Global parameters change as in a Context, by
    :meth:`TorchPotential.set_global_parameter`.

Adding a Force
--------------
1. Write a :class:`~openmm_tsf.potentials.forces.base.Term` in ``potentials/forces/``. Its
   constructor takes the Force and the pairs of the System's particles, registers constants as
   float64 buffers and raises NotCovered for every feature that it does not compute. Its ``energy``
   returns [B] in torch operations with the batch last, without branches on values;
   ``forces/geometry.py`` and ``forces/pairs.py`` have distances, angles and dihedrals whose
   derivatives are finite where OpenMM's are.
2. Add it to ``TERMS`` in ``forces/registry.py``.
3. Add a Force with random parameters to ``tests/support/torch_zoo.py``: energies, forces and second
   derivatives are then compared with OpenMM's. The verification at construction needs no change.
"""

from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.gaussian_mixture import GaussianMixture
from openmm_tsf.potentials.mixed_double_well import MixedDoubleWell
from openmm_tsf.potentials.muller_brown import MullerBrown
from openmm_tsf.potentials.openmm_potential import OpenMMPotential
from openmm_tsf.potentials.phi4 import PhiFourChain, PhiFourTorus
from openmm_tsf.potentials.radial_velocity import RadialVelocity
from openmm_tsf.potentials.silver import SilverCluster
from openmm_tsf.potentials.torch_potential import TorchPotential
from openmm_tsf.potentials.toy import DoubleWell, GaussianWell

__all__ = [
    "DoubleWell",
    "GaussianMixture",
    "GaussianWell",
    "MixedDoubleWell",
    "MullerBrown",
    "OpenMMPotential",
    "PhiFourChain",
    "PhiFourTorus",
    "Potential",
    "RadialVelocity",
    "SilverCluster",
    "TorchPotential",
]
