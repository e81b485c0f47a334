"""Which cells are kept at every scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hart_runtime.common.editing import kept_first, kept_inside

PYRAMIDS = [
    (1, 2, 3, 4, 6),
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 5, 8),
    (1, 3, 7, 12, 27, 36, 48, 64),
]


@pytest.mark.parametrize("patch_nums", PYRAMIDS, ids=str)
@pytest.mark.parametrize("share", [None, 0.2, 0.5])
def test_maps_are_those_of_the_published_resizing(patch_nums: tuple[int, ...], share: float | None) -> None:
    """Boxes and noise, whose ties at a half are rounded as PyTorch does."""
    rng, size = np.random.default_rng(len(patch_nums)), patch_nums[-1]
    cells = rng.random((100, size, size)) < (share or 0)
    if share is None:
        for mask in cells:
            (top, bottom), (left, right) = np.sort(rng.integers(0, size + 1, (2, 2)))
            mask[top:bottom, left:right] = True
    mask = torch.from_numpy(cells).float()[:, None]
    for side, found in zip(patch_nums, kept_inside(cells, patch_nums), strict=True):
        shrunk = F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False)[:, 0] > 0.5
        expected = shrunk.numpy() if side > 1 else np.ones((100, 1, 1), np.bool_)
        assert np.array_equal(found, expected), side


def test_coarse_scales_may_be_drawn_anew() -> None:
    kept = kept_inside(np.ones((1, 8, 8), np.bool_), (1, 2, 3, 5, 8), anew=2)
    assert [bool(cells.all()) for cells in kept] == [False, False, True, True, True]
    assert not kept[0].any()
    assert not kept[1].any()


def test_the_first_scales_may_be_kept() -> None:
    kept = kept_first(2, (1, 2, 3, 5, 8), batch=3)
    assert [cells.shape for cells in kept] == [(3, n, n) for n in (1, 2, 3, 5, 8)]
    assert [bool(cells.all()) for cells in kept] == [True, True, False, False, False]
