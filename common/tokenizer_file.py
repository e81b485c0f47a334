"""A ``tokenizer.json`` from elsewhere, checked before the tokenizers library opens it.

The library lists every number that no token has, to standard output, up to the largest there is; and what
it cannot use it tells with bare exceptions and with panics of Rust, which are no exceptions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hart_runtime.common.errors import InputError, guarded, shown
from hart_runtime.common.json_files import read_json

MOST_ROWS = 1 << 20
"""Of any embedding."""


def open_tokenizer_file(file: Path, rows: int = MOST_ROWS) -> Tokenizer:
    """The tokenizer of a file.

    Args:
        rows: of the text encoder's embedding. A vocabulary may be smaller, and Qwen2's is.

    Raises:
        InputError: a token has a number that the embedding has no row for, or another token's; or the
            library cannot use the file.
    """
    return make_tokenizer(read_json(file), file, rows)


def make_tokenizer(values: dict[str, Any], source: Path, rows: int = MOST_ROWS) -> Tokenizer:
    """The same of a parsed file; messages begin with ``source``."""
    failed = f"{source}: not a tokenizer file"
    guarded(lambda: _check_numbers(values, rows, source), failed)
    return guarded(lambda: Tokenizer.from_str(json.dumps(values)), failed)


def _check_numbers(values: Any, rows: int, source: Path) -> None:
    named: dict[object, object] = {}
    for token, number, names in _numbers(values):
        check_number(token, number, rows, source)
        if names and named.setdefault(number, token) != token:
            both = f"{shown(named[number])} and {shown(token)}"
            raise InputError(f"{source}: tokens {both} have number {number}")


def check_number(token: object, number: object, rows: int, source: Path) -> None:
    """Raises InputError for a token that the embedding has no row for."""
    if type(number) is not int or not 0 <= number < rows:
        raise InputError(
            f"{source}: token {shown(token)} has number {shown(number)}, the text encoder's embedding has "
            f"rows 0 to {rows - 1}"
        )


def _numbers(values: Any) -> Iterator[tuple[object, object, bool]]:
    """All tokens with their numbers, wherever the parsed file holds some; and whether it names them there."""
    if isinstance(values, list):
        for inner in values:
            yield from _numbers(inner)
    if not isinstance(values, dict):
        return
    for key, inner in values.items():
        if key == "vocab" and isinstance(inner, dict):
            yield from ((token, number, True) for token, number in inner.items())
        elif key == "vocab" and isinstance(inner, list):  # tokens with their scores, in order
            yield from ((pair, number, False) for number, pair in enumerate(inner))
        elif key == "ids" and isinstance(inner, list):
            yield from (("of the post-processor", number, False) for number in inner)
        elif key in {"sep", "cls"} and isinstance(inner, list) and len(inner) == 2:
            yield inner[0], inner[1], False
        elif key == "pad_id" or (key == "id" and "content" in values):
            yield values.get("content", values.get("pad_token")), inner, key == "id"
        else:
            yield from _numbers(inner)
