"""Training over ranks: what they sum, what they agree on, and what each has of its own.

Each rank has its part of the frames, draws and chains of every step. Its loss is its part of the
sum over all points, so that the sums of the gradients are those of one process with all of them:
every rank then makes the same step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openmm_tsf.training.settings import FitSettings
from openmm_tsf.utils.distributed import Ranks
from openmm_tsf.utils.validation import check_seed

#: Tensors of a checkpoint's chains with a row for each chain, all chains of a temperature together.
_BY_CHAIN = ("y", "reduced_energy", "gradient", "basin", "tau", "home")


def check_ranks(settings: FitSettings, ranks: Ranks) -> None:
    """Refuse more ranks than there are points for in a step."""
    if ranks.size == 1:
        return
    of = f"for each of {ranks.size} ranks"
    if settings.batch_size < ranks.size:
        raise ValueError(f"batch_size: expected one frame {of}, got {settings.batch_size}")
    n_rungs = len(settings.temperatures or (0,)) if settings.estimator == "path" else 1
    n_draws = settings.kl_batch_size // n_rungs
    if settings.lambda_max > 0 and n_draws < ranks.size:
        expected = f"one draw of each of {n_rungs} temperatures {of}"
        raise ValueError(f"kl_batch_size: expected {expected}, got {settings.kl_batch_size}")
    for rank in range(ranks.size if settings.n_chains else 0):
        one = Ranks(rank, ranks.size)
        least = 2 * one.count_share(n_draws)
        if one.count_share(settings.n_chains) < least:
            expected = f"{least} of each temperature {of}, twice its draws in a step"
            raise ValueError(f"n_chains: expected {expected}, got {settings.n_chains}")


def seed_of_rank(seed: int, rank: int, step: int = 0) -> int:
    """Return the seed of a rank's random numbers from a step on; rank 0 begins with `seed`."""
    if rank == step == 0:
        return check_seed(seed)
    sequence = np.random.SeedSequence(check_seed(seed), spawn_key=(rank, step))
    return int(sequence.generate_state(1)[0])


def sum_gradients(
    ranks: Ranks, network: nn.Module, exchanged: Sequence[Tensor], flags: Sequence[float]
) -> Tensor:
    """Replace gradients and the tensors `exchanged` by their sums over the ranks, in one exchange.

    Returns the sums of the flags, float64.
    """
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    device = gradients[0].device
    shared = torch.tensor(list(flags), dtype=torch.float64, device=device)
    tensors = [*gradients, *exchanged, shared]
    flat = ranks.sum_(torch.cat([tensor.double().flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
    return shared


def place(values: Tensor, part: slice, total: int, dim: int = 0) -> Tensor:
    """Return values, float64, in their part of `total` zeros: the sum over ranks has those of all.

    `part` says where they are along a dimension.
    """
    shape = list(values.shape)
    shape[dim] = total
    placed = values.new_zeros(shape, dtype=torch.float64)
    placed.narrow(dim, part.start, part.stop - part.start).copy_(values)
    return placed


def synchronize(ranks: Ranks, networks: Sequence[nn.Module]) -> None:
    """Set the weights of all ranks to those of rank 0: other processors may round differently."""
    if ranks.size == 1:
        return
    weights = [weight for network in networks for weight in network.state_dict().values()]
    flat = ranks.broadcast_(torch.cat([weight.flatten() for weight in weights]))
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.copy_(part.view_as(weight))


def gather_chains(state: dict[str, Any], shape: tuple[int, int], ranks: Ranks) -> dict[str, Any]:
    """Return the state of the chains of all ranks; `shape` is temperatures, and chains of each.

    Step sizes and positions of the ranks are in ``by_rank``. Every rank has to call it.
    """
    if ranks.size == 1 or not state:
        return state
    n_temperatures, n_chains = shape
    tensors = [state[name] for name in _BY_CHAIN]
    rows = [tensor.reshape(n_temperatures, -1, tensor[0].numel()).double() for tensor in tensors]
    table = ranks.sum_(place(torch.cat(rows, 2), ranks.share(n_chains), n_chains, dim=1))
    of_all = table.split([each.shape[2] for each in rows], dim=2)
    joined = {
        name: part.reshape(-1, *tensor.shape[1:]).to(tensor.dtype)
        for name, part, tensor in zip(_BY_CHAIN, of_all, tensors, strict=True)
    }
    own = torch.cat([state["step_sizes"].double(), table.new_full((1,), float(state["next"]))])
    by_rank = ranks.sum_(place(own[None], slice(ranks.rank, ranks.rank + 1), ranks.size))
    return {**state, **joined, "by_rank": by_rank}


def split_chains(
    state: Mapping[str, Any], shape: tuple[int, int], ranks: Ranks
) -> Mapping[str, Any]:
    """Return this rank's part of what :func:`gather_chains` returned, for any number of ranks."""
    by_rank = state.get("by_rank")
    if ranks.size == 1 and by_rank is None:
        return state
    n_temperatures, n_chains = shape
    part = ranks.share(n_chains)
    own = dict(state)
    for name in _BY_CHAIN:
        rows = state[name].reshape(n_temperatures, n_chains, *state[name].shape[1:])
        own[name] = rows[:, part].flatten(0, 1)
    own["next"] = 0
    if by_rank is not None and len(by_rank) == ranks.size:
        *sizes, position = by_rank[ranks.rank].tolist()
        own["step_sizes"] = torch.tensor(sizes, dtype=state["step_sizes"].dtype, device="cpu")
        own["next"] = int(position)
    return own


def gather_generators(generator: torch.Generator, ranks: Ranks) -> Tensor:
    """Return the states of the generators of all ranks, uint8; every rank has to call it."""
    own = generator.get_state()[None]
    placed = place(own, slice(ranks.rank, ranks.rank + 1), ranks.size)
    return ranks.sum_(placed).to(torch.uint8)
