"""Validation, which decides the weights that are kept: likelihood, free energy, populations.

The likelihood over all frames hardly changes when a minor basin is lost, and every reverse
estimate improves; therefore basins weigh the same, and both directions count.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_tsf.flows.base import AugmentedFlow
from openmm_tsf.flows.bijectors import Chain
from openmm_tsf.flows.weights import log_weight
from openmm_tsf.systems.dataset import MDDataset
from openmm_tsf.training.basins import BasinPartition
from openmm_tsf.training.losses import marginal_nll_bound, negative_log_likelihood, whiten
from openmm_tsf.training.settings import FitSettings
from openmm_tsf.training.target import Target, soften
from openmm_tsf.utils.random import make_generator

#: Basins with fewer held-out frames, a few visits only, weigh less.
_FRAMES_OF_A_BASIN = 100


@dataclass(frozen=True)
class Validation:
    r"""The results of one validation.

    Attributes
    ----------
    step, mixing
        Training step and lambda.
    score
        The quantity that is minimised, in nats: held-out NLL, with equal weights of temperatures
        and of basins of a hundred frames or more; plus the mean over temperatures of the draws'
        free energy (both together are a Jeffreys divergence, up to constants) less the ln of the
        fraction inside the domain; plus half the mean of \|ln(population of draws / of data)\| of
        the basins.
    nll
        Held-out NLL (bound on the marginal's, nats) by ``"<T>K basin <b>"``.
    free_energy, ess, basin_population
        By temperature: mean over the draws inside the domain of softened U/kT + |p|^2/2tau -
        log|J_D|, less the prior's entropy, plus the ln of the momenta's integral (a bound on
        -ln Z); reverse ESS of the joint weights; fraction of draws in each basin, by
        ``"<T>K basin <b>"``.
    inside
        By temperature: fraction of draws inside the domain.
    running
        Exponential means of the training losses and of the chains' acceptance.

    Examples
    --------
    >>> from openmm_tsf.training import Validation
    >>> validation = Validation(step=10, mixing=0.1, score=2.5, nll={"600K basin 0": 2.5})
    >>> print(validation)
    NLL 2.5
    >>> validation.row()["nll 600K basin 0"]
    2.5
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
        """Return a flat row for a CSV file."""
        flat: dict[str, float] = {"step": self.step, "lambda": self.mixing, "score": self.score}
        for name in ("nll", "kl", "chains"):
            flat[f"train_{name}"] = self.running.get(name, math.nan)
        for prefix in ("nll", "free_energy", "ess", "population", "inside"):
            name = "basin_population" if prefix == "population" else prefix
            flat |= {f"{prefix} {key}": value for key, value in getattr(self, name).items()}
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
            text += f" ESS {shown(self.ess, 2)}"
        return text


def effective_sample_fraction(log_weights: Tensor) -> float:
    """Return Kish's (sum w)^2 / (n sum w^2) of log weights [n]; 0 without a finite one."""
    finite = log_weights[torch.isfinite(log_weights)]
    if not len(finite):
        return 0.0
    log_ratio = 2 * torch.logsumexp(finite, 0) - torch.logsumexp(2 * finite, 0)
    return float(log_ratio.exp()) / len(log_weights)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


class Validator:
    """Validates networks on held-out frames and fixed noise, so that results are comparable.

    Without a target the reverse estimates are left out. `populations` are those of the basins [K]
    in each dataset as a whole, of which the held-out frames may be a short piece; by default
    theirs.
    """

    def __init__(
        self,
        flow: AugmentedFlow,
        datasets: Sequence[MDDataset],
        target: Target | None,
        basins: BasinPartition,
        settings: FitSettings,
        seed: int,
        populations: Sequence[Tensor] | None = None,
    ) -> None:
        self.flow, self.target, self.basins = flow, target, basins
        self.temperatures = settings.temperatures or (flow.reference_temperature,)
        dtype = settings.dtype
        generator = make_generator((seed + 7919) % 2**64, flow.device)
        self.held_out: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.groups: dict[float, dict[int, list[str]]] = {}
        self.populations: dict[float, list[Tensor]] = {}
        for number, dataset in enumerate(datasets):
            tau = dataset.temperature / flow.reference_temperature
            y, log_det = whiten(flow, dataset.positions.to(flow.device), tau, generator)
            labels = self.basins.labels(dataset.positions).to(flow.device)
            noise = torch.randn(
                len(y), flow.n_momenta, generator=generator, dtype=dtype, device=flow.device
            )
            momenta = math.sqrt(tau) * noise
            of_frames = self.basins.populations(dataset.positions)
            population = of_frames if populations is None else populations[number]
            self.populations.setdefault(dataset.temperature, []).append(population)
            for basin in labels.unique().tolist():
                chosen = labels == basin
                # MD and the sampler's frames may have the same temperature: keep both.
                key = f"{dataset.temperature:g}K basin {basin}"
                while key in self.held_out:
                    key += "'"
                groups = self.groups.setdefault(dataset.temperature, {})
                groups.setdefault(basin, []).append(key)
                self.held_out[key] = (
                    y[chosen].to(dtype),
                    log_det[chosen].to(dtype),
                    momenta[chosen],
                    torch.full((int(chosen.sum()),), tau, dtype=dtype, device=flow.device),
                )
        shape = (settings.n_validation_draws, flow.n_coordinates + flow.n_momenta)
        self.noise = torch.randn(shape, generator=generator, dtype=dtype, device=flow.device)

    @torch.no_grad()
    def validate(
        self, network: Chain, step: int, mixing: float, running: Mapping[str, float]
    ) -> Validation:
        """Return the results for a network's present weights."""
        nll: dict[str, float] = {}
        for key, (y, log_det, momenta, tau) in self.held_out.items():
            joint = negative_log_likelihood(network, y, log_det, momenta, tau)
            nll[key] = float(marginal_nll_bound(joint, self.flow.n_momenta, tau).mean())
        draws: dict[str, tuple[float, float, float, list[float]]] = {}
        if self.target is not None:
            for temperature in self.temperatures:
                draws[f"{temperature:g}K"] = self._evaluate_draws(network, self.target, temperature)
        free_energy = {key: values[0] for key, values in draws.items()}
        ess = {key: values[1] for key, values in draws.items()}
        inside = {key: values[2] for key, values in draws.items()}
        population = {
            f"{key} basin {basin}": value
            for key, values in draws.items()
            for basin, value in enumerate(values[3])
        }
        score = _mean(self.likelihood(basins, nll) for basins in self.groups.values())
        if free_energy:
            score += _mean(free_energy.values())
            score -= _mean(math.log(max(fraction, 1e-300)) for fraction in inside.values())
            score += 0.5 * self.population_error(population)
        if not math.isfinite(score):
            score = math.inf
        return Validation(
            step, mixing, score, nll, free_energy, ess, population, inside, dict(running)
        )

    def likelihood(self, basins: Mapping[int, list[str]], nll: Mapping[str, float]) -> float:
        """Return the mean NLL over a temperature's basins; basins with few frames weigh less."""
        total = weights = 0.0
        for keys in basins.values():
            weight = min(sum(len(self.held_out[key][0]) for key in keys), _FRAMES_OF_A_BASIN)
            total += weight * _mean(nll[key] for key in keys)
            weights += weight
        return total / weights

    def population_error(self, population: Mapping[str, float]) -> float:
        """Return the mean |ln(population of draws / of data)| of the basins that have data.

        `population` is the fraction of draws in each basin by ``"<T>K basin <b>"``.
        """
        least = 0.5 / len(self.noise)
        errors = []
        for temperature, populations in self.populations.items():
            expected = torch.stack(populations).mean(0).tolist()
            for basin, p in enumerate(expected):
                q = population.get(f"{temperature:g}K basin {basin}", math.nan)
                if p > 0 and math.isfinite(q):
                    errors.append(abs(math.log(max(q, least) / p)))
        return _mean(errors or [0.0])

    def _evaluate_draws(
        self, network: Chain, target: Target, temperature: float
    ) -> tuple[float, float, float, list[float]]:
        """Free energy, ESS, fraction inside and populations; see :class:`Validation`."""
        flow, potential = self.flow, target.potential
        tau = temperature / flow.reference_temperature
        v = self.noise * math.sqrt(tau)
        y, log_det = network.forward_and_log_det(v)
        x, momenta = y[:, : flow.n_coordinates].double(), y[:, flow.n_coordinates :].double()
        x, log_det = flow.apply_layers(x, log_det.double() + flow.log_multiplicity)
        if flow.overlap:
            log_det = log_det + flow.log_partition(x, temperature)
        kt = potential.boltzmann_constant * temperature
        energy = potential.energy(x)
        inside = torch.isfinite(log_det) & torch.isfinite(energy)
        latent = 0.5 * v.double().square().sum(dim=1) / tau
        log_weights = latent + log_weight(energy / kt, momenta, tau, -log_det)
        log_weights = torch.where(inside, log_weights, -math.inf)
        width = torch.tensor(kt, dtype=torch.float32, device=flow.device)
        softened = soften(energy[inside], target.energy_ceiling, width) / kt
        momenta, log_det = momenta[inside], log_det[inside]
        log_z_momenta = 0.5 * flow.n_momenta * math.log(2 * math.pi * tau)
        # E[log q] is minus the prior's entropy less E[log|J|]: this bounds -ln Z of x from above.
        entropy = 0.5 * v.shape[1] * (1 + math.log(2 * math.pi * tau))
        free_energy = -log_weight(softened, momenta, tau, -log_det).mean() - entropy + log_z_momenta
        no_draws = [math.nan] * self.basins.n_basins
        population = self.basins.populations(x[inside]).tolist() if inside.any() else no_draws
        ess, fraction = effective_sample_fraction(log_weights), float(inside.double().mean())
        return float(free_energy), ess, fraction, population
