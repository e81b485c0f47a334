"""A bundle on its way to the nodes: through Ray's object store, once to each, into a cache by identity."""

from __future__ import annotations

import fcntl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from hart_runtime.common.errors import RunError
from hart_runtime.common.files import whole_folder
from hart_runtime.common.hashing import PIECE
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.owned import owned_by_bundle

Pieces = Mapping[str, Sequence[Any]]
"""References to the bytes of files, by their path in the bundle."""


def in_store(bundle: Bundle) -> Pieces:
    """Put a bundle into the object store of the cluster that is connected; who draws fetches it there."""
    import ray

    owned = owned_by_bundle(bundle.folder)
    assert owned is not None
    pieces: dict[str, list[Any]] = {}
    for path in sorted(bundle.folder.rglob("*")):
        name = path.relative_to(bundle.folder)
        if path.is_file() and owned(name):
            with path.open("rb") as file:
                pieces[str(name)] = [ray.put(data) for data in iter(lambda: file.read(PIECE), b"")]
    return pieces


def on_this_node(identity: str, pieces: Pieces) -> Path:
    """The folder of a bundle in this node's cache; the first process that asks fetches it for all.

    Nothing is verified here: whoever opens a bundle does.

    Raises:
        RunError: it cannot be written.
    """
    import ray

    cache = user_cache_path("hart-runtime") / "bundles"
    folder = cache / identity
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{identity}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                return folder
            with whole_folder(folder) as new:
                for name, parts in pieces.items():
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    with (new / name).open("wb") as file:
                        for part in parts:
                            file.write(ray.get(part))
    except OSError as error:
        raise RunError(f"{folder}: the bundle cannot be kept there ({error.strerror})") from None
    return folder
