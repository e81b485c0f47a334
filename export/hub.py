"""Where a checkpoint comes from: a local folder, or a model on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hart_runtime.common.errors import InputError, parameter

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""owner/name, or owner/name@revision: a branch, a tag or a commit."""
CONFIGURATIONS = ["*.json", "*.txt"]
WANTED = [*CONFIGURATIONS, "*.safetensors", "*.bin", "*.pth", "*.pt"]


def resolve(source: str, revision: str | None = None, patterns: list[str] = WANTED) -> Path:
    """A local folder for ``source``; a hub id is downloaded, with the hub's own progress bars.

    ``HF_HUB_OFFLINE=1`` uses only what the local cache holds.

    Args:
        source: a folder, ``owner/name`` or ``owner/name@revision``.
        revision: the revision of a hub id that names none.
        patterns: which files are downloaded.

    Raises:
        InputError: neither a folder nor a model the hub can deliver.
    """
    if not source.strip():
        raise InputError("expected a folder or a hub id, found an empty word")
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(
                f"{parameter('revision', revision)}: only hub ids have revisions, {source} is a folder"
            )
        return path
    if path.is_file():
        raise InputError(f"{source}: is a file; give the folder of the checkpoint")
    found = HUB_ID.fullmatch(source)
    if found is None or source.startswith(".") or path.exists():
        raise InputError(f"{source}: no such folder, and not a hub id of the form owner/name")
    name, own = found.groups()
    if own and revision:
        raise InputError(
            f"{source}: names a revision already, found {parameter('revision', revision)} beside it"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(name, revision=own or revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{source}: no such folder here, and the hub's cache in {constants.HF_HUB_CACHE} does not "
                f"hold that model and revision; download it, or unset HF_HUB_OFFLINE"
            ) from None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"{source}: no such folder here, and the hub did not deliver it ({reason})"
        ) from None
