"""Manifests of made-up models, for tests of what only looks at shapes."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from hart_runtime.runtime.families import FAMILIES
from hart_runtime.runtime.manifest import Manifest, manifest_of
from hart_runtime.runtime.spec import ModelSpec
from hart_runtime.runtime.stages import SCALE

__all__ = ["manifest_of", "manifests"]

OF_SCALES = tuple(name for name, family in FAMILIES.items() if family.draws == SCALE)


@st.composite
def manifests(
    draw: st.DrawFn, families: Sequence[str] = OF_SCALES, fewest: int = 2, modulated: bool = True
) -> Manifest:
    """Manifests of small models of any shape that draw so many scales or more, modulated or not."""
    patch_nums = sorted(draw(st.sets(st.integers(1, 9), min_size=fewest, max_size=6)))
    heads = draw(st.integers(1, 3))
    family = draw(st.sampled_from(families))
    text = draw(st.booleans()) if modulated and "context_token" in FAMILIES[family].own else False
    own = {name: draw(st.integers(2, 9)) for name in sorted(FAMILIES[family].own - {"vocab_size"})}
    model = ModelSpec(
        patch_nums=tuple(patch_nums),
        depth=draw(st.integers(1, 3)),
        embed_dim=heads * 4 * draw(st.integers(1, 4)),
        num_heads=heads,
        vocab_size=draw(st.integers(600, 700)),
        latent_channels=draw(st.integers(1, 7)),
        image_size=patch_nums[-1] * 2,
        modulated=text,
        **own,
    )
    return manifest_of(family, model, draw(st.sampled_from(["fp32", "fp16"])))
