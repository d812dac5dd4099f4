"""Moves through a flow for the samplers of openmmtools, at the temperature of each state.

:class:`TSFMove` (a walk in the flow's latent space) and :class:`TSFIndependenceMove` (independent
draws) are ``openmmtools.mcmc.MCMCMove``: they work alone or in ``SequenceMove`` and
``WeightedMove``, in ``MCMCSampler`` and in the samplers of ``openmmtools.multistate``. Proposals
and acceptance are those of :mod:`openmm_tsf.sampling.kernels`, applied to one conformation.

**State.** A move is stored by the path and the SHA-256 of its flow file, and refuses to be restored
if the file is missing or has changed. Its statistics are stored, too; a sampler that is resumed
from a ``MultiStateReporter`` continues them, and does not repeat random numbers.

**Random numbers** are a function of the move (its seed, settings, and which copy it is), the number
of proposals before, the temperature and the positions. Openmmtools copies a move for every state;
copies, and moves that are restored, draw numbers of their own. They are the same again in another
run with the same seeds, also under MPI.

**Not for** constant pressure, periodic boxes and states whose energy is not that of the flow's
System (alchemical ones, another force field): these are refused, with the Forces that differ.
Masses may differ, and velocities stay as they are. Where bonds are constrained (HBonds), masses may
not, the measure is "rigid", and accepted moves draw velocities anew, tangent to the constraints.
"""

import copy
import hashlib
import logging
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import openmm.unit as unit
import torch
from openmmtools.mcmc import MCMCMove
from openmmtools.states import SamplerState, ThermodynamicState

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.load import load_flow
from openmm_tsf.hosts.constrained import ConstrainedReplicas, check_constraints, check_rigid
from openmm_tsf.hosts.energy_terms import check_same_energy, energy_terms
from openmm_tsf.hosts.matching import check_flow_file
from openmm_tsf.io.files import hash_of_file
from openmm_tsf.potentials.base import Potential
from openmm_tsf.potentials.openmm_potential import ContextPotential
from openmm_tsf.potentials.torch_potential import TorchPotential
from openmm_tsf.sampling.kernels.crank_nicolson import FlowCrankNicolson
from openmm_tsf.sampling.kernels.flow import FlowIndependence, FlowProposalKernel, FlowWalk
from openmm_tsf.sampling.state import WalkerState
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_positions, as_temperature
from openmm_tsf.utils.random import seeded_generator
from openmm_tsf.utils.validation import (
    check_choice,
    check_int,
    check_positive,
    check_seed,
    require_entry,
)  # fmt: skip

logger = logging.getLogger(__name__)

_STATISTICS = (
    "n_accepted", "n_proposed", "rejected_non_finite", "outside_domain", "mirror_images",
    "starts_mirrored", "n_evaluations",
)  # fmt: skip
_POTENTIALS = ("context", "torch")


class FlowMove(MCMCMove):
    """What moves through a flow share: the flow file, energies, statistics and random numbers.

    Parameters
    ----------
    flow
        The path of a flow file (``flow.save(path)``). It is stored as an absolute path.
    molecule
        The MolecularSystem of the flow. States must have its energy.
    n_steps
        The number of proposals each time that the move is applied, each accepted or rejected.
    seed
        Seed of the random numbers, drawn and stored if None.
    potential
        Where energies come from. ``"context"``: the sampler's ContextCache, on its platform.
        ``"torch"``: :class:`openmm_tsf.TorchPotential` of the state's System, which evaluates
        several independent proposals in one batch.

    Attributes
    ----------
    n_accepted, n_proposed : int
        Proposals accepted, and all.
    rejected_non_finite, outside_domain, mirror_images : int
        Proposals rejected for a non-finite energy or for leaving the flow's domain, those of them
        that left the domain, and those of the wrong handedness.
    starts_mirrored : int
        Applications to a mirror image, to which the dynamics had brought the molecule. No move
        leads there, so that all their proposals are rejected.
    n_evaluations : int
        Energies computed: one at each application, and one for each proposal in the domain.

    Raises
    ------
    ValueError
        If the file is not a flow of this molecule; if its energy depends on its pose, or its
        measure is "stiff".
    """

    def __init__(
        self,
        flow: str | os.PathLike[str],
        molecule: MolecularSystem,
        n_steps: int = 1,
        seed: int | None = None,
        potential: str = "context",
    ) -> None:
        super().__init__()
        try:
            self.flow_path = Path(os.path.abspath(flow))
        except TypeError:
            got = f"{type(flow).__name__}; write it with flow.save(path)"
            raise TypeError(f"flow: expected the path of a flow file, got {got}") from None
        if not issubclass(type(molecule), MolecularSystem):
            got = type(molecule).__name__
            raise TypeError(f"molecule: expected an openmm_tsf.MolecularSystem, got {got}")
        check_rigid(molecule.measure, "molecule")
        molecule.check_pose_independent()
        drawn = int(np.random.SeedSequence().generate_state(1)[0])
        self.seed = drawn if seed is None else check_seed(seed)
        self._stream = 0
        self.n_steps = check_int(n_steps, "n_steps")
        self.potential = check_choice(potential, "potential", _POTENTIALS)
        self.flow_sha256 = hash_of_file(self.flow_path, "flow file")
        self._terms = energy_terms(molecule.system)
        self.statistics = dict.fromkeys(_STATISTICS, 0)
        loaded = load_flow(self.flow_path, molecule)
        check_constraints(molecule, loaded)
        self._begin(loaded)

    def _begin(self, flow: AugmentedFlow | None) -> None:
        """Set what is not stored, but made when the move is first applied."""
        self._n_copies = 0
        self._flow = flow
        self._constrained = None if flow is None else ConstrainedReplicas.from_flow(flow)
        self._kernel: FlowProposalKernel | None = None
        self._torch_potential: TorchPotential | None = None
        self._checked: ThermodynamicState | None = None  # a state known to have the flow's energy

    @abstractmethod
    def _make_kernel(self, flow: AugmentedFlow, potential: Potential, kelvin: float) -> Any:
        """Return the kernel of this move at one temperature."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Return what a subclass adds to the settings, as plain data."""

    @property
    def statistics(self) -> dict[str, int]:
        """The counts, as a dictionary."""
        return {name: int(getattr(self, name)) for name in _STATISTICS}

    @statistics.setter
    def statistics(self, value: dict[str, int]) -> None:
        value = {"starts_mirrored": 0} | value  # which earlier versions did not store
        for name in _STATISTICS:
            setattr(self, name, check_int(require_entry(value, name, int), name, least=0))

    def apply(
        self,
        thermodynamic_state: ThermodynamicState,
        sampler_state: SamplerState,
        context_cache: Any = None,
    ) -> None:
        """Propose `n_steps` times, and change the positions of `sampler_state` where accepted.

        Parameters
        ----------
        thermodynamic_state : openmmtools.states.ThermodynamicState
            Its temperature is that of the move.
        sampler_state : openmmtools.states.SamplerState
            The conformation; box vectors stay as they are, velocities without constraints, too.
        context_cache : openmmtools.cache.ContextCache
            Where the Context comes from that computes energies; openmmtools' global one by default.

        Raises
        ------
        ValueError
            If the state has a pressure, a periodic box or another energy than the flow's System; if
            the positions have a non-finite energy.
        """
        self._check_state(thermodynamic_state)
        if self._flow is None:
            self._flow = load_flow(self.flow_path)  # if it is still the one of the move
            check_flow_file(self.flow_path, self.flow_sha256, type(self).__name__)
            self._constrained = ConstrainedReplicas.from_flow(self._flow)
        flow, constrained = self._flow, self._constrained
        positions = as_positions(sampler_state.positions, flow.event_shape[0])
        kelvin = as_temperature(thermodynamic_state.temperature)
        x = torch.tensor(positions, dtype=torch.float64, device="cpu")[None]
        if constrained is not None:
            x = constrained.project(x, "sampler_state")
            positions = x[0].numpy()
        potential = self._energies(thermodynamic_state, positions, context_cache)
        if self._kernel is None or self._kernel.temperatures != (kelvin,):
            self._kernel = self._make_kernel(flow, potential, kelvin)
        self._kernel.potential = potential

        energy = potential.energy(x)
        if not bool(energy.isfinite().all()):
            raise ValueError("sampler_state: expected positions of finite energy, got infinity")
        if bool(flow.is_mirror_image(x.to(flow.dtype)).any()):
            self._reject(kelvin)
            return
        replica = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
        count = self.n_proposed // self.n_steps
        start = WalkerState(x[None], None, energy[None], replica, iteration=count)
        generator = self._generator(kelvin, positions)
        end, info = self._kernel(start, generator)
        accepted = int(info.accepted.sum())
        if accepted:
            x_new = end.x[0, 0].numpy().copy()
            sampler_state.positions = unit.Quantity(x_new, unit.nanometer)
            if constrained is not None and sampler_state.velocities is not None:
                v = constrained.draw_velocities(end.x[0], [kelvin], generator)[0]
                sampler_state.velocities = v.numpy() * unit.nanometer / unit.picosecond
        self.n_accepted += accepted
        self.n_proposed += self.n_steps
        self.rejected_non_finite += int(info.rejected_non_finite)
        self.outside_domain += int(info.outside_domain)
        self.mirror_images += int(info.mirror_images)
        self.n_evaluations += 1 + info.n_evaluations

    def _reject(self, kelvin: float) -> None:
        """Count proposals from a mirror image as rejected; warn of the first."""
        if not self.starts_mirrored:
            logger.warning(
                f"{type(self).__name__}: positions at {kelvin:g} K have a centre (or labels of "
                "hydrogens) that is a mirror image of the flow's molecule: all proposals are "
                "rejected until the dynamics bring it back (starts_mirrored counts). If the start "
                "is another stereoisomer, give the flow's; if hot dynamics inverted a centre, "
                "lower the highest temperature or the time step"
            )
        self.starts_mirrored += 1
        self.n_proposed += self.n_steps
        self.n_evaluations += 1

    def _generator(self, kelvin: float, positions: np.ndarray) -> torch.Generator:
        """Return the source of this application's random numbers; see the module's docstring."""
        move = type(self).__name__, self._settings(), self.n_steps, self.seed, self._stream
        return seeded_generator(_hash_number(move, self.n_proposed, kelvin, positions.tobytes()))

    def _energies(
        self, state: ThermodynamicState, positions: np.ndarray, context_cache: Any
    ) -> Potential:
        """Return the potential of a state."""
        if self.potential == "context":
            context, _ = self._get_context_cache(context_cache).get_context(state)
            return ContextPotential(context)
        if self._torch_potential is None:
            system = state.get_system(remove_thermostat=True)
            self._torch_potential = TorchPotential.from_system(system, positions=positions)
        return self._torch_potential

    def _check_state(self, state: ThermodynamicState) -> None:
        """Refuse a state of another ensemble, or of another energy than the flow's System."""
        # States other than this class may have parameters that change between applications.
        plain = type(state) is ThermodynamicState
        if plain and self._checked is not None and self._checked.is_state_compatible(state):
            return
        check_same_energy(state, self._terms)
        self._checked = copy.copy(state) if plain else None

    def __getstate__(self) -> dict[str, Any]:
        # Openmmtools copies moves by their states. Copies that drew the same numbers would make
        # replicas equal to each other that are at one temperature.
        self._n_copies += 1
        return {
            "flow": str(self.flow_path),
            "flow_sha256": self.flow_sha256,
            "energy_terms": list(self._terms),
            "n_steps": self.n_steps,
            "seed": self.seed,
            "stream": _hash_number(self._stream, self._n_copies),
            "potential": self.potential,
            **self._settings(),
            **self.statistics,
        }

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        self.flow_path = Path(require_entry(serialization, "flow", str))
        self.flow_sha256 = require_entry(serialization, "flow_sha256", str)
        self._terms = list(require_entry(serialization, "energy_terms", list))
        self.n_steps = check_int(require_entry(serialization, "n_steps", int), "n_steps")
        self.seed = check_seed(require_entry(serialization, "seed", int))
        self._stream = check_seed(require_entry(serialization, "stream", int), "stream")
        potential = require_entry(serialization, "potential", str)
        self.potential = check_choice(potential, "potential", _POTENTIALS)
        self.statistics = serialization
        self._begin(None)
        check_flow_file(self.flow_path, self.flow_sha256, type(self).__name__)


class TSFMove(FlowMove):
    """TSF-MCMC: steps in the latent space of the flow, at the temperature of the state.

    A random walk with `sigma` (:class:`openmm_tsf.sampling.kernels.FlowWalk`), or Crank-Nicolson
    steps with `beta` (:class:`openmm_tsf.sampling.kernels.FlowCrankNicolson`).

    Parameters
    ----------
    flow, molecule, n_steps, seed, potential
        See :class:`FlowMove`.
    sigma
        Step size of the random walk, in units of the prior's width; 0.1 if neither is given.
    beta
        Step size of Crank-Nicolson steps, between 0 and 1, instead of `sigma`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import openmm.unit as unit
    >>> from openmmtools.mcmc import LangevinDynamicsMove, MCMCSampler, SequenceMove
    >>> from openmmtools.states import SamplerState, ThermodynamicState
    >>> import openmm_tsf as tsf
    >>> from openmm_tsf.hosts.openmmtools import TSFIndependenceMove, TSFMove
    >>> molecule = tsf.systems.alanine_dipeptide()
    >>> dataset = tsf.MDDataset.shipped(molecule, stride=40)
    >>> flow = tsf.TemperatureSteerableFlow.from_dataset(dataset, n_blocks=1, hidden=(8,))
    >>> path = Path(tempfile.mkdtemp()) / "flow.pt"
    >>> flow.save(path)
    >>> walk, draw = TSFMove(path, molecule, seed=1), TSFIndependenceMove(path, molecule, seed=2)
    >>> moves = SequenceMove([LangevinDynamicsMove(n_steps=5), walk, draw])
    >>> state = ThermodynamicState(molecule.system, temperature=300 * unit.kelvin)
    >>> start = SamplerState(molecule.positions * unit.nanometer)
    >>> MCMCSampler(state, start, moves).run(3)
    >>> walk.n_proposed, draw.n_proposed
    (3, 3)
    """

    def __init__(
        self,
        flow: str | os.PathLike[str],
        molecule: MolecularSystem,
        sigma: float | None = None,
        beta: float | None = None,
        n_steps: int = 1,
        seed: int | None = None,
        potential: str = "context",
    ) -> None:
        if sigma is not None and beta is not None:
            raise ValueError("sigma: expected either sigma or beta, got both")
        self._set_sizes(0.1 if sigma is None and beta is None else sigma, beta)
        super().__init__(flow, molecule, n_steps, seed, potential)

    def _set_sizes(self, sigma: Any, beta: Any) -> None:
        self.sigma = None if sigma is None else check_positive(sigma, "sigma")
        self.beta = None if beta is None else check_positive(beta, "beta")
        if self.beta is not None and self.beta >= 1:
            raise ValueError(f"beta: expected below 1 (1 is TSFIndependenceMove), got {beta!r}")

    def _make_kernel(self, flow: AugmentedFlow, potential: Potential, kelvin: float) -> Any:
        if self.beta is not None:
            return FlowCrankNicolson(flow, potential, (kelvin,), self.beta, n_steps=self.n_steps)
        return FlowWalk(flow, potential, (kelvin,), self.sigma, n_steps=self.n_steps)

    def _settings(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "beta": self.beta}

    def __setstate__(self, serialization: dict[str, Any]) -> None:
        sizes = (require_entry(serialization, k, float | None) for k in ("sigma", "beta"))
        self._set_sizes(*sizes)
        super().__setstate__(serialization)


class TSFIndependenceMove(FlowMove):
    """Independent draws from the flow, accepted or rejected at the temperature of the state.

    See :class:`openmm_tsf.sampling.kernels.FlowIndependence`. The `n_steps` proposals are mapped
    through the flow in one batch. :class:`TSFMove` has an example.

    Parameters
    ----------
    flow, molecule, n_steps, seed, potential
        See :class:`FlowMove`.
    """

    def _make_kernel(self, flow: AugmentedFlow, potential: Potential, kelvin: float) -> Any:
        return FlowIndependence(flow, potential, (kelvin,), n_steps=self.n_steps)

    def _settings(self) -> dict[str, Any]:
        return {}


def _hash_number(*words: object) -> int:
    """Return an integer below 2^64 that is a hash of numbers, texts, bytes and containers."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little")
