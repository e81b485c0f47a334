"""What published checkpoint files hold beside the weights that drawing needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hart_runtime.common.config import (
    ClassTransformerConfig,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
)

Makers = dict[str, Callable[[], Tensor]]
"""Key -> what makes the tensor, so that none exists before it is written."""


def var_names(transformer: ClassTransformerConfig, tokenizer: TokenizerConfig) -> tuple[str, str]:
    """What the files of a VAR checkpoint are called, without what their format adds."""
    sizes = f"ch{tokenizer.ch}v{tokenizer.vocab_size}z{tokenizer.z_channels}"
    return f"var_d{transformer.depth}", f"vae_{sizes}"


def llm_buffers(config: Transformer) -> Makers:
    """Buffers of the published transformer: levels, the training mask and the zero key biases.

    ``attn_bias_for_masking`` has one entry for each pair of tokens, so it is by far the largest.
    """
    sizes = [side * side for side in config.patch_nums]
    if isinstance(config, TransformerConfig):
        sizes[0] = config.context_token

    def levels() -> Tensor:
        return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]

    def mask() -> Tensor:
        level = levels()
        seen = level[:, :, None] >= level[:, None]
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None]

    biases = [f"blocks.{i}.attn.zero_k_bias" for i in range(config.depth)]
    return {
        "lvl_1L": levels,
        "attn_bias_for_masking": mask,
        **dict.fromkeys(biases, lambda: torch.zeros(config.embed_dim)),
    }


def tokenizer_extras(config: TokenizerConfig) -> Makers:
    """The discriminator of the tokenizer's training (its keys below ``disc.``) and the hit counts."""
    discriminator = {f"disc.main.{key}": value for key, value in _patch_discriminator().state_dict().items()}
    hits = "vae.quantize.ema_vocab_hit_SV"
    return {
        hits: lambda: torch.zeros(len(config.v_patch_nums), config.vocab_size),
        **{key: lambda value=value: value for key, value in discriminator.items()},  # type: ignore[misc]
    }


def _patch_discriminator(width: int = 64) -> nn.Sequential:
    """PatchGAN (Isola et al., 2017) with three strided layers."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    for factor, stride in ((1, 2), (2, 2), (4, 1)):
        inputs, outputs = factor * width, 2 * factor * width
        layers += [
            nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        ]
    layers.append(nn.Conv2d(8 * width, 1, 4, padding=1))
    return nn.Sequential(*layers)
