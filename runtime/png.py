"""PNG files that know how they were made, and can be made again."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hart_runtime.common.errors import InputError, RunError, parameter, shown
from hart_runtime.common.settings import LIMITS, SamplingSettings, settings_of
from hart_runtime.common.version import __version__

KEY = "hart"


@dataclass(frozen=True)
class Origin:
    """Everything that decides a picture."""

    prompt: str
    seed: int
    settings: SamplingSettings
    bundle: str
    """Name of the bundle."""
    identity: str
    """sha256 of the bundle's manifest."""


def save_png(image: Image.Image, path: Path, origin: Origin) -> None:
    """Write under a temporary name and rename, so that no half picture is ever there."""
    info = PngInfo()
    record = {**asdict(origin), "version": __version__}
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False))
    info.add_itxt("Description", origin.prompt)
    check_writable(path)
    handle, name = tempfile.mkstemp(prefix=".hart-", suffix=".png", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: could not be written ({error.strerror or error})") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse an output that cannot be written, before the work is done."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{parameter('path', path)}: expected a file ending in .png")
    try:
        if path.is_dir():
            raise InputError(f"{parameter('path', path)}: expected a file, found a folder")
        if not path.parent.is_dir():
            raise InputError(f"{parameter('path', path)}: the folder {path.parent} does not exist")
        with tempfile.TemporaryFile(prefix=".hart-", dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from None


def read_origin(path: Path) -> Origin:
    """The :class:`Origin` that :func:`save_png` stored in a picture."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(KEY)
    except Exception as error:  # damaged files raise anything, decompression bombs included
        raise InputError(f"{path}: not a readable picture ({error})") from None
    if text is None:
        raise InputError(f"{path}: carries no prompt and seed; it was not drawn by hart-run")
    try:
        record = json.loads(text)
        prompt, seed, settings = record["prompt"], record["seed"], record["settings"]
        if type(prompt) is not str or type(seed) is not int:
            raise TypeError(f"prompt {shown(prompt)}, seed {shown(seed)}")
        if missing := sorted(LIMITS.keys() - settings.keys()):
            raise TypeError(f"no {', '.join(missing)} among its settings")
        return Origin(
            prompt=prompt,
            seed=seed,
            settings=settings_of(settings, "settings"),
            bundle=str(record["bundle"]),
            identity=str(record["identity"]),
        )
    except KeyError as error:
        raise InputError(f"{path}: its prompt and seed are damaged (no {error.args[0]})") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its prompt and seed are damaged ({error})") from None


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{parameter('path', path)}: cannot be written ({error.strerror or error})")
