"""Which files are a checkpoint: folders in HART's layout, VAR's two files, ``var_d16.pth`` to
``var_d36.pth`` and ``vae_ch160v4096z32.pth`` beside it or elsewhere, or MAR's
(:mod:`hart_runtime.hart.mar_files`).

Nothing here needs torch until a configuration is asked for that only tensors tell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hart_runtime.common.checkpoint import (
    LLM,
    TOKENIZER,
    Checkpoint,
    Network,
    TwoFiles,
    find_checkpoint,
    name_of,
)
from hart_runtime.common.config import ClassTransformerConfig, TokenizerConfig
from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.settings import VAR_DEMO, SamplingSettings
from hart_runtime.common.weight_files import SUFFIXES
from hart_runtime.hart.mar_files import find_mar, holds_mar, parse_heads

if TYPE_CHECKING:
    from hart_runtime.hart.model import Var

Find = Callable[[Path, Path | None, bool | None], Checkpoint]
"""Looks at a place; takes the text encoder's and whether averaged weights are wanted, too."""
TOKENIZER_NAME = "vae_ch160v4096z32"
TRANSFORMERS, TOKENIZERS = ("var",), ("vae",)
"""How the names of the files begin."""
_DEPTH = re.compile(r"var_d(\d+)\b")
_TOKENIZER = re.compile(r"vae_ch(\d+)v(\d+)z(\d+)\b")


@dataclass(frozen=True)
class VarCheckpoint(TwoFiles):
    """The two files of a VAR checkpoint."""

    num_heads: int | None = None
    """Of a transformer whose file does not tell, if its heads are not 64 wide."""

    @property
    def source(self) -> str:
        """Where it is from: its file's name, for one from the hub behind owner/name@commit."""
        folder = name_of(self.root)
        return f"{folder}/{self.transformer_file.name}" if "@" in folder else self.transformer_file.name

    @property
    def name(self) -> str:
        return self.transformer_file.stem.replace("_", "-")

    @functools.cached_property
    def _empty(self) -> Var:
        """Both networks without numbers; raises InputError where a name says something else."""
        from hart_runtime.hart.var_checkpoint import empty_var

        model = empty_var(self.transformer_file, self.tokenizer_file, self.num_heads)
        config, image = model.transformer.config, model.tokenizer.config
        found = (image.ch, image.vocab_size, image.z_channels)
        for file, pattern, sizes, what in (
            (self.transformer_file, _DEPTH, (config.depth,), "a depth of"),
            (self.tokenizer_file, _TOKENIZER, found, "channels, codes and latent channels"),
        ):
            named = pattern.match(file.name)
            if named and tuple(map(int, named.groups())) != sizes:
                raise InputError(
                    f"{file}: its name says {what} {', '.join(named.groups())}, its tensors say "
                    f"{', '.join(map(str, sizes))}; download it again, or give it another name"
                )
        return model

    @property
    def llm_config(self) -> ClassTransformerConfig:
        return self._empty.transformer.config

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        return self._empty.tokenizer.config

    @property
    def text_config(self) -> None:
        return None

    @property
    def sampling(self) -> SamplingSettings:
        """Those of the published demo, overridden by ``sampling.json`` beside it."""
        top_k = min(VAR_DEMO.top_k or 1, self.tokenizer_config.vocab_size)
        return self.own_sampling(asdict(replace(VAR_DEMO, top_k=top_k)))


def find(
    place: Path,
    text_encoder: Path | None = None,
    ema: bool | None = None,
    tokenizer: Path | None = None,
    heads: str | None = None,
) -> Checkpoint:
    """Look at the files of a checkpoint, whichever family's it is; none is read.

    Args:
        place: a folder in HART's layout, a file of VAR's or of MAR's, or a folder that holds one.
        text_encoder, ema: as :func:`hart_runtime.common.checkpoint.find_checkpoint` takes them.
        tokenizer: VAR's or MAR's image tokenizer, where it does not lie beside its transformer.
        heads: of MAR's encoder and decoder, see :func:`hart_runtime.hart.mar_files.parse_heads`.

    Raises:
        InputError: none is there, or an option is another family's.
    """
    if holds_mar(place, tokenizer) and not (place / LLM).is_dir():
        _refused("text_encoder", text_encoder, "MAR draws classes and has no text encoder")
        return find_mar(place, tokenizer, parse_heads(heads) if heads else None, ema)
    _refused("heads", heads, "only MAR's files do not tell how many there are")
    ours = place.is_dir() and ((place / LLM).is_dir() or (place / "config.json").is_file())
    if place.is_dir() and (ours or not holds_var(place)):
        _refused("tokenizer", tokenizer, f"HART's lies in {TOKENIZER}/, beside {LLM}/")
        return find_checkpoint(place, text_encoder, ema)
    _refused("text_encoder", text_encoder, "VAR draws classes and has no text encoder")
    _refused("ema", ema or None, "VAR's files hold one set of weights")
    return find_var(place, tokenizer)


def finder(described: Mapping[str, Any], tokenizer: Path | None = None) -> Find:
    """How to look for a checkpoint that a bundle was exported from: with what its own files do not tell.

    Args:
        described: what the bundle says of it.
        tokenizer: as for :func:`find`.
    """
    llm = described[LLM]
    counts = [str(llm[name]) for name in ("encoder_heads", "decoder_heads") if name in llm]

    def at(place: Path, text_encoder: Path | None, ema: bool | None) -> Checkpoint:
        return find(place, text_encoder, ema, tokenizer, ",".join(counts) or None)

    return at


def _refused(name: str, value: object, why: str) -> None:
    """An option of another family; raises InputError."""
    if value is not None:
        raise InputError(f"{parameter(name, value)}: {why}")


def holds_var(folder: Path) -> bool:
    """Whether there are files by VAR's names in a folder."""
    return bool(_files(folder, (*TRANSFORMERS, *TOKENIZERS)))


def find_var(place: Path, tokenizer: Path | None = None, num_heads: int | None = None) -> VarCheckpoint:
    """Look for the two files; neither is read.

    Args:
        place: the transformer's file, or the folder that holds it.
        tokenizer: the image tokenizer's file; by default the one beside the transformer.

    Raises:
        InputError: one is missing, or there are several.
    """
    if place.is_dir():
        place = _only(place, _files(place, TRANSFORMERS), "transformers", "one as `file`")
    for file, what in ((place, "checkpoint"), (tokenizer, "image tokenizer")):
        if file is not None and not file.is_file():
            raise InputError(f"{file}: no such {what} file")
    folder = place.absolute().parent
    if tokenizer is None:
        beside = [file for file in _files(folder, TOKENIZERS) if file != place.absolute()]
        published = [file for file in beside if file.stem == TOKENIZER_NAME]
        if not beside:
            raise InputError(
                f"{place}: expected the image tokenizer {TOKENIZER_NAME}.pth beside it, found none; give its "
                f"file as `tokenizer`"
            )
        tokenizer = _only(folder, published or beside, "image tokenizers", "one as `tokenizer`")
    return VarCheckpoint(
        root=folder,
        llm=Network(folder, file=folder / place.name),
        tokenizer=Network(tokenizer.absolute().parent, file=tokenizer.absolute()),
        text_encoder=None,
        num_heads=num_heads,
    )


def _files(folder: Path, beginnings: tuple[str, ...]) -> list[Path]:
    """Weight files whose names begin like this, up to a number or a mark."""
    found = re.compile(rf"({'|'.join(beginnings)})([^a-z].*)?")
    there = (entry for entry in folder.iterdir() if entry.suffix in SUFFIXES and found.fullmatch(entry.stem))
    return sorted(entry.absolute() for entry in there if entry.is_file())


def _only(folder: Path, files: list[Path], what: str, way: str) -> Path:
    if not files:
        raise InputError(
            f"{folder}: expected a transformer such as var_d16.pth beside the image tokenizer, found none; "
            f"of a model on the hub, name it with `file`"
        )
    if len(files) != 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{folder}: {len(files)} {what} and no rule says which: {names}; give {way}")
    return files[0]
