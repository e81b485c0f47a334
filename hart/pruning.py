"""Blocks in which only a part of the tokens takes part: FastVAR (arXiv 2503.23367) as published for HART.

Which scales and how many tokens is decided in :mod:`hart_runtime.common.pruning`; here is which of them, and
what becomes of the others. Everything behind the blocks sees all tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hart_runtime.hart.rope import Rotation
from hart_runtime.hart.transformer import AttentionFunction, Block, Cache, Pair

Branches = list[Pair]
"""What attention and MLP of every block add to each token, (N, L, C) each."""
Record = Callable[[str, Tensor], None]


def score(x: Tensor) -> Tensor:
    """How far each token is from the mean of all. (N, L, C) -> (N, L)"""
    off = x - x.mean(1, keepdim=True)
    return (off * off).sum(-1)


def take(x: Tensor, kept: Tensor) -> Tensor:
    """Tokens (N, L, ...) at some places (N, K) of each row: (N, K, ...)."""
    return x.flatten(0, 1)[_flat(kept, x.shape[1])].unflatten(0, kept.shape)


def put(x: Tensor, kept: Tensor, tokens: Tensor) -> Tensor:
    """Tokens (N, L, C) with others (N, K, C) at some places (N, K) of each row."""
    whole = x.flatten(0, 1).index_put((_flat(kept, x.shape[1]),), tokens.flatten(0, 1))
    return whole.unflatten(0, x.shape[:2])


def _flat(kept: Tensor, length: int) -> Tensor:
    """Places among the tokens of all rows. (N, K) -> (N * K,)"""
    first = torch.arange(kept.shape[0], device=kept.device) * length
    return (kept + first[:, None]).flatten()


def restored(memory: Tensor, sources: Tensor) -> Tensor:
    """What the places of a larger map receive of a remembered one: the mean of those that each touches.

    (N, M, C), (4, L) -> (N, L, C), see :func:`hart_runtime.common.pruning.sources`.
    """
    first, *more = (memory[:, places].float() for places in sources)
    for values in more:
        first = first + values
    return first / sources.shape[0]


def run_pruned(
    blocks: Iterable[nn.Module],
    x: Tensor,
    rotation: Rotation,
    cache: Cache | None,
    count: int,
    memory: Branches,
    sources: Tensor,
    attend: AttentionFunction,
    record: Record = lambda *_: None,
) -> tuple[Tensor, list[Pair], Branches]:
    """Plain blocks, in each of which ``count`` tokens take part.

    Each branch of each block and each row chooses for itself, by what enters it. Keys and values are those of
    the chosen tokens alone, so the cache holds other places in each.

    Args:
        x: (N, L, C) new tokens.
        rotation: of all of them.
        cache: as for :meth:`hart_runtime.hart.transformer.ScaleTransformer.forward`.
        memory: what an earlier, smaller scale added.
        sources: (4, L), places of that scale.
        record: receives the scores and places of every branch.

    Returns:
        Hidden states, per block what ``attend`` keeps, and what was added to every token.
    """
    present, added = [], []
    pasts = cache or itertools.repeat(None)
    for number, (module, past, earlier) in enumerate(zip(blocks, pasts, memory, strict=False)):
        assert isinstance(module, Block)
        kept = _chosen(x, count, f"block{number}.attn", record)
        turned = Rotation(take(rotation.cos, kept), take(rotation.sin, kept))
        h, pair = module.attn(module.ln_wo_grad(take(x, kept)), turned, past, attend)
        attention = put(restored(earlier[0], sources), kept, h.float())
        record(f"block{number}.attn.out", attention)
        x = x + attention
        kept = _chosen(x, count, f"block{number}.ffn", record)
        mlp = put(restored(earlier[1], sources), kept, module.ffn(module.ln_wo_grad(take(x, kept))).float())
        record(f"block{number}.ffn.out", mlp)
        x = x + mlp
        record(f"block{number}.out", x)
        for what, cached in zip(("k", "v"), pair, strict=True):
            record(f"block{number}.{what}", cached)
        present.append(pair)
        added.append((attention, mlp))
    return x, present, added


def _chosen(x: Tensor, count: int, name: str, record: Record) -> Tensor:
    """Places of the ``count`` tokens that differ most, best first. (N, count)"""
    scores = score(x)
    kept = scores.topk(count, dim=1).indices
    record(f"{name}.score", scores)
    record(f"{name}.kept", kept)
    return kept
