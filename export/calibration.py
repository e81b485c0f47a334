"""A model that draws while somebody looks on, and what convolutions of the image decoder see of it: what
their 8-bit scales are taken from.

Text features are random ones: whatever they ask for, the model answers with codes of its own, and nothing but
the range of numbers is taken from the pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hart_runtime.common.errors import InputError
from hart_runtime.common.noise import SeededNoise
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.hart import checkpoints
from hart_runtime.hart.autoencoder import Decoder, ResnetBlock, Upsample
from hart_runtime.hart.model import Hart, Mar, Model, ScaleModel
from hart_runtime.hart.quantizer import HybridQuantizer

DECODER = "tokenizer.decoder"
"""Where the graph's weights have it."""
MOST_TOKENS = 256
"""That are drawn: some pictures of a small model, the first scales of a large one's."""
FEW, FEW_STEPS = 4, "ddim20"
"""Steps in which masked tokens are drawn, and their denoising steps."""
MOST_CELLS, LARGEST_SIDE = 1024, 16
"""Of latents that are decoded, all together, and on each side of one: the more, the rarer is a number that is
larger than any that was seen."""


@dataclass(frozen=True)
class Range:
    """The smallest and the largest number of a tensor."""

    low: float
    high: float

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Seen:
    """What a convolution took and made."""

    taken: Range
    made: Range

    def __or__(self, other: Seen) -> Seen:
        return Seen(self.taken | other.taken, self.made | other.made)


def convolutions(decoder: Decoder) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those that run in 8 bits, by name: all that take time, where many channels become many.

    The first one's input and the last one's output are the latent and the picture themselves; shortcuts hand
    the whole of a map on, and attention is small.
    """
    for path, module in decoder.named_modules(prefix=DECODER):
        names = {ResnetBlock: ("conv1", "conv2"), Upsample: ("conv",)}.get(type(module), ())
        for name in names:
            yield f"{path}.{name}", module.get_submodule(name)  # type: ignore[misc]


def calibrate(model: Model, settings: SamplingSettings, patch_nums: tuple[int, ...]) -> dict[str, Seen]:
    """What the convolutions of :func:`convolutions` see in a few pictures, by name.

    Raises:
        InputError: the model draws what is not finite.
    """
    with torch.inference_mode():
        if isinstance(model, Mar):
            latents = _of_tokens(model, settings)
        else:
            latents = _latents(model, settings, patch_nums)
    if not bool(latents.isfinite().all()):
        raise InputError("this model draws latents that are not finite, so 8-bit scales cannot be measured")
    seen: dict[str, Seen] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(_: nn.Module, taken: tuple[Tensor], made: Tensor) -> None:
            now = Seen(_range(*taken), _range(made))
            seen[name] = seen[name] | now if name in seen else now

        return hook

    watched = convolutions(model.tokenizer.decoder)
    hooks = [convolution.register_forward_hook(watch(name)) for name, convolution in watched]
    with torch.inference_mode():
        for latent in latents:  # all at once would take as many times the memory
            model.tokenizer.decode(latent[None])
    for hook in hooks:
        hook.remove()
    return seen


def _range(x: Tensor) -> Range:
    low, high = x.aminmax()
    return Range(float(low), float(high))


class _Drawn(Exception):  # noqa: N818
    """Ends a drawing that came far enough."""


def _latents(model: ScaleModel, settings: SamplingSettings, patch_nums: tuple[int, ...]) -> Tensor:
    """Of some pictures, (B, Cv, n, n). Scales that take too long to draw, and more pictures, are random.

    What convolutions see hardly depends on which codes there are, but it does on whether there are any.
    """
    tokens, scales = first_scales(patch_nums)
    pictures = max(MOST_CELLS // min(patch_nums[-1], LARGEST_SIDE) ** 2, 1)
    count = min(MOST_TOKENS // tokens, pictures)
    random, quantizer = torch.Generator().manual_seed(0), model.tokenizer.quantize
    found = draw_first(model, count, scales, settings, patch_nums, random)
    drawn = _with_codes(quantizer, found, patch_nums, scales, random)
    more = found.new_zeros(pictures - count, *found.shape[1:])
    latents = torch.cat([drawn, _with_codes(quantizer, more, patch_nums, 0, random)])
    return latents[:, :, :LARGEST_SIDE, :LARGEST_SIDE]


def _of_tokens(model: Mar, settings: SamplingSettings) -> Tensor:
    """The same of masked tokens, which have unit variance: of a picture drawn in few steps, and random."""
    config = model.transformer.config
    found: list[Tensor] = []
    side = config.latent_side
    more = max(MOST_CELLS // min(side, LARGEST_SIDE) ** 2, 1)
    random = torch.Generator().manual_seed(0)
    few = replace(settings, iterations=min(FEW, config.tokens), steps=FEW_STEPS)

    def record(name: str, value: Tensor) -> None:
        if name == "latent":
            found.append(value)
            raise _Drawn

    with contextlib.suppress(_Drawn):
        labels = torch.randint(config.num_classes, (1,), generator=random)
        checkpoints.draw(model, [labels], SeededNoise([0]), few, record=record)
    others = torch.randn(more, config.latent_channels, side, side, generator=random)
    latents = torch.cat([*found, others])[:, :, :LARGEST_SIDE, :LARGEST_SIDE]
    return latents / model.tokenizer.config.latent_scale


def first_scales(patch_nums: tuple[int, ...]) -> tuple[int, int]:
    """Tokens of the scales that are drawn, and how many scales these are."""
    tokens, scales = 0, 0
    for side in patch_nums:
        if tokens + side**2 > MOST_TOKENS:
            break
        tokens, scales = tokens + side**2, scales + 1
    return tokens, scales


def draw_first(
    model: ScaleModel,
    count: int,
    scales: int,
    settings: SamplingSettings,
    patch_nums: tuple[int, ...],
    random: torch.Generator,
) -> Tensor:
    """Draw the first scales of some pictures; latents (B, Cv, n, n), with the residual behind the last."""
    found: list[Tensor] = []

    def record(name: str, value: Tensor) -> None:
        if name.endswith(".f_hat"):  # one a scale, with the residual in the last
            found.append(value)
            if len(found) == scales:
                raise _Drawn

    asked, noise = _asked(model, count, random), SeededNoise(range(count))
    with contextlib.suppress(_Drawn):
        checkpoints.draw(model, asked, noise, settings, patch_nums, record)
    return found[-1]


def _with_codes(
    quantizer: HybridQuantizer,
    latents: Tensor,
    patch_nums: tuple[int, ...],
    first: int,
    random: torch.Generator,
) -> Tensor:
    """Latents with random codes of all scales from one on."""
    for scale, side in list(enumerate(patch_nums))[first:]:
        codes = torch.randint(len(quantizer.embedding.weight), (len(latents), side**2), generator=random)
        contribution = quantizer.contribution(
            quantizer.lookup(codes, side), scale, patch_nums, quantizer.phi_on_last
        )
        latents = latents + contribution
    return latents


def _asked(model: ScaleModel, count: int, random: torch.Generator) -> list[Tensor]:
    """What pictures begin with: random text features, or random classes."""
    if not isinstance(model, Hart):
        return [torch.randint(model.transformer.config.num_classes, (count,), generator=random)]
    config = model.transformer.config
    features = torch.randn(count, config.context_token, config.context_dim, generator=random)
    mask = torch.arange(config.context_token) <= config.context_token // 2
    return [features, mask.expand(count, -1)]
