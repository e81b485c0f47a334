"""The text tokenizer of a Qwen2 folder as one file, whichever files the folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from hart_runtime.common.errors import InputError, guarded, shown
from hart_runtime.common.json_files import object_in, read_json
from hart_runtime.common.text_files import lines_of, read_text
from hart_runtime.common.tokenizer_file import MOST_ROWS, check_number, open_tokenizer_file

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 splits text before the byte pairs are merged: part of the format."""


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_vocabulary(folder: Path, rows: int = MOST_ROWS) -> Tokenizer:
    """The tokenizer of a folder, with its padding written into it.

    Published folders hold ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``. Padding and
    added tokens are in ``tokenizer_config.json``, which has the last word, as in transformers.

    Args:
        rows: of the text encoder's embedding. A vocabulary may be smaller, and Qwen2's is.

    Raises:
        InputError: no tokenizer there, or it cannot be used: a token has a number that the embedding has
            no row for, or it names no padding.
    """
    settings = folder / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    source = next((f for f in (folder / "tokenizer.json", folder / "vocab.json") if f.is_file()), None)
    if source is None:
        raise InputError(
            f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, beside the text "
            f"encoder's weights"
        )
    make = open_tokenizer_file if source.name == "tokenizer.json" else _byte_pairs
    vocabulary = make(source, rows)
    _add_tokens(vocabulary, object_in(values, "added_tokens_decoder", str(settings)), rows, settings)
    if (older := folder / "added_tokens.json").is_file() and "added_tokens_decoder" not in values:
        _add_older_tokens(vocabulary, read_json(older), rows, older)
    padding = vocabulary.padding or {}
    token = _content(values.get("pad_token")) or padding.get("pad_token")
    number = vocabulary.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise InputError(
            f"{source}: names no padding; expected a pad_token of its vocabulary in "
            f"{settings}, found {shown(token)}"
        )
    side = values.get("padding_side") or padding.get("direction") or "right"
    if side not in ("left", "right"):
        raise InputError(f"{settings}: padding_side: expected 'left' or 'right', found {shown(side)}")
    vocabulary.enable_padding(direction=side, pad_id=number, pad_token=token)
    guarded(lambda: vocabulary.encode("a word"), f"{source}: not a tokenizer file")
    return vocabulary


def _byte_pairs(file: Path, rows: int) -> Tokenizer:
    """Qwen2's byte-level BPE from the two files that older folders keep it in."""
    words, pairs = read_json(file), []
    for token, number in words.items():
        check_number(token, number, rows, file)
    merges = file.with_name("merges.txt")
    for line in lines_of(read_text(merges)):
        if line and not line.startswith("#version"):
            first, _, second = line.partition(" ")
            if not second or " " in second:
                raise InputError(f"{merges}: expected two tokens a line, found {shown(line)}")
            pairs.append((first, second))
    vocabulary = guarded(lambda: Tokenizer(BPE(words, pairs)), f"{file}: not a tokenizer file")
    vocabulary.normalizer = normalizers.NFC()
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.ByteLevel()
    return vocabulary


def _add_tokens(vocabulary: Tokenizer, added: dict[str, Any], rows: int, settings: Path) -> None:
    """Tokens that stand for themselves, under the numbers the checkpoint gives them."""
    where = f"{settings}: added_tokens_decoder"
    numbered = {}
    for key, values in added.items():
        content = _content(values)
        if not key.isascii() or not key.isdigit() or len(key) > len(str(MOST_ROWS)):
            raise InputError(f"{where}: expected the number of a token, found {shown(key)}")
        if not isinstance(values, dict) or not isinstance(content, str) or not content:
            raise InputError(f"{where}: {key}: expected an object with its content, found {shown(values)}")
        if wrong := [flag for flag in FLAGS if not isinstance(values.get(flag, False), bool)]:
            found = shown(values[wrong[0]])
            raise InputError(f"{where}: {key}: {wrong[0]}: expected true or false, found {found}")
        check_number(content, int(key), rows, settings)
        numbered[int(key)] = AddedToken(content, **{flag: values[flag] for flag in FLAGS if flag in values})
    _number(vocabulary, numbered, settings)


def _add_older_tokens(vocabulary: Tokenizer, added: dict[str, Any], rows: int, file: Path) -> None:
    """The same from the file that was there before ``tokenizer_config.json`` held them."""
    first: dict[int, str] = {}
    for content, number in added.items():
        check_number(content, number, rows, file)
        if (other := first.setdefault(number, content)) != content:
            raise InputError(f"{file}: {shown(other)} and {shown(content)} have one number, {number}")
    tokens = {number: AddedToken(content, normalized=False) for content, number in added.items()}
    _number(vocabulary, tokens, file)


def _number(vocabulary: Tokenizer, tokens: dict[int, AddedToken], source: Path) -> None:
    """Add tokens, and see that the library gives them the numbers they are to have."""
    for number, token in sorted(tokens.items()):
        vocabulary.add_tokens([token])
        if (given := vocabulary.token_to_id(token.content)) != number:
            raise InputError(
                f"{source}: {shown(token.content)} has number {number}, the vocabulary gives it {given}"
            )


def _content(token: object) -> object:
    """A token's text, which newer files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token
