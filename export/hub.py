"""Where a checkpoint comes from: a local folder, or a model on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from hart.errors import InputError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONFIGURATIONS = ["*.json"]
WANTED = [*CONFIGURATIONS, "*.safetensors", "*.bin", "*.txt"]


def resolve(source: str, patterns: list[str] = WANTED) -> Path:
    """A local folder for ``source``; a hub id is downloaded, with the hub's own progress bars.

    ``patterns`` says which files are downloaded. ``HF_HUB_OFFLINE=1`` uses only what the local cache holds.

    Raises:
        InputError: neither a folder nor a model the hub can deliver.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(source) or source.startswith(".") or path.exists():
        raise InputError(f"{source}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{source}: no such folder here, and the hub did not deliver it ({reason})"
        ) from None
