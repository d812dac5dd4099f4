"""Multi-layer perceptrons with features first, and their derivatives without autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Perceptron(nn.Sequential):
    """A perceptron of SiLUs that maps [n_in, B] to [n_out, B].

    The last layer is zero at first. Weights are kept in the module's precision and used in that of
    the argument: converted once, and again after they have changed.

    Examples
    --------
    >>> import torch
    >>> from openmm_tsf.flows.perceptron import Perceptron
    >>> Perceptron(3, hidden=[8], n_out=2)(torch.ones(3, 5)).shape
    torch.Size([2, 5])
    """

    def __init__(self, n_in: int, hidden: Sequence[int], n_out: int) -> None:
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(n_in, width, dtype=torch.float32, device="cpu"), nn.SiLU()]
            n_in = width
        last = nn.Linear(n_in, n_out, dtype=torch.float32, device="cpu")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(*layers, last)
        self._converted = _Converted()
        self._frozen: list[tuple[Tensor, Tensor]] | None = None

    def freeze(self, dtype: torch.dtype) -> None:
        """Use the weights as they are now, in a precision: what changes later has no effect."""
        with torch.no_grad():
            self._frozen = [(w.clone(), b.clone()) for w, b in self._weights(dtype)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [n_out, B] of x [n_in, B], differentiable by autograd."""
        *hidden, (weight, bias) = self._weights(x.dtype)
        for w, b in hidden:
            x = nn.functional.silu(torch.addmm(b[:, None], w, x))
        return torch.addmm(bias[:, None], weight, x)

    def record(self, x: Tensor) -> "tuple[Tensor, Tape]":
        """Return the outputs [n_out, B] of x [n_in, B], detached, and what derivatives need."""
        tape = Tape([], [], [])
        with torch.no_grad():
            *hidden, (weight, bias) = self._weights(x.dtype)
            for w, b in hidden:
                argument = torch.addmm(b[:, None], w, x)
                share = torch.sigmoid(argument)
                value = argument.mul_(share)
                tape.weights.append(w)
                tape.inputs.append(x)
                # d/da a s(a) = s + a s (1 - s)
                tape.derivatives.append(torch.addcmul(share, value, 1 - share))
                x = value
            tape.weights.append(weight)
            tape.inputs.append(x)
            return torch.addmm(bias[:, None], weight, x), tape

    def _weights(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return the weight and bias of each layer in a precision."""
        if self._frozen is not None:
            return self._frozen
        parameters = list(self.parameters())
        if parameters[0].dtype != dtype:
            differentiable = torch.is_grad_enabled() and parameters[0].requires_grad
            if differentiable or parameters[0].is_inference():  # these count no changes
                parameters = [parameter.to(dtype) for parameter in parameters]  # type: ignore[misc]
            else:
                parameters = self._converted.get(parameters, dtype)  # type: ignore[assignment]
        return list(zip(parameters[::2], parameters[1::2], strict=True))


class Tape(NamedTuple):
    """What :meth:`Perceptron.record` keeps: weights and inputs of layers, derivatives of SiLUs."""

    weights: list[Tensor]
    inputs: list[Tensor]
    derivatives: list[Tensor]

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """Return the cotangent of the inputs [n_in, B] from that of the outputs [n_out, B]."""
        for weight, derivative in zip(self.weights[:0:-1], self.derivatives[::-1], strict=True):
            cotangent = torch.mm(weight.T, cotangent).mul_(derivative)
        return torch.mm(self.weights[0].T, cotangent)

    def gradients(self, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the cotangent of the first layer's outputs, and gradients of all parameters."""
        gradients: list[Tensor] = []
        for layer in reversed(range(len(self.weights))):
            gradients[:0] = [torch.mm(cotangent, self.inputs[layer].T), cotangent.sum(dim=1)]
            if layer:
                cotangent = torch.mm(self.weights[layer].T, cotangent)
                cotangent.mul_(self.derivatives[layer - 1])
        return cotangent, gradients


_steps_of_optimizers = 0


def _count_step(*_: object) -> None:
    global _steps_of_optimizers
    _steps_of_optimizers += 1


# Fused optimizers change parameters without counting it as a change.
register_optimizer_step_post_hook(_count_step)


class _Converted:
    """Parameters in another precision, valid as long as the parameters do not change.

    Changes are counted by torch, which does not see those of ``parameter.data``, and here, where
    those of optimizers count.
    """

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._versions: list[int] = []
        self._tensors: list[Tensor] = []

    def __reduce__(self) -> tuple[type["_Converted"], tuple[()]]:
        return _Converted, ()  # copies of a module convert their own parameters

    def get(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return the parameters in a precision, detached."""
        versions = [_steps_of_optimizers, *(parameter._version for parameter in parameters)]
        # The sources are kept: no other tensor can have their memory.
        same = (
            bool(self._tensors)
            and self._tensors[0].dtype == dtype
            and self._versions == versions
            and all(map(_share_memory, parameters, self._sources))
        )
        if not same:
            with torch.inference_mode(False):  # autograd may use them later
                self._sources = [parameter.detach() for parameter in parameters]
                self._tensors = [source.to(dtype) for source in self._sources]
            self._versions = versions
        return self._tensors


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()
