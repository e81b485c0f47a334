"""The model families there are. What differs between them is told here and nowhere else."""

from hart_runtime.common.config import ClassTransformerConfig, TokenizerConfig, Transformer
from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.runtime.families.class_hart import CLASS_HART
from hart_runtime.runtime.families.family import Family
from hart_runtime.runtime.families.hart import HART
from hart_runtime.runtime.families.mar import MAR
from hart_runtime.runtime.families.var import VAR

FAMILIES: dict[str, Family] = {family.name: family for family in (HART, VAR, CLASS_HART, MAR)}


def family_of(transformer: Transformer | MarConfig, tokenizer: TokenizerConfig | KlConfig) -> Family:
    """The family of a checkpoint with these configurations."""
    if isinstance(transformer, MarConfig) or isinstance(tokenizer, KlConfig):
        return MAR
    if not isinstance(transformer, ClassTransformerConfig):
        return HART
    return CLASS_HART if tokenizer.hybrid else VAR
