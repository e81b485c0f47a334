"""One call of a pipeline: its options, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import (
    InputError,
    first_line,
    in_range,
    known_names,
    one_of,
    plain,
    shown,
    whole_in_range,
)
from hart_runtime.common.pruning import pruning_of
from hart_runtime.common.settings import SPEEDS, Overrides, SamplingSettings, check_ranges
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.loop import Snapshot
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.pictures import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

MAX_SEED = 2**63 - 1
MAX_IMAGES = 10_000


Prompts = str | int | Sequence[str | int]
"""What is drawn: texts, or numbers and names of classes."""


class Options(Overrides, total=False):
    """Options of one call, see :meth:`Pipeline.batches`."""

    num_images: int
    batch: int | None
    preset: str | None
    speed: str | None
    callback: Callable[[Scale], None] | None
    previews: bool
    watch: Callable[[Snapshot], None] | None
    source: Source | None


@dataclass(frozen=True)
class Scale:
    """One scale done, as told to a callback."""

    index: int
    total: int
    patch_num: int
    images: list[Image.Image] | None
    """The pictures decoded at this scale, when previews were asked for."""


def checked_settings(
    manifest: Manifest,
    prompts: Sequence[str] | None,
    /,
    seed: int = 0,
    num_images: int = 1,
    batch: int | None = None,
    preset: str | None = None,
    speed: str | None = None,
    **overrides: Unpack[Overrides],
) -> SamplingSettings:
    """Refuse names that there are not and values out of range before anything runs.

    Returns the settings that :meth:`Pipeline.generate` uses for these arguments.

    Args:
        prompts: None where pictures are drawn from text features.
        preset: settings that have a name, which those that are given here replace.
        speed: one of :data:`hart_runtime.common.settings.SPEEDS`, in the bundle's own meaning if it has one;
            what the preset leaves out if not given.

    Raises:
        InputError: names the parameter, what was expected and what was found.
    """
    known_names(
        "options of a call", overrides, ("seed", *(Options.__annotations__ | Overrides.__annotations__))
    )
    if speed is not None:
        one_of("speed", speed, SPEEDS)
    left_out = {} if speed is None else manifest.at_speed(speed)
    given = left_out | {k: v for k, v in overrides.items() if v is not None}
    settings = replace(manifest.preset(preset), **given)
    for name, why in manifest.lacks.items():
        if getattr(settings, name) != getattr(manifest.sampling, name):
            raise InputError(f"`{name}`: {why}")
    if overrides.get("steps") == "":  # in checkpoints it stands for all, here for a variable that is not set
        raise InputError("`steps`: expected a number such as 8, found an empty word")
    if prompts is not None:
        _check_prompts(prompts)
    check_ranges(settings, manifest.model)
    if settings.prune:
        pruning_of(manifest.model.patch_nums, settings.keep)
    images = whole_in_range("num_images", num_images, 1, MAX_IMAGES)
    whole_in_range("seed", seed, 0, MAX_SEED - images + 1)  # the last picture's can be asked for, too
    if batch is not None:
        check_batch(manifest, batch)
    if "steps" not in manifest.lacks:
        diffusion_schedule(settings.steps)
    return settings


def check_batch(manifest: Manifest, batch: int) -> None:
    """Refuse more pictures at once than the bundle draws."""
    whole_in_range("batch", batch, 1, manifest.max_batch, " (the bundle's maximum)")


def _array(name: str, value: object, kinds: str) -> NDArray[Any]:
    """What somebody gives as an array, of one of numpy's kinds of numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists, tensors elsewhere
        raise InputError(f"`{name}`: cannot be read as an array ({first_line(error)})") from None
    if array.dtype.kind not in kinds:
        raise InputError(f"`{name}`: expected numbers, found {array.dtype}")
    return array


def _check_prompts(prompts: Sequence[str]) -> None:
    if not prompts:
        raise InputError("no prompt was given")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {number}: expected text, found {shown(prompt)}")
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError(f"prompt {number} is not valid UTF-8") from None
        if "\0" in prompt:
            raise InputError(f"prompt {number} holds a NUL character, as UTF-16 text does")


def words_of(prompts: Prompts, classes: ClassNames | None) -> list[str]:
    """Texts as they are, and classes by their full name; raises InputError."""
    if classes is None:
        return texts_of(prompts)
    asked: list[Any] = [prompts] if isinstance(plain(prompts), int) else texts_of(prompts)
    found = []
    for number, label in enumerate(asked, start=1):
        try:
            found.append(classes.words(label))
        except InputError as error:
            place = f"label {number}: " if len(asked) > 1 else ""
            raise InputError(f"{place}{error}") from None
    return found


def texts_of(prompts: Prompts) -> list[str]:
    """One prompt or several, as a list; raises InputError."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        if isinstance(prompts, bytes | bytearray | memoryview | Mapping | set | frozenset):
            raise TypeError  # lists of something else, or without an order in which seeds count on
        return list(prompts)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"`prompts`: expected a text or a list of texts, found {shown(prompts)}") from None


def checked_features(
    manifest: Manifest, features: object, mask: object
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Text features (B, T, D) and their mask (B, T) as the graphs take them.

    Raises:
        InputError: other shapes than the bundle's, no numbers, or not finite.
    """
    row = (manifest.model.context_token, manifest.model.context_dim)
    rows, padding = _array("features", features, "fiu"), _array("mask", mask, "biu")
    if rows.shape[1:] != row or padding.shape != rows.shape[:2]:
        raise InputError(
            f"`features`: expected (B, {row[0]}, {row[1]}) and a mask (B, {row[0]}), "
            f"found {rows.shape} and {padding.shape}"
        )
    in_range("features", len(rows), 1, manifest.max_batch, " rows (the bundle's maximum)")
    if not np.isfinite(rows).all():
        raise InputError("`features`: hold NaN or infinity")
    if not np.isin(padding, (0, 1)).all():
        raise InputError("`mask`: expected True and False")
    return rows.astype(np.float32), padding.astype(np.bool_)
