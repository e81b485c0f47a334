"""Where a checkpoint comes from: a local folder, or a model on the Hugging Face hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hart_runtime.common.errors import InputError, first_line, parameter
from hart_runtime.common.weight_files import SUFFIXES
from hart_runtime.hart.mar_files import holds_mar

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
"""owner/name, or owner/name@revision: a branch, a tag or a commit."""
CONFIGURATIONS = ["*.json", "*.txt"]
BESIDE = ["vae_*", "*kl16.*"]
"""What is downloaded beside a file that is asked for by its name."""
SEVERAL = ["var_d*", "mar_*"]
"""Files of which a model on the hub holds several, of gigabytes each: nobody wants them all."""
WANTED = [*CONFIGURATIONS, "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt"]


def resolve(
    source: str, revision: str | None = None, patterns: list[str] = WANTED, file: str | None = None
) -> Path:
    """A local folder or file for ``source``; a hub id is downloaded, with the hub's own progress bars.

    ``HF_HUB_OFFLINE=1`` uses only what the local cache holds.

    Args:
        source: a folder, a weight file that is a checkpoint by itself, ``owner/name`` or
            ``owner/name@revision``.
        revision: the revision of a hub id that names none.
        patterns: which files are downloaded.
        file: name of the one file, of several, that is the checkpoint.

    Raises:
        InputError: neither a folder nor a model the hub can deliver.
    """
    place = _place(source, revision, [file, *BESIDE] if file else patterns, file is None)
    if file is None:
        return place
    if not (place / file).is_file():
        raise InputError(f"{parameter('file', file)}: there is no such file in {source}")
    return place / file


def _place(source: str, revision: str | None, patterns: list[str], whole: bool) -> Path:
    """The folder, or the file that is all of it."""
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
        alone = holds_mar(path, None) or (
            path.suffix in SUFFIXES and not (path.parent / "config.json").exists()
        )
        if whole and alone and revision is None:
            return path
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
        ignored = SEVERAL if whole else None
        place = snapshot_download(
            name, revision=own or revision, allow_patterns=patterns, ignore_patterns=ignored
        )
        return Path(place)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{source}: no such folder here, and the hub's cache in {constants.HF_HUB_CACHE} does not "
                f"hold that model and revision; download it, or unset HF_HUB_OFFLINE"
            ) from None
        raise InputError(
            f"{source}: no such folder here, and the hub did not deliver it ({first_line(error)})"
        ) from None
