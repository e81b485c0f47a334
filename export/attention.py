"""Attention as graphs have it: one operator, and a cache that only grows at its end.

Tokens are the cache's first axis, and only the new ones come out of a graph: written right behind the
old ones they make the next cache without a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hart_runtime.hart.transformer import AttentionFunction, Pair

Kernel = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""Attention over complete keys and values, see :func:`hart_runtime.hart.transformer.scaled_dot_product`."""


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """As the ONNX Runtime operator whose 3-D form without a past never builds the whole score matrix.
    Keys and values arrive complete, so cache and mask play no part.
    """
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (q, k, v),
        {"num_heads": num_heads, "scale": scale},
        dtype=q.dtype,
        shape=q.shape,
        version=1,
    )


def halves_first(kernel: Kernel, kept: torch.dtype) -> AttentionFunction:
    """As :func:`tokens_first` where there may be fewer rows than the cache has: its conditional half alone.

    New tokens come out for all rows of the cache, those of the other half being nobody's.
    """
    whole = tokens_first(kernel, kept)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, past: Pair | None, num_heads: int, scale: float
    ) -> tuple[Tensor, Pair]:
        assert past is not None
        rows, cached = q.shape[0], past[0].shape[1]
        torch._check(rows <= cached)
        torch._check(cached <= 2 * rows)
        key, value = (old.narrow(1, 0, rows) for old in past)
        attended, new = whole(q, k, v, (key, value), num_heads, scale)
        key, value = (torch.cat([more, more], dim=1).narrow(1, 0, cached) for more in new)
        return attended, (key, value)

    return attend


def tokens_first(kernel: Kernel, kept: torch.dtype) -> AttentionFunction:
    """An attention function on a cache of (P, R, C) each, that keeps the new tokens (L, R, C) alone.

    Args:
        kept: type of the cache, in which all tokens are seen.
    """

    def attend(
        q: Tensor, k: Tensor, v: Tensor, past: Pair | None, num_heads: int, scale: float
    ) -> tuple[Tensor, Pair]:
        new = k.transpose(0, 1).to(kept), v.transpose(0, 1).to(kept)
        if past is not None:
            # The old tokens are touched only together with the new ones: work on them alone could run
            # long before, for all layers at once, and hold a second copy of the whole cache.
            k, v = (
                torch.cat([old, more]).transpose(0, 1).to(q.dtype)
                for old, more in zip(past, new, strict=True)
            )
        return kernel(q, k, v, num_heads, scale), new

    return attend
