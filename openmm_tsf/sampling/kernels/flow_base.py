"""What kernels through a flow share: latents, target density, domain, the round-trip check."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from openmm_tsf.flows.weights import log_weight
from openmm_tsf.potentials.base import Potential
from openmm_tsf.sampling import energies as evaluate
from openmm_tsf.sampling.kernels.base import RungKernel, SteerableMap, check_flow
from openmm_tsf.sampling.state import KernelInfo, Latents, WalkerState, per_rung
from openmm_tsf.units import NANOMETER, in_unit
from openmm_tsf.utils.deferred import as_count, check_flag
from openmm_tsf.utils.validation import check_int, check_positive


def rows_where(chosen: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """Return the rows of tensors [B, ...] from `these` where `chosen` [B], else from `others`."""
    return torch.where(chosen.reshape(-1, *(1,) * (these.ndim - 1)), these, others)


class LatentState(NamedTuple):
    """Configurations x [B, *event] with momenta p [B, m] and their latents v = D^-1(x, p)."""

    x: Tensor
    momenta: Tensor
    v: Tensor
    log_det: Tensor  # log|J_D| [B], plus ln of the weight of the copy drawn where copies overlap
    tau: Tensor  # T / T_ref [B]

    def where(self, chosen: Tensor, other: "LatentState") -> "LatentState":
        """Return these rows where `chosen` [B], those of the other state elsewhere."""
        return LatentState(*map(partial(rows_where, chosen), self, other))


class Proposal(NamedTuple):
    """Images (x [B, *event], p [B, m]) of latents, with log|J_D| and energies, both [B]."""

    x: Tensor
    momenta: Tensor
    log_det: Tensor
    energy: Tensor
    inside: Tensor  # [B], whether in the domain of the flow; the energy of the others is +inf
    mirror: Tensor  # [B], which of the others are mirror images


class FlowKernel(RungKernel):
    """What all kernels through a flow share: latents, domain, target density, round-trip check.

    The momenta are drawn, and v = D^-1(x, p) computed, once for all kernels through the same flow
    that follow each other in an iteration: after each decision the walker's v is known, v' if
    accepted and v if not, and the state carries it (:class:`openmm_tsf.sampling.state.Latents`).
    Every step leaves the joint density of (x, p) invariant, and so does drawing p from its
    conditional; their product therefore leaves that of x invariant. The next iteration computes v
    from the stored x', which has the pose and the labels of x, and checks the round trip.

    Parameters
    ----------
    flow
        The flow, in float64 or in a dtype in which the round trip stays below the tolerance.
    potential, temperatures
        The energy, and the ladder in K. The prior of v is N(0, tau), tau = T / T_ref.
    n_steps
        The number of proposals in a call, each accepted or rejected.
    name
        The name in counts and summaries.
    round_trip_interval, round_trip_walkers
        Iterations between two checks of D(D^-1(x)) = x, and walkers in each, others every time.
        The inverse in the walkers' batch is compared with D in each size of batch in which
        proposals are mapped: in the same size every time, in the others once.
    round_trip_tolerance
        The largest deviation of a coordinate that is allowed (nm, or a Quantity, for molecules).
    """

    exact = True
    name: str

    def __init__(
        self,
        flow: SteerableMap,
        potential: Potential,
        temperatures: Any,
        n_steps: int = 1,
        round_trip_interval: int = 25,
        round_trip_walkers: int = 4,
        round_trip_tolerance: float = 1e-6,
    ) -> None:
        check_flow(flow)
        if tuple(flow.event_shape) != tuple(potential.event_shape):
            raise ValueError(
                f"flow: expected configurations of the potential's shape "
                f"{tuple(potential.event_shape)}, got {tuple(flow.event_shape)}"
            )
        tolerance = in_unit(round_trip_tolerance, NANOMETER, "round_trip_tolerance")
        self.round_trip_tolerance = check_positive(tolerance, "round_trip_tolerance")
        super().__init__(temperatures, potential.boltzmann_constant)
        self.flow, self.potential = flow, potential
        self.n_steps = check_int(n_steps, "n_steps")
        self.round_trip_interval = check_int(round_trip_interval, "round_trip_interval")
        self.round_trip_walkers = check_int(round_trip_walkers, "round_trip_walkers")
        kelvin = torch.tensor(self.temperatures, dtype=torch.float64, device="cpu")
        self.tau = kelvin / flow.reference_temperature
        self._latest: tuple[LatentState, int] | None = None  # of the walkers, and the iteration
        self._compared: set[tuple[int, int]] = set()  # sizes of their batches and of proposals

    def settings(self) -> dict[str, Any]:
        """Return the choices made."""
        return {
            "kernel": type(self).__name__,
            "n_steps": self.n_steps,
            "round_trip_interval": self.round_trip_interval,
            "round_trip_walkers": self.round_trip_walkers,
            "round_trip_tolerance": self.round_trip_tolerance,
        }

    def log_weight(
        self, energy: Tensor, kt: Tensor, momenta: Tensor, tau: Tensor, log_det: Tensor
    ) -> Tensor:
        """Return -U/kT - |p|^2 / 2 tau + log|J_D|, the log-density [B] of the target for v."""
        return log_weight(energy / kt, momenta, tau, -log_det)

    def _counts(
        self, accepted: Tensor, non_finite: Tensor, inside: Tensor, mirror: Tensor, evaluated: int
    ) -> KernelInfo:
        """Return the counts of one proposal for every walker and rung, from masks [B]."""
        n_walkers, mirrors = len(accepted) // len(self.temperatures), as_count(mirror.sum())
        return KernelInfo(
            *per_rung(accepted.reshape(n_walkers, -1), n_walkers),
            rejected_non_finite=as_count(non_finite.sum()) - mirrors,
            mirror_images=mirrors,
            n_evaluations=evaluated,
            outside_domain=as_count((~inside).sum()) - mirrors,
        )

    def carried(self, state: WalkerState) -> Latents | None:
        """Return the latents that the state carries, if they are those of this kernel's flow."""
        known = state.latents
        if known is None or known.flow is not self.flow or not known.is_valid:
            return None
        return known

    def latents_of(self, state: WalkerState, generator: Generator) -> LatentState:
        """Return p and v of all walkers and rungs [B]: those that the state carries, or new."""
        x = state.x.flatten(0, 1)
        tau = self.on_device("tau", x.device).repeat(state.n_walkers)
        known = self.carried(state)
        if known is None:
            return self._to_latent(x, tau, state.iteration, generator)
        parts = (known.momenta, known.v, known.log_det)
        momenta, v, log_det = (part.flatten(0, 1) for part in parts)
        latent = LatentState(x, momenta, v, log_det, tau)
        self._latest = latent, state.iteration
        return latent

    def with_latents(self, state: WalkerState, end: LatentState, energy: Tensor) -> WalkerState:
        """Return the state with the configurations and latents of `end` and energies, all [B]."""
        pair = state.energy.shape
        x = end.x.reshape(state.x.shape)
        momenta, v, log_det = (
            part.reshape(*pair, *part.shape[1:]) for part in (end.momenta, end.v, end.log_det)
        )
        latents = Latents(self.flow, x, state.iteration, momenta, v, log_det)
        return state.evolve(x=x, energy=energy.reshape(pair), latents=latents)

    def _to_latent(
        self, x: Tensor, tau: Tensor, iteration: int, generator: Generator
    ) -> LatentState:
        """Draw momenta for x and map both to latents; check the round trip if it is due."""
        noise = torch.randn(
            len(x), self.flow.n_momenta, generator=generator, dtype=torch.float64, device=x.device
        )
        momenta = noise * tau.sqrt().unsqueeze(1)
        v, inverse_log_det = self._inverse(x, momenta, tau, generator)
        latent = LatentState(x, momenta, v, -inverse_log_det, tau)
        if iteration % self.round_trip_interval == 0:
            self._check_round_trip(latent, iteration, len(x))
        self._latest = latent, iteration
        return latent

    def _evaluate(self, v: Tensor, like: Tensor, tau: Tensor) -> tuple[Proposal, int]:
        """Map each v [B, d + m] to x in the pose of `like`; return the evaluations, too."""
        x, momenta, log_det = self._forward(v, tau)
        inside, mirror = self._domain(x, log_det)
        # The energy of what would be stored: it may depend on the pose, and the flow's dtype on
        # the last digits.
        x = self._match_pose(x, like)
        energy, n_evaluations = self._energy(x, inside, like)
        return Proposal(x, momenta, log_det, energy, inside, mirror), n_evaluations

    def _energy(self, x: Tensor, inside: Tensor, like: Tensor) -> tuple[Tensor, int]:
        """Return the energies [B] of the rows `inside` the domain [B], +inf of the others.

        And the number of evaluations. On a GPU those of all rows, of the configurations `like` for
        rows outside: choosing rows would wait for the device, and take as long.
        """
        if x.device.type != "cpu":
            allowed = evaluate.energy(self.potential, rows_where(inside, x, like))
            return torch.where(inside, allowed.to(torch.float64), torch.inf), len(x)
        rows = inside.nonzero().flatten()
        if len(rows) == len(x):
            return evaluate.energy(self.potential, x).to(torch.float64), len(x)
        energy = torch.full_like(inside, float("inf"), dtype=torch.float64)
        if len(rows):
            energy[rows] = evaluate.energy(self.potential, x[rows]).to(energy)
        return energy, len(rows)

    def _domain(self, x: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """Return which rows [B] are in the domain, and which are mirror images.

        Mirror images are outside whatever their log|J_D|: no walker starts at one, and a flow that
        proposed one without mapping it back would not be reversible.
        """
        finite = torch.isfinite(x).flatten(1).all(dim=1)
        mirror = self.flow.is_mirror_image(x.to(self.flow.dtype)) & finite
        return finite & torch.isfinite(log_det) & ~mirror, mirror

    def _forward(self, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, p and log|J_D|, plus ln of the copy's weight where copies overlap.

        The first batch of a size has the round trip checked in it: what a matrix product in a lower
        precision gives for a row may depend on the batch.
        """
        if self._latest is not None:
            latent, iteration = self._latest
            sizes = len(latent.x), len(v)
            if len(v) > 0 and sizes[0] != sizes[1] and sizes not in self._compared:
                self._compared.add(sizes)
                self._check_round_trip(latent, iteration, len(v))
        return self._map(v, tau)

    def _map(self, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x, momenta), log_det = self.flow.forward_and_log_det(v.to(self.flow.dtype))
        if self.flow.overlap and x.device.type != "cpu":
            kelvin = (tau * self.flow.reference_temperature).to(x)
            finite = torch.isfinite(log_det.detach())
            log_det = torch.where(finite, log_det + self.flow.log_partition(x, kelvin), log_det)
        elif self.flow.overlap:
            inside = torch.isfinite(log_det.detach()).nonzero().flatten()
            if len(inside) == len(x):
                kelvin = (tau * self.flow.reference_temperature).to(x)
                log_det = log_det + self.flow.log_partition(x, kelvin)
            else:  # chosen, not masked: a gradient would be NaN where there is no geometry
                kelvin = (tau[inside] * self.flow.reference_temperature).to(x)
                log_partition = self.flow.log_partition(x[inside], kelvin)
                log_det = log_det.index_add(0, inside, log_partition)
        return x.to(v), momenta.to(v), log_det.to(v)

    def _inverse(
        self, x: Tensor, momenta: Tensor, tau: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """Return v and -log|J_D|, less ln of the weight of the copy drawn where copies overlap."""
        in_flow, momenta = x.to(self.flow.dtype), momenta.to(self.flow.dtype)
        if self.flow.overlap:
            kelvin = (tau * self.flow.reference_temperature).to(in_flow)
            copies, log_partition = self.flow.draw_copies(in_flow, kelvin, generator)
            v, log_det = self.flow.inverse_and_log_det(in_flow, momenta, copies)
            log_det = log_det - log_partition
        else:
            v, log_det = self.flow.inverse_and_log_det(in_flow, momenta)
        return v.to(x), log_det.to(x)

    def _match_pose(self, x: Tensor, like: Tensor) -> Tensor:
        dtype = self.flow.dtype
        return self.flow.match_pose(x.to(dtype), like=like.to(dtype)).to(x)

    def _check_round_trip(self, latent: LatentState, iteration: int, size: int) -> None:
        """Compare D(D^-1(x, p)) with (x, p), and the log-determinants, D of `size` rows at once."""
        x, momenta = latent.x, latent.momenta
        chosen = torch.arange(size, dtype=torch.int64, device=x.device)
        batch = chosen % len(x)
        if size == len(x):  # checked again and again: some rows each time
            n = min(self.round_trip_walkers, size)
            chosen = (iteration // self.round_trip_interval * n + chosen[:n]) % size
        # All are mapped, as in a proposal: a product of a few rows may be rounded in another way.
        rows, images = batch[chosen], self._map(latent.v[batch], latent.tau[batch])
        x_back, momenta_back, log_det = (part[chosen] for part in images)
        x_back = self._match_pose(x_back, x[rows])
        pairs = (x_back, x[rows]), (momenta_back, momenta[rows]), (log_det, latent.log_det[rows])
        largest = torch.stack([(a - b).abs().max() if a.numel() else a.sum() for a, b in pairs])
        failed = ~(largest <= self.round_trip_tolerance).all()
        check_flag(failed, lambda: self._raise_deviation(largest, iteration, (len(x), size)))

    def _raise_deviation(self, largest: Tensor, iteration: int, sizes: tuple[int, int]) -> None:
        names = ("positions", "momenta", "log-determinant")
        for what, deviation in zip(names, largest.tolist(), strict=True):
            if not deviation <= self.round_trip_tolerance:
                raise RuntimeError(
                    f"{self.name}: the flow's round trip D(D^-1(x)) misses the {what} by "
                    f"{deviation:.3g} at iteration {iteration} (tolerance "
                    f"{self.round_trip_tolerance:.3g}, flow in {self.flow.dtype}, walkers in a "
                    f"batch of {sizes[0]}, proposals of {sizes[1]}); the chain would be biased. "
                    "Use flow.double() and conditioner_dtype=None, or retrain the flow with weight "
                    "decay"
                )
