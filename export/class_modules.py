"""What the graphs compute that other models do not have: of those that draw a class, and of codes alone.

Together with the others of :mod:`hart_runtime.export.modules` they are the loop of
:func:`hart_runtime.hart.generate.generate_classes`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hart_runtime.common.schedule import phi_index
from hart_runtime.export.modules import Accumulating, smoothed
from hart_runtime.hart.model import ClassModel, Var
from hart_runtime.hart.transformer import AttentionFunction


class ClassContextGraph(nn.Module):
    """Labels to the first input of the transformer, and all that a class is to the scales after it."""

    def __init__(self, model: ClassModel) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition = self.transformer.condition(label)
        return self.transformer.start(condition), condition, self.transformer.modulations(condition)


class ClassTransformerGraph(nn.Module):
    """All blocks over the new tokens of one scale, and what they add to the KV cache."""

    def __init__(self, model: ClassModel, attend: AttentionFunction) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.attend = attend

    def forward(self, x: Tensor, modulations: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = list(zip(past[0::2], past[1::2], strict=True))
        hidden, new = self.transformer(x, modulations, cache, self.attend)
        return (hidden, *(tensor for pair in new for tensor in pair))


class ClassNextScaleGraph(Accumulating):
    """The transformer's input for the next scale, whose cells carry embeddings of their places."""

    table: Tensor

    def __init__(self, model: ClassModel, num_scales: int) -> None:
        super().__init__(model, num_scales)
        self.word_embed = model.transformer.word_embed
        with torch.no_grad():
            self.register_buffer("table", model.transformer.places())

    def forward(
        self, h: Tensor, f_hat: Tensor, scale: Tensor, up: Tensor, down: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        f_hat, cells = self.accumulate(h, f_hat, scale, up, down)
        placed = F.embedding(places, self.table).flatten(0, 1)
        return f_hat, (self.word_embed(cells).float() + placed).repeat(2, 1, 1)


class DiscreteLatentGraph(nn.Module):
    """Last codes onto f_hat, smoothed like those of every scale."""

    def __init__(self, model: Var, num_scales: int) -> None:
        super().__init__()
        phis = model.tokenizer.quantize.quant_resi.phis()
        self.phi = phis[phi_index(num_scales - 1, num_scales, len(phis))] if phis else None

    def forward(self, f_hat: Tensor, h: Tensor) -> Tensor:
        h = h.permute(0, 3, 1, 2)
        if self.phi is None:
            return f_hat + h
        assert self.phi.bias is not None
        return f_hat + smoothed(h, self.phi.weight, self.phi.bias, self.phi.ratio)
