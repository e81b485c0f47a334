"""What in the folder of a bundle is the bundle's own: nothing else goes when it is replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hart_runtime.common.checkpoint import CLASS_NAMES
from hart_runtime.common.files import Owned, read_regular
from hart_runtime.runtime.bundle import TEXT_TOKENIZER
from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from hart_runtime.runtime.tensorrt.manifest import ENGINE_MANIFEST, engine_file
from hart_runtime.runtime.tensorrt.timing_cache import TIMINGS


def owned_by_bundle(folder: Path) -> Owned | None:
    """Which files a bundle made, its engines among them; None if there is none.

    Of a damaged manifest, or one of another version, all that bundles are made of.
    """
    values = _read(folder / MANIFEST)
    ours = isinstance(values.get("schema"), int) and isinstance(values.get("graphs"), dict)
    if not ours and not (folder / WEIGHTS).is_file():
        return None
    listed = values.get("files")
    names = {MANIFEST, *listed} if ours and isinstance(listed, dict) else None

    def owned(path: Path) -> bool:
        if len(path.parts) == 1:
            return path.match(TIMINGS) or (_made_of(path.name) if names is None else path.name in names)
        engines = folder / path.parts[0]
        return (engines / ENGINE_MANIFEST).is_file() and owned_by_engines(Path(*path.parts[1:]))

    return owned


def owned_by_engines(path: Path) -> bool:
    """Whether a file in a folder of engines is one, or describes them."""
    return len(path.parts) == 1 and (path.name == ENGINE_MANIFEST or path.match(engine_file("*")))


def engine_folders(bundle: Path) -> list[str]:
    """Names of the folders of engines in a bundle."""
    return sorted(file.parent.name for file in bundle.glob(f"*/{ENGINE_MANIFEST}"))


def _made_of(name: str) -> bool:
    graphs = {graph for family in FAMILIES.values() for graph in family.graphs}
    stem, _, kind = name.rpartition(".")
    return name in {MANIFEST, WEIGHTS, TEXT_TOKENIZER, CLASS_NAMES} or (
        kind == "onnx" and any(stem == graph or stem.startswith(f"{graph}_") for graph in graphs)
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
