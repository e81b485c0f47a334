"""The text encoder of int8 bundles: weights in 8 bits, tokens in float32, a table in half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from hart_runtime import Pipeline
from hart_runtime.common.checkpoint import TEXT_ENCODER, Network
from hart_runtime.common.config import TextEncoderConfig
from hart_runtime.export.quantize_blocks import block_of, quantize_weight
from hart_runtime.export.writer import WeightFile, write_graph
from hart_runtime.hart import text_encoder
from hart_runtime.hart.checkpoint import load_text_encoder
from hart_runtime.hart.demo import DEMO_CHECKPOINT
from hart_runtime.runtime.contract import DEQUANTIZED
from hart_runtime.runtime.text import TextEncoder
from tests.conftest import ExportOnce
from tests.qwen2 import TOKENS, graph_for

Array = NDArray[np.float32]
FEATURES = 0.03
"""Distance from the reference that is allowed, over its norm."""


def test_weights_are_rounded_in_blocks() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((160, 70), np.float32)
    weight[:32, 3] = 0
    values, scales = quantize_weight(weight)
    assert (values.shape, scales.shape) == ((70, 5, 32), (70, 5)), "32 is the largest power of two in 160"
    whole = ((values.astype(np.float32) - 128) * scales[..., None]).reshape(70, 160).T
    step = np.repeat(scales.T, 32, axis=0)
    assert (np.abs(whole - weight) <= 0.5001 * step).all()
    assert np.array_equal(whole[:32, 3], weight[:32, 3])
    assert [block_of(n) for n in (1536, 8960, 96, 48, 24)] == [64, 64, 32, 16, 0]


def test_the_demo_features_stay_close(export_once: ExportOnce) -> None:
    """Of padded tokens, too: all of them are the transformer's context."""
    pipeline = Pipeline.load(export_once(DEMO_CHECKPOINT, "int8"), device="cpu")
    assert isinstance(pipeline.text, TextEncoder)
    prompts = ["a red circle on a white background", "a small blue ring"]
    given = pipeline.text(prompts)
    ids, mask = pipeline.text.tokenizer(prompts)
    encoder = load_text_encoder(Network(DEMO_CHECKPOINT / TEXT_ENCODER))
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    assert distance(pipeline.backend.to_host(given["features"]), expected) < FEATURES


@pytest.mark.parametrize("exact_tokens", [True, False], ids=["tokens in float32", "tokens in 8 bits"])
def test_outliers_of_a_language_model(tmp_path: Path, exact_tokens: bool) -> None:
    """A few channels of tokens, and of what is between the layers of an MLP, a hundred times as large as the
    rest, and the weights that they meet smaller by as much: the function is the same as without.
    """
    torch.manual_seed(0)
    config = TextEncoderConfig(
        vocab_size=400,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    encoder = text_encoder.TextEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        ids, mask = torch.randint(400, (2, TOKENS)), torch.arange(TOKENS) < torch.tensor([[20], [TOKENS]])
        plain = encoder(ids, mask)
        for layer in encoder.layers:
            raise_channels(layer)
        expected = encoder(ids, mask)
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)
    with WeightFile(tmp_path) as weights:
        spec = write_graph(graph_for(encoder), tmp_path, weights, (DEQUANTIZED,), exact_tokens)
    for file in spec.files if exact_tokens else (spec.file,):  # ONNX Runtime rounds tokens of the other
        (found,) = ort.InferenceSession(tmp_path / file).run(
            None, {"input_ids": ids.numpy(), "mask": mask.numpy()}
        )
        assert (distance(found, expected.numpy()) < FEATURES) == exact_tokens


def raise_channels(layer: Any, channels: int = 4, factor: float = 100) -> None:
    """In front of a layer's products, and of the last of its MLP."""
    attention, mlp = layer.self_attn, layer.mlp
    for norm, products in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
    ):
        norm.weight[:channels] *= factor
        for product in products:
            product.weight[:, :channels] /= factor
    mlp.up_proj.weight[:channels] *= factor
    mlp.down_proj.weight[:, :channels] /= factor


def distance(found: Array, expected: Array) -> float:
    """Of features, over the reference's norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
