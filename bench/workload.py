"""The picture that is measured: of a prompt, or of random text features without an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hart_runtime.runtime.pipeline import Pipeline

PROMPT = "a red circle on a white background"


def drawing(pipeline: Pipeline, batch: int) -> Callable[[], list[Image.Image]]:
    """A function that draws ``batch`` pictures, seeds 0, 1, ..., to PNG-ready pixels.

    It starts at the prompt, or at text features if the bundle has no text encoder.
    """
    if pipeline.bundle.has_text_encoder:
        return lambda: pipeline.generate(PROMPT, num_images=batch, batch=batch).images
    features, mask = text_features(pipeline, batch)
    return lambda: draw_features(pipeline, features, mask)


def draw_features(pipeline: Pipeline, features: Any, mask: NDArray[np.bool_]) -> list[Image.Image]:
    """Text features (B, T, D) and their mask (B, T) to PNG-ready pixels, seeds 0, 1, ..."""
    return pipeline.from_features(features, mask).images


def text_features(pipeline: Pipeline, batch: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features (B, T, D) on the host and their mask: the prompt's, or random ones."""
    if pipeline.bundle.has_text_encoder:
        features, mask = pipeline.encode([PROMPT] * batch)
        return np.array(pipeline.backend.to_host(features)), mask
    model = pipeline.bundle.manifest.model
    mask = np.arange(model.context_token) < np.full((batch, 1), model.context_token // 2 + 1)
    shape = (batch, model.context_token, model.context_dim)
    return np.random.default_rng(0).standard_normal(shape, np.float32), mask
