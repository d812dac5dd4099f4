"""Muon: momentum with steps of weight matrices made orthogonal.

All directions of a weight matrix move equally far, not only those with large gradients; for the
couplings of a flow a step is worth many steps of Adam (``examples/benchmarks/training_trials.py``).
``torch.optim.Muon`` is the same rule, one matrix at a time and in bfloat16, which is emulated on
processors without it: far slower for networks of this size.
"""

from collections.abc import Callable, Iterable
from typing import NoReturn, overload

import torch
from torch import Tensor, nn

#: Keller Jordan's quintic: five rounds bring singular values from [0.001, 1] to [0.7, 1.2].
_QUINTIC, _ROUNDS = (3.4445, -4.7750, 2.0315), 5
#: Parameters that are not matrices are left to Adam, at this fraction of the learning rate.
VECTOR_RATE = 0.1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about U V^T for each matrix U S V^T of [n, rows, columns]; zero for zero."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-20)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., https://kellerjordan.github.io/posts/muon), batched over equal shapes.

    Steps have the size of Adam's at the same `lr` (as ``adjust_lr_fn="match_rms_adamw"`` of
    torch.optim.Muon; arXiv:2502.16982). `momentum` is the decay of the mean of gradients, used with
    Nesterov's rule; each step subtracts `weight_decay` times `lr` of the matrices from them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
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
            for shape, alike in by_shape.items():
                torch._foreach_mul_(list(alike), 1 - group["lr"] * group["weight_decay"])
                self._step(alike, group["momentum"], 0.2 * max(shape) ** 0.5 * group["lr"])

    def _step(self, alike: list[nn.Parameter], momentum: float, length: float) -> None:
        gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
        means = [self.state[parameter]["momentum"] for parameter in alike]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, means, momentum)
        steps = orthogonalize(torch.stack(ahead)).unbind()
        torch._foreach_add_(list(alike), list(steps), alpha=-length)


def make_optimizers(
    network: nn.Module, kind: str, lr: float, weight_decay: float = 0.0
) -> dict[str, torch.optim.Optimizer]:
    """Return optimizers by name: ``adam`` for all parameters, or ``muon`` for the matrices too."""
    parameters = list(network.parameters())
    if kind == "adam":
        # Fused: one kernel for all of the many small parameters.
        return {"adam": torch.optim.Adam(parameters, lr=lr, fused=True)}
    vectors = [parameter for parameter in parameters if parameter.ndim != 2]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    return {
        "adam": torch.optim.Adam(vectors, lr=VECTOR_RATE * lr, fused=True),
        "muon": Muon(matrices, lr=lr, weight_decay=weight_decay),
    }


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], lr: float) -> None:
    """Set the learning rate of optimizers from :func:`make_optimizers`."""
    for name, optimizer in optimizers.items():
        factor = VECTOR_RATE if name == "adam" and "muon" in optimizers else 1.0
        for group in optimizer.param_groups:
            group["lr"] = factor * lr
