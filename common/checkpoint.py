"""What a checkpoint holds: asked once, and handed on. In HART's published layout that is::

    <root>/llm/config.json, model.safetensors (or sharded, or pytorch_model.bin), ema_model.bin
    <root>/tokenizer/config.json, model.safetensors (keys below ``vae.``)
    <root>/text_encoder/config.json, model.safetensors, tokenizer.json   (optional)

Nothing here reads a weight; :mod:`hart_runtime.hart.checkpoint` does.
"""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hart_runtime.common.config import (
    HYBRID,
    ClassHartConfig,
    TextEncoderConfig,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
    config_from_dict,
    config_to_dict,
)
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError, shown, told_of
from hart_runtime.common.hashing import sha256_of
from hart_runtime.common.json_files import read_json
from hart_runtime.common.mar_config import KlConfig, MarConfig
from hart_runtime.common.qwen2_config import text_config_from_dict
from hart_runtime.common.settings import SamplingSettings, check_ranges, settings_of, speeds_of
from hart_runtime.common.weight_files import WeightFiles, any_weights, find_weights

LLM, TOKENIZER, TEXT_ENCODER = "llm", "tokenizer", "text_encoder"
"""The networks of a checkpoint, and the folders they lie in."""
AVERAGED = "ema_model.bin"
SAMPLING_FILE, CLASS_NAMES = "sampling.json", "classes.txt"
"""Files of ours that may lie beside the networks: default settings, and names of classes, one a line."""
SPEEDS_OWN = "speeds"
"""In the first of them, beside the settings: what the checkpoint means by names of speeds."""


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint."""

    folder: Path
    ema: bool | None = False
    """True for averaged weights, False for the others, None for averaged ones if there are any."""
    file: Path | None = None
    """The file that holds it, where the folder says nothing of it."""

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def has_weights(self) -> bool:
        """Whether there is any weight file; configurations alone are enough for a dry run."""
        return self.file is not None or any_weights(self.folder)

    @functools.cached_property
    def weights(self) -> WeightFiles:
        """Where its weights are; raises InputError if they are not there."""
        return WeightFiles((self.file,)) if self.file else find_weights(self.folder, self.ema)

    @property
    def files(self) -> tuple[Path, ...]:
        """One file or shards; raises InputError as :attr:`weights`."""
        return self.weights.files

    @property
    def names(self) -> tuple[str, ...]:
        """The files in the words of the folder."""
        return tuple(file.relative_to(self.folder).as_posix() for file in self.files)

    @functools.cached_property
    def text_config(self) -> TextEncoderConfig:
        """Its configuration, for a text encoder; raises InputError."""
        return text_config_from_dict(read_json(self.config_file), str(self.config_file))


@dataclass(frozen=True)
class Checkpoint(ABC):
    """Weight files of a model, as they lie on disk, and what is known of it without their numbers."""

    root: Path
    """The folder that holds all of it, absolute."""
    llm: Network
    tokenizer: Network
    text_encoder: Network | None

    @property
    def networks(self) -> dict[str, Network]:
        """Those that are there, by name."""
        parts = {LLM: self.llm, TOKENIZER: self.tokenizer, TEXT_ENCODER: self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def source(self) -> str:
        """Where it is from: its folder's name, or owner/name@commit for one from the hub."""
        return name_of(self.root)

    @property
    def name(self) -> str:
        """What to call it."""
        return self.source.rpartition("/")[2].partition("@")[0]

    @functools.cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """sha256 of every weight file, by network and name; reads them all."""
        found = {
            name: {known: sha256_of(file) for known, file in zip(part.names, part.files, strict=True)}
            for name, part in self.networks.items()
        }
        return {LLM: found[LLM], TOKENIZER: found[TOKENIZER], TEXT_ENCODER: found.get(TEXT_ENCODER, {})}

    @property
    @abstractmethod
    def llm_config(self) -> Transformer | MarConfig:
        """Configuration of the transformer; raises InputError."""

    @property
    @abstractmethod
    def tokenizer_config(self) -> TokenizerConfig | KlConfig:
        """Configuration of the image tokenizer; raises InputError."""

    @property
    @abstractmethod
    def text_config(self) -> TextEncoderConfig | None:
        """Configuration of the text encoder, if there is one; raises InputError."""

    @property
    @abstractmethod
    def sampling(self) -> SamplingSettings:
        """Its default settings; raises InputError."""

    @property
    def sizes(self) -> object:
        """What holds those that settings must not be over; raises InputError."""
        return self.tokenizer_config

    @property
    def class_names(self) -> Path | None:
        """The file of the names of its classes, if there is one."""
        file = self.root / CLASS_NAMES
        return file if file.is_file() else None

    def own_sampling(self, published: Mapping[str, Any]) -> SamplingSettings:
        """Published settings, overridden by the checkpoint's own; raises InputError."""
        file = self.root / SAMPLING_FILE
        own = {name: value for name, value in self._sampling_file.items() if name != SPEEDS_OWN}
        settings = settings_of({**published, **own}, str(file))
        with told_of(str(file)):
            check_ranges(settings, self.sizes)
            if settings.residual:
                diffusion_schedule(settings.steps)
        return settings

    @functools.cached_property
    def speeds(self) -> dict[str, SamplingSettings]:
        """What its own ``sampling.json`` means by names of speeds, under "speeds"; raises InputError."""
        source = f"{self.root / SAMPLING_FILE}: {SPEEDS_OWN}"
        return speeds_of(self._sampling_file.get(SPEEDS_OWN, {}), self.sampling, self.sizes, source)

    @property
    def _sampling_file(self) -> dict[str, Any]:
        file = self.root / SAMPLING_FILE
        return read_json(file) if os.path.lexists(file) else {}

    def describe(self) -> dict[str, Any]:
        """Name and configurations, as a manifest keeps them."""
        text = self.text_config
        return {
            "source": self.source,
            LLM: config_to_dict(self.llm_config),
            TOKENIZER: config_to_dict(self.tokenizer_config),
            TEXT_ENCODER: config_to_dict(text) if text else None,
        }


@dataclass(frozen=True)
class TwoFiles(Checkpoint):
    """A checkpoint without configuration, of one file for its transformer and one for its image tokenizer."""

    @property
    def transformer_file(self) -> Path:
        (file,) = self.llm.files
        return file

    @property
    def tokenizer_file(self) -> Path:
        (file,) = self.tokenizer.files
        return file


@dataclass(frozen=True)
class HartCheckpoint(Checkpoint):
    """Folders in HART's published layout."""

    @functools.cached_property
    def llm_config(self) -> TransformerConfig | ClassHartConfig:
        """Configuration of transformer and diffusion head; raises InputError."""
        file = self.llm.config_file
        values = read_json(file)
        if not {"depth", "embed_dim"} & set(values):
            tokenizer = "z_channels" in values or "v_patch_nums" in values
            what = "the tokenizer's; give the folder above it" if tokenizer else "another model's"
            raise InputError(
                f"{file}: expected depth and embed_dim of a scale transformer, this file is {what}"
            )
        if values.get("num_classes"):
            return config_from_dict(ClassHartConfig, values, str(file))
        return config_from_dict(TransformerConfig, values, str(file))

    @functools.cached_property
    def tokenizer_config(self) -> TokenizerConfig:
        """Configuration of the image tokenizer; raises InputError."""
        file = self.tokenizer.config_file
        config = config_from_dict(TokenizerConfig, read_json(file), str(file))
        if not config.hybrid:
            raise InputError(
                f"{file}: quantizer_type must be {HYBRID!r} (the published code runs no other), "
                f"found {shown(config.quantizer_type)}"
            )
        return config

    @functools.cached_property
    def text_config(self) -> TextEncoderConfig | None:
        """Configuration of the text encoder, if there is one; raises InputError."""
        if self.text_encoder is None:
            return None
        llm, config = self.llm_config, self.text_encoder.text_config
        if isinstance(llm, ClassHartConfig):
            raise InputError(
                f"{self.text_encoder.folder}: this checkpoint draws classes and has no text encoder"
            )
        if config.hidden_size != llm.context_dim:
            raise InputError(
                f"{self.text_encoder.folder}: features are {config.hidden_size} wide, "
                f"the transformer expects {llm.context_dim}"
            )
        return config

    @functools.cached_property
    def sampling(self) -> SamplingSettings:
        """The published defaults, overridden by the checkpoint's own ``sampling.json``."""
        return self.own_sampling({"steps": self.llm_config.num_sampling_steps})


def find_checkpoint(root: Path, text_encoder: Path | None = None, ema: bool | None = None) -> HartCheckpoint:
    """Look at the folders of a checkpoint; no file is read.

    Args:
        root: the checkpoint folder, or the ``llm`` folder inside it, as the published README
            tells users to pass.
        text_encoder: a Qwen2 folder; by default ``text_encoder/`` inside the checkpoint, if it is there.
        ema: True for averaged weights, False for the others; by default averaged ones where there are
            any, as the published sampler does.

    Raises:
        InputError: a folder or a configuration is missing.
    """
    for folder, what in ((root, "checkpoint"), (text_encoder, "text encoder")):
        if folder is not None and not folder.is_dir():
            raise InputError(f"{folder}: no such {what} folder")
    if (root / "manifest.json").is_file() and not (root / LLM).is_dir():
        raise InputError(f"{root}: is a bundle, expected the checkpoint that it was exported from")
    llm = root / LLM if (root / LLM).is_dir() else root
    whole = llm.absolute().parent  # a linked llm folder keeps its neighbours
    tokenizer = whole / TOKENIZER
    for folder in (llm, tokenizer):
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{root}: not a HART checkpoint, expected {folder / 'config.json'} "
                f"(layout: {LLM}/ and {TOKENIZER}/ side by side)"
            )
    text = text_encoder or whole / TEXT_ENCODER
    return HartCheckpoint(
        root=whole,
        llm=Network(llm, ema),
        tokenizer=Network(tokenizer),
        text_encoder=Network(text) if text_encoder or text.is_dir() else None,
    )


def name_of(folder: Path) -> str:
    """What to call a folder: its name, or owner/name@commit for one in the hub's cache."""
    folder = folder.resolve()
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return f"{cached.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name
