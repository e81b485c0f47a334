"""The exported draw against the reference's, which sums all codes in float64."""

from __future__ import annotations

import pytest
import torch

from hart_runtime.export.modules import DRAW_BLOCK, draw_in_blocks
from hart_runtime.hart.sampling import draw_codes, truncate


@pytest.mark.parametrize("vocabulary", [64, 512, 1000, 4096])
def test_it_is_the_draw_of_the_reference(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = truncate(torch.randn(2, 400, vocabulary, generator=generator) * 3, vocabulary // 8, 0.0)
    uniform = torch.rand(2, 400, generator=generator)
    uniform[0, :2] = torch.tensor([0.0, 1 - 2**-24])
    index, mass = draw_in_blocks(logits.softmax(-1), uniform)
    expected = draw_codes(logits, uniform)
    assert (index != expected).float().mean() <= 1e-3  # draws on a rounding boundary
    assert (logits.gather(-1, index[..., None]) > -torch.inf).all()
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_the_last_code_with_mass_is_the_last_to_be_drawn() -> None:
    """Whatever rounding does: codes behind it were cut off."""
    for last in (0, 1, DRAW_BLOCK - 1, DRAW_BLOCK, 150):
        probabilities = torch.zeros(1, 1, 200)
        probabilities[..., : last + 1] = 0.1
        index, _ = draw_in_blocks(probabilities, torch.ones(1, 1))
        assert index.item() == last


def test_nan_has_no_mass() -> None:
    index, mass = draw_in_blocks(torch.full((1, 1, 200), torch.nan), torch.zeros(1, 1))
    assert index.item() == 0
    assert not (mass > 0).any()
