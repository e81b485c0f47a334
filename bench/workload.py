"""The picture that is measured: of a prompt, of a class, or of random text features without an encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.class_names import ClassNames
from hart_runtime.runtime.families.names import CONTEXT
from hart_runtime.runtime.pipeline import Pipeline, to_images

PROMPT, CLASS = "a red circle on a white background", 207
"""A text, and a class (of as many as there are)."""


def subject(bundle: Bundle) -> str | None:
    """What a bundle is asked to draw: a text, or a class; None where it draws text features alone."""
    classes = bundle.manifest.model.num_classes
    if classes:
        return ClassNames.of(bundle).words(CLASS % classes)
    return PROMPT if bundle.has_text_encoder else None


def drawing(pipeline: Pipeline, batch: int) -> Callable[[], list[Image.Image]]:
    """A function that draws ``batch`` pictures, seeds 0, 1, ..., to PNG-ready pixels.

    It starts at what :func:`subject` says, or at text features.
    """
    asked = subject(pipeline.bundle)
    if asked is not None:
        return lambda: pipeline.generate(asked, num_images=batch, batch=batch).images
    given = begin(pipeline, batch)
    return lambda: draw_from(pipeline, given)


def draw_from(pipeline: Pipeline, given: Mapping[str, NDArray[Any]]) -> list[Image.Image]:
    """What a drawing begins with to PNG-ready pixels, seeds 0, 1, ..."""
    count = len(next(iter(given.values())))
    drawing = pipeline.drawer(given, range(count), pipeline.bundle.manifest.sampling)
    return to_images(drawing.images)


def begin(pipeline: Pipeline, batch: int) -> dict[str, NDArray[Any]]:
    """What a drawing begins with, on the host: features of the prompt, or random ones, or labels."""
    bundle, model = pipeline.bundle, pipeline.bundle.manifest.model
    if model.num_classes:
        return {**ClassNames.of(bundle)([CLASS % model.num_classes] * batch)}
    names = [tensor.name for tensor in bundle.manifest.graphs[CONTEXT].inputs]
    if bundle.has_text_encoder:
        features, mask = pipeline.encode([PROMPT] * batch)
        return dict(zip(names, (np.array(pipeline.backend.to_host(features)), mask), strict=True))
    mask = np.arange(model.context_token) < np.full((batch, 1), model.context_token // 2 + 1)
    shape = (batch, model.context_token, model.context_dim)
    return dict(zip(names, (np.random.default_rng(0).standard_normal(shape, np.float32), mask), strict=True))
