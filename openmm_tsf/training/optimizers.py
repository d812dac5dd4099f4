"""Muon: momentum with steps of weight matrices made orthogonal.

All directions of a weight matrix move equally far, not only those with large gradients; for the
couplings of a flow a step is worth many steps of Adam (``examples/benchmarks/training_trials.py``).
``torch.optim.Muon`` is the same rule, one matrix at a time and in bfloat16, which is emulated on
processors without it: far slower for networks of this size.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, overload

import torch
from torch import Tensor, nn

#: Quintics a x + b x^3 + c x^5, each the best on the interval that the last one leaves (Polar
#: Express, arXiv:2505.16932): together they bring singular values from [0.003, 1] to [0.80, 1.20],
#: which takes one round more with the same quintic in all of them.
QUINTICS = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
#: Parameters that are not matrices are left to Adam, at this fraction of the learning rate.
VECTOR_RATE = 0.1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about U V^T for each matrix U S V^T of [n, rows, columns]; zero for zero."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    for a, b, c in QUINTICS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), batched over equal shapes.

    Steps have the size of Adam's at the same `lr` (as ``adjust_lr_fn="match_rms_adamw"`` of
    torch.optim.Muon; arXiv:2502.16982). `momentum` is the decay of the mean of gradients, used with
    Nesterov's rule; each step subtracts `weight_decay` times `lr` of the matrices from them. With
    `parallel`, two threads share the matrices, with the same results.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        parallel: bool = False,
    ) -> None:
        self._pool = ThreadPoolExecutor(1, "muon") if parallel else None
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    shape = tuple(parameter.shape)
                    raise ValueError(f"parameters: expected matrices, got one of shape {shape}")
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Make one step with the present gradients."""
        if closure is not None:
            raise ValueError("closure: expected none, Muon uses the present gradients")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            first, second = _halves(list(by_shape.values()))
            options = group["lr"], group["momentum"], group["weight_decay"]
            if self._pool is None:
                self._step(first + second, *options)
                continue
            future = self._pool.submit(self._step, second, *options)
            try:
                self._step(first, *options)
            finally:  # also after an error: no thread is left working
                future.result()

    @torch.no_grad()  # a thread has its own setting
    def _step(
        self, parts: list[list[nn.Parameter]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        """Make one step of the matrices, of which each part has those of one shape."""
        for alike in parts:
            torch._foreach_mul_(list(alike), 1 - lr * weight_decay)
            gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
            means = [self.state[parameter]["momentum"] for parameter in alike]
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, means, momentum)
            steps = orthogonalize(torch.stack(ahead)).unbind()
            length = 0.2 * max(alike[0].shape) ** 0.5 * lr
            torch._foreach_add_(list(alike), list(steps), alpha=-length)


def _halves(parts: Sequence[list[nn.Parameter]]) -> tuple[list[list[nn.Parameter]], ...]:
    """Split parts of equal shapes into two of about equal work."""
    halves: tuple[list[list[nn.Parameter]], ...] = ([], [])
    work = [0.0, 0.0]

    def size(alike: list[nn.Parameter]) -> float:
        least, most = sorted(alike[0].shape)
        return len(alike) * least**2 * (2.0 * most + least)

    for alike in sorted(parts, key=size, reverse=True):
        to = work.index(min(work))
        halves[to].append(alike)
        work[to] += size(alike)
    return halves


def make_optimizers(
    network: nn.Module, kind: str, lr: float, weight_decay: float = 0.0, parallel: bool = False
) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers by name: ``adam`` for all parameters, or ``muon`` for the matrices too.

    With `parallel`, two threads share the work of ``muon``.
    """
    parameters = list(network.parameters())
    if kind == "adam":
        # Fused: one kernel for all of the many small parameters.
        return {"adam": torch.optim.Adam(parameters, lr=lr, fused=True)}
    vectors = [parameter for parameter in parameters if parameter.ndim != 2]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    return {
        "adam": torch.optim.Adam(vectors, lr=VECTOR_RATE * lr, fused=True),
        "muon": Muon(matrices, lr=lr, weight_decay=weight_decay, parallel=parallel),
    }


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of optimizers from :func:`make_optimizers`."""
    for name, optimizer in optimizers.items():
        factor = VECTOR_RATE if name == "adam" and "muon" in optimizers else 1.0
        for group in optimizer.param_groups:
            group["lr"] = factor * lr
