"""Prompts in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.common.errors import InputError, RunError, known_names, plain, shown, true_or_false
from hart_runtime.common.settings import LIMITS, Overrides, SamplingSettings
from hart_runtime.runtime import stages
from hart_runtime.runtime.backends.backend import Backend, Limits
from hart_runtime.runtime.backends.registry import open_backend
from hart_runtime.runtime.bundle import Bundle, open_bundle
from hart_runtime.runtime.call import (
    Options,
    Prompts,
    Scale,
    check_batch,
    checked_features,
    checked_settings,
    words_of,
)
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.drawer import Drawer
from hart_runtime.runtime.editing import Encoded, as_input, encode, kept_of, require_encoder
from hart_runtime.runtime.loop import Array, Snapshot
from hart_runtime.runtime.manifest import Manifest
from hart_runtime.runtime.pasting import pasted
from hart_runtime.runtime.pictures import NO_MARGINS, Source, plain_source, source_of
from hart_runtime.runtime.pictures import Given as GivenPicture
from hart_runtime.runtime.reconstruction import Reconstruction, reconstruct
from hart_runtime.runtime.text import EncodedPrompts, Given, TextEncoder, require_text_encoder

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on

MOST_ENCODED = 64
"""Prompts whose features, 2 MB each in a published model, are worth holding to close its text encoder."""


@dataclass(frozen=True)
class Result:
    """What was drawn: by :meth:`Pipeline.generate` everything, by :meth:`Pipeline.batches` one batch."""

    images: list[Image.Image]
    prompts: list[str]
    seeds: list[int]
    settings: SamplingSettings
    seconds: dict[str, float]
    """Wall time per stage."""


def add_seconds(total: dict[str, float], more: Mapping[str, float]) -> None:
    """Add times by stage."""
    for stage, value in more.items():
        total[stage] = total.get(stage, 0.0) + value


class Pipeline:
    """A loaded bundle: what makes inputs of prompts (an encoder, or names of classes), and a drawer.

    It may be called from several threads: drawings wait for each other. A callback cannot draw.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        threads: int | None = None,
        encoded: EncodedPrompts | None = None,
    ) -> None:
        """A pipeline on a backend that is open already.

        Args:
            threads: that the host draws random numbers with, at most.
            encoded: every prompt there will be, for a backend without the text encoder.
        """
        self.bundle, self.backend, self.threads = bundle, backend, threads
        self.drawer = Drawer(bundle.manifest, backend, threads)
        self.classes = ClassNames.of(bundle) if bundle.manifest.model.num_classes else None
        self.text: TextEncoder | EncodedPrompts | None = encoded
        if encoded is None and bundle.has_text_encoder:
            self.text = TextEncoder(bundle, backend)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "auto",
        threads: int | None = None,
        backend: str = "auto",
        strict: bool = False,
        tf32: bool = False,
        batch: int | None = None,
        size: int | None = None,
    ) -> Pipeline:
        """Verify and open a bundle.

        Args:
            bundle: its folder, its manifest, or a folder that holds one bundle.
            device, threads, backend, strict, tf32: see
                :func:`hart_runtime.runtime.backends.registry.open_backend`.
            batch: largest that will be drawn, for which memory is taken now. Without it memory grows with
                the first picture, and again with the first larger batch.
            size: of pictures, in pixels along a side, where the bundle draws several; its first if left out.

        Raises:
            InputError: no bundle there, a damaged one, or nothing that runs it; in one sentence.
        """
        if not isinstance(bundle, str | Path) or not str(bundle).strip():
            raise InputError(f"`bundle`: expected a path, found {shown(bundle)}")
        opened = open_bundle(Path(bundle), wait=False).at_size(size)
        if batch is not None:
            check_batch(opened.manifest, batch)
        backed = open_backend(opened, device, threads, backend, strict, tf32)
        pipeline = cls(opened, backed, threads)
        if batch is not None:
            pipeline.drawer.reserve(batch)
        return pipeline

    @classmethod
    def for_prompts(
        cls,
        bundle: Bundle,
        prompts: Sequence[str],
        batch: int,
        open_part: Callable[[Bundle], Backend],
        threads: int | None = None,
        lap: Callable[[str], None] = lambda _: None,
        settings: SamplingSettings | None = None,
    ) -> Pipeline:
        """A pipeline that draws these prompts and no others, and needs less memory for it.

        The text encoder, most of the weights of a published model, is opened first, and closed before
        anything else is opened. With more than :data:`MOST_ENCODED` different prompts everything is
        opened at once, and each is encoded when its turn comes.

        Args:
            batch: prompts encoded at once.
            open_part: opens a bundle, see :func:`hart_runtime.runtime.backends.registry.open_backend`.
            lap: called after the stages "load" (twice) and "text encoder".
            settings: that all is drawn with, as :func:`hart_runtime.runtime.call.checked_settings` returns
                them; None for any.

        Raises:
            InputError: the bundle has no text encoder, or ``open_part`` does.
        """
        classes = bundle.manifest.model.num_classes
        if not classes:
            require_text_encoder(bundle)
        bundle = bundle if settings is None else bundle.for_settings(settings)
        texts = list(dict.fromkeys(prompts))
        if classes or len(texts) > MOST_ENCODED:
            pipeline = cls(bundle, open_part(bundle), threads)
            lap(stages.LOAD)
            return pipeline
        text, rest = bundle.parts()
        encoder = TextEncoder(text, open_part(text))
        lap(stages.LOAD)
        encoder.tell_cut_off(texts)
        encoded = encoder.known(texts, batch_size(rest.manifest, batch, None, encoder.backend.limits))
        lap(stages.TEXT_ENCODER)
        del encoder  # and with it everything that was opened for it
        pipeline = cls(bundle, open_part(rest), threads, encoded)
        lap(stages.LOAD)
        return pipeline

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse pickling and copying: what a backend holds lives in this process."""
        raise InputError(
            f"a pipeline cannot be pickled or copied; load it where it is used: "
            f"Pipeline.load({str(self.bundle.folder)!r})"
        )

    def __call__(self, prompts: Prompts, seed: int = 0, **options: Unpack[Options]) -> list[Image.Image]:
        """PIL images, ``num_images`` per prompt; options as for :meth:`batches`."""
        return self.generate(prompts, seed=seed, **options).images

    def generate(self, prompts: Prompts, seed: int = 0, **options: Unpack[Options]) -> Result:
        """Draw every prompt ``num_images`` times and return all pictures; options as for :meth:`batches`."""
        parts = list(self.batches(prompts, seed, **options))
        seconds: dict[str, float] = {}
        for part in parts:
            add_seconds(seconds, part.seconds)
        return Result(
            images=[image for part in parts for image in part.images],
            prompts=[prompt for part in parts for prompt in part.prompts],
            seeds=[s for part in parts for s in part.seeds],
            settings=parts[0].settings,
            seconds=seconds,
        )

    def edit(
        self,
        image: GivenPicture,
        mask: GivenPicture | None,
        prompts: Prompts,
        seed: int = 0,
        outpaint: Sequence[int] = NO_MARGINS,
        anew: int = 0,
        fit: str | None = None,
        paste: bool = True,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Draw a part of a picture anew: where a mask is white, and around the picture if that is asked for.

        Args:
            image: a file, its contents, or a picture of Pillow's.
            mask: of its size; where it is transparent, or without transparency where it is white, is drawn.
                None for where the picture itself is transparent.
            prompts: what the whole picture is to be; of a bundle that draws classes also "none".
            outpaint: pixels of the picture's size to draw to its left, above it, to its right and below.
            anew: coarsest scales that are drawn whole, whatever the mask.
            fit: "cover", "contain" or "stretch", where the picture is no square; without it, the picture
                fills the square, and what ``outpaint`` adds is not cut off again.
            paste: False for the model's own picture, in which what is kept is what the tokenizer makes of it.
            seed, options: as for :meth:`batches`.

        Raises:
            InputError: as :func:`hart_runtime.runtime.pictures.source_of` and :meth:`batches`.
            RunError: the run produced no usable picture.
        """
        source = source_of(
            self.bundle.manifest.model, image, mask, outpaint=outpaint, anew=anew, fit=fit, paste=paste
        )
        options["source"] = source
        return self.generate(prompts, seed=seed, **options).images

    def vary(
        self,
        image: GivenPicture,
        scales: int,
        prompts: Prompts,
        seed: int = 0,
        fit: str | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Keep the first scales of a picture, its layout and its colours, and draw the others.

        Args:
            scales: from 1 to all but the last.
            image, prompts, seed, fit, options: as for :meth:`edit`.
        """
        source = source_of(self.bundle.manifest.model, image, vary=scales, fit=fit)
        options["source"] = source
        return self.generate(prompts, seed=seed, **options).images

    def reconstruct(self, image: GivenPicture, fit: str | None = None) -> Reconstruction:
        """What the tokenizer keeps of a picture; nothing is drawn. Raises as :meth:`edit`."""
        require_encoder(self.bundle)
        manifest = self.bundle.manifest
        return reconstruct(self.backend, manifest, plain_source(manifest.model, image, fit))

    def batches(
        self,
        prompts: Prompts,
        seed: int = 0,
        num_images: int = 1,
        batch: int | None = None,
        callback: Callable[[Scale], None] | None = None,
        previews: bool = False,
        watch: Callable[[Snapshot], None] | None = None,
        preset: str | None = None,
        speed: str | None = None,
        source: Source | None = None,
        **overrides: Unpack[Overrides],
    ) -> Iterator[Result]:
        """Draw every prompt ``num_images`` times, with seeds ``seed``, ``seed + 1``, ..., batch by batch.

        Args:
            prompts: a text or several; of a bundle that draws classes their numbers, their names, or "none".
            batch: images drawn at once (default and most: the bundle's maximum, or what its engines
                hold). Pictures do not depend on it.
            callback: called after each scale of each batch.
            previews: decode the picture at each scale for the callback.
            watch: called after each scale and denoising step, for progress bars.
            preset: settings that have a name, such as "fid" of VAR, in the place of the bundle's.
            speed: "exact", "balanced" or "fast": how much is left out, see the table in docs/performance.md.
            source: a given picture of which parts are kept, see
                :func:`hart_runtime.runtime.pictures.source_of`.
            overrides: sampling settings; those left out (or None) are the bundle's.

        Raises:
            InputError: a value is out of range, or the bundle takes no pictures.
            RunError: the run produced no usable picture.
        """
        manifest = self.bundle.manifest
        texts = words_of(prompts, self.classes)
        settings = checked_settings(manifest, texts, seed, num_images, batch, preset, speed, **overrides)
        seed, num_images, batch = plain(seed), plain(num_images), plain(batch)
        if isinstance(self.text, TextEncoder):
            self.text.tell_cut_off(dict.fromkeys(texts))
        jobs = [(text, seed + i) for text in texts for i in range(num_images)]
        size = batch_size(manifest, len(jobs), batch, self.backend.limits)
        sources = None if source is None else [source] * len(jobs)
        self._check(settings, size, sources)
        told = self._teller(callback, previews, watch)
        return self._batches(jobs, size, settings, told, sources)

    def jobs(
        self,
        jobs: Sequence[tuple[str, int]],
        settings: SamplingSettings,
        watch: Callable[[Snapshot], None] | None = None,
        sources: Sequence[Source] | None = None,
    ) -> Iterator[Result]:
        """Draw prompts, each with a seed of its own, in as few batches as the backend holds them.

        Args:
            jobs: prompts and seeds.
            settings: all of them, as :func:`hart_runtime.runtime.call.checked_settings` returns them.
            watch: as for :meth:`batches`; what a snapshot decodes is pasted, too.
            sources: a given picture for each of the jobs, with a mask of its own each: pictures depend on
                neither their batch nor on what others in it keep. None where nothing is given. Sources are
                made anywhere, by :func:`hart_runtime.runtime.pictures.source_of` of the bundle's model;
                equal objects next to each other are encoded once.

        Raises:
            InputError: the backend was not built for that, or the bundle takes no pictures.
            RunError: the run produced no usable picture.
        """
        size = batch_size(self.bundle.manifest, len(jobs), None, self.backend.limits)
        self._check(settings, size, sources)
        return self._batches([*jobs], size, settings, watch, sources)

    def _check(self, settings: SamplingSettings, size: int, sources: Sequence[Source] | None) -> None:
        """Refuse what cannot be drawn here; raises InputError."""
        if sources is not None:
            require_encoder(self.bundle)
        self.drawer.check(settings, size, sources is not None)

    def _batches(
        self,
        jobs: list[tuple[str, int]],
        size: int,
        settings: SamplingSettings,
        told: Callable[[Snapshot], None] | None,
        sources: Sequence[Source] | None = None,
    ) -> Iterator[Result]:
        """Draw prompts with their seeds, ``size`` at once."""
        known: dict[Source, Encoded] = {}
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            alone = least_at_once(self.backend.limits) - len(part)
            filled = [*part, *part[-1:] * alone]  # a few pictures too many are drawn, and nobody gets them
            words, seeds = [text for text, _ in filled], [s for _, s in filled]
            began = time.perf_counter()
            given = self.given(words)
            taken = time.perf_counter() - began
            seconds = {stages.TEXT_ENCODER: taken} if isinstance(self.text, TextEncoder) else {}
            kept: list[Source] = []
            if sources is not None:
                kept = [*sources[start : start + size]]
                kept += kept[-1:] * alone
                began = time.perf_counter()
                known = {source: known.get(source) or self._encoded(source) for source in kept}
                seconds[stages.ENCODER] = time.perf_counter() - began
            try:
                drawn = self._draw(given, words, seeds, settings, told, kept, known)
            except RunError as error:
                numbers = f"{start + 1} to {start + len(part)} of {len(jobs)}"
                raise RunError(f"{error}; it was drawing pictures {numbers}") from None
            count = len(part)
            yield replace(
                drawn,
                images=drawn.images[:count],
                prompts=words[:count],
                seeds=seeds[:count],
                seconds=seconds | drawn.seconds,
            )

    def from_features(
        self,
        features: NDArray[np.float32],
        mask: NDArray[np.bool_],
        seed: int = 0,
        callback: Callable[[Scale], None] | None = None,
        previews: bool = False,
        watch: Callable[[Snapshot], None] | None = None,
        **overrides: Unpack[Overrides],
    ) -> Result:
        """Draw a picture per row of text features, which may come from elsewhere than the bundle.

        Args:
            features: (B, T, D), float32, as the text encoder gives them for T padded tokens.
            mask: (B, T), True where a token is not padding.
            seed: of the first picture; the next has ``seed + 1``.
            callback, previews, watch, overrides: as for :meth:`batches`.

        Raises:
            InputError: another shape than the bundle's, a value out of range, or not finite.
            RunError: the run produced no usable picture.
        """
        manifest = self.bundle.manifest
        if self.classes:
            raise InputError(f"{self.bundle.folder}: this bundle draws classes, and takes no text features")
        known_names("settings", overrides, LIMITS)
        features, mask = checked_features(manifest, features, mask)
        settings = checked_settings(manifest, None, seed, len(features), **overrides)
        seeds = [plain(seed) + i for i in range(len(features))]
        words, given = [""] * len(features), {"features": features, "mask": mask}
        return self._draw(given, words, seeds, settings, self._teller(callback, previews, watch))

    def _draw(
        self,
        given: Given,
        words: list[str],
        seeds: list[int],
        settings: SamplingSettings,
        told: Callable[[Snapshot], None] | None,
        sources: Sequence[Source] = (),
        known: Mapping[Source, Encoded] | None = None,
    ) -> Result:
        """One batch."""
        if not sources or known is None:
            drawing = self.drawer(given, seeds, settings, told)
            return Result(to_images(drawing.images), words, seeds, settings, drawing.seconds)

        def told_pasted(snapshot: Snapshot) -> None:
            if told is not None:
                told(replace(snapshot, decode=lambda: pasted(snapshot.decode(), sources)))

        patch_nums = self.bundle.manifest.model.patch_nums
        kept = kept_of([known[s] for s in sources], [s.cells(patch_nums) for s in sources])
        drawing = self.drawer(given, seeds, settings, told and told_pasted, kept)
        images = to_images(pasted(drawing.images, sources))
        return Result(images, words, seeds, settings, drawing.seconds)

    def _encoded(self, source: Source) -> Encoded:
        return encode(self.backend, self.bundle.manifest.model.patch_nums, as_input(source.pixels))

    def _teller(
        self,
        callback: Callable[[Scale], None] | None,
        previews: bool,
        watch: Callable[[Snapshot], None] | None,
    ) -> Callable[[Snapshot], None] | None:
        """Tells both of what is done, the callback in its own words; None where nobody asks."""
        for name, function in (("callback", callback), ("watch", watch)):
            if function is not None and not callable(function):
                raise InputError(f"`{name}`: expected a function, found {shown(function)}")
        true_or_false("previews", previews)
        if callback is None:
            return watch
        patch_nums = self.bundle.manifest.model.patch_nums

        def told(snapshot: Snapshot) -> None:
            if watch is not None:
                watch(snapshot)
            if snapshot.stage in stages.DRAWS:
                pictures = to_images(snapshot.decode()) if previews else None
                index = snapshot.index
                callback(Scale(index, snapshot.total, patch_nums[min(index, len(patch_nums) - 1)], pictures))

        return told

    def given(self, prompts: Sequence[str]) -> Given:
        """What a drawing begins with: text features and their mask, or labels."""
        return self.classes(prompts) if self.classes else self._encoder()(prompts)

    def encode(self, prompts: Sequence[str]) -> tuple[object, NDArray[np.bool_]]:
        """Text features (B, T, D), on the device or as they were encoded before, and their mask (B, T)."""
        given = self._encoder()(prompts)
        return given["features"], given["mask"]

    def _encoder(self) -> TextEncoder | EncodedPrompts:
        if self.text is None:
            require_text_encoder(self.bundle)
        assert self.text is not None
        return self.text


def batch_size(manifest: Manifest, pictures: int, asked: int | None, limits: Limits | None = None) -> int:
    """How many pictures are drawn at once: as many as there are, as far as the backend holds them."""
    most = limits.batches[-1] if limits else manifest.max_batch
    return asked or max(min(pictures, most), least_at_once(limits))


def least_at_once(limits: Limits | None) -> int:
    """The fewest pictures that a backend draws at once."""
    return limits.batches[0] if limits else 1


def to_images(pixels: Array) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] to PIL; fractions are cut off, as the published sampler does."""
    bytes_ = (pixels * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return [Image.fromarray(image) for image in bytes_]
