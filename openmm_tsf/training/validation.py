"""What decides which weights are kept: likelihood per basin, free energy, ESS, populations.

Likelihood over all frames is blind to a lost minor basin, and every reverse figure improves while
one is lost; so basins weigh the same, and both directions count.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.potentials.base import Potential
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import basin_labels
from openmm_tsf.training.losses import (
    marginal_nll_bound,
    negative_log_likelihood,
    soften,
    whitened,
)
from openmm_tsf.utils.random import seeded_generator

#: Basins of fewer held-out frames weigh less: they are but a few visits.
_FRAMES_OF_A_BASIN = 100


@dataclass(frozen=True)
class Validation:
    r"""Figures of one validation.

    Attributes
    ----------
    step, mixing
        Training step and lambda.
    score
        What is minimised, in nats: held-out NLL, each temperature, and each basin of a hundred
        frames or more, weighing the same; plus the mean over temperatures of the draws' free
        energy (the two make a Jeffreys divergence, up to constants) less ln of the share inside
        the domain; plus half the mean of \|ln(flow's own share / data's share)\| of the basins.
    nll
        Held-out NLL (bound on the marginal's, nats) by ``"<T>K basin <b>"``.
    free_energy, ess, basin_population
        By temperature: mean over the draws inside the domain of softened U/kT + |p|^2/2tau -
        log|J_D|, less the prior's entropy, plus ln of the momenta's integral (a bound on -ln Z);
        reverse ESS of the joint weights; share of draws in basin 1.
    inside
        By temperature: share of draws inside the domain.
    running
        Exponential means of the training losses (by path gradients: without points whose
        gradients are cut) and of the chains' acceptance.
    """

    step: int
    mixing: float
    score: float
    nll: dict[str, float]
    free_energy: dict[str, float] = field(default_factory=dict)
    ess: dict[str, float] = field(default_factory=dict)
    basin_population: dict[str, float] = field(default_factory=dict)
    inside: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """A flat row for a CSV file."""
        flat: dict[str, float] = {"step": self.step, "lambda": self.mixing, "score": self.score}
        for name in ("nll", "kl", "chains"):
            flat[f"train_{name}"] = self.running.get(name, math.nan)
        for prefix, values in (
            ("nll", self.nll),
            ("free_energy", self.free_energy),
            ("ess", self.ess),
            ("basin1", self.basin_population),
            ("inside", self.inside),
        ):
            flat |= {f"{prefix} {key}": value for key, value in values.items()}
        return flat

    def __str__(self) -> str:
        def shown(values: Mapping[str, float], digits: int) -> str:
            return "/".join(f"{value:.{digits}f}" for value in values.values())

        text = f"NLL {shown(self.nll, 1)}"
        if "nll" in self.running:
            text += f" train {self.running['nll']:.1f}"
        if "kl" in self.running:
            text += f" KL {self.running['kl']:.1f}"
        if self.ess:
            text += f" ESS {shown(self.ess, 2)} basin {shown(self.basin_population, 3)}"
        return text


def effective_sample_fraction(log_weights: Tensor) -> float:
    """Kish's (sum w)^2 / (n sum w^2) of unclipped log weights [n]; 0 if none is finite."""
    finite = log_weights[torch.isfinite(log_weights)]
    if not len(finite):
        return 0.0
    log_ratio = 2 * torch.logsumexp(finite, 0) - torch.logsumexp(2 * finite, 0)
    return float(log_ratio.exp()) / len(log_weights)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


class Validator:
    """Held-out frames and fixed noise, so that validations are comparable.

    Parameters
    ----------
    flow
        The fixed layers and T_ref.
    datasets
        Held-out frames by temperature.
    potential
        Energies of the draws; None leaves the reverse figures out.
    temperatures
        Where draws are made, K.
    n_draws
        Draws per temperature.
    dtype
        Precision of the network.
    seed
        Seed of the noise.
    shares
        Population of basin 1 in each dataset as a whole, of which the held-out frames may be a
        short piece; by default theirs.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        potential: Potential | None,
        temperatures: Sequence[float],
        n_draws: int,
        dtype: torch.dtype,
        seed: int,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.flow, self.potential = flow, potential
        self.temperatures, self.dtype = tuple(temperatures), dtype
        generator = seeded_generator((seed + 7919) % 2**64)
        self.held_out: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.groups: dict[float, dict[int, list[str]]] = {}
        self.shares: dict[float, list[float]] = {}
        self.molecule = datasets[0].molecule
        for number, dataset in enumerate(datasets):
            tau = dataset.temperature / flow.reference_temperature
            y, log_det = whitened(flow, dataset.positions, tau, generator)
            labels = basin_labels(dataset.molecule, dataset.positions)
            momenta = math.sqrt(tau) * torch.randn(
                len(y), flow.n_momenta, generator=generator, dtype=dtype
            )
            share = float(labels.double().mean()) if shares is None else shares[number]
            self.shares.setdefault(dataset.temperature, []).append(share)
            for basin in labels.unique().tolist():
                chosen = labels == basin
                # Two datasets may have one temperature (MD and the sampler's own): keep both.
                key = f"{dataset.temperature:g}K basin {basin}"
                while key in self.held_out:
                    key += "'"
                basins = self.groups.setdefault(dataset.temperature, {})
                basins.setdefault(basin, []).append(key)
                self.held_out[key] = (
                    y[chosen].to(dtype),
                    log_det[chosen].to(dtype),
                    momenta[chosen],
                    torch.full((int(chosen.sum()),), tau, dtype=dtype),
                )
        width = flow.n_coordinates + flow.n_momenta
        self.noise = torch.randn(n_draws, width, generator=generator, dtype=dtype)

    @torch.no_grad()
    def validate(
        self,
        network: Chain,
        step: int,
        mixing: float,
        ceiling: float,
        running: Mapping[str, float],
    ) -> Validation:
        """Figures of a network's present weights."""
        nll: dict[str, float] = {}
        for key, (y, log_det, momenta, tau) in self.held_out.items():
            joint = negative_log_likelihood(network, y, log_det, momenta, tau)
            nll[key] = float(marginal_nll_bound(joint, self.flow.n_momenta, tau).mean())
        free_energy: dict[str, float] = {}
        ess: dict[str, float] = {}
        population: dict[str, float] = {}
        inside: dict[str, float] = {}
        if self.potential is not None:
            for temperature in self.temperatures:
                key = f"{temperature:g}K"
                free_energy[key], ess[key], population[key], inside[key] = self._draws(
                    network, temperature, ceiling
                )
        score = _mean(self._likelihood(basins, nll) for basins in self.groups.values())
        if free_energy:
            score += _mean(free_energy.values())
            score -= _mean(math.log(max(share, 1e-300)) for share in inside.values())
            score += 0.5 * self._population_error(population)
        if not math.isfinite(score):
            score = math.inf
        return Validation(
            step, mixing, score, nll, free_energy, ess, population, inside, dict(running)
        )

    def _likelihood(self, basins: Mapping[int, list[str]], nll: Mapping[str, float]) -> float:
        """Mean NLL of a temperature's basins: few frames have little to say of theirs."""
        total = weights = 0.0
        for keys in basins.values():
            weight = min(sum(len(self.held_out[key][0]) for key in keys), _FRAMES_OF_A_BASIN)
            total += weight * _mean(nll[key] for key in keys)
            weights += weight
        return total / weights

    def _population_error(self, population: Mapping[str, float]) -> float:
        """Mean |ln(share of draws / share of data)| of the basins, where there are data."""
        least = 0.5 / len(self.noise)
        errors = [0.0]
        for temperature, shares in self.shares.items():
            found = population.get(f"{temperature:g}K")
            if found is None or not math.isfinite(found):
                continue
            expected = _mean(shares)
            for p, q in ((expected, found), (1 - expected, 1 - found)):
                if p > 0:
                    errors.append(abs(math.log(max(q, least) / p)))
        return _mean(errors[1:] or errors)

    def _draws(
        self, network: Chain, temperature: float, ceiling: float
    ) -> tuple[float, float, float, float]:
        flow, potential = self.flow, self.potential
        assert potential is not None
        tau = temperature / flow.reference_temperature
        v = self.noise * math.sqrt(tau)
        y, log_det = network.forward_and_log_det(v)
        x, momenta = y[:, : flow.n_coordinates].double(), y[:, flow.n_coordinates :].double()
        total = log_det.double() + flow.log_multiplicity
        for layer in (flow.whitening, flow.coordinates):
            if layer is not None:
                x, extra = layer.forward_and_log_det(x)
                total = total + extra
        if flow.overlap:
            total = total + flow.log_partition(x, temperature)
        kt = potential.boltzmann_constant * temperature
        energy = potential.energy(x)
        inside = torch.isfinite(total) & torch.isfinite(energy)
        momentum_term = 0.5 * momenta.square().sum(dim=1) / tau
        action = energy / kt + momentum_term - total
        log_weights = torch.where(
            inside, 0.5 * v.double().square().sum(dim=1) / tau - action, -math.inf
        )
        softened = soften(energy[inside], ceiling, torch.as_tensor(kt)) / kt
        log_z_momenta = 0.5 * flow.n_momenta * math.log(2 * math.pi * tau)
        # E[log q] is minus the prior's entropy less E[log|J|]: this bounds -ln Z of x from above.
        entropy = 0.5 * v.shape[1] * (1 + math.log(2 * math.pi * tau))
        mean = (softened + momentum_term[inside] - total[inside]).mean() - entropy + log_z_momenta
        labels = basin_labels(self.molecule, x[inside]).double()
        population = float(labels.mean()) if len(labels) else math.nan
        share = float(inside.double().mean())
        return float(mean), effective_sample_fraction(log_weights), population, share
