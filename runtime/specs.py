"""The manifest that a model's export will have, from its sizes alone."""

from __future__ import annotations

from hart_runtime.common.config import TokenizerConfig, TransformerConfig
from hart_runtime.common.errors import one_of
from hart_runtime.common.precisions import FP32, PRECISIONS
from hart_runtime.common.settings import DEFAULT_MAX_BATCH, SamplingSettings
from hart_runtime.runtime.bundle import (
    APPEND,
    NEW,
    PAST,
    TEXT,
    UNCONDITIONAL,
    UNCONDITIONAL_APPEND,
    GraphSpec,
    Manifest,
    ModelSpec,
    TensorSpec,
    cache_names,
)


def describe_model(
    llm: TransformerConfig, tokenizer: TokenizerConfig, patch_nums: tuple[int, ...]
) -> ModelSpec:
    """What the loop has to know about a model."""
    return ModelSpec(
        patch_nums=patch_nums,
        depth=llm.depth,
        embed_dim=llm.embed_dim,
        num_heads=llm.num_heads,
        vocab_size=tokenizer.vocab_size,
        latent_channels=tokenizer.z_channels,
        image_size=patch_nums[-1] * tokenizer.downsample,
        context_token=llm.context_token,
        context_dim=llm.context_dim,
    )


def manifest_of(
    model: ModelSpec,
    diff_width: int,
    precision: str = FP32,
    max_batch: int = DEFAULT_MAX_BATCH,
    modulated: bool = False,
    sampling: SamplingSettings | None = None,
) -> Manifest:
    """The graphs with their inputs and outputs, without files and origin.

    Args:
        diff_width: width of the residual diffusion MLP.
        modulated: whether the blocks are modulated by a pooled condition.
        sampling: default settings; those of the published sampler if left out.
    """
    one_of("precision", precision, PRECISIONS)
    both, dim, tokens = "2*batch", model.embed_dim, model.context_token
    last, channels, vocab = model.patch_nums[-1], model.latent_channels, model.vocab_size
    cells, head = last * last, model.embed_dim // model.num_heads
    half = PRECISIONS[precision].traced
    names = tuple(cache_names(model.depth))

    def graph(
        file: str, inputs: dict[str, tuple[object, ...]], outputs: dict[str, tuple[object, ...]]
    ) -> GraphSpec:
        types = {"input_ids": "int64", "mask": "bool", "top_k": "int64", "scale": "int64"}
        types |= {"timestep": "int64", "index": "int64"}

        def tensors(shapes: dict[str, tuple[object, ...]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(name, half if name.endswith(names) else types.get(name, "float32"), shape)  # type: ignore[arg-type]
                for name, shape in shapes.items()
            )

        opset = 20 if file == "decoder" else 23
        return GraphSpec(f"{file}.onnx", opset, tensors(inputs), tensors(outputs))

    rows = "rows"
    step: dict[str, tuple[object, ...]] = {"x": (rows, "length", dim), "angles": (rows, "length", head)}
    condition: dict[str, tuple[object, ...]] = {"block_condition": (rows, dim)} if modulated else {}
    pooled: dict[str, tuple[object, ...]] = {"block_condition": (both, dim), "text_condition": ("batch", dim)}
    new_hidden: dict[str, tuple[object, ...]] = {"hidden": (rows, "length", dim)}
    hidden: dict[str, tuple[object, ...]] = {"hidden": (both, "length", dim)}
    text: dict[str, tuple[object, ...]] = {f"{TEXT}hidden": ("batch", tokens, dim)}
    text_in_both: dict[str, tuple[object, ...]] = {"hidden": (both, tokens, dim)}
    latents, side = ("batch", channels, last, last), ("batch", "side", "side")
    rest = ("batch", cells, channels)
    scalar: tuple[object, ...] = ()
    graphs = {
        "text_encoder": graph(
            "text_encoder",
            {"input_ids": ("batch", tokens), "mask": ("batch", tokens)},
            {"features": ("batch", tokens, model.context_dim)},
        ),
        "context": graph(
            "context",
            {"features": ("batch", tokens, model.context_dim), "mask": ("batch", tokens)},
            {
                "x": ("batch", tokens, dim),
                "angles": ("batch", tokens, head),
                "offset": (both, 1),
                "head_condition": (both, dim),
                **(pooled if modulated else {}),
            },
        ),
        "transformer": graph(
            "transformer",
            step | condition | {f"{PAST}{n}": (rows, "past", dim) for n in names},
            new_hidden | dict.fromkeys(names, (rows, "past + length", dim)),
        ),
        UNCONDITIONAL: graph(
            UNCONDITIONAL,
            text | {f"{TEXT}{n}": ("batch", tokens, dim) for n in names},
            text_in_both | dict.fromkeys(names, (both, tokens, dim)),
        ),
        "sample": graph(
            "sample",
            {
                **hidden,
                "head_condition": (both, dim),
                "guidance": scalar,
                "top_k": (1,),
                "top_p": scalar,
                "uniform": side,
            },
            {"index": side, "codes": (*side, channels), "logits": (*side, vocab)},
        ),
        "smooth": graph(
            "smooth",
            {
                "logits": (*side, vocab),
                "exponential": (*side, vocab),
                "logit_gain": scalar,
                "temperature": scalar,
            },
            {"h": (*side, channels)},
        ),
        "next_scale": graph(
            "next_scale",
            {
                "h": (*side, channels),
                "f_hat": latents,
                "scale": (1,),
                "up": (last, "side"),
                "down": ("next_side", last),
                "offset": (both, 1),
            },
            {"f_hat_out": latents, "x": (both, "next_side**2", dim), "angles": (both, "next_side**2", head)},
        ),
        "residual_condition": graph(
            "residual_condition",
            {"hidden": (both, cells, dim), "codes": ("batch", last, last, channels)},
            {"embedded": (both, cells, diff_width)},
        ),
        "residual_step": graph(
            "residual_step",
            {
                "x": rest,
                "embedded": (both, cells, diff_width),
                "timestep": (1,),
                "coefficients": (7,),
                "guidance": scalar,
                "noise": rest,
            },
            {"x_out": rest},
        ),
        "latent": graph(
            "latent",
            {"f_hat": latents, "h": ("batch", last, last, channels), "residual": rest},
            {"f_hat_out": latents},
        ),
        "decoder": graph(
            "decoder", {"f_hat": latents}, {"image": ("batch", 3, model.image_size, model.image_size)}
        ),
        APPEND: graph(
            APPEND,
            step | condition | {f"{PAST}{n}": ("past", rows, dim) for n in names},
            new_hidden | {f"{NEW}{n}": ("length", rows, dim) for n in names},
        ),
        UNCONDITIONAL_APPEND: graph(
            UNCONDITIONAL_APPEND,
            text | {f"{TEXT}{n}": (tokens, "batch", dim) for n in names},
            text_in_both | {f"{NEW}{n}": (tokens, both, dim) for n in names},
        ),
    }
    settings = sampling or SamplingSettings()
    return Manifest("planned", precision, max_batch, model, settings, graphs, {}, {}, {})
