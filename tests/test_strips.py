"""The decoder in strips is the decoder."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from hart_runtime.export import strips
from hart_runtime.hart.autoencoder import Decoder, Encoder


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(ch=32, ch_mult=(1, 2, 2), z_channels=8).eval().requires_grad_(False)
    for parameter in decoder.parameters():  # norms that shift and scale
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter))
    return decoder


@pytest.mark.parametrize("rows", [8, 9])  # 9: strips of different heights
@pytest.mark.parametrize("large", [1 << 13, 1 << 14])  # at the second level, or at the last
def test_strips_are_the_whole(
    decoder: Decoder, rows: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "LARGE", large)
    z = torch.randn(2, 8, rows, 6)
    whole = decoder(z)
    torch.testing.assert_close(strips.decode(decoder, z), whole, rtol=1e-5, atol=1e-5)
    assert whole.std() > 0.1


def test_a_norm_needs_the_whole_map(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "LARGE", 1 << 12)
    z = torch.randn(1, 8, 8, 6)
    z[:, :, 6:] *= 10  # the lower strips alone change
    alone = strips.decode(decoder, z[:, :, :4])
    together = strips.decode(decoder, z)[:, :, : alone.shape[2]]
    assert (alone - together).abs().max() > 0.1
    torch.testing.assert_close(strips.decode(decoder, z), decoder(z), rtol=1e-5, atol=1e-5)


class _Decode(torch.nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return strips.decode(self.decoder, z)


def test_strips_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    decoder = Decoder(ch=32, ch_mult=(1, 1), z_channels=8).eval().requires_grad_(False)
    monkeypatch.setattr(strips, "LARGE", 1 << 12)
    z = torch.randn(2, 8, 8, 6)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.onnx.export(
        _Decode(decoder).eval(),
        (z,),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None
    written = program.model_proto.SerializeToString()
    session = ort.InferenceSession(written, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: z[:1].numpy()})[0]
    np.testing.assert_allclose(found, decoder(z[:1]).numpy(), rtol=1e-4, atol=1e-5)
    operators = {node.op_type for node in program.model_proto.graph.node}
    assert operators & {"Split", "Slice"}


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(ch=32, ch_mult=(1, 2, 2), z_channels=8).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand_like(parameter))
    return encoder


@pytest.mark.parametrize("rows", [4, 6, 11])  # 6 and 11: strips of different heights
@pytest.mark.parametrize("large", [1 << 11, 1 << 14])  # at every level but the lowest, or at the first
def test_encoding_in_strips(encoder: Encoder, rows: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "LARGE", large)
    image = torch.randn(2, 3, 4 * rows, 24)
    cut = strips._cut_evenly(image, 32, 4)
    assert len(cut) == (4 if 32 * 4 * rows * 24 >= large else 1)
    whole = encoder(image)
    torch.testing.assert_close(strips.encode(encoder, image), whole, rtol=1e-5, atol=1e-5)
    assert whole.std() > 0.1
