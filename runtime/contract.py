"""What is true of a graph: its name, what it takes and returns, when it runs, where it is recorded.

The graphs of a model family are listed in its module of :mod:`hart_runtime.runtime.families`. Examples
and free dimensions of the export, manifests, memory plans, profiles, stages, counts and the comparison
are derived from those lists, and a bundle is compared with them when it is opened.

Dimensions are expressions over two kinds of names. Sizes of the model (``tokens``, ``dim``, ...) are
numbers in a manifest; free ones stay: ``batch`` pictures, ``rows`` of the transformer (both guidance
halves, or one), ``guided`` rows that codes are drawn from, ``length`` new tokens after ``past`` ones, maps
of ``side`` x ``side`` cells and of ``next_side`` after them, which draw from a ``pool`` of random numbers.
Where not all is computed, ``chosen`` of the tokens take part, others receive what a scale of ``remembered``
tokens received, and the cache has ``cached`` rows whether all are computed or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from hart_runtime.common.precisions import INT8, PRECISIONS
from hart_runtime.runtime.spec import GraphSpec, ModelSpec, TensorSpec

FLOAT, INT, BOOL = "float32", "int64", "bool"
CACHE = "cache"
"""Type of keys and values: what the precision keeps them in."""

PAST, NEW = "past_", "new_"
"""Prefixes of the KV cache, tokens first: what a graph takes (or begins it with), and the new tokens it
returns. Written right behind the old ones they make the next cache without a copy."""
BRANCH, MEMORY = "branch_", "memory_"
"""Prefixes of what each branch of each block adds to its tokens: what a graph returns where somebody asks,
and what it takes of an earlier scale."""
OUT = "_out"
"""Ends the names of outputs that take the place of the input of that name."""
DEQUANTIZED = "dequantized"
"""Form of a graph with 8-bit products: the same weights, made floating point by a standard operator before
they are multiplied, for backends with 8-bit products of their own."""
WRITTEN_OUT, STANDARD = "tensorrt-10.3", "tensorrt-10.15"
"""Forms for TensorRT, from these versions on: attention, norms and running sums written out of operators
that all versions have; and the standard operator for attention, where the graph has any."""

OLDEST_OPSET = 20
"""The last that every parser of TensorRT knows all types of."""

Dimension = int | str
Shape = tuple[Dimension, ...]


class Scales(Enum):
    """When in a drawing a graph runs, and so with which values of the free dimensions."""

    ONCE = "once"
    """Nothing about it changes from scale to scale."""
    ALL = "all"
    BUT_LAST = "but last"


@dataclass(frozen=True)
class Row:
    """One input or output, or one for the key and one for the value of every block."""

    name: str
    shape: Shape
    dtype: str = FLOAT
    recorded: str | None = None
    """Where :func:`hart_runtime.hart.generate.generate` records it: a format of ``index`` (of the
    scale, iteration or denoising step), ``before`` and ``after`` it, its ``last`` denoising step, and for
    ``blocks`` of ``block``, ``kind`` and its first letter, ``part``."""
    modulated: bool = False
    """Only models whose blocks are modulated by a pooled condition have it."""
    prunable: bool | None = None
    """Only models whose tokens may be left out have it, or only others."""
    blocks: tuple[str, ...] = ()
    """Of each block: such as ``key`` and ``value`` for ``key_0``, ``value_0``, ``key_1``, ... behind ``name``
    as their prefix."""
    decides: bool = False
    """The host reads its value, and shapes depend on it."""


@dataclass(frozen=True)
class Contract:
    """One graph."""

    name: str
    stage: str
    """What of a picture it belongs to, see :mod:`hart_runtime.runtime.stages`; a format of ``index``."""
    inputs: tuple[Row, ...]
    outputs: tuple[Row, ...]
    scales: Scales = Scales.ONCE
    opset: int = OLDEST_OPSET
    operators: frozenset[str] = frozenset()
    """All that its nodes may be, in any form."""
    int8: bool = False
    """Has products, or convolutions, with weights of 8 bits in int8 bundles."""
    fp8: bool = False
    """Has products in 8-bit floating point in fp8 bundles."""
    exact: bool = False
    """Its weights are float32 whatever the precision."""
    exact_tokens: bool = False
    """These products round weights alone: tokens of language models have outliers."""
    bfloat16: bool = False
    """May run in bfloat16 between those, where the processor has it. In other graphs a rounded sum would
    choose another code, or be amplified by the noisiest denoising step."""
    attention: bool = False
    """Has ONNX Runtime's operator for attention, which TensorRT does not read."""
    on_demand: bool = False
    """Most drawings do without it: it is opened when the first asks for it."""
    engine: bool = True
    """Engines hold it, too."""
    optional: bool = False
    """There are bundles without it."""
    one_by_one: bool = False
    """Runs with smaller batches than pictures are drawn in."""
    predicted: str | None = None
    """Of denoising steps, where their network's guided output is recorded: they amplify its rounding."""
    drawn: tuple[str, ...] = ()
    """Where random numbers are recorded that what the host feeds is made of."""
    replayed: Mapping[str, str] = field(default_factory=dict)
    """Free dimensions that have another size where a recording is replayed, with the formula of it."""
    operations: str = "0"
    bytes: str = "0"
    """Formulas of what a run has to do and to move, over the dimensions, the family's other sizes, and
    the bytes of a ``weight`` of a product, of one in the blocks (``block_weight``), of what is ``kept``
    (cached keys, a text's table), and of what stays as it was traced (``unchanged``)."""
    scratch: str = "0"
    """Formula of the bytes that a run holds inside at the most, about, with fused attention; "0" for graphs
    that hold little."""
    scores: str = "0"
    """Formula of the bytes of a block's attention scores, all pairs of tokens of all heads, which a fused
    kernel never writes to memory; "0" for graphs without attention that could be fused."""

    @property
    def needs(self) -> set[str]:
        """Names that its formulas are made of."""
        return {*re.findall(r"[a-z_]+", f"{self.operations} {self.bytes} {self.scratch} {self.scores}")}

    def forms(self, precision: str) -> tuple[str, ...]:
        """Further forms of the graph that a bundle holds."""
        if not PRECISIONS[precision].engines:
            return (DEQUANTIZED,) if precision == INT8 and self.int8 else ()
        old = (WRITTEN_OUT,) if self.opset > OLDEST_OPSET else ()
        return (*old, STANDARD) if self.attention else old

    def opset_of(self, form: str | None) -> int:
        """Of the graph itself, or of a form of it."""
        return min(self.opset, OLDEST_OPSET) if form == WRITTEN_OUT else self.opset

    def deciding(self) -> frozenset[str]:
        """Inputs whose values the host reads, since shapes depend on them."""
        return frozenset(row.name for row in self.inputs if row.decides)


Contracts = Mapping[str, Contract]


CACHED = ("key", "value")
"""What the cache holds of each block."""
BRANCHES = ("attn", "ffn")
"""Of each block, as recordings name them."""


def names_of(kinds: tuple[str, ...], depth: int) -> list[str]:
    """Tensors of every block, in the order in which graphs take and return them."""
    return [f"{kind}_{i}" for i in range(depth) for kind in kinds]


def tensors_of(
    rows: tuple[Row, ...], model: ModelSpec, precision: str
) -> Iterator[tuple[TensorSpec, str | None]]:
    """Every tensor that rows stand for in a model, and where it is recorded."""
    cache, sizes = PRECISIONS[precision].kept, model.sizes
    for row in rows:
        if row.modulated and not model.modulated:
            continue
        if row.prunable not in (None, model.prunable):
            continue
        shape = tuple(sizes.get(n, n) if isinstance(n, str) else n for n in row.shape)
        dtype = cache if row.dtype == CACHE else row.dtype
        if not row.blocks:
            yield TensorSpec(row.name, dtype, shape), row.recorded
            continue
        for name in names_of(row.blocks, model.depth):
            kind, _, block = name.rpartition("_")
            place = row.recorded
            if place is not None:
                place = place.format(index="{index}", block=block, kind=kind, part=kind[0])
            yield TensorSpec(row.name + name, dtype, shape), place


def specs_of(
    contracts: Contracts, model: ModelSpec, precision: str, size: int | None = None
) -> dict[str, GraphSpec]:
    """The graphs of a bundle as its manifest describes them.

    Args:
        precision: one of :data:`hart_runtime.common.precisions.PRECISIONS`.
        size: of pictures, where they are not the bundle's own.
    """
    return {
        name: GraphSpec(
            file=graph_file(name, size=size),
            opset=graph.opset,
            inputs=tuple(tensor for tensor, _ in tensors_of(graph.inputs, model, precision)),
            outputs=tuple(tensor for tensor, _ in tensors_of(graph.outputs, model, precision)),
            forms={form: graph_file(name, form, size) for form in graph.forms(precision)},
        )
        for name, graph in contracts.items()
    }


def specs_at(
    contracts: Contracts, model: ModelSpec, other: ModelSpec, precision: str
) -> dict[str, GraphSpec]:
    """Graphs that another size of pictures has of its own, where a bundle's model draws both.

    What depends on the size takes or returns a tensor of it: codes that are added to a map of its side,
    cells that a residual is drawn for, pixels.
    """
    shared = specs_of(contracts, model, precision)
    found = specs_of(contracts, other, precision, other.image_size)
    tensors = {name: (spec.inputs, spec.outputs) for name, spec in shared.items()}
    return {name: spec for name, spec in found.items() if (spec.inputs, spec.outputs) != tensors[name]}


def graph_file(name: str, form: str | None = None, size: int | None = None) -> str:
    """Name of a graph's file in a bundle, or of another of its forms, or of those of another size."""
    return f"{'_'.join([name, *([f'{size}px'] if size else []), *([form] if form else [])])}.onnx"
