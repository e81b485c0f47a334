"""The graphs of a bundle as modules to trace: which of :mod:`hart_runtime.export.modules` is which.

Names, shapes and types are those of :mod:`hart_runtime.runtime.contract`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from hart_runtime.common.precisions import FP16, FP32
from hart_runtime.common.schedule import PUBLISHED_TOP_K
from hart_runtime.export.modules import (
    ContextGraph,
    DecoderGraph,
    LatentGraph,
    NextScaleGraph,
    ResidualConditionGraph,
    ResidualStepGraph,
    SampleGraph,
    SmoothGraph,
    TextEncoderGraph,
    TransformerGraph,
    UnconditionalGraph,
    multi_head_attention,
)
from hart_runtime.hart.model import Hart
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.transformer import AttentionFunction
from hart_runtime.runtime import contract
from hart_runtime.runtime.shapes import shape_of
from hart_runtime.runtime.spec import GraphSpec, TensorSpec, describe_model

BATCH = Dim("batch", min=1, max=64)
FREE: dict[str, object] = {
    "batch": BATCH,
    "2*batch": 2 * BATCH,  # the conditional and the unconditional half
    "rows": Dim("rows", min=1, max=128),  # of the transformer: both halves, or at scale 0 one
    "length": Dim("length", min=1, max=1 << 20),
    "past": Dim("past", min=0, max=1 << 20),
    "side": Dim("side", min=1, max=1 << 10),
    "next_side": Dim("next_side", min=1, max=1 << 10),
}
EXAMPLE = {"batch": 2, "rows": 4, "length": 5, "past": 3, "side": 2, "next_side": 3}
"""What the free dimensions are while a graph is traced."""

Shape = dict[int, object]


@dataclass(frozen=True)
class Graph:
    """One graph to export."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Shape]]
    """Name -> (example, free dimensions)."""
    outputs: tuple[str, ...]
    opset: int


def graph_of(spec: GraphSpec, module: nn.Module, top_k: int = PUBLISHED_TOP_K) -> Graph:
    """A module with what it is traced with.

    Args:
        top_k: what an input is that the host reads: there have to be as many codes.
    """
    decide = contract.deciding_inputs(spec.name)
    inputs = {t.name: (_example(t, top_k if t.name in decide else None), _free(t)) for t in spec.inputs}
    return Graph(spec.name, module, inputs, tuple(t.name for t in spec.outputs), spec.opset)


def build_graphs(
    model: Hart,
    text: TextEncoder | None,
    patch_nums: tuple[int, ...],
    attend: AttentionFunction = multi_head_attention,
) -> dict[str, Callable[[], Graph]]:
    """Every graph that is traced, built one at a time so that their examples do not pile up.

    With :func:`hart_runtime.hart.transformer.attention` as ``attend``, PyTorch runs them as they are.
    """
    config = model.transformer.config
    precision = FP16 if model.transformer.head.weight.dtype == torch.float16 else FP32
    sizes = describe_model(config, model.tokenizer.config, patch_nums)
    sizes = replace(sizes, depth=len(model.transformer.blocks))  # a dry run takes one for all
    specs = contract.specs_of(sizes, config.diff_width, config.modulated, precision, text is not None)
    modules: dict[str, Callable[[], nn.Module]] = {
        contract.CONTEXT: lambda: ContextGraph(model),
        contract.TRANSFORMER: lambda: TransformerGraph(model, attend),
        contract.UNCONDITIONAL: lambda: UnconditionalGraph(model),
        contract.SAMPLE: lambda: SampleGraph(model),
        contract.SMOOTH: lambda: SmoothGraph(model),
        contract.NEXT_SCALE: lambda: NextScaleGraph(model, len(patch_nums)),
        contract.RESIDUAL_CONDITION: lambda: ResidualConditionGraph(model),
        contract.RESIDUAL_STEP: lambda: ResidualStepGraph(model),
        contract.LATENT: LatentGraph,
        contract.DECODER: lambda: DecoderGraph(model),
        contract.UNCONDITIONAL_APPEND: lambda: UnconditionalGraph(model, tokens_first=True),
    }
    if text is not None:
        modules = {contract.TEXT_ENCODER: lambda: TextEncoderGraph(text), **modules}

    def build(name: str) -> Graph:
        return graph_of(specs[name], modules[name](), min(PUBLISHED_TOP_K, sizes.vocab_size))

    return {name: functools.partial(build, name) for name in modules}


def _example(tensor: TensorSpec, value: int | None) -> Tensor:
    shape, dtype = shape_of(tensor, EXAMPLE), getattr(torch, tensor.dtype)
    if value is not None:
        return torch.full(shape, value, dtype=dtype)
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _free(tensor: TensorSpec) -> Shape:
    return {place: FREE[n] for place, n in enumerate(tensor.shape) if isinstance(n, str)}
