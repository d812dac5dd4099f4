"""An expression as a graph in which equal subexpressions are one node, and its torch operations.

Nodes are numbered in the order of their creation, arguments first, so ascending numbers are an
order of evaluation. Constants are folded, and the identities that Lepton (OpenMM's expression
library) applies are applied here too, because the values at singular points depend on them:
x - x = 0, x/x = 1, 0·x = 0, x·(1/y) = x/y, x/(1/y) = x·y, √(x²) = |x|, √x·√x = x.
"""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Key = tuple[Any, ...]  # (operation, *arguments)


# The derivatives of abs, min and max at ties are Lepton's: |x|' = 1 at 0; for x = y that of the
# second argument in min(x, y) and of the first in max(x, y), where torch's functions average. NaN
# as first argument stays NaN; in OpenMM that depends on the platform and the processor.
def _abs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, -x)


def _min(x: Any, y: Any) -> Tensor:
    return torch.where(x >= y, y, x)


def _max(x: Any, y: Any) -> Tensor:
    return torch.where(x < y, y, x)


_OF_TORCH = "pow sqrt exp log sin cos tan asin acos atan atan2 sinh cosh tanh erf erfc where"
# Functions of the language and operations of the graph; arguments are tensors or Python floats.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in _OF_TORCH.split()},
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "recip": torch.reciprocal,
    "sec": lambda x: x.cos().reciprocal(),
    "csc": lambda x: x.sin().reciprocal(),
    "cot": lambda x: x.tan().reciprocal(),
    "min": _min,
    "max": _max,
    "abs": _abs,
    "step": lambda x: (x >= 0).to(x.dtype),
    "delta": lambda x: (x == 0).to(x.dtype),
    # detach: torch would propagate a zero gradient, and 0 * inf is NaN.
    "floor": lambda x: x.detach().floor(),
    "ceil": lambda x: x.detach().ceil(),
    "nonzero": lambda x: x != 0,
    "zero": lambda x: x == 0,
    "and": torch.logical_and,
    "guard": torch.where,
}
# Operations whose value or a derivative of some order can be infinite or overflow, with arguments
# at which all are finite (None: that argument needs no guard).
_SAFE: dict[str, tuple[float | None, ...]] = {
    **dict.fromkeys(("exp", "tan", "sec", "asin", "acos", "sinh", "cosh"), (0.0,)),
    **dict.fromkeys(("sqrt", "log", "csc", "cot", "recip"), (1.0,)),
    "atan2": (0.0, 1.0),
    "div": (None, 1.0),
    "pow": (1.0, 1.0),
}
_SYMMETRIC = {"add", "mul", "and"}
_NO_DERIVATIVE = {"constant", "tensor", "step", "delta", "floor", "ceil", "nonzero", "zero", "and"}
_LINEAR = {"add", "sub", "neg"}
_NEEDS_TENSORS = {"atan2"}


class Graph:
    """Nodes of one expression.

    A node is a tuple: ``("constant", value)``, ``("variable", name)``, ``("call", function,
    *arguments)``, ``("guard", mask, x, safe)`` or ``(operation, *arguments)``, arguments by number.
    """

    def __init__(self) -> None:
        self.nodes: list[Key] = []
        self._numbers: dict[Key, int] = {}
        self._guarded: dict[tuple[int, int, bool], int] = {}

    def constant(self, value: float) -> int:
        """Return the node of a number; those of 0 and -0 are different."""
        return self._node(("constant", value), (math.copysign(1.0, value),))

    def variable(self, name: str) -> int:
        """Return the node of a variable."""
        return self._node(("variable", name))

    def call(self, function: str, arguments: Iterable[int]) -> int:
        """Return the node of a call of a function that the language does not have."""
        return self._node(("call", function, *map(self._tensor, arguments)))

    def value(self, node: int) -> float | None:
        """Return the number, if the node is a constant."""
        operation, *rest = self.nodes[node]
        return rest[0] if operation == "constant" else None

    def reachable(self, *roots: int) -> list[int]:
        """Return the nodes that `roots` depend on, including `roots`, in an order of evaluation."""
        reached: set[int] = set()
        todo = list(roots)
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                todo.extend(self.arguments(node))
        return sorted(reached)

    def arguments(self, node: int) -> tuple[int, ...]:
        """Return the arguments of a node."""
        operation, *rest = self.nodes[node]
        if operation in ("constant", "variable"):
            return ()
        return tuple(rest[1:]) if operation == "call" else tuple(rest)

    def apply(self, operation: str, *arguments: int) -> int:
        """Return the node of an operation or of a function of the language, simplified."""
        values = [self.value(a) for a in arguments]
        if operation == "square":
            return self.apply("mul", arguments[0], arguments[0])
        if operation == "cube":
            return self._integer_power(arguments[0], 3)
        if operation == "select":
            return self._select(*arguments)
        if all(v is not None for v in values):
            # By the operations that would run otherwise: inf and NaN follow IEEE rules.
            tensors = [torch.tensor(v, dtype=torch.float64, device="cpu") for v in values]
            return self.constant(OPERATIONS[operation](*tensors).item())
        simpler = self._simplified(operation, arguments, values)
        if simpler is not None:
            return simpler
        if operation in _NEEDS_TENSORS:
            arguments = tuple(map(self._tensor, arguments))
        return self._node((operation, *arguments))

    def _simplified(
        self, operation: str, arguments: tuple[int, ...], values: list[float | None]
    ) -> int | None:
        a, va = arguments[0], values[0]
        b, vb = (arguments[1], values[1]) if len(arguments) > 1 else (-1, None)
        if operation == "add" and 0.0 in (va, vb):
            return b if va == 0.0 else a
        if operation == "sub":
            if a == b:
                return self.constant(0.0)
            if vb == 0.0:
                return a
            if va == 0.0:
                return self.apply("neg", b)
        if operation == "mul":
            if 0.0 in (va, vb):
                return self.constant(0.0)
            if 1.0 in (va, vb):
                return b if va == 1.0 else a
            for x, y in ((a, b), (b, a)):
                inner, *rest = self.nodes[y]
                if inner == "recip":
                    return self.apply("div", x, rest[0])
                if inner == "sqrt" and x == y:
                    return int(rest[0])
        if operation == "div":
            if a == b:
                return self.constant(1.0)
            if va == 0.0:
                return self.constant(0.0)
            if va == 1.0:
                return self.apply("recip", b)
            if vb == 1.0:
                return a
            if self.nodes[b][0] == "recip":
                return self.apply("mul", a, self.nodes[b][1])
        if operation == "neg" and self.nodes[a][0] == "neg":
            return int(self.nodes[a][1])
        if operation == "sqrt":
            inner, *rest = self.nodes[a]
            if inner == "mul" and rest[0] == rest[1]:
                return self.apply("abs", rest[0])
        if operation == "pow":
            if va in (0.0, 1.0):
                return a
            if vb == 0.5:
                return self.apply("sqrt", a)
            if vb == 2.0:
                return self.apply("mul", a, a)
            if vb is not None and vb == int(vb if math.isfinite(vb) else 0) and abs(vb) < 2**31:
                return self._integer_power(a, int(vb))
        return None

    def _integer_power(self, base: int, exponent: int) -> int:
        """Return a power as products, valid for negative bases and with all derivatives at 0."""
        if exponent == 0:
            return self.constant(1.0)
        if exponent < 0:
            return self._integer_power(self.apply("recip", base), -exponent)
        if exponent == 1:
            return base
        if exponent % 2:
            return self._product(self._integer_power(base, exponent - 1), base)
        half = self._integer_power(base, exponent // 2)
        return self._product(half, half)

    def _product(self, a: int, b: int) -> int:
        """Return a product without identities: powers of 1/x and √x are kept, as in Lepton."""
        both = self.value(a) is not None and self.value(b) is not None
        return self.apply("mul", a, b) if both else self._node(("mul", a, b))

    def _select(self, condition: int, if_true: int, if_false: int) -> int:
        value = self.value(condition)
        if value is not None:
            return if_true if value != 0.0 else if_false
        if if_true == if_false:
            return if_true
        true, false = self._node(("nonzero", condition)), self._node(("zero", condition))
        return self._where(true, self._guard(if_true, true), self._guard(if_false, false))

    def _where(self, mask: int, x: int, y: int) -> int:
        if self.value(x) is not None and self.value(y) is not None:
            x = self._tensor(x)  # two Python numbers would make torch choose its default dtype
        return self._node(("where", mask, x, y))

    def _guard(self, root: int, mask: int) -> int:
        """Return a copy of `root` whose derivatives of any order are finite where `mask` is false.

        torch multiplies the zero gradient of the branch not taken by the branch's derivatives,
        and 0 * inf is NaN. So the copy has other arguments where it is not taken: variables in
        products are 1, and singular operations get the arguments in ``_SAFE``.
        """
        # Linear uses of a variable need no guard; nodes are visited arguments first.
        for node in self.reachable(root):
            for inside in (False, True):
                if (node, mask, inside) not in self._guarded:
                    self._guarded[node, mask, inside] = self._guard_one(node, mask, inside)
        return self._guarded[root, mask, False]

    def _guard_one(self, node: int, mask: int, inside: bool) -> int:
        operation, *rest = self.nodes[node]
        if operation in _NO_DERIVATIVE:
            return node
        if operation == "variable":
            return self._masked(mask, node, 1.0) if inside else node
        if operation == "where":
            x, y = (self._guarded[a, mask, inside] for a in rest[1:])
            return self._where(rest[0], x, y)
        if operation == "guard":
            both = self._node(("and", rest[0], mask))
            return self._masked(both, self._guarded[rest[1], mask, True], self.nodes[rest[2]][1])
        arguments = self.arguments(node)
        linear = operation in _LINEAR or (
            (operation == "mul" and any(self.value(a) is not None for a in arguments))
            or (operation == "div" and self.value(arguments[1]) is not None)
        )
        arguments = tuple(self._guarded[a, mask, inside or not linear] for a in arguments)
        if operation == "call":
            return self.call(rest[0], arguments)
        safe = _SAFE.get(operation, (None,) * len(arguments))
        arguments = tuple(
            a if s is None else self._masked(mask, a, s)
            for a, s in zip(arguments, safe, strict=True)
        )
        return self._node((operation, *arguments))

    def _masked(self, mask: int, node: int, safe: float) -> int:
        operation, *rest = self.nodes[node]
        if operation in ("constant", "tensor"):
            return node
        if operation == "guard" and rest[0] == mask:
            node = rest[1]
        return self._node(("guard", mask, node, self.constant(safe)))

    def _tensor(self, node: int) -> int:
        return node if self.value(node) is None else self._node(("tensor", node))

    def _node(self, key: Key, extra: Key = ()) -> int:
        if key[0] in _SYMMETRIC:
            key = (key[0], *sorted(key[1:]))
        number = self._numbers.setdefault(key + extra, len(self.nodes))
        if number == len(self.nodes):
            self.nodes.append(key)
        return number
