"""Prompts to text features: the first half of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.errors import LONGEST, InputError, shown
from hart_runtime.common.json_files import parse_json
from hart_runtime.common.text_files import decoded
from hart_runtime.common.text_tokenizer import PromptTokenizer
from hart_runtime.common.tokenizer_file import make_tokenizer
from hart_runtime.runtime import stages
from hart_runtime.runtime.backends.backend import Backend, Value
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, Bundle
from hart_runtime.runtime.families.names import TEXT_ENCODER, TOKEN_IDS
from hart_runtime.runtime.program import Run

log = logging.getLogger(__name__)

Given = Mapping[str, Value]
"""What a drawing begins with: text ``features`` (B, T, D) and their ``mask`` (B, T)."""
ENCODE = Run(TEXT_ENCODER, stages.TEXT_ENCODER)


class TextEncoder:
    """Encodes prompts with a bundle's text encoder.

    Raises:
        InputError: the bundle has none, or its tokenizer cannot be read.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.backend = backend
        self.tokenizer = open_tokenizer(bundle)

    def __call__(self, prompts: Sequence[str]) -> Given:
        """On the device, for the prompts in their order."""
        ids, mask = self.tokenizer(prompts)
        outputs = self.backend.run(ENCODE, {TOKEN_IDS: ids, "mask": mask})
        return {**outputs, "mask": mask}

    def known(self, prompts: Sequence[str], batch: int) -> EncodedPrompts:
        """All of these prompts, encoded now, ``batch`` at once."""
        rows: dict[str, dict[str, NDArray[np.generic]]] = {}
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            arrays = {name: self.backend.to_host(value) for name, value in self(part).items()}
            rows |= {text: {name: array[i] for name, array in arrays.items()} for i, text in enumerate(part)}
        return EncodedPrompts(rows)

    def tell_cut_off(self, prompts: Iterable[str]) -> None:
        """Log what of a prompt is over the token limit."""
        for prompt in prompts:
            if lost := self.tokenizer.cut_off(prompt):
                first = lost if len(lost) <= LONGEST else f"{lost[:LONGEST]}..."
                log.warning("the prompt is over %d tokens, cut off: %r", self.tokenizer.max_tokens, first)


class EncodedPrompts:
    """Prompts that were encoded before, on the host; there is no encoder for others."""

    def __init__(self, rows: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> None:
        self.rows = rows

    def __call__(self, prompts: Sequence[str]) -> Given:
        """As :class:`TextEncoder`; raises InputError for other prompts."""
        if unknown := [prompt for prompt in prompts if prompt not in self.rows]:
            raise InputError(f"this pipeline was opened for other prompts, found {shown(unknown[0])}")
        rows = [self.rows[prompt] for prompt in prompts]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def require_text_encoder(bundle: Bundle) -> None:
    """Raises InputError for a bundle that draws from features only, or classes."""
    if bundle.manifest.model.num_classes:
        raise InputError(f"{bundle.folder}: this bundle draws classes, and takes no texts")
    if not bundle.has_text_encoder:
        raise InputError(
            f"{bundle.folder}: this bundle has no text encoder; export it again with one (`text_encoder`), "
            "or draw from text features with Pipeline.from_features"
        )


def open_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """The tokenizer of a bundle's text encoder; raises InputError where there is none."""
    require_text_encoder(bundle)
    manifest, file = bundle.manifest, bundle.path(TEXT_TOKENIZER)
    values = parse_json(decoded(bundle.tokenizer, str(file)), str(file))
    tokenizer = make_tokenizer(values, file, manifest.text_rows or 0)
    if tokenizer.padding is None:
        raise InputError(f"{file}: names no padding; export the bundle again")
    return PromptTokenizer(tokenizer, manifest.model.context_token)
