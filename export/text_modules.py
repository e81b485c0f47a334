"""What the graphs compute of models that draw a text, up to the hidden states of a scale.

Together with the others of :mod:`hart_runtime.export.modules` they are the loop of
:func:`hart_runtime.hart.generate.generate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hart_runtime.export.modules import Accumulating
from hart_runtime.hart.model import Hart
from hart_runtime.hart.pruning import run_pruned
from hart_runtime.hart.rope import Rotation, context_angles, image_angles
from hart_runtime.hart.text_encoder import TextEncoder
from hart_runtime.hart.transformer import AttentionFunction, Pair


class TextEncoderGraph(nn.Module):
    """Token ids to text features."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.text_encoder = encoder

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return self.text_encoder(input_ids, mask)


class ContextGraph(nn.Module):
    """Text features to the first input of the transformer and everything pooled from them.

    Scale 0 runs the conditional half alone, see :class:`UnconditionalGraph`.
    """

    def __init__(self, model: Hart) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        llm = self.transformer
        context = llm.context(features, mask)
        position_ids = mask.float().cumsum(1) - 1  # exact, and no engine sums whole numbers
        x = _conditional(context.tokens) + llm.level_embeddings(2)[0]
        angles = context_angles(position_ids, llm.config.head_dim)
        last = position_ids[:, -1:]
        outputs = (x, angles, torch.cat([last, torch.zeros_like(last)]), context.head_condition)
        return (*outputs, _conditional(context.block_condition)) if llm.config.modulated else outputs


def _conditional(both: Tensor) -> Tensor:
    """The conditional half of a batch. (2B, ...) -> (B, ...)"""
    return both.unflatten(0, (2, -1))[0]


class TransformerGraph(nn.Module):
    """All blocks over the new tokens of one scale, and what they add to the KV cache.

    Rows are those of both guidance halves, at scale 0 of the conditional one.
    """

    def __init__(self, model: Hart, attend: AttentionFunction) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.attend = attend

    def forward(self, x: Tensor, angles: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        modulated = self.transformer.config.modulated
        condition, past = (rest[0], rest[1:]) if modulated else (x[:, 0], rest)
        cache = _pairs(past)
        hidden, new = self.transformer(x, angles, condition, cache, self.attend)
        return (hidden, *(tensor for pair in new for tensor in pair))


class PrunedTransformerGraph(TransformerGraph):
    """The same with a part of the tokens, and what an earlier scale added for the others."""

    def forward(self, x: Tensor, angles: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Of ``taking_part`` the length alone counts. What is added comes out for all rows of the cache."""
        taking_part, sources, *more = rest
        blocks = self.transformer.blocks
        memory, cache = _pairs(more[: 2 * len(blocks)]), _pairs(more[2 * len(blocks) :])
        rows, cached = x.shape[0], memory[0][0].shape[0]
        torch._check(rows <= cached)
        torch._check(cached <= 2 * rows)
        torch._check(taking_part.shape[0] <= x.shape[1])
        own = [(attention.narrow(0, 0, rows), mlp.narrow(0, 0, rows)) for attention, mlp in memory]
        hidden, new, added = run_pruned(
            blocks, x, Rotation.of(angles), cache, taking_part.shape[0], own, sources, self.attend
        )
        branches = (torch.cat([b, b]).narrow(0, 0, cached).to(more[0].dtype) for pair in added for b in pair)
        return (hidden, *branches, *(tensor for pair in new for tensor in pair))


def _pairs(tensors: Sequence[Tensor]) -> list[Pair]:
    return list(zip(tensors[0::2], tensors[1::2], strict=True))


class UnconditionalGraph(nn.Module):
    """What the transformer makes of the text, with the unconditional half beside it.

    The unconditional half has the same token at the same position T times, and no mask. So whatever
    a token attends to, it finds one value, and all of them stay alike through every block: one
    token, run here once, is all of them for every prompt.
    """

    def __init__(self, model: Hart, kept: torch.dtype) -> None:
        super().__init__()
        llm = model.transformer
        weight = llm.context_embed.weight
        with torch.no_grad():
            nothing = weight.new_zeros(1, 1, llm.config.context_dim, dtype=torch.float32)
            context = llm.project_context(nothing, torch.ones_like(nothing[..., 0], dtype=torch.bool))
            angles = context.tokens.new_zeros(1, 1, llm.config.head_dim)
            x = context.tokens + llm.level_embeddings(1)[0]
            hidden, cache = llm(x, angles, context.block_condition, None)
        condition = [context.block_condition] if llm.config.modulated else []
        self.rows_first = 1 + len(condition)
        keys_and_values = (value.to(kept) for pair in cache for value in pair)
        for i, value in enumerate((hidden, *condition, *keys_and_values)):
            self.register_buffer(f"constant_{i}", value)

    def forward(self, *text: Tensor) -> tuple[Tensor, ...]:
        """Hidden states (B, T, C), the blocks' condition (B, C), then keys and values (T, B, C)."""
        return tuple(
            torch.cat([half, constant.expand_as(half)], dim=int(number >= self.rows_first))
            for number, (half, constant) in enumerate(zip(text, self.buffers(), strict=True))
        )


class NextScaleGraph(Accumulating):
    """The transformer's input for the next scale, whose cells are rotated by their places."""

    def __init__(self, model: Hart, num_scales: int) -> None:
        super().__init__(model, num_scales)
        llm = model.transformer
        self.lvl_embed = nn.Embedding.from_pretrained(llm.level_embeddings(num_scales))
        self.word_embed = llm.word_embed
        self.head_dim = llm.config.head_dim

    def forward(
        self,
        h: Tensor,
        f_hat: Tensor,
        scale: Tensor,
        up: Tensor,
        down: Tensor,
        positions: Tensor,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        f_hat, cells = self.accumulate(h, f_hat, scale, up, down)
        x = (self.word_embed(cells).float() + self.lvl_embed(scale + 1)).repeat(2, 1, 1)
        side = positions.shape[0]
        rows, columns = positions[:, None].expand(side, side), positions[None].expand(side, side)
        places = torch.stack([rows, columns], dim=-1).flatten(0, 1)
        angles = image_angles(places + offset[:, :, None], self.head_dim)
        return f_hat, x, angles
