"""Walkers at every rung of a ladder under a sequence of kernels: the chain without files."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Generator, Tensor

from openmm_tsf.metropolis import InvalidWalker
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling.consistency import (
    check_constants,
    check_constraints,
    check_distinct,
    check_domains,
    check_pose,
    check_potentials,
    check_step_sizes,
    check_velocities,
    member_infos,
    with_members,
)
from openmm_tsf.sampling.initial import minimised, starting_state, with_velocities
from openmm_tsf.sampling.kernels.base import (
    Closable,
    Kernel,
    SteerableMap,
    check_flow,
    device_of_map,
)
from openmm_tsf.sampling.kernels.dynamics import DynamicsKernel
from openmm_tsf.sampling.kernels.schedule import Scheduled, default_kernels, kernels_by_name
from openmm_tsf.sampling.recorder import Reporter
from openmm_tsf.sampling.state import KernelInfo, WalkerState, counts_to_host
from openmm_tsf.sampling.tuning import HasStepSize, StepSizeTuner
from openmm_tsf.systems.molecule import MolecularSystem
from openmm_tsf.units import as_temperatures
from openmm_tsf.utils.deferred import defer_checks
from openmm_tsf.utils.progress import progress_bar
from openmm_tsf.utils.random import make_generator
from openmm_tsf.utils.validation import check_int, check_seed


@contextmanager
def _naming(kernel: str) -> Iterator[None]:
    """Name the kernel in the error of an invalid walker."""
    try:
        yield
    except InvalidWalker as error:
        raise InvalidWalker(f"kernel {kernel}: {error}") from error


class TemperingChain:
    """The part of :class:`openmm_tsf.ParallelTempering` that needs no run directory."""

    def __init__(
        self,
        molecule: MolecularSystem | None,
        flow: SteerableMap,
        temperatures: Any,
        n_walkers: int,
        kernels: Sequence[Kernel | Scheduled] | None = None,
        potential: Potential | None = None,
        seed: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        self.temperatures = as_temperatures(temperatures)
        if not isinstance(molecule, MolecularSystem | None):
            raise TypeError(
                f"molecule: expected a MolecularSystem or None, got {type(molecule).__name__}"
            )
        if potential is None:
            if molecule is None:
                raise ValueError("potential: expected one where molecule is None, got None")
            device = device_of_map(flow)
            # On a GPU an error where torch does not cover a Force: OpenMM's Contexts would compute
            # one conformation after the other.
            options: dict[str, Any] = {} if device.type == "cpu" else {"device": device}
            potential = molecule.potential(**options)
        check_flow(flow)
        if tuple(flow.event_shape) != tuple(potential.event_shape):
            raise ValueError(
                f"flow: expected configurations of shape {tuple(potential.event_shape)}, "
                f"got a flow for {tuple(flow.event_shape)}"
            )
        fingerprint = getattr(flow, "fingerprint", None)
        if molecule is not None and fingerprint not in (None, molecule.fingerprint):
            raise ValueError("flow: it was made for another System or Topology than molecule's")
        self.molecule, self.flow, self.potential = molecule, flow, potential
        self.n_walkers = check_int(n_walkers, "n_walkers")
        drawn = int(np.random.SeedSequence().generate_state(1)[0])
        self.seed = drawn if seed is None else check_seed(seed)
        self.device = device_of_map(flow)
        if generator is not None and generator.device.type != self.device.type:
            raise ValueError(
                f"generator: expected one on {self.device}, where the flow is, got one on "
                f"{generator.device}"
            )
        self._generator = make_generator(self.seed, self.device) if generator is None else generator
        self._masses: Tensor | None = None
        if molecule is not None:
            self._masses = torch.tensor(molecule.dynamics_masses, dtype=torch.float64, device="cpu")
        if kernels is None:
            kernels = default_kernels(potential, flow, self.temperatures, self._masses)
        self.schedule = [k if isinstance(k, Scheduled) else Scheduled(k) for k in kernels]
        self.kernels: dict[str, Kernel] = kernels_by_name(self.schedule, self.temperatures)
        for check in (check_distinct, check_step_sizes, check_domains):
            check(self.kernels.values())
        check_constants(self.kernels.values(), potential)
        check_pose(self.kernels.values(), flow, molecule)
        check_constraints(self.kernels.values(), molecule)
        if molecule is not None:  # velocities are drawn for the masses that dynamics has
            moving = (k for k in self.kernels.values() if isinstance(k, DynamicsKernel))
            self._masses = next((kernel.masses for kernel in moving), self._masses)
        self.reporters: list[Reporter] = []
        self.totals: dict[str, KernelInfo] = self._zero()
        self._state: WalkerState | None = None

    def _zero(self) -> dict[str, KernelInfo]:
        return {name: KernelInfo.zero(k.counts_shape) for name, k in self.kernels.items()}

    @property
    def state(self) -> WalkerState:
        """The walkers; without :meth:`set_positions` they start at the default positions."""
        if self._state is None:
            if self.molecule is None:
                raise RuntimeError("no walkers yet: call set_positions(x) first")
            start = torch.tensor(
                minimised(self.potential, self.molecule), dtype=torch.float64, device="cpu"
            )
            self.set_positions(start.repeat(self.n_walkers, len(self.temperatures), 1, 1))
        assert self._state is not None
        return self._state

    @property
    def exact(self) -> bool:
        """Whether every kernel is exact, without time-step errors."""
        return all(kernel.exact for kernel in self.kernels.values())

    def set_positions(self, x: Any, velocities: Any = None) -> None:
        """Start the walkers at given configurations, iteration 0.

        Otherwise all walkers of a molecule start at the minimised reference conformation, and the
        first part of the run must be discarded.

        Parameters
        ----------
        x
            [W, R, *event], nm for molecules (or a Quantity). Constrained distances are set to
            their values, from which they may differ by 1e-4 of them.
        velocities
            The same shape, nm/ps; by default Maxwell-Boltzmann at every rung (molecules) or absent.

        Raises
        ------
        ValueError
            If a walker starts at a non-finite energy or outside the flow's domain (mirror images),
            or a kernel has another energy than the sampler or needs velocities that are missing.
        """
        state = starting_state(
            x, velocities, self.n_walkers, self.temperatures, self.flow, self.potential,
            self.molecule,
        )  # fmt: skip
        if velocities is None and self._masses is not None:
            state = with_velocities(
                state, self.temperatures, self.potential, self._masses, self._generator
            )
        check_velocities(self.kernels.values(), state)
        check_potentials(self.kernels.values(), self.potential, state)
        self._state = state

    def close(self) -> None:
        """Free the kernels' Contexts and threads, not the potential's; may be called twice."""
        for kernel in self.kernels.values():
            if isinstance(kernel, Closable):
                kernel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _iterate(self, state: WalkerState) -> tuple[WalkerState, dict[str, KernelInfo]]:
        """Run one iteration; after an error generator and kernels are as before.

        A GPU is waited for once, for counts and checks together, at the end.
        """
        before = self._generator.get_state(), self._kernel_states()
        infos: dict[str, KernelInfo] = {}
        try:
            with defer_checks() as checks:
                for entry in self.schedule:
                    if state.iteration % entry.interval:
                        continue
                    name, n_checks = entry.kernel.name, len(checks.flags)
                    for _ in range(entry.repeats):
                        with _naming(name):
                            state, info = entry.kernel(state, self._generator)
                        infos[name] = infos[name] + info if name in infos else info
                    checks.wrap_errors(n_checks, partial(_naming, name))
            infos, failed = counts_to_host(infos, checks.flags)
            checks.raise_first(failed)
        except BaseException:
            self._generator.set_state(before[0])
            self._load_kernel_states(before[1])
            raise
        return state.evolve(iteration=state.iteration + 1), infos

    def _advance(self) -> dict[str, KernelInfo]:
        self._state, infos = self._iterate(self.state)
        for name, info in infos.items():
            self.totals[name] = self.totals[name] + info
        return infos

    def _kernel_states(self) -> dict[str, dict[str, Any]]:
        return {name: kernel.state_dict() for name, kernel in self.kernels.items()}

    def _load_kernel_states(self, content: Mapping[str, dict[str, Any]]) -> None:
        for name, kernel in self.kernels.items():
            kernel.load_state_dict(content[name])

    def tune(
        self, n_iterations: int = 200, target_acceptance: float = 0.3, progress: bool = False
    ) -> dict[str, Tensor]:
        """Adapt the step sizes of all kernels, rung by rung, then fix them.

        Meanwhile this is not a Markov chain, and nothing is written or enters estimates.

        Parameters
        ----------
        n_iterations, target_acceptance
            The number of iterations, which also serve as burn-in (0 changes nothing), and a number
            between 0 and 1; kernels may have a target of their own.

        Returns
        -------
        dict of str to Tensor
            The step sizes [R] by kernel name; ``"mixture.member"`` for members of mixtures.

        Warns
        -----
        UserWarning
            If a step size was adapted fewer than two times.

        """
        return tune_chains([self], n_iterations, target_acceptance, progress=progress)

    @property
    def step_sizes(self) -> dict[str, Tensor]:
        """The step sizes [R] by kernel name, members of mixtures too, as `tune` returns them."""
        return {name: kernel.sigma for name, kernel in self._tunable().items()}

    @step_sizes.setter
    def step_sizes(self, sizes: Mapping[str, Any]) -> None:
        kernels = self._tunable()
        if kernels.keys() != sizes.keys():
            expected, got = sorted(kernels), sorted(sizes)
            raise ValueError(f"step_sizes: expected those of {expected}, got {got}")
        for name, kernel in kernels.items():
            kernel.sigma = sizes[name]

    def _tunable(self) -> dict[str, HasStepSize]:
        members = with_members(self.kernels.values())
        return {name: kernel for name, kernel in members if isinstance(kernel, HasStepSize)}


def tune_chains(
    chains: Sequence[TemperingChain],
    n_iterations: int = 200,
    target_acceptance: float = 0.3,
    *,
    n_advanced: int | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Adapt the step sizes of several chains together, as `TemperingChain.tune` does those of one.

    In every iteration the counts of all chains are added, and all get the same step sizes. The
    counts are integers, so that the step sizes do not depend on which process has which chains.

    Parameters
    ----------
    chains
        Chains with the same kernels, at least one.
    n_iterations, target_acceptance
        As for `TemperingChain.tune`.
    n_advanced
        Only so many of the chains are advanced and counted, the others get the step sizes.
    add_up
        Return the sum, over all processes, of a tensor of int64; these call it in every iteration.
    progress
        Show a progress bar.
    """
    n_iterations = check_int(n_iterations, "n_iterations", least=0)
    first, advanced = chains[0], chains[:n_advanced]
    tuners = {
        name: StepSizeTuner(kernel, target_acceptance) for name, kernel in first._tunable().items()
    }
    for chain in advanced:
        chain.totals = chain._zero()
    with progress_bar("tune", n_iterations, show=progress) as bar:
        for _ in range(n_iterations):
            infos = [dict(member_infos(chain._advance())) for chain in advanced]
            for name, tuner in tuners.items():
                info = _sum_counts([each[name] for each in infos if name in each], tuner, add_up)
                if info is not None:
                    tuner.update(info)
            _set_step_sizes(chains, first.step_sizes)
            bar.update()
    for name, tuner in tuners.items():
        if n_iterations and tuner.fewest_updates < 2:
            warnings.warn(
                f"tune: the step sizes of {name} were adapted {tuner.fewest_updates} times in "
                f"{n_iterations} iterations and are hardly tuned; use more iterations",
                stacklevel=3,
            )
    sizes = {name: tuner.freeze() for name, tuner in tuners.items()}
    _set_step_sizes(chains, sizes)
    return sizes


def _set_step_sizes(chains: Sequence[TemperingChain], sizes: Mapping[str, Tensor]) -> None:
    """Give the step sizes of the first chain to the others."""
    for chain in chains[1:]:
        chain.step_sizes = sizes


def _sum_counts(
    infos: Sequence[KernelInfo], tuner: StepSizeTuner, add_up: Callable[[Tensor], Tensor] | None
) -> KernelInfo | None:
    """Return the counts of a kernel in all chains; None if it was applied in none of them."""
    counts = torch.zeros(3, len(tuner.kernel.sigma), dtype=torch.int64, device="cpu")
    for info in infos:
        counts += torch.stack([info.accepted, info.proposed, torch.ones_like(info.proposed)])
    if add_up is not None:
        counts = add_up(counts)
    return KernelInfo(counts[0], counts[1]) if bool(counts[2].any()) else None
