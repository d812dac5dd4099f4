"""The common part of the terms of Custom Forces: parameters, tabulated functions, expressions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from openmm_tsf.potentials.expressions import tabulated
from openmm_tsf.potentials.expressions.parser import Expression
from openmm_tsf.potentials.forces.base import NotCovered, Term


class CustomTerm(Term):
    """The energy of a Force that is written in OpenMM's expression language.

    `rows` are the values of the parameters `names`, a row for each particle, bond, angle or
    torsion; `global_parameters` are names and defaults of those that the expressions may use.
    """

    values: Tensor

    def __init__(self, force: Any, names: Iterable[str], rows: Sequence[Sequence[float]]) -> None:
        super().__init__()
        if force.usesPeriodicBoundaryConditions():
            raise NotCovered(force, "periodic boundary conditions")
        self.global_parameters: dict[str, float] = {
            force.getGlobalParameterName(i): force.getGlobalParameterDefaultValue(i)
            for i in range(force.getNumGlobalParameters())
        }
        self.names = list(names)
        table = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(
            len(rows), len(self.names)
        )
        self.register_buffer("values", table.T.unsqueeze(-1).contiguous())
        # In a list: a submodule may not have any name, a tabulated function may.
        self.tables = nn.ModuleList()
        self._functions: dict[str, nn.Module] = {}
        # CustomBondForce and others have none.
        count = getattr(force, "getNumTabulatedFunctions", int)()
        for i in range(count):
            module = tabulated.from_openmm(force.getTabulatedFunction(i))
            self.tables.append(module)
            self._functions[force.getTabulatedFunctionName(i)] = module

    def parse(self, force: Any, text: str, known: Iterable[str]) -> Expression:
        """Return the expression `text`, whose variables are `known` or global parameters."""
        expression = Expression(text, functions=self._functions)
        unknown = sorted(expression.variables - set(known) - set(self.global_parameters))
        if unknown:
            raise NotCovered(force, f"the undefined variable {unknown[0]!r} of {text!r}")
        return expression

    def named_values(self) -> dict[str, Tensor]:
        """Return the parameters by name, each [M, 1]."""
        return dict(zip(self.names, self.values.unbind(0), strict=True))


def read_groups(force: Any, group: str) -> tuple[list[str], list[Any]]:
    """Return the names of parameters, and atoms and values of each Bond, Angle, ... of a Force."""
    count = getattr(force, f"getNumPer{group}Parameters")()
    names = [getattr(force, f"getPer{group}ParameterName")(i) for i in range(count)]
    count = getattr(force, f"getNum{group}s")()
    return names, [getattr(force, f"get{group}Parameters")(i) for i in range(count)]


def evaluate(expression: Expression, like: Tensor, *scopes: Mapping[str, Tensor]) -> Tensor:
    """Return an expression's value; each variable is that of the last scope that has it.

    `like` gives dtype and device to an expression without variables.
    """
    values = {"": like}
    for scope in scopes:
        values.update(scope)
    result: Tensor = expression(values)
    return result


def total(values: Tensor, n_terms: int, x: Tensor) -> Tensor:
    """Return the sums [B] of `n_terms` terms [M, B], [M, 1] or a scalar, at positions [3, N, B]."""
    return values.expand(n_terms, x.shape[-1]).sum(dim=0)
