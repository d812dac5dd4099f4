"""OpenMM's expression language (Lepton) as torch operations.

The grammar is Lepton's, checked against OpenMM: ``^`` is right-associative and binds tighter than
unary minus, which binds tighter than ``*`` and ``/``; no space before a function's parenthesis;
``expression; name = definition; ...``, where a definition may use those after it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openmm_tsf.potentials.expressions.graph import OPERATIONS, Graph

_UNARY = (
    "sqrt exp log sin cos sec csc tan cot asin acos atan sinh cosh tanh erf erfc step delta square "
    "cube recip abs floor ceil"
)
_ARITY = dict.fromkeys(_UNARY.split(), 1) | {"atan2": 2, "min": 2, "max": 2, "select": 3}
_OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div", "^": "pow"}
_PRECEDENCE = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 3}
_NEGATION = 2  # between "*" and "^"
_NUMBER = re.compile(r"(?=[0-9.])[0-9]*\.?[0-9]*([eE][+-]?[0-9]*)?")
_NAME = re.compile(r"[^\s(),+*/^-]+")
_INVALID = set("=<>!&|%?")  # Lepton would take them for letters of a name


class ExpressionError(ValueError):
    """An expression that cannot be read, because of `problem` at the character `position`."""

    def __init__(self, text: str, position: int, problem: str) -> None:
        self.text = text
        self.position = position
        self._problem = problem
        super().__init__(f"expression {text!r}, position {position}: {problem}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.position, self._problem)


class _Token(NamedTuple):
    kind: str  # "number", "name", "function", "end" or the character itself
    text: str
    position: int


class Parser:
    """Reads an expression into a graph, by precedence climbing."""

    def __init__(self, text: str, graph: Graph, functions: Mapping[str, nn.Module]) -> None:
        self.text = text
        self.graph = graph
        self.functions = functions
        self.defined: dict[str, int] = {}

    def parse(self) -> int:
        """Return the node of the main expression."""
        starts = [0] + [i + 1 for i, c in enumerate(self.text) if c == ";"]
        ends = [*(s - 1 for s in starts[1:]), len(self.text)]
        # From last to first, as in Lepton: a definition may use those after it, and of two with one
        # name an expression uses the nearest one after itself.
        for start, end in zip(reversed(starts[1:]), reversed(ends[1:]), strict=True):
            if self.text[start:end].strip():
                equals = self.text.find("=", start, end)
                name = self.text[start:equals].strip()
                if equals < 0 or not name:
                    raise self._error(start, "expected a definition, name = expression")
                self.defined[name] = self._expression(equals + 1, end)
        return self._expression(0, ends[0])

    def _expression(self, start: int, end: int) -> int:
        self.tokens = self._tokenize(start, end)
        self.next = 0
        node = self._binary(0)
        token = self.tokens[self.next]
        if token.kind != "end":
            hint = "unbalanced parenthesis" if token.kind == ")" else f"unexpected {token.text!r}"
            raise self._error(token.position, hint)
        return node

    def _tokenize(self, start: int, end: int) -> list[_Token]:
        tokens, position = [], start
        while position < end:
            kind, stop = self.text[position], position + 1
            if kind.isspace():
                position = stop
                continue
            if number := _NUMBER.match(self.text, position, end):
                kind, stop = "number", number.end()
            elif name := _NAME.match(self.text, position, end):
                kind, stop = "name", name.end()
                if invalid := _INVALID.intersection(name[0]):
                    at = min(self.text.index(c, position) for c in invalid)
                    raise self._error(at, f"unexpected {self.text[at]!r}")
                if stop < end and self.text[stop] == "(":
                    kind = "function"
            tokens.append(_Token(kind, self.text[position:stop], position))
            position = stop
        return [*tokens, _Token("end", "", end)]

    def _binary(self, precedence: int) -> int:
        node = self._operand()
        while (token := self.tokens[self.next]).kind in _OPERATORS:
            level = _PRECEDENCE[token.kind]
            if level < precedence:
                break
            self.next += 1
            right = self._binary(level if token.kind == "^" else level + 1)
            node = self.graph.apply(_OPERATORS[token.kind], node, right)
        return node

    def _operand(self) -> int:
        token = self.tokens[self.next]
        self.next += 1
        if token.kind == "number":
            try:
                return self.graph.constant(float(token.text))
            except ValueError:
                problem = f"{token.text!r} is not a number"
                raise self._error(token.position, problem) from None
        if token.kind == "name":
            if token.text in self.defined:
                return self.defined[token.text]
            return self.graph.variable(token.text)
        if token.kind == "(":
            node = self._binary(0)
            self._close(token)
            return node
        if token.kind == "function":
            return self._function(token)
        if token.kind == "-":
            return self.graph.apply("neg", self._binary(_NEGATION))
        got = "end of expression" if token.kind == "end" else repr(token.text)
        raise self._error(token.position, f"expected a number, a name or '(', got {got}")

    def _function(self, token: _Token) -> int:
        name, given = token.text, self.functions.get(token.text)
        if given is None and name not in _ARITY:
            raise self._error(token.position, f"unknown function {name!r}")
        opening = self.tokens[self.next]
        self.next += 1
        arguments = [self._binary(0)]
        while self.tokens[self.next].kind == ",":
            self.next += 1
            arguments.append(self._binary(0))
        self._close(opening)
        arity = _ARITY[name] if given is None else getattr(given, "n_arguments", len(arguments))
        if len(arguments) != arity:
            problem = f"function {name!r} takes {arity} argument(s), got {len(arguments)}"
            raise self._error(token.position, problem)
        if given is None:
            return self.graph.apply(name, *arguments)
        return self.graph.call(name, arguments)

    def _close(self, opening: _Token) -> None:
        token = self.tokens[self.next]
        if token.kind == "end":
            raise self._error(opening.position, "unbalanced parenthesis")
        if token.kind != ")":
            raise self._error(token.position, f"unexpected {token.text!r}")
        self.next += 1

    def _error(self, position: int, problem: str) -> ExpressionError:
        return ExpressionError(self.text, position, problem)


class Expression(nn.Module):
    """A function of named variables, read from OpenMM's expression language.

    Values and derivatives are OpenMM's, also at ties and steps (min, max, abs, step, delta, floor,
    ceil) and at 0, where √ has an infinite derivative. Differentiable to any order; the branch of a
    ``select`` that is not taken contributes exact zeros, whatever its value. A product with
    ``step`` is a product, as in OpenMM: 0 · NaN is NaN. Where base and exponent of ``^`` both vary,
    torch's ∂²/∂x∂y is wrong at exponent exactly 0.

    `functions` are modules for functions that the language does not have, called with one tensor
    for each argument, whose number is enforced if the module has ``n_arguments``.
    """

    #: Names that must have values: those left when definitions are inserted and terms cancelled.
    variables: frozenset[str]

    def __init__(self, text: str, functions: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not isinstance(text, str):
            raise TypeError(f"text: expected a string, got {type(text).__name__}")
        self.text = text
        functions = dict(functions or {})
        self.functions = nn.ModuleList(functions.values())
        graph = Graph()
        parser = Parser(text, graph, functions)
        root = parser.parse()
        self._defined = frozenset(parser.defined)
        self._emit(graph, root, list(functions))

    def _emit(self, graph: Graph, root: int, functions: list[str]) -> None:
        """Translate the graph to instructions on registers, of which some hold constants."""
        order = graph.reachable(root)
        register = {node: i for i, node in enumerate(order)}
        self._registers: list[Any] = [graph.value(node) for node in order]
        self._inputs: list[tuple[str, int]] = []
        self._constants: list[tuple[float, int]] = []
        self._program: list[tuple[Callable[..., Tensor], tuple[int, ...], int]] = []
        for node in order:
            operation, *rest = graph.nodes[node]
            out, arguments = register[node], tuple(register[a] for a in graph.arguments(node))
            if operation == "variable":
                self._inputs.append((rest[0], out))
            elif operation == "tensor":
                self._constants.append((graph.nodes[rest[0]][1], out))
            elif operation == "call":
                function = self.functions[functions.index(rest[0])]
                self._program.append((function, arguments, out))
            elif operation != "constant":
                self._program.append((OPERATIONS[operation], arguments, out))
        if graph.value(root) is not None:
            self._constants.append((self._registers[-1], len(order) - 1))
        self.variables = frozenset(name for name, _ in self._inputs)

    def forward(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the expression's values, of the shape to which the variables' values broadcast.

        `values` has a floating-point tensor for each of ``variables``; other names are ignored.
        """
        registers = self._registers.copy()
        like: Tensor | None = None
        for name, out in self._inputs:
            if name not in values:
                raise self._missing(name)
            registers[out] = like = values[name]
        if self._constants:
            if like is None:
                like = next(
                    iter(values.values()), torch.empty((), dtype=torch.float64, device="cpu")
                )
            for value, out in self._constants:
                registers[out] = like.new_full((), value)
        for function, arguments, out in self._program:
            registers[out] = function(*[registers[a] for a in arguments])
        return registers[-1]

    def _missing(self, name: str) -> ValueError:
        defined = name in self._defined
        hint = " (a definition can be used only by what comes before it)" if defined else ""
        return ValueError(f"values: expression {self.text!r} needs one for {name!r}{hint}")
