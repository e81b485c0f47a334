"""Codes and latents of given pictures, and the rule by which they are mixed into what is drawn.

The rule is :mod:`hart_runtime.common.editing` and, for the continuous part, that of
:class:`hart_runtime.hart.editing.Kept`: a kept cell of HART ends with the given picture's own latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hart_runtime.common.editing import Cells
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.families.names import CODED, CODES, ENCODER, F_HAT, IMAGE, INDEX, LATENT
from hart_runtime.runtime.families.scales import ENCODE_PICTURES
from hart_runtime.runtime.program import Run

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """What the tokenizer makes of pictures."""

    latent: Array
    """(B, Cv, P, P): codes of all scales and what they leave over."""
    discrete: Array
    """(B, Cv, P, P): what the codes alone make."""
    indices: tuple[NDArray[np.int64], ...]
    """Of each scale (B, n, n)."""
    codes: tuple[Array, ...]
    """Of each scale (B, n, n, Cv)."""

    @property
    def rest(self) -> Array:
        """(B, Cv, P, P): what is left of the latent before the last scale's codes, which a hybrid tokenizer
        keeps in their place.
        """
        return self.latent - self.discrete + self.codes[-1].transpose(0, 3, 1, 2)


def require_encoder(bundle: Bundle) -> None:
    """Raises InputError for a bundle that takes no pictures."""
    if ENCODER not in bundle.manifest.contracts:
        raise InputError(f"{bundle.folder}: this bundle takes no pictures, and no other of its family does")
    if ENCODER not in bundle.manifest.graphs:
        raise InputError(
            f"{bundle.folder}: this bundle takes no pictures, it has no encoder; export its checkpoint again "
            f"with this version, and not with `encoder=False`"
        )


def as_input(pixels: NDArray[np.uint8]) -> Array:
    """A picture's bytes (H, W, 3) as the encoder takes them, (1, 3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255 * 2 - 1)


def encode(backend: Backend, patch_nums: Sequence[int], images: Array) -> Encoded:
    """Encode pictures, one after another, as they are decoded.

    Args:
        images: (B, 3, H, W) in [-1, 1], of the model's size.

    Raises:
        RunError: a latent is not finite.
    """
    found: dict[str, list[NDArray[np.generic]]] = {}
    for image in images:
        for name, value in backend.run(ENCODE_PICTURES, {IMAGE: image[None]}).items():
            found.setdefault(name, []).append(backend.to_host(value).copy())
    whole = {name: np.concatenate(parts) for name, parts in found.items()}
    if not np.isfinite(whole[LATENT]).all():
        raise RunError("encoder: the latent of a given picture holds NaN or infinity")
    ends = np.cumsum([side * side for side in patch_nums])[:-1]
    indices, codes = (np.split(whole[name], ends, axis=1) for name in (INDEX, CODES))
    maps = [(len(images), side, side) for side in patch_nums]
    return Encoded(
        latent=whole[LATENT],
        discrete=whole[CODED],
        indices=tuple(part.reshape(shape) for part, shape in zip(indices, maps, strict=True)),
        codes=tuple(part.reshape(*shape, -1) for part, shape in zip(codes, maps, strict=True)),
    )


@dataclass(frozen=True)
class Kept:
    """What a batch keeps of its given pictures; an :data:`hart_runtime.runtime.loop.Edit`."""

    pictures: Encoded
    cells: tuple[Cells, ...]
    """Of each scale (B, n, n), True where a code is kept."""

    def __call__(self, run: Run, name: str, value: NDArray[np.generic]) -> NDArray[np.generic]:
        """A drawn code map with the kept codes in it, at the last scale of a hybrid tokenizer a drawn latent
        with the kept one in it: what is added to that there is nothing.
        """
        if run.graph != LATENT:
            return np.where(self.cells[run.index][..., None], self.pictures.codes[run.index], value)
        inside = self.cells[-1]
        if F_HAT not in run.edited:
            return np.where(inside[..., None], self.pictures.codes[-1], value)
        if name == F_HAT:
            return np.where(inside[:, None], self.pictures.latent, value)
        cells = inside.reshape(*value.shape[:-1], 1)  # of h (B, P, P), of the residual (B, P * P)
        return np.where(cells, np.zeros((), value.dtype), value)


def kept_of(pictures: Sequence[Encoded], cells: Sequence[Sequence[Cells]]) -> Kept:
    """What a batch keeps, of one given picture for each drawn one.

    Args:
        cells: of each picture, for each scale (1, n, n).
    """
    whole = Encoded(
        np.concatenate([p.latent for p in pictures]),
        np.concatenate([p.discrete for p in pictures]),
        tuple(map(np.concatenate, zip(*(p.indices for p in pictures), strict=True))),
        tuple(map(np.concatenate, zip(*(p.codes for p in pictures), strict=True))),
    )
    return Kept(whole, tuple(map(np.concatenate, zip(*cells, strict=True))))
