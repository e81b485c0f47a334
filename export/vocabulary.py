"""The text tokenizer of a Qwen2 folder as one file, whichever files the folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from hart_runtime.common.errors import InputError, shown
from hart_runtime.common.json_files import object_in, read_json
from hart_runtime.common.text_files import lines_of, read_text

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2 splits text before the byte pairs are merged: part of the format."""


MOST_ROWS = 1 << 20
"""Of any embedding; a number far beyond makes the tokenizers library list all that are missing below it."""
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
    make = _whole if source.name == "tokenizer.json" else _byte_pairs
    vocabulary = _guarded(lambda: make(source, rows), source)
    _add_tokens(vocabulary, object_in(values, "added_tokens_decoder", str(settings)), rows, settings)
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
    return _guarded(lambda: vocabulary, source)


def _guarded(make: Callable[[], Tokenizer], source: Path) -> Tokenizer:
    """A tokenizer that has cut a word; whatever the library says of one that cannot is a sentence."""
    try:
        vocabulary = make()
        vocabulary.encode("a word")
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare exceptions, and panics of Rust, which are none
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{source}: not a tokenizer file ({reason})") from None
    return vocabulary


def _whole(file: Path, rows: int) -> Tokenizer:
    values = read_json(file)
    for token, number in _numbers(values):
        _check_number(token, number, rows, file)
    return Tokenizer.from_str(json.dumps(values))


def _byte_pairs(file: Path, rows: int) -> Tokenizer:
    """Qwen2's byte-level BPE from the two files that older folders keep it in."""
    words, pairs = read_json(file), []
    for token, number in words.items():
        _check_number(token, number, rows, file)
    merges = file.with_name("merges.txt")
    for line in lines_of(read_text(merges)):
        if line and not line.startswith("#version"):
            first, _, second = line.partition(" ")
            if not second or " " in second:
                raise InputError(f"{merges}: expected two tokens a line, found {shown(line)}")
            pairs.append((first, second))
    vocabulary = Tokenizer(BPE(words, pairs))
    vocabulary.normalizer = normalizers.NFC()
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary.decoder = decoders.ByteLevel()
    return vocabulary


def _numbers(values: Any) -> Iterator[tuple[object, object]]:
    """All tokens of a parsed ``tokenizer.json`` with their numbers, wherever it holds some."""
    if isinstance(values, list):
        for inner in values:
            yield from _numbers(inner)
    if not isinstance(values, dict):
        return
    for key, inner in values.items():
        if key == "vocab" and isinstance(inner, dict):
            yield from inner.items()
        elif key == "vocab" and isinstance(inner, list):  # tokens with their scores, in order
            yield from ((pair, number) for number, pair in enumerate(inner))
        elif key == "ids" and isinstance(inner, list):
            yield from (("of the post-processor", number) for number in inner)
        elif key in {"sep", "cls"} and isinstance(inner, list) and len(inner) == 2:
            yield inner[0], inner[1]
        elif key in {"pad_id", "id"} and isinstance(inner, int):
            yield values.get("content", values.get("pad_token")), inner
        else:
            yield from _numbers(inner)


def _check_number(token: object, number: object, rows: int, source: Path) -> None:
    if type(number) is not int or not 0 <= number < rows:
        raise InputError(
            f"{source}: token {shown(token)} has number {shown(number)}, the text encoder's embedding has "
            f"rows 0 to {rows - 1}"
        )


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
        _check_number(content, int(key), rows, settings)
        numbered[int(key)] = AddedToken(content, **{flag: values[flag] for flag in FLAGS if flag in values})
    for number, token in sorted(numbered.items()):
        vocabulary.add_tokens([token])
        if vocabulary.token_to_id(token.content) != number:
            raise InputError(
                f"{settings}: {token.content!r} has number {number}, the vocabulary gives it "
                f"{vocabulary.token_to_id(token.content)}"
            )


def _content(token: object) -> object:
    """A token's text, which newer files wrap in an object."""
    return token.get("content") if isinstance(token, dict) else token
