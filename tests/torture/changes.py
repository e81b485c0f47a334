"""Changes of files, of any and of those whose structure is known, made by a random generator."""

from __future__ import annotations

import copy
import json
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

Json = Any
Path = tuple[str | int, ...]


class Change(NamedTuple):
    """Changed contents."""

    data: bytes
    said: str
    """What was done."""
    where: Path = ()
    """Of JSON, the place that was changed."""


NUMBERS = (0, -1, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, 1e308)
WORDS = (
    *("", "?", "batch", "2*batch", "past + length", "float33", "../x", "/etc/passwd", "x" * 5000, "a\nb"),
    *("\0", "\ud800", "日本", "[red]", "`x`", "1", "null", "9**9**9", "__import__('os')", "{}"),
)
OTHERS: tuple[Json, ...] = (None, True, False, [], {}, [[]], [1, "x"], {"a": 1}, float("nan"), float("inf"))


def change_bytes(data: bytes, rng: random.Random) -> Change:
    """As a bad disk or a broken download would."""
    size = len(data)
    place = rng.randrange(max(1, size))
    length = rng.choice((1, 4, 16, 256))
    kind = rng.choice(("bit", "bit", "noise", "zeros", "cut", "cut off", "twice", "longer", "empty"))
    if kind == "bit" and size:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        new = bytes(changed)
    elif kind in ("noise", "zeros"):
        filling = rng.randbytes(length) if kind == "noise" else bytes(length)
        new = data[:place] + filling + data[place + length :]
    elif kind == "cut":
        new = data[:place] + data[place + length :]
    elif kind == "cut off":
        new = data[:place]
    elif kind == "twice":
        new = data[:place] + data[place : place + length] + data[place:]
    elif kind == "longer":
        new = data + rng.randbytes(length)
    else:
        new = b""
    return Change(new, f"{kind} at {place} of {size}")


def _places(value: Json, at: Path = ()) -> Iterator[Path]:
    yield at
    items: Iterator[tuple[str | int, Json]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, item in items:
        yield from _places(item, (*at, key))


def _get(value: Json, place: Path) -> Json:
    for key in place:
        value = value[key]
    return value


def some_place(value: Json, rng: random.Random) -> Path:
    """Down from the top, one step after the other, so that small parts come up as often as large ones."""
    place: Path = ()
    while isinstance(value, dict | list) and value and (not place or rng.random() < 0.85):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        place, value = (*place, key), value[key]
    return place


def _other_value(value: Json, everything: Json, rng: random.Random) -> Json:
    """Of the same type often, so that it comes further."""
    if rng.random() < 0.3:
        return copy.deepcopy(rng.choice((*OTHERS, *NUMBERS, *WORDS)))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        near: tuple[Json, ...] = (value + 1, value - 1, value * 2, -value, value // 2, float(value))
        return rng.choice((*near, *near, *NUMBERS, str(value)))
    if isinstance(value, str):
        other = _get(everything, rng.choice(list(_places(everything))))
        known = other if isinstance(other, str) else value
        return rng.choice((value + "x", value[:-1], value.upper(), known, known, known, *WORDS))
    if isinstance(value, list) and value:
        item = rng.choice(value)
        return rng.choice((value[:-1], [*value, item], value[::-1], value[1:], [], [value], value * 20))
    return rng.choice(OTHERS)


def change_json(data: bytes, rng: random.Random) -> Change:
    """One value, name or list of a JSON file, or how the file is written."""
    values = json.loads(data)
    if rng.random() < 0.08:
        return _written(data, values, rng)
    place = some_place(values, rng)
    if not place:
        return Change(json.dumps(rng.choice(OTHERS)).encode(), "another document")
    parent, key = _get(values, place[:-1]), place[-1]
    kind = rng.choice(("value",) * 6 + ("gone", "swapped", "new name", "unknown", "a neighbour's"))
    names = list(parent) if isinstance(parent, dict) else []
    if kind == "gone":
        del parent[key]
    elif kind == "swapped":
        other = rng.choice(names or range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == "new name" and names:
        parent[rng.choice((*WORDS[:8], f"{key}_", *names))] = parent.pop(key)
    elif kind == "unknown" and names:
        parent[rng.choice(("x", "Depth", "__class__", "schema2", "tokens"))] = rng.choice((*OTHERS, 1, "x"))
    elif kind == "a neighbour's":
        parent[key] = copy.deepcopy(_get(values, some_place(values, rng)))
    else:
        kind = "value"
        parent[key] = _other_value(parent[key], values, rng)
    found = _get(values, place) if kind in ("value", "swapped", "a neighbour's") else ""
    return Change(_dumped(values), f"{'.'.join(map(str, place))}: {kind} {found!r:.80}", place)


def _dumped(values: Json) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")


def _written(data: bytes, values: Json, rng: random.Random) -> Change:
    """The same, or nearly, in other letters."""
    kind = rng.choice(("spaces", "sorted", "UTF-16", "mark", "deep", "twice", "comment", "long number"))
    text = data.decode()
    new = {
        "spaces": lambda: json.dumps(values, indent=7).encode(),
        "sorted": lambda: json.dumps(values, sort_keys=True).encode(),
        "UTF-16": lambda: text.encode("utf-16"),
        "mark": lambda: b"\xef\xbb\xbf" + data,
        "deep": lambda: b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b", " + data.lstrip()[1:],
        "twice": lambda: data + data,
        "comment": lambda: b"// a comment\n" + data,
        "long number": lambda: b'{"x": ' + b"9" * 5000 + b", " + data.lstrip()[1:],
    }[kind]()
    return Change(new, f"written with {kind}", ("written", kind))


def change_safetensors(data: bytes, rng: random.Random) -> Change:
    """Its header, as JSON, with the length mended or not; or its numbers."""
    if rng.random() < 0.35:
        return change_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.1:
        claimed = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63))
        return Change(struct.pack("<Q", claimed) + header + rest, f"a header of {claimed} bytes")
    if rng.random() < 0.25:
        values = json.loads(header)
        name = rng.choice([name for name in values if name != "__metadata__"])
        start, end = values[name]["data_offsets"]
        filling = rng.choice((b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", bytes(4)))
        place = start + 4 * rng.randrange(max(1, (end - start) // 4))
        return Change(
            data[: 8 + length + place] + filling + data[8 + length + place + 4 :],
            f"{name}: {filling.hex()}",
            (name,),
        )
    if rng.random() < 0.4:
        values = json.loads(header)
        name = rng.choice([name for name in values if name != "__metadata__"])
        kind = rng.choice(("type", "shape", "offsets", "name", "gone"))
        if kind == "type":
            values[name]["dtype"] = rng.choice(
                ("F16", "BF16", "I32", "I64", "F64", "BOOL", "F8_E4M3", "U8", "X")
            )
        elif kind == "shape":
            values[name]["shape"] = rng.choice((values[name]["shape"][::-1], [], [1], [2**40], [-1]))
        elif kind == "offsets":
            values[name]["data_offsets"] = values[rng.choice([n for n in values if n != "__metadata__"])][
                "data_offsets"
            ]
        else:
            item = values.pop(name)
            if kind == "name":
                values[rng.choice((f"module.{name}", f"{name}x", f"_orig_mod.{name}", ""))] = item
        new, said = _dumped(values), f"{name}: {kind}"
    else:
        change = change_json(header, rng)
        new, said = change.data, change.said
    return Change(struct.pack("<Q", len(new)) + new + rest, f"header: {said}")


def change_tokenizer(data: bytes, rng: random.Random) -> Change:
    """Ids, tokens, merges, padding and what goes before and after."""
    if rng.random() < 0.4:
        return change_json(data, rng)
    values = json.loads(data)
    model = values["model"]
    tokens = list(model["vocab"])
    token = rng.choice(tokens)
    kind = rng.choice(
        ("id", "gone", "same id", "merge", "merge gone", "pad", "side", "added id", "added", "kind")
    )
    numbers = (-1, 0, 1, len(tokens), len(tokens) + 1000, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 1.5)
    if kind == "id":
        model["vocab"][token] = rng.choice(numbers)
    elif kind == "gone":
        del model["vocab"][token]
    elif kind == "same id":
        model["vocab"][token] = model["vocab"][rng.choice(tokens)]
    elif kind == "merge":
        model.setdefault("merges", []).append(
            rng.choice((["x", "y"], "x y", ["\ud83d"], [token, token], "x"))
        )
    elif kind == "merge gone":
        model["merges"] = model.get("merges", [])[: rng.randrange(len(model.get("merges", [])) + 1)]
    elif kind == "pad":
        values["padding"] = values.get("padding") or {}
        values["padding"]["pad_id"] = rng.choice(numbers)
    elif kind == "side":
        values["padding"]["direction"] = rng.choice(("Left", "Right", "Up"))
    elif kind == "added id" and values["added_tokens"]:
        rng.choice(values["added_tokens"])["id"] = rng.choice(numbers)
    elif kind == "added":
        token_of = {"id": rng.choice(numbers), "content": rng.choice(("red", "a", "", " ")), "special": True}
        values["added_tokens"].append(
            {**token_of, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        )
    else:
        model["type"] = rng.choice(("WordPiece", "Unigram", "WordLevel", "X"))
    return Change(_dumped(values), f"tokenizer: {kind} {token!r}")


def chunks_of(png: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Kind, data and checksum of the chunks of a PNG."""
    found, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        end = place + 8 + length
        found.append((png[place + 4 : place + 8], png[place + 8 : end], png[end : end + 4]))
        place = end + 4
    return found


def png_of(chunks: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """The file of chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + check for kind, data, check in chunks
    )


def change_png(png: bytes, rng: random.Random) -> Change:
    """A chunk, its checksum mended or not; most often the text that brings the picture back."""
    if rng.random() < 0.15:
        return change_bytes(png, rng)
    chunks = chunks_of(png)
    number = rng.choice(
        [i for i, (kind, _, _) in enumerate(chunks) if kind == b"iTXt"] * 4 + [*range(len(chunks))]
    )
    kind, data, check = chunks[number]
    where: Path = ()
    said, mended = "", rng.random() < 0.85
    if kind == b"iTXt" and data.startswith(b"hart\0"):
        change = change_json(data[9:], rng)
        data, said, where = data[:9] + change.data, change.said, change.where
    elif (what := rng.choice(("bytes", "gone", "twice", "first"))) == "bytes":
        change = change_bytes(data, rng)
        data, said = change.data, change.said
    elif what == "gone":
        del chunks[number]
    else:
        chunks.insert(1 if what == "first" else number, chunks[number])
    if data != chunks[min(number, len(chunks) - 1)][1] and said:
        chunks[number] = (
            kind,
            data,
            struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))) if mended else check,
        )
    return Change(
        png_of(chunks), f"{kind.decode()}{'' if mended else ' (checksum broken)'}: {said or what}", where
    )
