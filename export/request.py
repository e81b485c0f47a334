"""What an export is asked for, and whether a bundle is that already; no torch is needed to say so."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hart_runtime.common.checkpoint import CLASS_NAMES, LLM, TEXT_ENCODER, TOKENIZER, Checkpoint
from hart_runtime.common.errors import InputError, one_of, parameter, shown, whole_in_range
from hart_runtime.common.files import refuse_strangers
from hart_runtime.common.mar_config import MarConfig
from hart_runtime.common.precisions import FP8, PRECISIONS
from hart_runtime.common.pyramids import pyramid_of
from hart_runtime.common.settings import DEFAULT_MAX_BATCH, MOST_MAX_BATCH, check_ranges
from hart_runtime.common.weight_files import choose_set
from hart_runtime.export.system_prompt import sha256_of_system_prompt
from hart_runtime.export.vocabulary import read_vocabulary
from hart_runtime.runtime.bundle import TEXT_TOKENIZER, open_bundle
from hart_runtime.runtime.class_names import read_class_names
from hart_runtime.runtime.families import FAMILIES, family_of
from hart_runtime.runtime.families.names import ENCODER
from hart_runtime.runtime.find import MANIFEST
from hart_runtime.runtime.manifest import Manifest, read_manifest
from hart_runtime.runtime.owned import owned_by_bundle
from hart_runtime.runtime.spec import ModelSpec

IMAGENET = Path(__file__).parent / "imagenet" / "classes.txt"
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Request:
    """A checkpoint and all options that decide the bundle made of it."""

    checkpoint: Checkpoint
    precision: str
    """One of :data:`hart_runtime.common.precisions.PRECISIONS`."""
    max_batch: int = DEFAULT_MAX_BATCH
    system_prompt: str | None = None
    """What stands before every prompt: a file, "none", or None for what the text encoder's
    ``config.json`` says, see :func:`hart_runtime.export.system_prompt.read_system_prompt`."""
    class_names: Path | None = None
    """Names of the classes, one a line; by default those beside the checkpoint, or ImageNet's, where there
    are as many."""
    patch_nums: tuple[int, ...] | None = None
    """Another pyramid than the checkpoint's, for models whose weights do not depend on it (rotary
    attention with timestep level embeddings)."""
    sizes: tuple[int, ...] = ()
    """Sides in pixels of the pictures that the bundle draws, its own first; by default the checkpoint's, see
    :func:`hart_runtime.common.pyramids.pyramid_of`."""
    encoder: bool = True
    """Whether the bundle takes pictures, too, to draw parts of them anew."""

    def check(self, weights: bool = True) -> None:
        """Refuse what cannot be exported, by names, configurations and what files there are.

        Args:
            weights: whether weight files are needed.

        Raises:
            InputError: names the parameter or the file.
        """
        one_of("precision", self.precision, PRECISIONS)
        whole_in_range("max_batch", self.max_batch, 1, MOST_MAX_BATCH)
        config = self.checkpoint.llm_config
        if self.precision == FP8 and not any(graph.fp8 for graph in FAMILIES[self.family].graphs.values()):
            raise InputError(
                f"{parameter('precision', FP8)}: graphs of {self.family} have no products in 8-bit floating "
                f"point; export it as fp16 or int8"
            )
        if self.pyramid != config.patch_nums:
            if isinstance(config, MarConfig):
                raise InputError("this checkpoint draws no scales, there is no pyramid to change")
            if not config.use_timestep_embed:
                raise InputError("this checkpoint stores a level table, its pyramid cannot be changed")
            replace(config, patch_nums=self.pyramid)  # checks the values
        for model in self.models:
            check_ranges(self.checkpoint.sampling, model)
        if twice := [size for size in self.sizes if self.sizes.count(size) > 1]:
            raise InputError(f"`size`: expected each size once, found {twice[0]} twice")
        if self.checkpoint.text_encoder is None and self.system_prompt is not None:
            given = parameter("system_prompt", self.system_prompt)
            if self.model.num_classes:
                raise InputError(f"{given}: this checkpoint draws classes, and there is no text before them")
            raise InputError(f"{given}: there is no text encoder; give `text_encoder` too")
        if self.class_names is not None and not self.model.num_classes:
            given = parameter("class_names", self.class_names)
            raise InputError(f"{given}: this checkpoint draws texts and has no classes")
        if self.system_prompt is not None:
            sha256_of_system_prompt(self.system_prompt, wanted=False)  # reads it
        _ = (
            self.checkpoint.text_config,
            self.checkpoint.sampling,
            self.checkpoint.speeds,
            self.model,
        )  # read, and held together
        _ = self.vocabulary, self.names
        if weights:
            _ = [network.files for network in self.checkpoint.networks.values()]

    @property
    def pyramid(self) -> tuple[int, ...]:
        """That the weights know."""
        return self.patch_nums or self.checkpoint.llm_config.patch_nums

    @property
    def family(self) -> str:
        """Of the model."""
        return family_of(self.checkpoint.llm_config, self.checkpoint.tokenizer_config).name

    @property
    def model(self) -> ModelSpec:
        """What the loop has to know about the model, which draws the first of the sizes."""
        return self.models[0]

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """The same of each size; raises InputError."""
        llm, image = self.checkpoint.llm_config, self.checkpoint.tokenizer_config
        known = family_of(llm, image).describe(llm, image, self.pyramid)
        return tuple(known.resized(pyramid_of(llm, image, size)) for size in self.sizes) or (known,)

    @property
    def trained_with_system_prompt(self) -> bool:
        text = self.checkpoint.text_config
        return text is not None and text.use_llm_system_prompt

    @functools.cached_property
    def vocabulary(self) -> Tokenizer | None:
        """The text tokenizer, if there is a text encoder; raises InputError."""
        text, config = self.checkpoint.text_encoder, self.checkpoint.text_config
        return read_vocabulary(text.folder, config.vocab_size) if text and config else None

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """Names of the classes, as far as there are any; raises InputError."""
        count = self.model.num_classes
        if self.class_names is not None and count:
            said = parameter("class_names", self.class_names)
            return read_class_names(self.class_names, count, said)
        if count and (own := self.checkpoint.class_names):
            return read_class_names(own, count)
        return read_class_names(IMAGENET, count) if count == IMAGENET_CLASSES else ()


def _sha256_of_names(names: Sequence[str]) -> str | None:
    return hashlib.sha256(as_file(names)).hexdigest() if names else None


def as_file(names: Sequence[str]) -> bytes:
    """Names of classes as a bundle holds them, one a line."""
    return "".join(f"{name}\n" for name in names).encode()


def check_replaceable(output: Path, force: bool) -> bool:
    """Whether a bundle is at ``output``; nothing of the checkpoint is needed to say so.

    Raises:
        InputError: what is there is no bundle, which is never replaced, or holds (with ``force``) what is not
            the bundle's.
    """
    above = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise InputError(f"{output}: cannot be written, {above} is no folder")
    if not os.path.lexists(output):
        return False
    if not output.is_dir():
        what = "is a file" if output.exists() else "is a link to nothing"
        raise InputError(f"{output}: {what}, and not a bundle, not replaced")
    owned = owned_by_bundle(output)
    if not (output / MANIFEST).is_file() or owned is None:
        raise InputError(f"{output}: exists and is not a bundle (no {MANIFEST} of one), not replaced")
    if force:
        refuse_strangers(output, owned)
    return True


def check_place(request: Request, output: Path, force: bool) -> bool:
    """Whether a bundle at ``output`` is what is asked for; then there is nothing to do.

    Raises:
        InputError: something else is there, and would be lost (without ``force``); or what is no
            bundle, as :func:`check_replaceable`.
    """
    if not check_replaceable(output, force) or force:
        return False
    found = _unusable(lambda: read_manifest(output)) or differences(request, read_manifest(output)[0])
    if found := found or _unusable(lambda: open_bundle(output)):
        raise InputError(
            f"{output}: exists already, and not as asked for ({'; '.join(found)}); give `force=True` to "
            f"replace it, or another `output`"
        )
    return True


def _unusable(read: Callable[[], object]) -> list[str]:
    """What keeps a bundle from being read, if anything does."""
    try:
        read()
    except InputError as error:
        return [str(error)]
    return []


def differences(request: Request, manifest: Manifest) -> list[str]:
    """In what a bundle is not what is asked for, in words; nothing if it is.

    Weights are hashed only where nothing else differs: that takes as long as reading them.
    """
    checkpoint, described = request.checkpoint, manifest.checkpoint
    prompt = described.get("system_prompt")
    wanted_prompt = None
    if checkpoint.text_encoder is not None:
        wanted_prompt = sha256_of_system_prompt(request.system_prompt, request.trained_with_system_prompt)
    pairs: dict[str, tuple[Any, Any]] = {
        "precision": (manifest.precision, request.precision),
        "max_batch": (manifest.max_batch, request.max_batch),
        "scales": (
            [list(each.model.patch_nums) for each in manifest.every_size.values()],
            [list(model.patch_nums) for model in request.models],
        ),
        "encoder of pictures": (ENCODER in manifest.graphs, request.encoder),
        "system prompt": (prompt["sha256"] if prompt else None, wanted_prompt),
    }
    found = [f"{what} {there}, asked for {asked}" for what, (there, asked) in pairs.items() if there != asked]
    own = checkpoint.describe()
    for network in (LLM, TOKENIZER, TEXT_ENCODER):
        if _plain(described.get(network)) != _plain(own[network]):
            found.append(f"another {network} configuration")
    if (manifest.sampling, manifest.speeds) != (checkpoint.sampling, checkpoint.speeds):
        found.append("other sampling defaults")
    for what, name, wanted in (
        ("another text tokenizer", TEXT_TOKENIZER, _sha256_of_vocabulary(request.vocabulary)),
        ("other names of classes", CLASS_NAMES, _sha256_of_names(request.names)),
    ):
        file = manifest.files.get(name)
        if (file.identity if file else None) != wanted:
            found.append(what)
    if not found and described.get("weights") != checkpoint.weights:
        found.append("other weights")
    elif not found and not checkpoint.llm.weights.averaged:
        chosen = choose_set(checkpoint.llm.files[0], manifest.sets, checkpoint.llm.ema)
        if chosen != manifest.sets[0]:
            found.append(f"weights below {shown(manifest.sets[0])}, asked for those below {shown(chosen)}")
    return found


def _sha256_of_vocabulary(vocabulary: Tokenizer | None) -> str | None:
    """Of the file that it would be saved as."""
    return hashlib.sha256(vocabulary.to_str(pretty=True).encode()).hexdigest() if vocabulary else None


def _plain(value: Any) -> Any:
    """As JSON would bring it back: tuples are lists there."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
