"""Why a weight file cannot be one, said before a library is asked to read it."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import shown
from hart_runtime.common.text_files import not_the_file

START = 4096
LONGEST_HEADER = 100_000_000
"""Bytes, of a safetensors file."""
SIZES = {"Double": 8, "Float": 4, "Long": 8, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
"""Bytes of a number in a pickled storage, by the storage's name; one where it is none of these."""


def is_safetensors(file: Path) -> bool:
    """By what is inside, whatever its name."""
    with file.open("rb") as opened:
        start = opened.read(9)
    return start[8:9] == b"{" or (file.suffix.lower() == ".safetensors" and start[:1] not in (b"P", b"\x80"))


def what_is_wrong(file: Path) -> str | None:
    """What a weight file is instead, or what of it is missing, in words; None if it may be whole.

    Raises:
        OSError: it cannot be read.
    """
    if not file.is_file():
        return "is no regular file" if file.exists() else "no such file"
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(START)
    if not start:
        return "is empty; download it again"
    if other := not_the_file(start):
        return other
    if line := _text(start):
        return f"is text and no weight file, it begins with {shown(line)}; download the file itself"
    if not start.strip(b"\0"):
        return "begins with zeros, as a download that did not end; download it again"
    return _safetensors_damage(file, size) if is_safetensors(file) else _pickle_damage(file, size, start)


def _pickle_damage(file: Path, size: int, start: bytes) -> str | None:
    if file.suffix.lower() == ".safetensors":
        return "is a file of PyTorch's under another name; call it pytorch_model.bin"
    if start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return _ends_early(_pickled_end(file) - size, f"found {size:,}")
    return None


def damaged_part(file: Path) -> str | None:
    """Of a pickled file, the part that is not as it was written, by its checksum; reads all of it."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as parts:
        for part in parts.infolist():
            try:
                with parts.open(part) as opened:
                    while opened.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, EOFError):
                if part.CRC:  # PyTorch can be told to compute none
                    return part.filename
    return None


def _text(start: bytes) -> str | None:
    """The first line of something that people read, as servers send it in a file's place."""
    if re.search(rb"[\0-\x08\x0e-\x1f\x7f]", start) or start.startswith(b"\x80"):
        return None
    try:
        text = start.decode("utf-8", "strict" if len(start) < START else "ignore").strip()
    except UnicodeDecodeError:
        return None
    return text.partition("\n")[0]


def _ends_early(missing: int, found: str) -> str:
    least = f"at least {missing:,} bytes are missing" if missing > 0 else "its end is missing"
    return f"is cut off, {least} ({found}); download it again"


def _safetensors_damage(file: Path, size: int) -> str | None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > LONGEST_HEADER or size < 9:
            return "is no safetensors file"
        if 8 + length > size:
            return _ends_early(8 + length - size, f"found {size:,}")
        try:
            pairs: list[tuple[str, Any]] = json.loads(opened.read(length), object_pairs_hook=list)
            header = {name: dict(described) for name, described in pairs}
            end = (
                8
                + length
                + max((v["data_offsets"][1] for k, v in header.items() if k[:2] != "__"), default=0)
            )
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None  # the library says of what is wrong
    if len(header) < len(pairs):
        names = [name for name, _ in pairs]
        return f"stores {shown(next(name for name in header if names.count(name) > 1))} twice"
    if size < end:
        counts = f"{end - size:,} bytes are missing (expected {end:,}, found {size:,})"
        return f"is cut off, {counts}; download it again"
    return f"is {size - end:,} bytes longer than its header says; download it again" if size > end else None


def _pickled_end(file: Path) -> int:
    """The least size of a pickled file, by the storages that its first record lists; nothing is unpickled."""
    storages: dict[object, int] = {}
    pushed: list[Any] = []
    memo: dict[object, Any] = {}
    with file.open("rb") as opened:
        header = opened.read(30)
        opened.seek(30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
        start = opened.tell()
        try:
            for code, argument, position in pickletools.genops(opened):
                if code.name in {"BINPUT", "LONG_BINPUT"}:
                    memo[argument] = pushed[-1] if pushed else None
                elif code.name in {"BINGET", "LONG_BINGET"}:
                    pushed.append(memo.get(argument))
                elif code.name == "BINPERSID" and len(pushed) > 3:  # kind, key, device, numbers
                    kind, key, _, count = pushed[-4:]
                    name = str(kind).rpartition(" ")[2].removesuffix("Storage")
                    storages[key] = count * SIZES.get(name, 1)
                elif argument is not None:
                    pushed.append(argument)
                start = max(start, position or 0)
        except Exception:  # cut off inside the list itself
            return start
    return start + sum(storages.values())
