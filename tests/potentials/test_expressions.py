"""OpenMM's expression language and its tabulated functions in torch, against OpenMM itself."""

import math
import random
import re

import numpy as np
import openmm
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from openmm_tsf.potentials.expressions.graph import Graph
from openmm_tsf.potentials.expressions.parser import Expression, ExpressionError, Parser
from openmm_tsf.potentials.expressions.tabulated import from_openmm
from tests.support.torch_cases import reference_values, system_of

POINTS = np.array([[1.3, 0.7, -2.0], [-1.5, 2.0, 0.3], [0.41, -0.62, 0.93], [3.1, 0.11, 1.7]])


def by_openmm(text, points, functions=None):
    """Energies [n] and gradients [n, 3] of one particle at (x, y, z), Reference platform."""
    force = openmm.CustomCompoundBondForce(1, text + ";x=x1;y=y1;z=z1")
    for name, function in (functions or {}).items():
        force.addTabulatedFunction(name, function.__copy__())
    force.addBond([0])
    energies, forces = reference_values(system_of(force, n=1), torch.tensor(points)[:, None])
    return energies.numpy(), -forces[:, 0].numpy()


def by_torch(text, points, functions=None):
    expression = Expression(text, {n: from_openmm(f) for n, f in (functions or {}).items()})
    x = torch.tensor(points, requires_grad=True)
    values = dict(zip("xyz", x.unbind(1), strict=True))
    energies = expression(values).expand(len(points))
    if not energies.requires_grad:
        return energies.numpy(), np.zeros_like(points)
    (gradient,) = torch.autograd.grad(energies.sum(), x)
    return energies.detach().numpy(), gradient.numpy()


def check(text, points=POINTS, functions=None, tolerance=1e-10):
    """Equal to OpenMM wherever OpenMM is finite; infinities and NaNs at the same energies."""
    for expected, got in zip(
        by_openmm(text, points, functions), by_torch(text, points, functions), strict=True
    ):
        finite = np.isfinite(expected)
        np.testing.assert_allclose(got[finite], expected[finite], rtol=tolerance, atol=1e-13)
        if expected.ndim == 1:
            np.testing.assert_array_equal(got[~finite], expected[~finite])


UNARY = re.findall(
    r"\w+",
    "sqrt exp log sin cos sec csc tan cot asin acos atan sinh cosh tanh erf erfc step delta square "
    "cube recip abs floor ceil",
)


@pytest.mark.parametrize("name", UNARY)
def test_functions(name):
    check(f"{name}(x)+y*{name}(0.3*z*z+0.1*y)")


@pytest.mark.parametrize("name", ["min", "max", "atan2"])
def test_functions_of_two(name):
    check(f"{name}(x,y)*z+{name}(z,0.5)+{name}(1,x)")


@pytest.mark.parametrize(
    "text",
    [
        "-x^2", "-2^2", "2^-1+x", "x^-2", "2^3^2", "2-3-4", "24/4/2", "2*-3", "x^2^0.5", "2^-x^2",
        "2+-x", "2--x", "-x^-2", "--x", "-x*y", "-x-y", "x/y*z", "x-y+z", "x/y/z", "2*x^-y^2",
        "x^y^z", "x^0", "x^1", "x^20", "x^-20", "x^(2+1)", "x^n;n=3", "x^2.5", "2^x", "0^x", "1^x",
        "x^0.5", "x^7*y^-3", "1e3*x", "1.5E-2*x", ".5*x", "5.*x", "1e+2*x", " x\t+ y\n", "3",
    ],
)  # fmt: skip
def test_precedence_powers_and_numbers(text):
    check(text)


@pytest.mark.parametrize(
    "text",
    [
        "0.5*k*(r-r0)^2; k=100; r0=0.1; r=sqrt(x^2+y^2+z^2)",
        "4*epsilon*((sigma/r)^12-(sigma/r)^6); sigma=0.9; epsilon=1.5; r=sqrt(x^2+y^2+z^2)",
        "D*(1-exp(-a*(r-1)))^2; D=3; a=1.7; r=sqrt(x*x+y*y+z*z)",
        "k*(1+cos(3*theta-0.4)); theta=atan2(y,x); k=2.5",
        "138.935456*q/r*erfc(2.2*r)+step(1-r)*(r-1)^4; q=-0.4; r=sqrt(x^2+y^2+z^2)",
        "min(1, max(0, abs(x)-0.2))^2 + 5*max(0, r-0.8)^2; r=sqrt(y^2+z^2)",
        "select(step(U-0.1), 0.5*(1/L-1/U+0.25*(r-s/r)*(1/(U^2)-1/(L^2))+0.5*log(L/U)/r), 0);"
        "U=r+0.4; L=max(0.2, D); D=abs(r-0.4); s=0.3; r=sqrt(x^2+y^2+z^2)",
        "select(x-1.3, a/y, a*z); a=x+y",
        "a*x;a=2;a=3", "a*x;;a=b*2;b=y;", "x;unused=foo+2", "sqrt;sqrt=2*x", "x;x=y", "b;b=a+y;a=x",
    ],
)  # fmt: skip
def test_whole_expressions(text):
    check(text)


ORIGIN = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, -1.0], [-1.0, 2.0, 0.0]])


@pytest.mark.parametrize(
    "text",
    [
        "abs(x)", "min(x,y)", "max(x,y)", "step(x)+delta(x)", "sqrt(x^2)", "(x^2)^0.5", "x^2*y^3",
        "x/x", "x-x", "0*log(x)", "x*(1/x)", "y/(1/x)", "sqrt(x)^2", "sqrt(x)*sqrt(x)*y", "1/0+x",
        "step(x)*sqrt(x)", "select(step(x-0.5),sqrt(x-0.5),x^2)", "select(x,1/x,y)", "sqrt(x)^4",
        "x^2.5", "x^-1", "min(x,0)*max(y,x)", "floor(sqrt(x))+x", "(x^2)^1.5", "select(x,y,1)",
    ],
)  # fmt: skip
def test_singular_points_and_ties(text):
    check(text, ORIGIN)


def test_derivative_of_the_square_root_at_zero():
    assert by_torch("sqrt(x)", ORIGIN[:1])[1][0, 0] == math.inf
    assert by_openmm("sqrt(x)", ORIGIN[:1])[1][0, 0] == math.inf


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.1:
        return rng.choice("xxyyz") if rng.random() < 0.8 else f"{rng.uniform(0.2, 3):.3g}"

    def operand():
        return random_expression(rng, depth - 1)

    kind = rng.random()
    if kind < 0.5:
        return f"{operand()}{rng.choice('++--**/')}{operand()}"
    if kind < 0.6:
        return f"({operand()})^{rng.choice(['2', '3', '-1', '-2', '0.5', '1.5', '4', '(y)'])}"
    if kind < 0.65:
        return f"-({operand()})"
    if kind < 0.75:
        return f"({operand()})"
    if kind < 0.8:
        return f"{rng.choice(['min', 'max', 'atan2'])}({operand()},{operand()})"
    if kind < 0.85:
        return f"select({operand()},{operand()},step({operand()})*{operand()})"
    return f"{rng.choice(UNARY)}({operand()})"


class Unfolded(Graph):
    """Refuses to fold constants: OpenMM's optimiser never returns from those that become NaN."""

    def apply(self, operation, *arguments):
        node = super().apply(operation, *arguments)
        if self.value(node) is not None:
            raise ArithmeticError(operation)
        return node


def is_safe_for_openmm(text):
    try:
        Parser(text, Unfolded(), {}).parse()
    except ArithmeticError:
        return False
    return True


@pytest.mark.parametrize("seed", range(6))
def test_random_expressions(seed):
    rng, compared = random.Random(seed), 0
    for _ in range(180):
        text = f"a+b*({random_expression(rng, 3)});a={random_expression(rng, 4)}"
        text += f";b={random_expression(rng, 2)}"
        if not is_safe_for_openmm(text):
            continue
        energies, gradients = by_openmm(text, POINTS)
        got = by_torch(text, POINTS)
        finite = np.isfinite(energies)
        for a, b in ((energies, got[0]), (gradients, got[1])):
            # Rounding errors are magnified near poles and where large terms cancel.
            known = np.isfinite(a) & (np.abs(a) < 1e6) & finite.reshape(-1, *[1] * (a.ndim - 1))
            if "min(" in text or "max(" in text:
                known &= ~np.isnan(b)  # min(NaN, 1) is the processor's choice in OpenMM
            np.testing.assert_allclose(b[known], a[known], rtol=1e-10, atol=1e-11, err_msg=text)
            compared += known.sum()
    assert compared > 500


@pytest.mark.parametrize(
    "text",
    [
        "x^3*y^-2+exp(-x*y)*erf(z)+erfc(x)*tanh(z)",
        "select(step(x-1), log(x)*y, sqrt(4-x)*z)",
        "x^y+2^z+atan2(x,z)+acos(0.2*z)*asin(0.1*x)",
        "sec(0.3*x)+csc(x)+tan(0.2*y)+cot(0.4*y)+sinh(z)*cosh(x)+atan(y)",
        "min(x,y)*max(x^2,z)+abs(z)*floor(x)",
    ],
)
def test_second_and_third_derivatives(text):
    expression = Expression(text)
    inputs = tuple(torch.tensor(v).double().requires_grad_() for v in ([1.3], [0.7], [0.9]))
    names = "xyz"

    def energy(*values: Tensor) -> Tensor:
        return expression(dict(zip(names, values, strict=True)))

    def laplacian(*values: Tensor) -> Tensor:
        first = torch.autograd.grad(energy(*values).sum(), values, create_graph=True)
        return sum(g.square().sum() for g in first)

    assert torch.autograd.gradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(energy, inputs)
    assert torch.autograd.gradgradcheck(laplacian, inputs)


SINGULAR = [
    "sqrt(x)", "log(x)", "1/x", "x^-6", "x^1.5", "x^y", "y^(1/x)", "log(sqrt(x))", "acos(3+x)",
    "asin(1+x)", "exp(1000/x^2)", "exp(1e4*(1+x))", "1/(x-y)", "atan2(x,y)", "csc(x)", "cot(x)",
    "sinh(1e4-x)", "tan(asin(1))*1/x", "(1/x)^12-(1/x)^6", "sqrt(x*y)*log(x*x)/x", "min(sqrt(x),1)",
    "select(y,sqrt(x),log(x))", "select(step(x),1/x,0)", "abs(1/x)", "floor(1/x)*x", "sin(1/x)",
    "y*recip(x)+erf(1/x)", "2^(1/x)", "x*y*1e200*y*1e200*x", "square(1/x)", "cube(log(x))",
]  # fmt: skip


@pytest.mark.parametrize("body", SINGULAR)
@pytest.mark.parametrize(
    "form",
    [
        "select(c, H, B)",
        "select(1-c, B, H)",
        "H + z*select(c, 0, B)",
        "select(c, select(c, H, B), 2*B)",
        "select(1-c, select(z, B, B+1), H)",
    ],
)
def test_the_branch_not_taken_contributes_nothing(body, form):
    expression = Expression(form.replace("H", "(x^3+y)").replace("B", f"({body})"))
    x = torch.tensor([0.0, -1.0, 1e-300]).double().requires_grad_()
    y = torch.tensor([0.0, 0.0, -1.0]).double().requires_grad_()
    one = torch.ones(3).double()
    result = expression({"x": x, "y": y, "z": one, "c": one})
    torch.testing.assert_close(result, x**3 + y, rtol=0, atol=0)
    for expected_x, expected_y in ((3 * x * x, one), (6 * x, 0 * one), (6 * one, 0 * one)):
        # x*y keeps both in the graph of every order.
        result, along_y = torch.autograd.grad((result + 0 * x * y).sum(), [x, y], create_graph=True)
        torch.testing.assert_close(result, expected_x, rtol=0, atol=0)
        torch.testing.assert_close(along_y, expected_y, rtol=0, atol=0)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(text):
    """Names of the torch operations of one call."""
    expression, x = Expression(text), torch.rand(5).double()
    with Count() as count:
        expression(dict.fromkeys("xyz", x))
    return count.names


def test_common_subexpressions_are_evaluated_once():
    text = "a*a+exp(r*2)+exp(2*r)+a;a=exp(2*r)-sqrt(x*y+1)*sqrt(1+y*x);r=x*y;unused=log(x)"
    names = operations(text)
    assert names.count("exp") == 1
    assert "sqrt" not in names  # √u · √u is u
    assert "log" not in names
    assert len(names) == 9
    # s/r, three products for the 6th power and one for the 12th
    assert len(operations("4*x*((y/z)^12-(y/z)^6)")) == 8
    assert "mul" not in operations("atan2(cube(2),x)")


BAD = {
    "end of expression": [("", 0), (" ;a=1", 1), ("x+", 2), ("x;a=sqrt(", 9)],
    "unbalanced": [("(x", 0), ("x)", 1), ("y*sqrt(x", 6)],
    "unknown function 'foo'": [("x+foo(x)", 2)],
    "takes 1": [("sqrt(x,y)", 0)],
    "takes 2": [("min(x,y,z)", 0)],
    "takes 3": [("1+select(x,y)", 2)],
    r"got '\)'": [("sqrt()", 5)],
    r"got '\*'": [("x**2", 2)],
    r"got '\+'": [("+x", 0)],
    "unexpected 'x'": [("2x", 1)],
    "unexpected 'y'": [("x y", 2)],
    r"unexpected '\('": [("sqrt (x)", 5)],
    "unexpected '>'": [("x>2", 1)],
    "unexpected '='": [("x=2", 1), ("x;a=2=3", 5)],
    "unexpected ','": [("x,y", 1), ("(x,y)", 2)],
    "unexpected": [("1.2.3", 3)],
    "not a number": [("2e*x", 0)],
    "definition": [("x;2", 2), ("x;=2", 2)],
}


@pytest.mark.parametrize(
    ("text", "position", "problem"), [(*case, problem) for problem in BAD for case in BAD[problem]]
)
def test_bad_expressions(text, position, problem):
    with pytest.raises(ExpressionError, match=problem) as caught:
        Expression(text)
    assert caught.value.position == position
    assert repr(text) in str(caught.value)
    if not any(c in text for c in "e=>"):
        with pytest.raises(openmm.OpenMMException):
            by_openmm(text, POINTS[:1])


def test_variables_and_missing_values():
    expression = Expression("a*x+c*0;a=b+c-c;b=y;unused=z")
    assert expression.variables == {"x", "y", "c"}
    with pytest.raises(ValueError, match="needs one for 'y'"):
        expression({"x": torch.ones(1), "c": torch.ones(1)})
    circular = Expression("a;a=b;b=a+1")
    assert circular.variables == {"a"}
    with pytest.raises(ValueError, match=r"'a' .a definition can be used only by"):
        circular({})
    with pytest.raises(TypeError, match="text: expected a string"):
        Expression(3)


def test_constants_dtypes_and_broadcasting():
    assert Expression("cube(2)+square(3)")({}).item() == 17.0
    assert Expression("2^0.5")({}).dtype == torch.float64
    assert Expression("2^0.5")({"x": torch.ones(3)}).dtype == torch.float32
    for text in ("select(x,1,2)+y", "atan2(x,0.5)+min(1,y)", "x^2+3*y", "step(x)*floor(y)"):
        for dtype in (torch.float32, torch.float64):
            values = {"x": torch.ones(4, 1, dtype=dtype), "y": torch.rand(5, dtype=dtype)}
            result = Expression(text)(values)
            assert result.dtype == dtype
            assert result.shape == (4, 5)


def test_tracing_and_compiling():
    table = openmm.Continuous1DFunction([0.0, 1.0, 0.5, 2.0], 0.0, 2.0)
    functions = {
        "table": table,
        "map": openmm.Discrete2DFunction(2, 3, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    }
    text = "select(step(x-1), log(x)*table(y), z^2)*exp(-a^3)+floor(y)+map(x,y);a=sqrt(x*x+1)"
    expression = Expression(text, {name: from_openmm(f) for name, f in functions.items()})

    def energy_and_gradient(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = expression({"x": x, "y": y, "z": y})
        return energy, torch.autograd.grad(energy.sum(), x)[0]

    x, y = torch.linspace(0.5, 1.5, 7).double(), torch.linspace(0.1, 0.9, 7).double()
    other = x.flip(0) + 0.1
    traced = make_fx(energy_and_gradient)(x, y)
    for a, b in zip(traced(other, y), energy_and_gradient(other, y), strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(expression, fullgraph=True, backend="aot_eager")
    values = {"x": other, "y": y, "z": y}
    torch.testing.assert_close(compiled(values), expression(values))


def tables():
    rng = np.random.default_rng(3)
    for n in (2, 3, 10, 50):
        yield "t(x)*y", openmm.Continuous1DFunction(rng.normal(size=n).tolist(), 0.2, 1.1)
    for n in (3, 4, 20):
        values = rng.normal(size=n)
        values[-1] = values[0]
        yield "t(x)*y", openmm.Continuous1DFunction(values.tolist(), 0.2, 1.1, True)
    for nx, ny in ((2, 2), (3, 5), (9, 6)):
        values = rng.normal(size=nx * ny).tolist()
        yield "t(x,y)+z", openmm.Continuous2DFunction(nx, ny, values, -0.5, 1.4, 0.0, 2.0)
    for nx, ny in ((3, 4), (9, 6)):
        grid = rng.normal(size=(ny, nx))
        grid[-1] = grid[0]
        grid[:, -1] = grid[:, 0]
        values = grid.ravel().tolist()
        yield "t(x,y)*z", openmm.Continuous2DFunction(nx, ny, values, -0.5, 1.4, 0.0, 1.0, True)
    yield "t(x)*y", openmm.Discrete1DFunction([1.5, 2.5, -1.0])
    yield "t(x,y)", openmm.Discrete2DFunction(2, 3, rng.normal(size=6).tolist())
    yield "t(x,y,z)*x", openmm.Discrete3DFunction(2, 3, 4, rng.normal(size=24).tolist())


@pytest.mark.parametrize(("text", "function"), list(tables()))
def test_tabulated_functions(text, function):
    rng = np.random.default_rng(4)
    halves = rng.integers(-3, 6, size=(40, 3)) + 0.5
    ends = np.array([[0.2, 1.0, 2.0], [1.1, 0.0, 1.0], [-0.5, 0.0, 1.0], [1.4, 2.0, 1.0]])
    points = np.concatenate([rng.uniform(-2, 4, size=(150, 3)), ends, halves])
    functions = {"t": function}
    for expected, got in zip(
        by_openmm(text, points, functions), by_torch(text, points, functions), strict=True
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12 * scale)


def test_splines_differentiate_twice():
    line = from_openmm(openmm.Continuous1DFunction([0.0, 1.0, 0.5, 2.0], 0.0, 3.0))
    grid = from_openmm(openmm.Continuous2DFunction(3, 3, [*map(float, range(9))], 0, 2, 0, 2))
    x = torch.tensor([0.3, 1.4, 1.7]).double().requires_grad_()
    y = torch.tensor([0.6, 1.2, 0.1]).double().requires_grad_()
    assert torch.autograd.gradgradcheck(line, (x,))
    assert torch.autograd.gradgradcheck(grid, (x, y))
    outside = torch.tensor([-1.0, 3.5, math.nan]).double().requires_grad_()
    value = line(outside)
    assert value[:2].tolist() == [0.0, 0.0]
    assert value[2].isnan()
    assert line.to(torch.float32)(x.detach().float()).dtype == torch.float32


def test_functions_that_are_not_covered():
    with pytest.raises(ValueError, match="Continuous3DFunction is not covered"):
        from_openmm(openmm.Continuous3DFunction(2, 2, 2, [0.0] * 8, 0, 1, 0, 1, 0, 1))
    with pytest.raises(TypeError, match=r"function: expected an openmm.TabulatedFunction, got int"):
        from_openmm(3)
    table = from_openmm(openmm.Discrete1DFunction([1.0, 2.0]))
    with pytest.raises(ExpressionError, match="takes 1"):
        Expression("t(x,y)", {"t": table})
