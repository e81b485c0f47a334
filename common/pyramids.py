"""Smaller pictures of the same weights: which scales they are drawn with.

No parameter of a published HART depends on its pyramid: levels are embedded by their number, places by rotary
angles. What depends on it is how well the weights know it. Of the choices below, which the demo decided
(docs/sizes.md has the numbers), the published code has neither: run with other ``patch_nums`` it spreads
positions over the new last scale.

- There are as many scales as before, since what a level means, the guidance, the convolutions behind the
  codes and the residual all go by a scale's number. The first scales of a pyramid alone leave most of the
  picture undecided.
- Positions stay spread over the extent that was trained
  (:attr:`hart_runtime.runtime.spec.ModelSpec.extent`).
"""

from __future__ import annotations

from hart_runtime.common.config import TokenizerConfig, Transformer, TransformerConfig
from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.mar_config import KlConfig, MarConfig

FEWEST_CELLS = 2
"""Cells along a side of the smallest latent."""


def pyramid_of(llm: Transformer | MarConfig, image: TokenizerConfig | KlConfig, size: int) -> tuple[int, ...]:
    """Sides of the scales of pictures of ``size`` x ``size`` pixels.

    Raises:
        InputError: the weights belong to their own pyramid, or there is none for this size.
    """
    own, given = llm.patch_nums, parameter("size", size)
    pixels, largest = image.downsample, own[-1] * image.downsample
    if type(size) is not int or size % pixels or not FEWEST_CELLS * pixels <= size <= largest:
        raise InputError(
            f"{given}: expected a multiple of {pixels} from {FEWEST_CELLS * pixels} to {largest}, the pixels "
            f"that this checkpoint was trained for"
        )
    if size == largest:
        return own
    if not (isinstance(llm, TransformerConfig) and llm.use_timestep_embed):
        raise InputError(
            f"{given}: the weights of this checkpoint belong to its scales and draw {largest} pixels alone; "
            f"only HART's whose levels are embedded by their number draw others"
        )
    return shrunk(own, size // pixels)


def shrunk(patch_nums: tuple[int, ...], last: int) -> tuple[int, ...]:
    """As many scales, with sides in proportion, rounded up."""
    return tuple(-(-side * last // patch_nums[-1]) for side in patch_nums)
