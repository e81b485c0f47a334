"""Prompts as a command is given them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.text_files import decoded, lines_of, read_text

log = logging.getLogger(__name__)


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines are left out. "-" is standard input."""
    said = parameter("prompts_file", file)
    text = decoded(sys.stdin.buffer.read(), said) if str(file) == "-" else read_text(file, said)
    prompts = [line.strip() for line in lines_of(text) if line.strip()]
    if not prompts:
        raise InputError(f"{said}: holds no prompt")
    return prompts


def as_typed(prompt: str) -> str:
    """A prompt of the command line in UTF-8, where Python took its bytes for another encoding (LANG=C)."""
    try:
        return os.fsencode(prompt).decode() if any("\udc80" <= c <= "\udcff" for c in prompt) else prompt
    except UnicodeError:  # it is none, which is told of later
        return prompt


def hint_at_quotes(prompts: Sequence[str]) -> None:
    if len(prompts) > 1 and not any(" " in prompt.strip() for prompt in prompts):
        words = ", ".join(map(repr, prompts[:5])) + (", ..." if len(prompts) > 5 else "")
        log.warning("each word is a prompt of its own (%s); a prompt of several words needs quotes", words)
