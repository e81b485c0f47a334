"""The two networks of a checkpoint, together."""

from __future__ import annotations

from typing import NamedTuple

from hart_runtime.hart.class_transformer import ClassHartTransformer, ClassTransformer
from hart_runtime.hart.kl_tokenizer import KlTokenizer
from hart_runtime.hart.mar import MarTransformer
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


class ClassHart(NamedTuple):
    """What ``llm/`` and ``tokenizer/`` hold, where ``llm/`` draws classes."""

    transformer: ClassHartTransformer
    tokenizer: ImageTokenizer


class Mar(NamedTuple):
    """What the two files of a MAR checkpoint hold."""

    transformer: MarTransformer
    tokenizer: KlTokenizer


ClassModel = Var | ClassHart
HybridModel = Hart | ClassHart
ScaleModel = Hart | Var | ClassHart
Model = ScaleModel | Mar
