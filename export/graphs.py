"""The graphs of a bundle as modules to trace: which of :mod:`hart_runtime.export.modules` is which.

Names, shapes and types are those of :mod:`hart_runtime.runtime.families`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from hart_runtime.common.precisions import FP16, FP32, PRECISIONS
from hart_runtime.common.schedule import PUBLISHED_TOP_K
from hart_runtime.export.attention import Kernel, halves_first, multi_head_attention, tokens_first
from hart_runtime.export.class_modules import (
    ClassContextGraph,
    ClassNextScaleGraph,
    ClassTransformerGraph,
    DiscreteLatentGraph,
)
from hart_runtime.export.encoding import EncoderGraph
from hart_runtime.export.masked_modules import (
    BeginGraph,
    ClassVectorsGraph,
    DenoiseGraph,
    MaskedTransformerGraph,
    PlaceGraph,
    TokensLatentGraph,
)
from hart_runtime.export.modules import (
    DecoderGraph,
    LatentGraph,
    ResidualConditionGraph,
    ResidualStepGraph,
    SampleGraph,
    SmoothGraph,
)
from hart_runtime.export.text_modules import (
    ContextGraph,
    NextScaleGraph,
    PrunedTransformerGraph,
    TextEncoderGraph,
    TransformerGraph,
    UnconditionalGraph,
)
from hart_runtime.hart.model import Hart, Mar, Model, ScaleModel, Var
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.runtime.contract import specs_of
from hart_runtime.runtime.families import family_of, names
from hart_runtime.runtime.families.masked import AT_ONCE
from hart_runtime.runtime.shapes import shape_of
from hart_runtime.runtime.spec import GraphSpec, TensorSpec

BATCH = Dim("batch", min=1, max=64)
FREE: dict[str, object] = {
    "batch": BATCH,
    "2*batch": 2 * BATCH,  # the conditional and the unconditional half
    "rows": Dim("rows", min=1, max=128),  # of the transformer: both halves, or at scale 0 one
    "length": Dim("length", min=1, max=1 << 20),
    "past": Dim("past", min=0, max=1 << 20),
    "side": Dim("side", min=1, max=1 << 10),
    "next_side": Dim("next_side", min=1, max=1 << 10),
    "pool": Dim("pool", min=1, max=1 << 30),
    "guided": Dim("guided", min=1, max=128),
    "cached": Dim("cached", min=1, max=128),
    "chosen": Dim("chosen", min=1, max=1 << 20),
    "remembered": Dim("remembered", min=1, max=1 << 20),
}
EXAMPLE = {
    **{"batch": 2, "rows": 4, "guided": 3, "cached": 6, "length": 5, "chosen": 4, "past": 3, "remembered": 2},
    **{"side": 2, "next_side": 3, "pool": 1 << 20},
}
"""What the free dimensions are while a graph is traced."""

STEPS = {names.DENOISE: AT_ONCE}
"""Steps in a row of graphs that do several."""

Shape = dict[int, object]
Modules = dict[str, Callable[[], nn.Module]]
"""What makes the module of a graph."""


@dataclass(frozen=True)
class Graph:
    """One graph to export."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Shape]]
    """Name -> (example, free dimensions)."""
    outputs: tuple[str, ...]
    opset: int
    steps: int = 1
    """How often what it does is repeated, see :mod:`hart_runtime.export.unroll`; it is traced once."""


def graph_of(
    name: str, spec: GraphSpec, module: nn.Module, decided: Mapping[str, int], steps: int = 1
) -> Graph:
    """A module with what it is traced with.

    Args:
        decided: values of inputs that the host reads.
        steps: that it is repeated for; inputs that hold something for each are traced with one.
    """
    traced = (replace(t, shape=(1, *t.shape[1:])) if t.shape[:1] == (steps,) else t for t in spec.inputs)
    inputs = {t.name: (_example(t, decided.get(t.name)), _free(t)) for t in traced}
    return Graph(name, module, inputs, tuple(t.name for t in spec.outputs), spec.opset, steps)


def build_graphs(
    model: Model,
    text: TextEncoder | None,
    patch_nums: tuple[int, ...],
    kernel: Kernel = multi_head_attention,
    precision: str | None = None,
    encoder: bool = True,
) -> dict[str, Callable[[], Graph]]:
    """Every graph, built one at a time so that their examples do not pile up.

    Args:
        kernel: with :func:`hart_runtime.hart.transformer.scaled_dot_product`, PyTorch runs them.
        precision: of the bundle; that of the weights if left out.
        encoder: whether pictures can be given, and there is a graph for them.
    """
    config, image = model.transformer.config, model.tokenizer.config
    family = family_of(config, image)
    if precision is None:
        precision = FP16 if model.tokenizer.post_quant_conv.weight.dtype == torch.float16 else FP32
    kept = getattr(torch, PRECISIONS[precision].kept)
    sizes = family.describe(config, image, patch_nums)
    if isinstance(model, Mar):
        modules = _masked(model, kernel)
    else:
        sizes = replace(sizes, depth=len(model.transformer.blocks))  # a dry run takes one for all
        modules = _scales(model, patch_nums, kernel, kept, encoder)
    modules[names.DECODER] = lambda: DecoderGraph(model)
    specs = specs_of(family.graphs, sizes, precision)
    if text is not None:
        modules[names.TEXT_ENCODER] = lambda: TextEncoderGraph(text)
    codes = min(PUBLISHED_TOP_K, sizes.vocab_size)  # there have to be as many

    def build(name: str) -> Graph:
        decided = dict.fromkeys(family.graphs[name].deciding(), codes)
        return graph_of(name, specs[name], modules[name](), decided, STEPS.get(name, 1))

    return {name: functools.partial(build, name) for name in family.graphs if name in modules}


def _scales(
    model: ScaleModel, patch_nums: tuple[int, ...], kernel: Kernel, kept: torch.dtype, encoder: bool
) -> Modules:
    """Those of models that draw scale after scale."""
    modules: Modules = {
        names.SAMPLE: lambda: SampleGraph(model),
        names.SMOOTH: lambda: SmoothGraph(model),
        **_conditioning(model, len(patch_nums), kernel, kept),
        **_tokens(model, len(patch_nums)),
    }
    if encoder:
        modules[names.ENCODER] = lambda: EncoderGraph(model, patch_nums)
    return modules


def _masked(model: Mar, kernel: Kernel) -> Modules:
    """Those of models that draw masked tokens."""
    net = model.transformer.diffloss.net
    return {
        names.CONTEXT: lambda: ClassVectorsGraph(model),
        names.MASKED_TRANSFORMER: lambda: MaskedTransformerGraph(model, kernel),
        names.BEGIN: lambda: BeginGraph(net),
        names.DENOISE: lambda: DenoiseGraph(net, model.transformer.z_proj.weight.dtype),
        names.PLACE: PlaceGraph,
        names.LATENT: lambda: TokensLatentGraph(model),
    }


def _conditioning(model: ScaleModel, num_scales: int, kernel: Kernel, kept: torch.dtype) -> Modules:
    """Those of what is drawn: a text or a class."""
    if isinstance(model, Hart):
        return {
            names.CONTEXT: lambda: ContextGraph(model),
            names.TRANSFORMER: lambda: TransformerGraph(model, tokens_first(kernel, kept)),
            names.FAST: lambda: (
                TransformerGraph if model.transformer.config.modulated else PrunedTransformerGraph
            )(model, halves_first(kernel, kept)),
            names.UNCONDITIONAL: lambda: UnconditionalGraph(model, kept),
            names.NEXT_SCALE: lambda: NextScaleGraph(model, num_scales),
        }
    return {
        names.CONTEXT: lambda: ClassContextGraph(model),
        names.TRANSFORMER: lambda: ClassTransformerGraph(model, tokens_first(kernel, kept)),
        names.FAST: lambda: ClassTransformerGraph(model, halves_first(kernel, kept)),
        names.NEXT_SCALE: lambda: ClassNextScaleGraph(model, num_scales),
    }


def _tokens(model: ScaleModel, num_scales: int) -> Modules:
    """Those of what pictures are made of: codes, and a residual behind them or not."""
    if isinstance(model, Var):
        return {names.LATENT: lambda: DiscreteLatentGraph(model, num_scales)}
    return {
        names.RESIDUAL_CONDITION: lambda: ResidualConditionGraph(model),
        names.RESIDUAL_STEP: lambda: ResidualStepGraph(model),
        names.LATENT: LatentGraph,
    }


def _example(tensor: TensorSpec, value: int | None) -> Tensor:
    shape, dtype = shape_of(tensor, EXAMPLE), getattr(torch, tensor.dtype)
    if value is not None:
        return torch.full(shape, value, dtype=dtype)
    return torch.rand(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _free(tensor: TensorSpec) -> Shape:
    return {place: FREE[n] for place, n in enumerate(tensor.shape) if isinstance(n, str)}
