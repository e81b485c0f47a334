"""The text tokenizer of a Qwen2 folder as one file, whichever files the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from hart_runtime.common.config import read_json
from hart_runtime.common.errors import InputError

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 splits text before the byte pairs are merged: part of the format."""


def read_vocabulary(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with its padding written into it.

    Published folders hold ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``. Padding and
    added tokens are in ``tokenizer_config.json``, which has the last word, as in transformers.

    Raises:
        InputError: no tokenizer there, or it names no padding.
    """
    settings = folder / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    source = next((f for f in (folder / "tokenizer.json", folder / "vocab.json") if f.is_file()), None)
    if source is None:
        raise InputError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, beside the text "
            f"encoder's weights"
        )
    try:
        whole = source.name == "tokenizer.json"
        vocabulary = Tokenizer.from_file(str(source)) if whole else _byte_pairs(folder)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"{source}: not a tokenizer file ({error})") from None
    _add_tokens(vocabulary, values.get("added_tokens_decoder") or {}, settings)
    padding = vocabulary.padding or {}
    token = _content(values.get("pad_token")) or padding.get("pad_token")
    number = vocabulary.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise InputError(
            f"{source}: names no padding; expected a pad_token of its vocabulary in "
            f"{settings}, found {token!r}"
        )
    side = values.get("padding_side") or padding.get("direction") or "right"
    if side not in {"left", "right"}:
        raise InputError(f"{settings}: padding_side: expected 'left' or 'right', found {side!r}")
    vocabulary.enable_padding(direction=side, pad_id=number, pad_token=token)
    return vocabulary


def _byte_pairs(folder: Path) -> Tokenizer:
    """Qwen2's byte-level BPE from the two files that older folders keep it in."""
    vocabulary = Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    vocabulary.normalizer = normalizers.NFC()
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.ByteLevel()
    return vocabulary


def _add_tokens(vocabulary: Tokenizer, added: dict[str, Any], settings: Path) -> None:
    """Tokens that stand for themselves, under the numbers the checkpoint gives them."""
    for number, values in sorted(added.items(), key=lambda item: int(item[0])):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {flag: bool(values[flag]) for flag in flags if flag in values}
        content = values["content"]
        vocabulary.add_tokens([AddedToken(content, **options)])
        if vocabulary.token_to_id(content) != int(number):
            raise InputError(
                f"{settings}: {content!r} has number {number}, the vocabulary gives it "
                f"{vocabulary.token_to_id(content)}"
            )


def _content(token: object) -> object:
    """A token's text, which newer files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token
