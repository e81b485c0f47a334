"""The two networks of a HART checkpoint, together."""

from __future__ import annotations

from typing import NamedTuple

from hart_runtime.hart.tokenizer import ImageTokenizer
from hart_runtime.hart.transformer import ScaleTransformer


class Hart(NamedTuple):
    """What ``llm/`` and ``tokenizer/`` hold."""

    transformer: ScaleTransformer
    tokenizer: ImageTokenizer
