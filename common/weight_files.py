"""Which files of a folder hold a network's weights, by rules that are written down and told of.

The averaged ones (EMA) come first, where they are wanted: files and folders with the word "ema" in
their names. Otherwise ``model.safetensors``, an index with its shards, or ``pytorch_model.bin``, in the
order of :data:`NAMES`; and where none of these is there, the only weight file that is. Capitals are
small letters. What several sets inside one file are called is chosen by the same words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hart_runtime.common.errors import InputError, listed, shown
from hart_runtime.common.json_files import object_in, read_json

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
INDEX = ".index.json"
SHARD = re.compile(r"(?i)-\d+-of-\d+\.")
OF_TRAINING = re.compile(r"(?i)(optimizer|scheduler|scaler|rng_state|training_args|random_states).*")


@dataclass(frozen=True)
class WeightFiles:
    """Files that are read together."""

    files: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    """By the index: the name of the file that holds each tensor."""
    passed_over: tuple[str, ...] = ()
    """Other weights of the same folder."""
    averaged: bool = False
    """Whether they are called so."""


def any_weights(folder: Path) -> bool:
    """Whether a folder holds any tensors; an index alone holds none, as downloads of ``*.json`` leave it."""
    for entry in folder.iterdir():
        if entry.name.lower().endswith(SUFFIXES) and SHARD.search(entry.name):
            return True
        if not entry.name.lower().endswith(INDEX) and _holds_weights(entry):
            return True
    return False


def find_weights(folder: Path, ema: bool | None) -> WeightFiles:
    """The weights of a network; none of them is read.

    Args:
        ema: True for averaged weights, False for the others, None for averaged ones if there are any. Where
            no file is called so, they may be inside another: see :func:`choose_set`.

    Raises:
        InputError: there are none, or several among which no rule decides, or an index names a file
            that is not there.
    """
    there = sorted(entry for entry in folder.iterdir() if _holds_weights(entry))
    averaged = [entry for entry in there if is_averaged(entry.name)]
    plain = [entry for entry in there if not is_averaged(entry.name)]
    called = bool(averaged) and ema is not False
    chosen = _first(folder, averaged if called else plain)
    if chosen.is_dir():
        chosen = _first(chosen, sorted(entry for entry in chosen.iterdir() if _holds_weights(entry)))
    others = tuple(entry.name for entry in there if entry not in (chosen, chosen.parent))
    if not chosen.name.lower().endswith(INDEX):
        return WeightFiles((chosen,), passed_over=others, averaged=called)
    places = _read_index(chosen)
    files = tuple(chosen.parent / name for name in sorted(set(places.values())))
    return WeightFiles(files, chosen, places, others, called)


def choose_set(file: Path, sets: Sequence[str], ema: bool | None) -> str:
    """Which of several sets of weights in one file is used, by the keys that they lie below.

    Args:
        ema: as for :func:`find_weights`.

    Raises:
        InputError: none is averaged, and that is asked for; or no rule says which.
    """
    averaged = [name for name in sets if is_averaged(name)]
    if ema and not averaged:
        raise InputError(
            f"{file}: `ema`: expected averaged weights, in a file such as ema_model.bin or below a key such "
            f"as ema, found none that are whole"
        )
    plain = [name for name in sets if name not in averaged]
    chosen = averaged if averaged and (ema is not False or not plain) else plain
    if len(chosen) > 1:
        where = " and ".join(map(shown, chosen))
        raise InputError(
            f"{file}: holds several sets of weights, below {where}, and nothing says which; save one of "
            f"them by itself"
        )
    return chosen[0]


def is_averaged(name: str) -> bool:
    """Whether a file, a folder or a key is called one of averaged weights; "non_ema" is the opposite."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return ("ema" in words and "non" not in words) or "averaged" in words


def _holds_weights(entry: Path) -> bool:
    if entry.is_dir():
        return is_averaged(entry.name) and any(map(_holds_weights, entry.iterdir()))
    named = entry.name.lower().endswith((*SUFFIXES, *(f"{suffix}{INDEX}" for suffix in SUFFIXES)))
    if not named or SHARD.search(entry.name) or OF_TRAINING.fullmatch(entry.name):
        return False
    if not entry.exists():
        raise InputError(f"{entry}: is a link to {str(entry.readlink())!r} and nothing is there; download it")
    if not entry.is_file():
        raise InputError(f"{entry}: expected a weight file, found a device or a FIFO, which has no end")
    return True


def _first(folder: Path, there: list[Path]) -> Path:
    """The one that comes first by its name, or the only one."""
    known = {entry.name.lower(): entry for entry in there}  # of two spellings, the small one
    for name in NAMES:
        if name in known:
            return known[name]
    if len(there) == 1:
        return there[0]
    if len(there) > 1:
        order = [name.removeprefix("model").removeprefix("pytorch_model") for name in NAMES]
        stems = {name.partition(".")[0] for name in known}
        if len(stems) == 1:  # one set of weights in several formats
            suffixes = {name.removeprefix(*stems): entry for name, entry in known.items()}
            return next((suffixes[suffix] for suffix in order if suffix in suffixes), there[0])
        names = listed([entry.name for entry in there])
        raise InputError(f"{folder}: several weights, and no rule says which: {names}; keep one of them")
    if shards := sorted(entry.name for entry in folder.iterdir() if SHARD.search(entry.name)):
        raise InputError(f"{folder}: expected {NAMES[1]} or its like beside shards, found {shards[0]} alone")
    raise InputError(
        f"{folder}: no weights, expected model.safetensors, a sharded index or pytorch_model.bin"
    )


def _read_index(index: Path) -> dict[str, str]:
    places = object_in(read_json(index), "weight_map", str(index))
    if not places:
        raise InputError(f"{index}: expected a weight_map that names the shards")
    for name in dict.fromkeys(map(_name_or_none, places.values())):
        if name is None:
            raise InputError(f"{index}: weight_map: expected names of files, found {_wrong(places)}")
        if Path(name).name != name or not os.path.isfile(index.parent / name):  # noqa: PTH113 - of any length
            raise InputError(f"{index}: names the shard {shown(name)}, which is not in {index.parent}")
    stray = sorted(
        entry.name
        for entry in index.parent.iterdir()
        if SHARD.search(entry.name) and entry.name not in places.values() and _same_set(entry, index)
    )
    if stray:
        raise InputError(f"{index}: does not name {stray[0]} beside it; remove that, or mend the index")
    return dict(places)


def _same_set(shard: Path, index: Path) -> bool:
    stem, _, rest = index.name.lower().partition(".")
    return SHARD.split(shard.name.lower())[0] == stem and rest.startswith(shard.suffix.lower()[1:])


def _name_or_none(name: object) -> str | None:
    return name if isinstance(name, str) and name and os.sep not in name else None


def _wrong(places: Mapping[str, object]) -> str:
    return shown(next(name for name in places.values() if _name_or_none(name) is None))
