"""Text features of prompts that come again."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hart_runtime.runtime.pipeline import MOST_ENCODED
from hart_runtime.runtime.text import EncodedPrompts, Given, TextEncoder


class RememberedPrompts(EncodedPrompts):
    """Encodes prompts, but for those that it encoded lately."""

    def __init__(self, encoder: TextEncoder, most: int = MOST_ENCODED) -> None:
        """``most``: prompts that are kept, 2 MB each in a published model."""
        super().__init__({})
        self.encoder, self.most = encoder, most
        self.read: dict[str, str] = {}
        """What of each prompt is not over the model's tokens."""
        self.encoded = 0
        """Prompts that were not known, so far."""
        self.seconds = 0.0
        """That encoding them took."""

    def __call__(self, prompts: Sequence[str]) -> Given:
        """As :class:`TextEncoder`, on the host."""
        kept, wanted = dict(self.rows), list(dict.fromkeys(prompts))
        new = [prompt for prompt in wanted if prompt not in kept]
        if new:
            began = time.perf_counter()
            kept |= self.encoder.known(new, len(new)).rows
            self.seconds += time.perf_counter() - began
            self.encoded += len(new)
            self.read |= {prompt: self.encoder.tokenizer.read(prompt) for prompt in new}
        for prompt in wanted:  # those of now are the last to be forgotten
            kept[prompt] = kept.pop(prompt)
        self.rows = dict(list(kept.items())[-max(self.most, len(wanted)) :])
        self.read = {prompt: self.read[prompt] for prompt in self.rows}
        return super().__call__(prompts)

    def tokens(self, prompt: str) -> int:
        """Of a prompt that was encoded just now, without its padding."""
        return int(self.rows[prompt]["mask"].sum())
