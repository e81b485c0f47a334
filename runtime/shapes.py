"""Shapes of graph inputs and outputs: named dimensions, and what they are at each scale.

A manifest writes free dimensions as ``batch``, ``2*batch``, ``past + length`` or
``next_side**2``. Every number behind these names is known before a run starts.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

from hart_runtime.runtime.spec import TensorSpec

Dims = dict[str, int]
Shape = tuple[int, ...]

DISTINCT = {
    "batch": 10007,
    "rows": 10009,
    "length": 10037,
    "past": 10039,
    "side": 10061,
    "next_side": 10067,
    "pool": 10069,
    "cached": 10079,
    "chosen": 10091,
    "remembered": 10093,
    "guided": 10099,
}
"""Values of the free dimensions, no two expressions of which are equal by chance."""

LONGEST, LARGEST_POWER = 400, 4
"""Characters of an expression, and the largest exponent in it: files come from strangers."""


def _power(base: int, exponent: int) -> int:
    if not 0 <= exponent <= LARGEST_POWER:
        raise ValueError(f"exponent {exponent}")
    return base**exponent


OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: _power,
}


def evaluate(dimension: int | str, dims: Mapping[str, int]) -> int:
    """Value of one dimension of a manifest, such as ``past + length``.

    Raises:
        ValueError: it names an unknown dimension or is not simple arithmetic.
    """
    if isinstance(dimension, int):
        return dimension

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in dims:
                return dims[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError(f"dimension {dimension!r} cannot be computed from {sorted(dims)}")

    if len(dimension) > LONGEST:
        raise ValueError(f"dimension of {len(dimension)} characters")
    try:
        return value(ast.parse(dimension, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"dimension {dimension!r} is not an expression") from None


def shape_of(spec: TensorSpec, dims: Mapping[str, int]) -> Shape:
    """Exact shape of a graph input or output."""
    return tuple(evaluate(n, dims) for n in spec.shape)


def solve(specs: Iterable[TensorSpec], shapes: Mapping[str, Sequence[int]]) -> Dims:
    """Values of the named dimensions, from the shapes of a graph's inputs.

    Only names and ``2*name`` stand in inputs.

    Raises:
        ValueError: a shape contradicts its specification or another input's.
    """
    dims: Dims = {}
    for spec in specs:
        found = shapes[spec.name]
        if len(found) != len(spec.shape):
            raise ValueError(f"{spec.name}: expected {len(spec.shape)} dimensions, found {tuple(found)}")
        for dimension, size in zip(spec.shape, found, strict=True):
            if isinstance(dimension, str):
                factor, name = (2, dimension[2:]) if dimension.startswith("2*") else (1, dimension)
                dims.setdefault(name, size // factor)
            if evaluate(dimension, dims) != size:
                raise ValueError(f"{spec.name}: expected {spec.shape} with {dims}, found {tuple(found)}")
    return dims


def same_tensor(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two descriptions say the same: the exporter writes a sum either way round."""

    def value(tensor: TensorSpec) -> tuple[str, str, tuple[int | str, ...]]:
        try:
            return tensor.name, tensor.dtype, shape_of(tensor, DISTINCT)
        except ValueError:  # of names that no graph has
            return tensor.name, tensor.dtype, tensor.shape

    return value(one) == value(other)
