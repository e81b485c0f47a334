"""A graph and a model as a manifest describes them."""

from __future__ import annotations

from dataclasses import dataclass

from hart_runtime.common.config import TokenizerConfig, TransformerConfig


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; named dimensions are strings such as ``batch``."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle."""

    file: str
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """The one that it has in the bundle and in the contract."""
        return self.file.removesuffix(".onnx")

    def reads(self, name: str) -> bool:
        """Whether the graph has an input of this name (adaLN variants have one more)."""
        return any(spec.name == name for spec in self.inputs)


@dataclass(frozen=True)
class ModelSpec:
    """What the loop needs to know about the model."""

    patch_nums: tuple[int, ...]
    depth: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    latent_channels: int
    image_size: int
    context_token: int
    context_dim: int


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
