"""Which files are a MAR checkpoint: ``mar_base/checkpoint-last.pth`` and ``kl16.ckpt``, beside it, one folder
above, or elsewhere.

Nothing here needs torch until a configuration is asked for that only tensors tell.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hart_runtime.common.checkpoint import SAMPLING_FILE, Network, TwoFiles, name_of
from hart_runtime.common.diffusion_schedule import diffusion_schedule
from hart_runtime.common.errors import InputError, listed, shown, told_of
from hart_runtime.common.mar_config import Heads, KlConfig, MarConfig
from hart_runtime.common.settings import MAR_PUBLISHED, SamplingSettings
from hart_runtime.common.weight_files import SUFFIXES

if TYPE_CHECKING:
    from hart_runtime.hart.model import Mar

TRANSFORMER_NAME, TOKENIZER_NAME = "checkpoint-last.pth", "kl16.ckpt"
TRAINED = "checkpoint"
"""How a name begins that says nothing of the model: it is called as its folder is."""
TRANSFORMERS, TOKENIZERS = (TRAINED, "mar"), ("kl",)
"""How the names of the files begin."""
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
"""Of the published results, by the width of the model."""


class _Sizes(NamedTuple):
    num_tokens: int


@dataclass(frozen=True)
class MarCheckpoint(TwoFiles):
    """The two files of a MAR checkpoint."""

    heads: Heads | None = None
    """Where they are not those of a published model of that width."""

    @property
    def source(self) -> str:
        """Where it is from: its folder and file, for one from the hub behind owner/name@commit."""
        file = self.transformer_file
        inside = f"{self.root.name}/{file.name}" if file.stem.startswith(TRAINED) else file.name
        hub = next((name_of(place) for place in (self.root, self.root.parent) if "@" in name_of(place)), None)
        return f"{hub}/{inside}" if hub else inside

    @property
    def name(self) -> str:
        stem = self.transformer_file.stem
        return (self.root.resolve().name if stem.startswith(TRAINED) else stem).replace("_", "-")

    @functools.cached_property
    def _empty(self) -> Mar:
        """Both networks without numbers; raises InputError."""
        from hart_runtime.hart.mar_checkpoint import empty_mar

        return empty_mar(self.transformer_file, self.tokenizer_file, self.heads, self.llm.ema)

    @property
    def llm_config(self) -> MarConfig:
        return self._empty.transformer.config

    @property
    def tokenizer_config(self) -> KlConfig:
        return self._empty.tokenizer.config

    @property
    def text_config(self) -> None:
        return None

    @property
    def sizes(self) -> _Sizes:
        return _Sizes(self.llm_config.tokens)

    @property
    def sampling(self) -> SamplingSettings:
        """Those of the published results, overridden by ``sampling.json`` beside it."""
        guidance = GUIDANCE.get(self.llm_config.encoder_dim, MAR_PUBLISHED.guidance)
        found = self.own_sampling(asdict(replace(MAR_PUBLISHED, guidance=guidance)))
        with told_of(str(self.root / SAMPLING_FILE)):
            diffusion_schedule(found.steps)
        return found


def holds_mar(place: Path, tokenizer: Path | None) -> bool:
    """Whether a folder holds a file by MAR's names, or a file or its tokenizer has one."""
    if place.is_dir():
        return bool(_files(place, TRANSFORMERS))
    return _called(place, TRANSFORMERS) or (tokenizer is not None and _called(tokenizer, TOKENIZERS))


def find_mar(
    place: Path, tokenizer: Path | None = None, heads: Heads | None = None, ema: bool | None = None
) -> MarCheckpoint:
    """Look for the two files; neither is read.

    Args:
        place: the transformer's file, or the folder that holds it.
        tokenizer: the image tokenizer's file; by default the one beside the transformer, or one folder above.
        heads: where they are not those of a published model of that width.
        ema: True for ``model_ema``, False for ``model``; by default averaged weights where there are any.

    Raises:
        InputError: one is missing, or there are several.
    """
    if place.is_dir():
        place = _only(place, _files(place, TRANSFORMERS), "transformers", "one as `file`", TRANSFORMER_NAME)
    for file, what in ((place, "checkpoint"), (tokenizer, "image tokenizer")):
        if file is not None and not file.is_file():
            raise InputError(f"{file}: no such {what} file")
    folder = place.absolute().parent
    if tokenizer is None:
        tokenizer = _beside(place, folder)
    return MarCheckpoint(
        root=folder,
        llm=Network(folder, ema, file=folder / place.name),
        tokenizer=Network(tokenizer.absolute().parent, file=tokenizer.absolute()),
        text_encoder=None,
        heads=heads,
    )


def parse_heads(text: str) -> Heads:
    """Numbers of heads: ``16``, or ``12,16`` where encoder and decoder differ.

    Raises:
        InputError: neither.
    """
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise InputError(
            f"`heads`: expected a number such as 16, or those of encoder and decoder such as 12,16, "
            f"found {shown(text)}"
        )
    first, last = int(parts[0]), int(parts[-1])
    if not first or not last:
        raise InputError(f"`heads`: expected at least one, found {shown(text)}")
    return first, last


def _beside(place: Path, folder: Path) -> Path:
    """The image tokenizer of a transformer."""
    for where in (folder, folder.parent):
        if found := [file for file in _files(where, TOKENIZERS) if file != place.absolute()]:
            return _only(where, found, "image tokenizers", "one as `tokenizer`", TOKENIZER_NAME)
    raise InputError(
        f"{place}: expected the image tokenizer {TOKENIZER_NAME} beside it or one folder above, found none; "
        f"give its file as `tokenizer`"
    )


def _files(folder: Path, beginnings: tuple[str, ...]) -> list[Path]:
    """Weight files with such names."""
    there = (entry.absolute() for entry in folder.iterdir() if _called(entry, beginnings))
    return sorted(entry for entry in there if entry.is_file())


def _called(file: Path, beginnings: tuple[str, ...]) -> bool:
    """Whether a file is named so, up to a number or a mark, and ends as weights do."""
    begins = any(
        file.stem.startswith(word) and not file.stem[len(word) :][:1].isalpha() for word in beginnings
    )
    return begins and file.suffix in (*SUFFIXES, ".ckpt")


def _only(folder: Path, files: list[Path], what: str, way: str, published: str) -> Path:
    """The one of the published name, or the only one."""
    if not files:
        raise InputError(
            f"{folder}: expected a transformer such as {published}, found none; of a model on the hub, name "
            f"it with `file`"
        )
    files = [file for file in files if file.name == published] or files
    if len(files) != 1:
        names = listed([file.name for file in files])
        raise InputError(f"{folder}: {len(files)} {what} and no rule says which: {names}; give {way}")
    return files[0]
