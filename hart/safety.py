"""Asks ShieldGemma about prompts before they are drawn (needs torch and transformers).

ShieldGemma (arXiv 2407.21772) is a language model trained to answer Yes or No to the question
whether a text breaks a guideline. The question's form is the chat template that comes with the
model; the guideline here is our wording of what the published sampler screens for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from hart_runtime.common.errors import InputError, RunError, first_line, parameter
from hart_runtime.common.install import require

GUIDELINE = (
    '"No Harmful Pictures": A prompt must not ask for a picture that encourages violence, self-harm or '
    "crime, that threatens, bullies or demeans a person, that spreads hatred of people for what they are, "
    "or that is sexually explicit."
)
THRESHOLD = 0.5
"""Probability of Yes from which a prompt is refused; the published sampler's."""
ANSWERS = ("Yes", "No")


class SafetyModel:
    """A ShieldGemma that is open."""

    def __init__(self, source: str) -> None:
        """Raises InputError: the model is not there, or is not one that answers such questions.

        Args:
            source: its folder or hub id, read as transformers does (``HF_HUB_OFFLINE`` honoured), from
                safetensors only.
        """
        require("`source`", "safety", "torch", "transformers")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.named = parameter("source", source)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self.named}: cannot be loaded ({first_line(error)})") from None
        self.answers = _answers(self.tokenizer, source)
        self.model = model.to(self.device).eval()

    def __call__(self, prompts: Sequence[str]) -> list[float]:
        """The probability of Yes against No for each prompt.

        Raises:
            RunError: the model answered with NaN.
        """
        import torch

        scores = []
        for number, prompt in enumerate(prompts, start=1):
            inputs = self.tokenizer.apply_chat_template(
                _chat(prompt), guideline=GUIDELINE, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():  # of all the words, the logits of the last one's answer
                logits = self.model(**inputs.to(self.device), logits_to_keep=1).logits
            score = float(logits[0, -1, self.answers].float().softmax(-1)[0])
            if not math.isfinite(score):
                raise RunError(f"{self.named}: answered prompt {number} with NaN, nothing was drawn")
            scores.append(score)
        return scores


def refuse_unsafe(prompts: Sequence[str], source: str) -> None:
    """Ask the safety model about each prompt; ``source`` is as of :class:`SafetyModel`.

    Raises:
        InputError: prompts break the guideline, by number; or there is no such model.
        RunError: the model answered with NaN.
    """
    scores = SafetyModel(source)(prompts)
    found = {number: score for number, score in enumerate(scores, start=1) if score > THRESHOLD}
    if found:
        listed = ", ".join(f"prompt {number} ({score:.2f})" for number, score in found.items())
        raise InputError(
            f"{listed} refused by {parameter('source', source)}: the probability that it breaks the "
            f"guideline may be {THRESHOLD} at most; change what is asked for"
        )


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.strip()}]


def _answers(tokenizer: Any, source: str) -> list[int]:
    """Numbers of the tokens Yes and No, of a model that is asked about guidelines."""
    vocabulary = tokenizer.get_vocab()
    missing = [answer for answer in ANSWERS if answer not in vocabulary]
    template = tokenizer.chat_template
    asked = template and tokenizer.apply_chat_template(_chat("x"), guideline=GUIDELINE, tokenize=False)
    if missing or not asked or GUIDELINE not in asked:
        lacks = f"token {missing[0]}" if missing else "chat template that takes a guideline"
        raise InputError(f"{parameter('source', source)}: expected a ShieldGemma, found no {lacks}")
    return [vocabulary[answer] for answer in ANSWERS]
