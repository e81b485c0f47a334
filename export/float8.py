"""Matrix products of the blocks in 8-bit floating point (E4M3), for GPUs that multiply such numbers.

A product has one scale for its weights and one for its tokens, constants that are measured while the model
draws. Both are powers of two: dividing by them rounds nothing, so that all that is lost are the bits that
E4M3 does not have. Which products stay in half is measured, too (see :func:`sensitive`).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.precisions import FP8, FP16
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.export.calibration import MOST_TOKENS, draw_first, first_scales
from hart_runtime.export.quantize import SMALLEST, constant
from hart_runtime.export.rewrite import remove_unused
from hart_runtime.hart.layers import Linear
from hart_runtime.hart.model import Mar, Model
from hart_runtime.hart.transformer import Attention, Gpt2MLP, LlamaMLP
from hart_runtime.runtime.families.names import TRANSFORMER

LARGEST = 448.0
"""Number of E4M3."""
SMALLEST_SCALE = 2.0**-14
"""The last power of two that half holds with all of its bits."""
HEADROOM = 4.0
"""How much larger tokens of other pictures may be than those that were seen. What is larger still is cut off;
a number that is four times as small loses nothing, as long as it is not among the smallest."""
ALIGNED = 16
"""What sides of a product are multiples of where tensor cores take it in 8 bits."""
SENSITIVE = 1.5
"""A product stays in half if what its rounding alone does to what comes out of its block, squared, is more
than this many times the average a weight."""


@dataclass(frozen=True)
class Rounding:
    """What becomes of the products of a model's blocks."""

    scales: dict[str, float]
    """Of the tokens of each that runs in 8 bits, by its module's path."""
    in_half: dict[str, float]
    """The others, and what rounding each alone would do: the error of what comes out of its block, root of
    the mean square, over the size of that."""


def products(transformer: nn.Module) -> Iterator[tuple[str, Linear]]:
    """Those that can run in 8 bits, by path: of attention and MLP of every block."""
    for path, module in transformer.named_modules(prefix=TRANSFORMER):
        if isinstance(module, Attention | LlamaMLP | Gpt2MLP):
            for name, part in module.named_children():
                if isinstance(part, Linear) and fits(part.weight.shape):
                    yield f"{path}.{name}", part


def fits(shape: torch.Size) -> bool:
    """Whether a product of weights of this shape takes time, and tensor cores take it."""
    return min(shape) >= SMALLEST and all(side % ALIGNED == 0 for side in shape)


def scale_of(largest: float) -> float:
    """The power of two that numbers are divided by so that they fit, the largest among them."""
    return max(2.0 ** math.ceil(math.log2(max(largest, SMALLEST_SCALE) / LARGEST)), SMALLEST_SCALE)


def calibrate(model: Model, settings: SamplingSettings, patch_nums: tuple[int, ...]) -> Rounding:
    """Measure what products see, and what rounding each of them alone does, in the first scales of pictures.

    Args:
        model: in float32.

    Raises:
        InputError: there is no product that fits, or one is given what is not finite.
    """
    found = dict(products(model.transformer))
    if not found or isinstance(model, Mar):
        raise InputError(
            f"{parameter('precision', FP8)}: this model has no product in its blocks with sides that are "
            f"multiples of {ALIGNED} and at least {SMALLEST}; give {parameter('precision', FP16)}"
        )
    largest: dict[str, float] = defaultdict(float)
    errors: dict[str, list[float]] = defaultdict(list)

    def look(name: str, taken: Tensor) -> None:
        now = float(taken.abs().amax())
        if not math.isfinite(now):
            raise InputError(f"{name}: takes what is not finite, so 8-bit scales cannot be measured")
        largest[name] = max(largest[name], now)

    def compare(names: list[str], block: nn.Module, taken: tuple[Tensor, ...], made: Tensor) -> None:
        for name in names:
            with _rounded(found[name]):
                off = block.forward(*taken)[0] - made
            errors[name].append(float(off.square().mean() / made.square().mean()))

    hooks = [
        product.register_forward_pre_hook(lambda _, taken, name=name: look(name, *taken))
        for name, product in found.items()
    ]
    for number, block in enumerate(model.transformer.blocks):
        own = [name for name in found if name.startswith(f"{TRANSFORMER}.blocks.{number}.")]
        hooks.append(
            block.register_forward_hook(
                lambda block, taken, made, own=own: compare(own, block, taken, made[0])
            )
        )
    tokens, scales = first_scales(patch_nums)
    random = torch.Generator().manual_seed(0)
    draw_first(model, max(MOST_TOKENS // tokens, 1), scales, settings, patch_nums, random)
    for hook in hooks:
        hook.remove()
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    kept = sensitive(means, {name: product.weight.numel() for name, product in found.items()})
    return Rounding(
        {name: scale_of(HEADROOM * seen) for name, seen in largest.items() if name not in kept},
        {name: math.sqrt(means[name]) for name in kept},
    )


def sensitive(errors: Mapping[str, float], weights: Mapping[str, int]) -> list[str]:
    """Products whose mean square error is more than :data:`SENSITIVE` times the average a weight."""
    limit = SENSITIVE * sum(errors.values()) / sum(weights.values())
    return [name for name, error in errors.items() if error > limit * weights[name]]


@contextlib.contextmanager
def _rounded(product: Linear) -> Iterator[None]:
    """A product as it is in 8 bits, with scales for what it is given."""
    whole = product.weight.data
    product.weight.data = rounded(whole)
    hook = product.register_forward_pre_hook(lambda _, taken: (rounded(*taken),))
    try:
        yield
    finally:
        hook.remove()
        product.weight.data = whole


def rounded(x: Tensor) -> Tensor:
    """To the numbers that E4M3 has, with the scale that fits."""
    scale = scale_of(float(x.abs().amax()))
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


def round_products(model: ir.Model, scales: Mapping[str, float]) -> ir.Model:
    """Store weights of products in 8 bits, in place, and return the model.

    ``x @ w`` becomes ``D(Q(x)) @ D(q)``, with ``q`` in E4M3, ``Q`` that rounds to it and ``D`` that makes
    half of it again: what engines take for a product of 8-bit numbers.

    Args:
        scales: of the tokens of each product that is to change, by its module's path.
    """
    graph = model.graph
    kind = ir.DataType.FLOAT8E4M3FN
    zero = constant(graph, "float8.zero", np.zeros((), kind.numpy()))
    tokens: dict[tuple[ir.Value, float], ir.Value] = {}
    for product in [node for node in graph if node.op_type == "MatMul"]:
        name = (product.name or "").rpartition("/")[0]
        x, weight = product.inputs
        if name not in scales:
            continue
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        if (x, scales[name]) not in tokens:
            scale = constant(graph, f"{name}.tokens.scale", np.array(scales[name], np.float16))
            levels = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/tokens")
            levels.outputs[0].shape, levels.outputs[0].dtype = x.shape, kind
            back = ir.node("DequantizeLinear", [*levels.outputs, scale, zero], name=f"{name}/half")
            back.outputs[0].shape, back.outputs[0].dtype = x.shape, ir.DataType.FLOAT16
            graph.insert_before(product, [levels, back])
            tokens[x, scales[name]] = back.outputs[0]
        values, scale = (
            constant(graph, f"{name}.{part}", array)
            for part, array in zip(
                ("float8", "float8.scale"), round_weight(weight.const_value.numpy()), strict=True
            )
        )
        whole = ir.node("DequantizeLinear", [values, scale, zero], name=f"{name}/weight")
        whole.outputs[0].shape, whole.outputs[0].dtype = weight.shape, ir.DataType.FLOAT16
        graph.insert_before(product, whole)
        product.replace_input_with(0, tokens[x, scales[name]])
        product.replace_input_with(1, whole.outputs[0])
    remove_unused(model)
    return model


def round_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half to E4M3 of the same shape, and its scale in half."""
    scale = scale_of(float(np.abs(weight).max()))
    levels = (weight.astype(np.float32) / np.float32(scale)).clip(-LARGEST, LARGEST)
    return levels.astype(ir.DataType.FLOAT8E4M3FN.numpy()), np.array(scale, np.float16)
