"""Small random checkpoints in VAR's published layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hart_runtime.common.config import DISCRETE, ClassTransformerConfig, TokenizerConfig
from hart_runtime.hart.random_var import VarShape, write_random_var

NAMES = ["crane bird, crane", "tabby cat", "golden retriever", "Labrador retriever", "crane", "Cup", "moon"]
"""Of the classes of :data:`SMALL`: two share a name, and some are near others."""
SMALL = VarShape(
    ClassTransformerConfig(
        depth=2,
        embed_dim=64,
        num_heads=2,
        num_classes=len(NAMES),
        patch_nums=(1, 2, 3),
        mlp_hidden=128,
        attn_l2_norm=True,
        shared_aln=False,
    ),
    TokenizerConfig(
        vocab_size=96,
        z_channels=8,
        ch=32,
        ch_mult=(1, 1),
        share_quant_resi=4,
        v_patch_nums=(1, 2, 3),
        quantizer_type=DISCRETE,
    ),
)


def varied(image: dict[str, object] | None = None, **transformer: object) -> VarShape:
    """The small shape with other options."""
    chosen = replace(SMALL.transformer, **transformer)  # type: ignore[arg-type]
    tokenizer = replace(SMALL.tokenizer, v_patch_nums=chosen.patch_nums, **(image or {}))  # type: ignore[arg-type]
    return VarShape(chosen, tokenizer)


VARIANTS = {
    "shared adaLN": varied(shared_aln=True),
    "plain attention of one wide head": varied(attn_l2_norm=False, num_heads=1),
    "a first scale of four tokens, equal scales": varied(patch_nums=(2, 3, 3, 5)),
    "one phi a scale, three levels, 1 x 1 convolutions": varied(
        {"share_quant_resi": 0, "ch_mult": (1, 2, 2), "quant_conv_ks": 1}, patch_nums=(1, 3)
    ),
    "one phi for all, one level, another MLP": varied(
        {"share_quant_resi": 1, "ch_mult": (1,)}, mlp_hidden=80, embed_dim=48, num_heads=3
    ),
    "no phi, many codes": varied({"quant_resi": 0.0, "vocab_size": 700}, depth=1),
}


def write_names(folder: Path) -> Path:
    """A file of the names."""
    file = folder / "names.txt"
    file.write_text("\n".join(NAMES), encoding="utf-8")
    return file


__all__ = ["NAMES", "SMALL", "VARIANTS", "VarShape", "varied", "write_names", "write_random_var"]
