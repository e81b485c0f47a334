"""A checkpoint on the hub as its headers tell of it: weight files of the real length, with the real headers,
and nothing written where the numbers are. Whatever reads no values reads such a folder as the whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

from hart_runtime.common.errors import InputError, first_line, shown
from hart_runtime.common.weight_files import OF_TRAINING, SUFFIXES
from hart_runtime.export.hub import CONFIGURATIONS, HUB_ID, resolve
from hart_runtime.hart.damage import LONGEST_HEADER

SAFETENSORS = ".safetensors"
TABLES = ("lvl_1L",)
"""Of a few numbers, which tell what no shape does: they are fetched, too."""
LARGEST_TABLE = 1 << 20
TIMEOUT = 20


@dataclass(frozen=True)
class Headers:
    """A folder that stands for a checkpoint."""

    folder: Path
    pickled: dict[str, int]
    """Weight files without headers, which are not looked into, and their bytes."""


@contextmanager
def headers_of(source: str, revision: str | None) -> Iterator[Headers]:
    """The headers of a checkpoint: a local folder or file is looked at where it is, the hub's in a copy.

    Raises:
        InputError: no folder, and the hub does not show it; or it gives whole files alone.
    """
    place = Path(source).expanduser()
    if place.exists() or not HUB_ID.fullmatch(source):
        yield Headers(resolve(source, revision, CONFIGURATIONS), {})
        return
    with TemporaryDirectory() as folder:
        name, own = HUB_ID.fullmatch(source).groups()  # type: ignore[union-attr]
        yield _fetched(source, name, own or revision, Path(folder))


def _fetched(source: str, name: str, revision: str | None, folder: Path) -> Headers:
    from huggingface_hub import HfApi, hf_hub_url

    try:
        found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:  # of a library of requests, which depends on the hub's version
        raise InputError(
            f"{source}: no such folder here, and the hub does not show it ({first_line(error)}); log in with "
            f"`hf auth login` where it is gated, or download it elsewhere and give the folder"
        ) from None
    root = folder / f"models--{name.replace('/', '--')}" / "snapshots" / (found.sha or "main")
    shutil.copytree(resolve(source, revision, CONFIGURATIONS), root)
    pickled = {}
    for entry in found.siblings or []:
        file = PurePosixPath(entry.rfilename)
        if file.suffix.lower() not in SUFFIXES or OF_TRAINING.fullmatch(file.name) or ".." in file.parts:
            continue
        if file.suffix.lower() != SAFETENSORS:
            pickled[str(file)] = entry.size or 0
            continue
        url = hf_hub_url(name, entry.rfilename, revision=found.sha)
        try:
            _write_header(url, f"{source}: {file}", root / file)
        except (URLError, OSError) as error:
            raise InputError(f"{source}: {file}: the hub did not deliver it ({first_line(error)})") from None
    return Headers(root, pickled)


def _write_header(url: str, said: str, target: Path) -> None:
    """A file of the real one's length, of which only the header and small tables take room on the disk."""
    start = read_range(url, said, 0, 8)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= LONGEST_HEADER:
        raise InputError(f"{said}: expected a header of at most {LONGEST_HEADER} bytes, found {length}")
    header = read_range(url, said, 8, 8 + length)
    begin = 8 + length
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        file.write(start + header)
        places = _places(header, said)
        for name, (first, last) in places.items():
            if name.endswith(TABLES) and 0 <= first < last <= first + LARGEST_TABLE:
                file.seek(begin + first)
                file.write(read_range(url, said, begin + first, begin + last))
        file.truncate(begin + max((last for _, last in places.values()), default=0))


def _places(header: bytes, said: str) -> dict[str, tuple[int, int]]:
    try:
        tensors = json.loads(header)
        offsets = {name: tensor["data_offsets"] for name, tensor in tensors.items() if name != "__metadata__"}
        return {name: (int(first), int(last)) for name, (first, last) in offsets.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{said}: expected a header of safetensors, found another ({shown(str(error))})"
        ) from None


def read_range(url: str, said: str, first: int, last: int) -> bytes:
    """Bytes of a file on the hub, of which no more are asked for and no more are read.

    Args:
        said: begins messages.

    Raises:
        InputError: the server answers with whole files.
        OSError: it does not answer, or with fewer bytes.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    request = Request(url, headers={"Range": f"bytes={first}-{last - 1}"})
    for name, value in build_hf_headers().items():
        request.add_unredirected_header(name, value)  # what stores the files is not told who asks
    with urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            raise InputError(
                f"{said}: its server gives whole files and no ranges, so headers cannot be read alone; "
                f"download it and give the folder"
            )
        read: bytes = answer.read(last - first)
    if len(read) != last - first:
        raise OSError(f"expected {last - first} bytes, found {len(read)}")
    return read
