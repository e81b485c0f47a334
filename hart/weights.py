"""Tensors of weight files, as training tools and hubs leave them, for the names that a network has.

Names may stand below a prefix, below keys of nested dictionaries, and with the wrappers of training
tools in between. The prefix is one below which every name of the network is found; of several,
:func:`~hart_runtime.common.weight_files.choose_set` takes one by its name, and nothing is guessed. Pickles
are read with ``weights_only=True``, never otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from hart_runtime.common.errors import InputError, Made, guarded, named, shown
from hart_runtime.common.weight_files import WeightFiles, choose_set, is_averaged
from hart_runtime.hart.damage import damaged_part, is_safetensors, what_is_wrong

log = logging.getLogger(__name__)

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that DataParallel, torch.compile and their like put in."""
FLOATS = ("float64", "float32", "bfloat16", "float16")
WHOLE = ("int64", "int32", "int16", "int8", "uint8")
STORED = {
    **{"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
"""What safetensors calls the types that are read."""
NOTABLE = 0.01
"""The share of a matrix that may become zero without a word."""
DEPTH = 8


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file."""

    file: Path
    container: tuple[str, ...]
    """Keys of the dictionaries that it lies in."""
    key: str
    shape: list[int]
    kind: str
    """Its type, and whatever else makes it no plain array of numbers on the CPU."""
    read: Callable[[], Tensor]

    @property
    def readable(self) -> bool:
        """Whether it is a plain array of numbers, whole or not."""
        return self.kind in (*FLOATS, *WHOLE)

    @property
    def path(self) -> str:
        return ".".join((*self.container, self.key))

    @property
    def name(self) -> str:
        """Without what training tools put in."""
        return ".".join(part for part in self.path.split(".") if part not in WRAPPERS)

    def __str__(self) -> str:
        return f"{self.file}: {named(self.path)}"


@contextlib.contextmanager
def opened(weights: WeightFiles) -> Iterator[list[Stored]]:
    """All tensors that count: where there is an index, those that it assigns to their file.

    Raises:
        InputError: a file is broken, or is not what the index says.
    """
    with contextlib.ExitStack() as stack:
        found = [entry for file in weights.files for entry in _entries(file, stack)]
        if weights.index is not None:
            paths = {(entry.path, entry.file.name) for entry in found}
            for key, name in weights.places.items():
                if (key, name) not in paths:
                    raise InputError(f"{weights.index}: says that {key} is in {name}, which does not hold it")
            unnamed = [entry for entry in found if entry.path not in weights.places]
            if unnamed:
                raise InputError(f"{unnamed[0]}: is not named by {weights.index.name}")
            found = [entry for entry in found if weights.places[entry.path] == entry.file.name]
        yield found


def check_whole(weights: WeightFiles) -> None:
    """Compare the checksums that pickled files have of their parts; raises InputError."""
    for file in weights.files:
        if part := _from(file, functools.partial(damaged_part, file)):
            raise InputError(f"{file}: {shown(part)} in it is not as it was written; download it again")


class Fitted(NamedTuple):
    """What of weight files is a network's."""

    tensors: dict[str, Stored]
    """By name."""
    tables: dict[str, Stored]
    """Those that inference does not read, by their name below the prefix."""
    unexpected: list[str]
    """Names that belong to nothing."""


def fit(
    entries: Sequence[Stored],
    expected: Mapping[str, Sequence[int]],
    unused: Sequence[re.Pattern[str]],
    ema: bool | None,
) -> Fitted:
    """Which tensor belongs to which name of a network.

    Args:
        expected: shapes by name.
        ema: as for :func:`hart_runtime.common.weight_files.choose_set`.

    Raises:
        InputError: two tensors for one name, or several sets of weights and no rule which counts.
    """
    names = expected.keys()
    prefix, *other_sets = sets_of(entries, names, ema)
    if ema is False and is_averaged(prefix):
        log.warning("%s: holds averaged weights and no others, they are used", entries[0].file)
    homes = {entry.container for entry in entries if _below(prefix, entry.name) in names}
    fitting: dict[str, Stored] = {}
    tables: dict[str, Stored] = {}
    unexpected = []
    for entry in entries:
        name = _below(prefix, entry.name)
        if name in names:
            if name in fitting:
                raise InputError(
                    f"{entry}: is stored twice, also as {fitting[name]}; nothing says which counts"
                )
            fitting[name] = entry
        elif any(pattern.fullmatch(entry.name) for pattern in unused):
            tables[name or entry.name] = entry
        elif any(_below(other, entry.name) in names for other in other_sets):
            continue
        elif entry.container in homes and entry.shape:  # single numbers count steps
            unexpected.append(entry.path)
    if ema is not False and not is_averaged(prefix):
        others = [entry for entry in entries if entry.container not in homes]
        if unread := [e for e in others if is_averaged(e.path)] or _copies(others, expected.values()):
            log.warning("%s: averaged weights in a form that is not read, the others are used", unread[0])
    return Fitted(fitting, tables, unexpected)


def check_kind(entry: Stored) -> None:
    """Refuse what is no plain tensor of real numbers; raises InputError."""
    if entry.kind not in FLOATS:
        raise InputError(f"{entry}: expected {', '.join(FLOATS)}, found {entry.kind}")


def read(entry: Stored, dtype: torch.dtype) -> Tensor:
    """The tensor in another type.

    Raises:
        InputError: a value is not finite, or is not in this type.
    """
    tensor = _from(entry.file, entry.read)
    converted = tensor.to(dtype)
    if not tensor.numel():
        return converted
    ends = [float(end) for end in torch.aminmax(tensor)]
    if not all(map(_is_finite, ends)):
        bad = int(tensor.isfinite().logical_not().sum())
        raise InputError(f"{entry}: holds NaN or infinity, {bad} of {tensor.numel()} values")
    if not all(bool(end.to(dtype).isfinite()) for end in torch.tensor(ends, dtype=torch.float64)):
        largest = max(ends, key=abs)
        enough = abs(largest) <= torch.finfo(torch.float32).max
        raise InputError(
            f"{entry}: holds {largest:g}, beyond the {torch.finfo(dtype).max:g} of {_kind_word(dtype)}; "
            + ("give `precision='fp32'`" if enough else "no precision holds it")
        )
    if torch.finfo(dtype).smallest_normal > torch.finfo(tensor.dtype).smallest_normal:
        lost = int(tensor.count_nonzero() - converted.count_nonzero()) / tensor.numel()
        if lost > NOTABLE:
            words = "%s: %.0f%% of its values are too small for %s and become 0"
            log.warning(words, entry, 100 * lost, _kind_word(dtype))
    return converted


def sets_of(entries: Sequence[Stored], names: Collection[str], ema: bool | None) -> tuple[str, ...]:
    """What is in front of the network's own names: of each set that is whole, the chosen one first.

    Where none is whole it is that of the largest part of one, and "" without any.

    Raises:
        InputError: as :func:`~hart_runtime.common.weight_files.choose_set`.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        parts = entry.name.split(".")
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in names:
                found[".".join(parts[:start])].add(rest)
    whole = [prefix for prefix, held in found.items() if len(held) == len(names)]
    if not whole:
        return tuple(sorted(found, key=lambda prefix: (-len(found[prefix]), len(prefix)))[:1]) or ("",)
    chosen = choose_set(entries[0].file, whole, ema)
    return (chosen, *(prefix for prefix in whole if prefix != chosen))


def _copies(entries: Iterable[Stored], shapes: Iterable[Sequence[int]]) -> list[Stored]:
    """Tensors of one dictionary or list that has one of every shape of the network, whatever their names."""
    wanted = Counter(map(tuple, shapes))
    held: dict[tuple[str, ...], list[Stored]] = defaultdict(list)
    for entry in entries:
        held[entry.container].append(entry)
    copies = (found for found in held.values() if not wanted - Counter(tuple(e.shape) for e in found))
    return next(copies, [])


def _below(prefix: str, name: str) -> str | None:
    if not prefix:
        return name
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def _entries(file: Path, stack: contextlib.ExitStack) -> Iterator[Stored]:
    """What a weight file holds, read when it is asked for."""
    if wrong := _from(file, lambda: what_is_wrong(file)):
        raise InputError(f"{file}: {wrong}")
    if is_safetensors(file):
        opened = _from(file, lambda: stack.enter_context(safe_open(file, framework="pt")))
        for key in opened.keys():  # noqa: SIM118 - not a dict
            part = opened.get_slice(key)
            kind = part.get_dtype()
            read = functools.partial(opened.get_tensor, key)
            yield Stored(file, (), key, list(part.get_shape()), STORED.get(kind, kind), read)
        return
    state = _from(file, lambda: _unpickled(file))
    found = list(_nested(state, file, (), set()))
    if not found:
        raise InputError(f"{file}: expected a dictionary of tensors")
    yield from found


def _unpickled(file: Path) -> Any:
    with file.open("rb") as start:
        mapped = start.read(2) == b"PK"  # the format before torch 1.6 cannot be mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training script
            return torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError:
        reason = "it holds more than tensors, and pickled code is never run"
        raise InputError(f"{file}: cannot be read as a weight file ({reason})") from None


def _nested(state: object, file: Path, container: tuple[str, ...], seen: set[int]) -> Iterator[Stored]:
    """Tensors in dictionaries, and in lists below them; numbers and words beside are of the training.

    Args:
        seen: what was met already, and is not followed again: a pickle may hold one dictionary many
            times, or inside itself.
    """
    if len(container) > DEPTH:
        return
    pairs: Iterable[tuple[object, object]]
    if isinstance(state, Mapping):
        pairs = state.items()
    elif isinstance(state, list | tuple) and container:
        pairs = enumerate(state)
    else:
        return
    again = id(state) in seen
    seen.add(id(state))
    for key, value in pairs:
        if isinstance(value, Tensor):
            shape = [] if value.is_nested else list(value.shape)
            yield Stored(file, container, str(key), shape, _kind(value), value.detach)
        elif not again:
            yield from _nested(value, file, (*container, str(key)), seen)


def _kind(tensor: Tensor) -> str:
    word = _kind_word(tensor.dtype)
    if tensor.is_nested:
        return f"{word}, nested"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"{word}, {'quantized' if tensor.is_quantized else _kind_word(tensor.layout)}"
    return word if tensor.device.type == "cpu" else f"{word} without values ({tensor.device.type})"


def _kind_word(kind: object) -> str:
    return str(kind).removeprefix("torch.")


def _is_finite(number: float) -> bool:
    return number - number == 0


def _from(file: Path, work: Callable[[], Made]) -> Made:
    """What a library makes of a weight file, damaged or malicious as it may be."""
    return guarded(work, f"{file}: cannot be read as a weight file")
