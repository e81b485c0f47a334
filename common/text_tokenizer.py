"""Prompts to padded token ids, as the published sampler prepares them (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from hart_runtime.common.errors import InputError, guarded, shown


class PromptTokenizer:
    """Tokenizes, truncates at ``max_tokens`` and pads to it.

    Padding side and token are those the tokenizer file is configured for. The mask is "is
    not the pad token", also inside a prompt, as in the published code.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Takes the tokenizer over: a copy would be written out, which lists all numbers without a token."""
        padding = tokenizer.padding
        if padding is None:
            raise InputError("the text tokenizer names no padding; export the bundle again")
        self.pad_id: int = padding["pad_id"]
        self.tokenizer = tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.left = padding["direction"] == "left"
        self.max_tokens = max_tokens

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(B, max_tokens) ids and mask."""
        ids = np.full((len(prompts), self.max_tokens), self.pad_id, dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self._ids(prompt)[: self.max_tokens]
            if self.left:
                row[self.max_tokens - len(tokens) :] = tokens
            else:
                row[: len(tokens)] = tokens
        return ids, ids != self.pad_id

    def system_prompt(self, text: str) -> list[int]:
        """Token ids of what goes in front of every padded prompt, tokenized on its own.

        Raises:
            InputError: it is over the limit, at which the published sampler would cut it, or empty.
        """
        tokens = self._ids(text)
        if not 0 < len(tokens) <= self.max_tokens:
            raise InputError(f"`system_prompt`: expected 1 to {self.max_tokens} tokens, found {len(tokens)}")
        return tokens

    def cut_off(self, prompt: str) -> str:
        """The end of the prompt that does not fit, "" when all of it does."""
        tokens = self._ids(prompt)
        return str(self.tokenizer.decode(tokens[self.max_tokens :])).strip()

    def read(self, prompt: str) -> str:
        """The beginning of the prompt that fits, all of it where all does."""
        failed = f"the text tokenizer cannot read {shown(prompt)}"
        offsets: list[tuple[int, int]] = guarded(lambda: self.tokenizer.encode(prompt).offsets, failed)
        if len(offsets) <= self.max_tokens:
            return prompt
        return prompt[: max(end for _, end in offsets[: self.max_tokens])]

    def _ids(self, text: str) -> list[int]:
        """All of its tokens; raises InputError where the vocabulary lacks one."""
        failed = f"the text tokenizer cannot read {shown(text)}"
        ids: list[int] = guarded(lambda: self.tokenizer.encode(text).ids, failed)
        return ids
