"""The two networks of a checkpoint, together."""

from __future__ import annotations

from typing import NamedTuple

from hart_runtime.hart.class_transformer import ClassTransformer
from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer


class Hart(NamedTuple):
    """What ``llm/`` and ``tokenizer/`` hold."""

    transformer: ScaleTransformer
    tokenizer: ImageTokenizer


class Var(NamedTuple):
    """What the two files of a VAR checkpoint hold."""

    transformer: ClassTransformer
    tokenizer: ImageTokenizer
