"""The graphs of a bundle: their inputs and outputs, by name, and which dimensions are free.

What each one computes is in :mod:`hart_runtime.export.modules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim

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
from hart_runtime.runtime.bundle import NEW, TEXT, UNCONDITIONAL, UNCONDITIONAL_APPEND, cache_names

OPSET = 23
DECODER_OPSET = 20
"""GroupNorm becomes InstanceNormalization here; from 21 on it is an operator that ONNX
Runtime expands into far larger intermediates."""

BATCH = Dim("batch", min=1, max=64)
BOTH = 2 * BATCH  # the conditional and the unconditional half
ROWS = Dim("rows", min=1, max=128)  # of the transformer: both halves, or at scale 0 one
LENGTH = Dim("length", min=1, max=1 << 20)
PAST = Dim("past", min=0, max=1 << 20)
SIDE = Dim("side", min=1, max=1 << 10)
NEXT_SIDE = Dim("next_side", min=1, max=1 << 10)

Shape = dict[int, object]


@dataclass(frozen=True)
class Graph:
    """One graph to export."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[Tensor, Shape]]
    """Name -> (example, free dimensions)."""
    outputs: tuple[str, ...]
    opset: int = OPSET


def text_encoder_graph(text: TextEncoder, tokens: int) -> Graph:
    """Prompts padded to ``tokens`` ids; a system prompt is among the weights."""
    b = 2  # example batch
    return Graph(
        "text_encoder",
        TextEncoderGraph(text),
        {
            "input_ids": (torch.zeros(b, tokens, dtype=torch.long), {0: BATCH}),
            "mask": (torch.ones(b, tokens, dtype=torch.bool), {0: BATCH}),
        },
        ("features",),
    )


def unconditional_graph(model: Hart, tokens_first: bool = False) -> Graph:
    """The constants of the unconditional half put beside what the transformer made of the text.

    Args:
        tokens_first: the layout of :func:`hart_runtime.export.cache.append_only`.
    """
    config = model.transformer.config
    b, tokens, dim = 2, config.context_token, config.embed_dim
    hidden = torch.randn(b, tokens, dim)
    half = torch.zeros(b, tokens, dim, dtype=model.transformer.head.weight.dtype)
    if tokens_first:
        half = half.transpose(0, 1).contiguous()
    names = cache_names(len(model.transformer.blocks))
    inputs: dict[str, tuple[Tensor, Shape]] = {f"{TEXT}hidden": (hidden, {0: BATCH})}
    inputs |= {f"{TEXT}{name}": (half.clone(), {int(tokens_first): BATCH}) for name in names}
    outputs = ("hidden", *(f"{NEW}{name}" if tokens_first else name for name in names))
    name = UNCONDITIONAL_APPEND if tokens_first else UNCONDITIONAL
    return Graph(name, UnconditionalGraph(model, tokens_first), inputs, outputs)


def build_graphs(
    model: Hart,
    text: TextEncoder | None,
    patch_nums: tuple[int, ...],
    attend: AttentionFunction = multi_head_attention,
) -> list[Callable[[], Graph]]:
    """Every graph of a bundle, built one at a time so that their examples do not pile up.

    With :func:`hart_runtime.hart.transformer.attention` as ``attend``, PyTorch runs them as they are.
    """
    llm, config = model.transformer, model.transformer.config
    dim, depth, size = config.embed_dim, config.depth, patch_nums[-1]
    tokens, channels = config.context_token, model.tokenizer.config.z_channels
    vocab, cells = llm.head.out_features, size * size
    cache_dtype = llm.head.weight.dtype
    b = 2  # example batch

    def text_encoder() -> Graph:
        assert text is not None
        return text_encoder_graph(text, tokens)

    def context() -> Graph:
        outputs: tuple[str, ...] = ("x", "angles", "offset", "head_condition")
        modulated = ("block_condition", "text_condition")
        return Graph(
            "context",
            ContextGraph(model),
            {
                "features": (torch.randn(b, tokens, config.context_dim), {0: BATCH}),
                "mask": (torch.ones(b, tokens, dtype=torch.bool), {0: BATCH}),
            },
            (*outputs, *modulated) if config.modulated else outputs,
        )

    def transformer() -> Graph:
        inputs: dict[str, tuple[Tensor, Shape]] = {
            "x": (torch.randn(2 * b, 4, dim), {0: ROWS, 1: LENGTH}),
            "angles": (torch.randn(2 * b, 4, config.head_dim), {0: ROWS, 1: LENGTH}),
        }
        if config.modulated:
            inputs["block_condition"] = (torch.randn(2 * b, dim), {0: ROWS})
        past = torch.zeros(2 * b, 3, dim, dtype=cache_dtype)
        names = cache_names(depth)
        inputs |= {f"past_{name}": (past.clone(), {0: ROWS, 1: PAST}) for name in names}
        return Graph("transformer", TransformerGraph(model, attend), inputs, ("hidden", *names))

    def unconditional() -> Graph:
        return unconditional_graph(model)

    def sample() -> Graph:
        return Graph(
            "sample",
            SampleGraph(model),
            {
                "hidden": (torch.randn(2 * b, 5, dim), {0: BOTH, 1: LENGTH}),
                "head_condition": (torch.randn(2 * b, dim), {0: BOTH}),
                "guidance": (torch.tensor(1.0), {}),
                "top_k": (torch.tensor([min(PUBLISHED_TOP_K, vocab)]), {}),
                "top_p": (torch.tensor(1.0), {}),
                "uniform": (torch.rand(b, 2, 2), {0: BATCH, 1: SIDE, 2: SIDE}),
            },
            ("index", "codes", "logits"),
        )

    def smooth() -> Graph:
        return Graph(
            "smooth",
            SmoothGraph(model),
            {
                "logits": (torch.randn(b, 2, 2, vocab), {0: BATCH, 1: SIDE, 2: SIDE}),
                "exponential": (torch.rand(b, 2, 2, vocab), {0: BATCH, 1: SIDE, 2: SIDE}),
                "logit_gain": (torch.tensor(1.5), {}),
                "temperature": (torch.tensor(0.1), {}),
            },
            ("h",),
        )

    def next_scale() -> Graph:
        return Graph(
            "next_scale",
            NextScaleGraph(model, len(patch_nums)),
            {
                "h": (torch.randn(b, 2, 2, channels), {0: BATCH, 1: SIDE, 2: SIDE}),
                "f_hat": (torch.randn(b, channels, size, size), {0: BATCH}),
                "scale": (torch.tensor([1]), {}),
                "up": (torch.randn(size, 2), {1: SIDE}),
                "down": (torch.randn(3, size), {0: NEXT_SIDE}),
                "offset": (torch.randn(2 * b, 1), {0: BOTH}),
            },
            ("f_hat_out", "x", "angles"),
        )

    def residual_condition() -> Graph:
        return Graph(
            "residual_condition",
            ResidualConditionGraph(model),
            {
                "hidden": (torch.randn(2 * b, cells, dim), {0: BOTH}),
                "codes": (torch.randn(b, size, size, channels), {0: BATCH}),
            },
            ("embedded",),
        )

    def residual_step() -> Graph:
        x = torch.randn(b, cells, channels)
        return Graph(
            "residual_step",
            ResidualStepGraph(model),
            {
                "x": (x, {0: BATCH}),
                "embedded": (torch.randn(2 * b, cells, config.diff_width), {0: BOTH}),
                "timestep": (torch.tensor([999]), {}),
                "coefficients": (torch.rand(7), {}),
                "guidance": (torch.tensor(1.0), {}),
                "noise": (x.clone(), {0: BATCH}),
            },
            ("x_out",),
        )

    def latent() -> Graph:
        return Graph(
            "latent",
            LatentGraph(),
            {
                "f_hat": (torch.randn(b, channels, size, size), {0: BATCH}),
                "h": (torch.randn(b, size, size, channels), {0: BATCH}),
                "residual": (torch.randn(b, cells, channels), {0: BATCH}),
            },
            ("f_hat_out",),
        )

    def decoder() -> Graph:
        return Graph(
            "decoder",
            DecoderGraph(model),
            {"f_hat": (torch.randn(b, channels, size, size), {0: BATCH})},
            ("image",),
            opset=DECODER_OPSET,
        )

    graphs = [context, transformer, unconditional, sample, smooth, next_scale]
    graphs += [residual_condition, residual_step, latent, decoder]
    return [text_encoder, *graphs] if text is not None else graphs
