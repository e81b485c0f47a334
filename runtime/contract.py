"""The contract of the graphs: what each is called, what it takes and returns, and what is true of it.

Examples and free dimensions of the export, manifests, memory plans, profiles and stages are derived
from it, and a bundle is compared with it when it is opened. What the loop feeds is checked
against it when a drawing is planned.

Dimensions are expressions over two kinds of names. Sizes of the model (``tokens``, ``dim``, ...) are
numbers in a manifest; free ones stay: ``batch`` pictures, ``rows`` of the transformer (both guidance
halves, at scale 0 the conditional one alone), ``length`` new tokens after ``past`` ones, maps of
``side`` x ``side`` cells and of ``next_side`` after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hart_runtime.common.precisions import INT8, PRECISIONS
from hart_runtime.runtime import stages
from hart_runtime.runtime.spec import GraphSpec, ModelSpec, TensorSpec

TEXT_ENCODER = "text_encoder"
CONTEXT = "context"
TRANSFORMER, TRANSFORMER_APPEND = "transformer", "transformer_append"
UNCONDITIONAL, UNCONDITIONAL_APPEND = "unconditional", "unconditional_append"
SAMPLE, SMOOTH, NEXT_SCALE = "sample", "smooth", "next_scale"
RESIDUAL_CONDITION, RESIDUAL_STEP = "residual_condition", "residual_step"
LATENT, DECODER = "latent", "decoder"

FLOAT, INT, BOOL = "float32", "int64", "bool"
CACHE = "cache"
"""Type of keys and values: that of the precision's products."""

PAST, NEW, TEXT = "past_", "new_", "text_"
"""Prefixes of cache inputs (tokens so far), of outputs of the append-only forms (the tokens they add,
first axis), and of inputs that belong to the text in the conditional half."""
DEQUANTIZED = "_dequantized"
"""Ends the names of the second form of graphs with 8-bit products: the same weights, made floating
point by a standard operator before they are multiplied, for backends with 8-bit products of their own."""

Dimension = int | str
Shape = tuple[Dimension, ...]


@dataclass(frozen=True)
class Row:
    """One input or output, or one for the key and one for the value of every block."""

    name: str
    shape: Shape
    dtype: str = FLOAT
    modulated: bool = False
    """Only models whose blocks are modulated by a pooled condition have it."""
    blocks: bool = False
    """Stands for ``key_0``, ``value_0``, ``key_1``, ... behind ``name`` as their prefix."""
    decides: bool = False
    """The host reads its value, and shapes depend on it."""


@dataclass(frozen=True)
class Contract:
    """One graph."""

    name: str
    stage: str
    """What of a picture it belongs to, see :mod:`hart_runtime.runtime.stages`."""
    inputs: tuple[Row, ...]
    outputs: tuple[Row, ...]
    opset: int = 23
    int8: bool = False
    """Has products that run in 8-bit integers in int8 bundles. Text encoder and decoder stay in float32:
    one is known for outliers, the other is made of convolutions."""
    bfloat16: bool = False
    """May run in bfloat16 between those, where the processor has it. In other graphs a rounded sum would
    choose another code, or be amplified by the noisiest denoising step."""
    one_by_one: bool = False
    """Runs with smaller batches than pictures are drawn in."""
    form_of: str | None = None
    """The graph that this is a second form of: with a cache that only grows at its end."""


_BATCH_TEXT, _BOTH, _MAP = ("batch", "tokens"), "2*batch", ("batch", "side", "side")
_LATENTS, _REST = ("batch", "channels", "last", "last"), ("batch", "cells", "channels")
_GUIDANCE = Row("guidance", ())
_STEP = (
    Row("x", ("rows", "length", "dim")),
    Row("angles", ("rows", "length", "head")),
    Row("block_condition", ("rows", "dim"), modulated=True),
)


def _cache(prefix: str, *shape: Dimension) -> Row:
    return Row(prefix, shape, CACHE, blocks=True)


_TEXT_ENCODER = Contract(
    TEXT_ENCODER,
    stages.TEXT_ENCODER,
    (Row("input_ids", _BATCH_TEXT, INT), Row("mask", _BATCH_TEXT, BOOL)),
    (Row("features", (*_BATCH_TEXT, "context_dim")),),
    one_by_one=True,  # equal prompts are encoded once
)
_CONTEXT = Contract(
    CONTEXT,
    stages.CONTEXT,
    (Row("features", (*_BATCH_TEXT, "context_dim")), Row("mask", _BATCH_TEXT, BOOL)),
    (
        Row("x", (*_BATCH_TEXT, "dim")),
        Row("angles", (*_BATCH_TEXT, "head")),
        Row("offset", (_BOTH, 1)),
        Row("head_condition", (_BOTH, "dim")),
        Row("block_condition", (_BOTH, "dim"), modulated=True),
        Row("text_condition", ("batch", "dim"), modulated=True),
    ),
)
_TRANSFORMER = Contract(
    TRANSFORMER,
    stages.TRANSFORMER_PART,
    (*_STEP, _cache(PAST, "rows", "past", "dim")),
    (Row("hidden", ("rows", "length", "dim")), _cache("", "rows", "past + length", "dim")),
    int8=True,
    bfloat16=True,
)
_TRANSFORMER_APPEND = replace(
    _TRANSFORMER,
    name=TRANSFORMER_APPEND,
    inputs=(*_STEP, _cache(PAST, "past", "rows", "dim")),
    outputs=(Row("hidden", ("rows", "length", "dim")), _cache(NEW, "length", "rows", "dim")),
    form_of=TRANSFORMER,
)
# Puts the constant unconditional half beside what the transformer made of the text.
_UNCONDITIONAL = Contract(
    UNCONDITIONAL,
    stages.TRANSFORMER_PART,
    (Row(f"{TEXT}hidden", (*_BATCH_TEXT, "dim")), _cache(TEXT, *_BATCH_TEXT, "dim")),
    (Row("hidden", (_BOTH, "tokens", "dim")), _cache("", _BOTH, "tokens", "dim")),
)
_UNCONDITIONAL_APPEND = replace(
    _UNCONDITIONAL,
    name=UNCONDITIONAL_APPEND,
    inputs=(Row(f"{TEXT}hidden", (*_BATCH_TEXT, "dim")), _cache(TEXT, "tokens", "batch", "dim")),
    outputs=(Row("hidden", (_BOTH, "tokens", "dim")), _cache(NEW, "tokens", _BOTH, "dim")),
    form_of=UNCONDITIONAL,
)
_SAMPLE = Contract(
    SAMPLE,
    stages.SAMPLING_PART,
    (
        Row("hidden", (_BOTH, "length", "dim")),
        Row("head_condition", (_BOTH, "dim")),
        _GUIDANCE,
        Row("top_k", (1,), INT, decides=True),
        Row("top_p", ()),
        Row("uniform", _MAP),
    ),
    (Row("index", _MAP, INT), Row("codes", (*_MAP, "channels")), Row("logits", (*_MAP, "vocab"))),
    int8=True,
)
_SMOOTH = Contract(
    SMOOTH,
    stages.SAMPLING_PART,
    (
        Row("logits", (*_MAP, "vocab")),
        Row("exponential", (*_MAP, "vocab")),
        Row("logit_gain", ()),
        Row("temperature", ()),
    ),
    (Row("h", (*_MAP, "channels")),),
)
_NEXT_SCALE = Contract(
    NEXT_SCALE,
    stages.SAMPLING_PART,
    (
        Row("h", (*_MAP, "channels")),
        Row("f_hat", _LATENTS),
        Row("scale", (1,), INT),
        Row("up", ("last", "side")),
        Row("down", ("next_side", "last")),
        Row("offset", (_BOTH, 1)),
    ),
    (
        Row("f_hat_out", _LATENTS),
        Row("x", (_BOTH, "next_side**2", "dim")),
        Row("angles", (_BOTH, "next_side**2", "head")),
    ),
)
_RESIDUAL_CONDITION = Contract(
    RESIDUAL_CONDITION,
    stages.RESIDUAL_CONDITION,
    (Row("hidden", (_BOTH, "cells", "dim")), Row("codes", ("batch", "last", "last", "channels"))),
    (Row("embedded", (_BOTH, "cells", "width")),),
    int8=True,
)
_RESIDUAL_STEP = Contract(
    RESIDUAL_STEP,
    stages.RESIDUAL,
    (
        Row("x", _REST),
        Row("embedded", (_BOTH, "cells", "width")),
        Row("timestep", (1,), INT),
        Row("coefficients", (7,)),
        _GUIDANCE,
        Row("noise", _REST),
    ),
    (Row("x_out", _REST),),
    int8=True,
)
_LATENT = Contract(
    LATENT,
    stages.DECODER,
    (Row("f_hat", _LATENTS), Row("h", ("batch", "last", "last", "channels")), Row("residual", _REST)),
    (Row("f_hat_out", _LATENTS),),
)
_DECODER = Contract(
    DECODER,
    stages.DECODER,
    (Row("f_hat", _LATENTS),),
    (Row("image", ("batch", 3, "pixels", "pixels")),),
    opset=20,  # from 21 on GroupNorm is an operator that ONNX Runtime expands into far larger intermediates
    bfloat16=True,
    one_by_one=True,  # its full-resolution activations are the largest of all
)

GRAPHS: dict[str, Contract] = {
    graph.name: graph
    for graph in (
        *(_TEXT_ENCODER, _CONTEXT, _TRANSFORMER, _UNCONDITIONAL, _SAMPLE, _SMOOTH, _NEXT_SCALE),
        *(_RESIDUAL_CONDITION, _RESIDUAL_STEP, _LATENT, _DECODER),
        *(_TRANSFORMER_APPEND, _UNCONDITIONAL_APPEND),
    )
}
"""In the order in which a picture needs them, second forms last. All but the text encoder are in every
bundle."""
APPEND_FORMS = {graph.form_of: graph.name for graph in GRAPHS.values() if graph.form_of}
"""Graphs that touch the cache, and their forms for one that only grows at its end."""


def cache_names(depth: int) -> list[str]:
    """Keys and values of every block, in the order in which graphs take and return them."""
    return [f"{kind}_{i}" for i in range(depth) for kind in ("key", "value")]


def contract_of(graph: str) -> Contract:
    """What holds for a graph of a bundle, the second form of one with 8-bit products too."""
    return GRAPHS[graph.removesuffix(DEQUANTIZED)]


def deciding_inputs(graph: str) -> frozenset[str]:
    """Inputs whose values the host reads, since shapes depend on them."""
    return frozenset(row.name for row in contract_of(graph).inputs if row.decides)


def specs_of(
    model: ModelSpec, diff_width: int, modulated: bool, precision: str, text_encoder: bool = True
) -> dict[str, GraphSpec]:
    """The graphs of a bundle as its manifest describes them.

    Args:
        diff_width: width of the residual diffusion MLP.
        modulated: whether the blocks are modulated by a pooled condition.
        precision: one of :data:`hart_runtime.common.precisions.PRECISIONS`.
        text_encoder: whether the bundle draws from prompts.
    """
    last = model.patch_nums[-1]
    sizes: dict[str, int] = {
        "tokens": model.context_token,
        "context_dim": model.context_dim,
        "dim": model.embed_dim,
        "head": model.embed_dim // model.num_heads,
        "vocab": model.vocab_size,
        "channels": model.latent_channels,
        "width": diff_width,
        "last": last,
        "cells": last * last,
        "pixels": model.image_size,
    }
    cache = PRECISIONS[precision].traced

    def tensors(rows: tuple[Row, ...]) -> Iterator[TensorSpec]:
        for row in rows:
            if row.modulated and not modulated:
                continue
            shape = tuple(sizes.get(n, n) if isinstance(n, str) else n for n in row.shape)
            names = [row.name + name for name in cache_names(model.depth)] if row.blocks else [row.name]
            for name in names:
                yield TensorSpec(name, cache if row.dtype == CACHE else row.dtype, shape)

    def spec(name: str, graph: Contract) -> GraphSpec:
        inputs, outputs = tuple(tensors(graph.inputs)), tuple(tensors(graph.outputs))
        return GraphSpec(f"{name}.onnx", graph.opset, inputs, outputs)

    graphs = [graph for graph in GRAPHS.values() if text_encoder or graph.name != TEXT_ENCODER]
    found = {graph.name: spec(graph.name, graph) for graph in graphs}
    if precision == INT8:
        for graph in graphs:
            if graph.int8 and not graph.form_of:  # the cache of the second form only grows at its end
                form = GRAPHS[APPEND_FORMS.get(graph.name, graph.name)]
                found[graph.name + DEQUANTIZED] = spec(graph.name + DEQUANTIZED, form)
    return found


def stages_of(graphs: Iterable[str]) -> list[str]:
    """The stage each graph run of one picture belongs to, from their order."""
    scale, step = -1, -1
    found = []
    for graph in graphs:
        scale += graph == TRANSFORMER
        step += graph == RESIDUAL_STEP
        stage = contract_of(graph).stage
        numbered = {
            stages.TRANSFORMER_PART: stages.transformer_stage(scale),
            stages.SAMPLING_PART: stages.sampling_stage(scale),
            stages.RESIDUAL: stages.residual_stage(step),
        }
        found.append(numbered.get(stage, stage))
    return found
