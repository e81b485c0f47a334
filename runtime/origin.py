"""The checkpoint that a bundle was exported from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from hart_runtime.common.checkpoint import LLM, TEXT_ENCODER, TOKENIZER, Checkpoint
from hart_runtime.common.errors import InputError, listed, parameter
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.manifest import Manifest

NETWORKS = (LLM, TOKENIZER, TEXT_ENCODER)
Find = Callable[[Path, Path | None, bool | None], Checkpoint]
Weights = Mapping[str, Mapping[str, str]]
"""sha256 of weight files, by network and name."""


def exported_from(
    bundle: Bundle,
    given: Path | None,
    demos: Iterable[Path],
    find: Find,
    text_encoder: Path | None = None,
    networks: Collection[str] = NETWORKS,
) -> Checkpoint:
    """Find the checkpoint of a bundle, with the weights that it was exported with (averaged or not).

    Args:
        given: where the caller says it is.
        demos: checkpoints of the package, of which the one with the bundle's source is tried when nothing is
            given.
        find: looks at a place; takes the text encoder's and whether averaged weights are wanted, too.
        text_encoder: its Qwen2 folder; by default the one inside the checkpoint.
        networks: those that have to be the bundle's.

    Raises:
        InputError: it is not there, or its weights are not those that were exported.
    """
    manifest = bundle.manifest
    if text_encoder is not None and manifest.model.num_classes:
        raise InputError(f"{text_encoder}: this bundle draws classes and has no text encoder")
    averaged = None if manifest.averaged else False  # where there are none, others are told apart by hash
    source = manifest.checkpoint["source"]
    place = given or next((demo for demo in demos if demo.name == source), None)
    other = InputError(
        f"{bundle.folder}: was exported from {source}, which is not the demo checkpoint; give its folder as "
        f"`checkpoint`"
    )
    if place is None:
        raise other
    found = find(place, text_encoder, averaged)
    if not bundle.has_text_encoder or TEXT_ENCODER not in networks:
        found = replace(found, text_encoder=None)
    weights = found.weights
    try:
        check_same_weights(weights, manifest, parameter("checkpoint", given), networks)
    except InputError:
        if given is not None:
            raise
        raise other from None
    return found


def check_same_weights(
    found: Weights,
    manifest: Manifest,
    source: str,
    networks: Collection[str] = NETWORKS,
    mend: str = "give what it was exported from (`checkpoint`, `text_encoder`)",
) -> None:
    """Refuse other weights than those a bundle was exported from.

    Args:
        source: where ``found`` is from, begins the message.
        mend: what to do, ends it.

    Raises:
        InputError: with both hashes of the first network that differs.
    """
    exported: Weights = manifest.checkpoint["weights"]
    for network in networks:
        if (other := found.get(network, {})) != exported.get(network, {}):
            raise InputError(
                f"{source}: its {network} weights are {_listed(other)}, bundle {manifest.name} was exported "
                f"from {_listed(exported.get(network, {}))}; {mend}"
            )


def _listed(files: Mapping[str, str]) -> str:
    return listed([f"{name} ({digest[:12]}...)" for name, digest in files.items()]) or "none"
