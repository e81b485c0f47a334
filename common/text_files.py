"""Text files as people save them: with or without a byte order mark, with any end of line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from hart_runtime.common.errors import InputError

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
POINTER = re.compile(rb"\s*version https://(git-lfs\.github|hawser\.github)\.com/spec/")
PAGE = re.compile(rb"\s*<(!doctype|!--|html|head|body|\?xml|error>)", re.IGNORECASE)


def read_text(file: Path, source: str | None = None) -> str:
    """All of a file, without a byte order mark; no end of line is changed.

    Args:
        source: what messages call it; its path if left out.

    Raises:
        InputError: it cannot be read, or is no UTF-8 text.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{source or file}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a path that holds NUL
        raise InputError(f"{source or file}: cannot be read ({error})") from None
    return decoded(raw, source or str(file))


def decoded(raw: bytes, source: str) -> str:
    """Bytes of a file as text; raises InputError as :func:`read_text`."""
    if other := not_the_file(raw):
        raise InputError(f"{source}: {other}")
    if raw.startswith(UTF_16):
        raise InputError(f"{source}: is UTF-16 text, expected UTF-8; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{source}: holds NUL characters, as UTF-16 text does; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """Lines as editors show them: other characters that Unicode calls separators do not end one."""
    return re.split("\r\n|\n|\r", text)


def not_the_file(start: bytes) -> str | None:
    """What a download left in a file's place, in words, by its first bytes; None if it may be the file."""
    start = start.removeprefix(codecs.BOM_UTF8)
    if POINTER.match(start):
        size = re.search(rb"^size (\d{1,15})\s*$", start, re.MULTILINE)
        what = f" ({int(size[1]) / 1e6:,.1f} MB)" if size else ""
        return f"is a git-lfs pointer and not the file itself{what}; run: git lfs pull, or download it"
    if PAGE.match(start):
        return "is a web page and not the file itself; download the file"
    return None
