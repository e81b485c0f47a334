"""Operators that the graphs of bundles are made of: a file with any other is not opened.

What is missing here on purpose: loops, branches, and whatever makes a tensor of a size that only its
values tell. :mod:`hart_runtime.runtime.graph_check` bounds those that make a tensor larger.
"""

from __future__ import annotations

from hart_runtime.runtime.families.names import (
    BEGIN,
    CONTEXT,
    DECODER,
    DENOISE,
    ENCODER,
    FAST,
    LATENT,
    MASKED_TRANSFORMER,
    NEXT_SCALE,
    PLACE,
    RESIDUAL_CONDITION,
    RESIDUAL_STEP,
    SAMPLE,
    SMOOTH,
    TEXT_ENCODER,
    TRANSFORMER,
    UNCONDITIONAL,
)

Operators = frozenset[str]


def _named(names: str) -> Operators:
    return frozenset(names.split())


EVERYWHERE = _named(
    "Add Cast Concat Div Expand Gather Identity Mul Neg Reshape Shape Slice Split Sqrt Squeeze Sub Transpose"
    " Unsqueeze"
)
"""In any graph: arithmetic and what makes shapes."""
_INT8 = _named("Abs DequantizeLinear Max QuantizeLinear ReduceMax com.microsoft:MatMulIntegerToFloat")
"""Of products in 8 bits; those in floating point have two of them."""
_INT8_WEIGHTS = _named("com.microsoft:MatMulNBits")
"""Of products with weights in 8 bits and tokens in float32."""
_INT8_CONVOLUTIONS = _named("DequantizeLinear QLinearConv QuantizeLinear")
"""Of convolutions in 8 bits."""
_WRITTEN = {
    "com.microsoft:MultiHeadAttention": _named("Attention MatMul Softmax"),
    "RMSNormalization": _named("ReduceMean"),
    "CumSum": _named("LessOrEqual MatMul Range"),
}
"""What other forms of a graph have in the place of an operator, beside those that all have."""

_NORM = "MatMul RMSNormalization"
_BLOCK = "Clip Gelu ReduceL2 com.microsoft:MultiHeadAttention"
_CHOICE = "GatherND Range ReduceMean ReduceSum ScatterND TopK"
"""Of tokens that take part."""
_DRAW = (
    "And CumSum GatherElements Gemm Greater Less LessOrEqual MatMul Min Pad ReduceMin ReduceSum Sigmoid"
    " Softmax TopK Where"
)
TEXT = {
    TEXT_ENCODER: _named(f"{_NORM} And Cos Not Sigmoid Sin Softmax Where"),
    CONTEXT: _named(f"{_NORM} Clip CumSum Gemm ReduceMax ReduceMean ReduceSum Sigmoid"),
    TRANSFORMER: _named(f"{_NORM} {_BLOCK} Cos Gemm Sigmoid Sin"),
    FAST: _named(f"{_NORM} {_BLOCK} {_CHOICE} Cos Gemm Sigmoid Sin"),
    UNCONDITIONAL: _named(""),
    SAMPLE: _named(f"{_NORM} {_DRAW}"),
    NEXT_SCALE: _named("MatMul Pad Tile"),
}
"""Of models that draw a text."""
CLASS = {
    CONTEXT: _named("Gemm Sigmoid"),
    TRANSFORMER: _named(f"{_BLOCK} LayerNormalization MatMul"),
    FAST: _named(f"{_BLOCK} LayerNormalization MatMul"),
    SAMPLE: _named(f"{_DRAW} LayerNormalization"),
    NEXT_SCALE: _named("MatMul Pad Tile"),
}
"""Of models that draw a class."""
HYBRID = {
    RESIDUAL_CONDITION: _named(_NORM),
    RESIDUAL_STEP: _named("Clip Cos Exp Gemm LayerNormalization MatMul Sigmoid Sin"),
    LATENT: _named(""),
}
"""Of tokens with a residual."""
DISCRETE = {LATENT: _named("MatMul Pad")}
"""Of tokens without."""
COMMON = {
    SMOOTH: _named("GatherElements Log MatMul Softmax"),
    DECODER: _named(
        "Clip Conv InstanceNormalization MatMul Pow Reciprocal ReduceMean ReduceSum Resize Sigmoid Softmax"
    ),
    ENCODER: _named(
        "ArgMin Conv InstanceNormalization MatMul Pad Pow Reciprocal ReduceMean ReduceSum Sigmoid Softmax"
    ),
}


MASKED = {
    CONTEXT: _named(""),
    MASKED_TRANSFORMER: _named(
        "GatherElements Gelu LayerNormalization MatMul ScatterElements com.microsoft:MultiHeadAttention"
    ),
    BEGIN: _named("Exp LayerNormalization MatMul"),
    DENOISE: _named("Exp LayerNormalization MatMul Sigmoid"),
    PLACE: _named("ScatterElements"),
    LATENT: _named("ReduceSum"),
    DECODER: COMMON[DECODER],
}
"""Of models that draw masked tokens."""


def operators_of(own: Operators, int8: bool, exact_tokens: bool = False) -> Operators:
    """All that may be in a graph, whichever form of it.

    Args:
        own: of the graph itself, beside those of all.
        int8: whether it has products, or convolutions, in 8 bits in int8 bundles.
        exact_tokens: whether only weights of these are in 8 bits.
    """
    own = own | EVERYWHERE
    written = [parts for operator, parts in _WRITTEN.items() if operator in own]
    products = _INT8_WEIGHTS if exact_tokens else _INT8
    return own.union(*written, (_INT8_CONVOLUTIONS if "Conv" in own else products) if int8 else ())
