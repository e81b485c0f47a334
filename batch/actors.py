"""Processes of Ray's: those that draw, and those that encode prompts for them, where that saves memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa

from hart_runtime.batch.artist import Artist, Means, opened
from hart_runtime.batch.bundles import Pieces, on_this_node
from hart_runtime.batch.output import Finished
from hart_runtime.batch.plan import Picture
from hart_runtime.batch.sources import Given, Read, read_here
from hart_runtime.common.errors import InputError, RunError
from hart_runtime.common.settings import SamplingSettings
from hart_runtime.runtime.backends.backend import Backend
from hart_runtime.runtime.bundle import Bundle
from hart_runtime.runtime.pictures import Source
from hart_runtime.runtime.pipeline import Pipeline
from hart_runtime.runtime.spec import ModelSpec
from hart_runtime.runtime.text import EncodedPrompts, TextEncoder

ASKED = pa.schema(
    {
        "number": pa.int64(),
        "row": pa.int64(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "settings": pa.int32(),
        "error": pa.string(),
        "source": pa.int32(),
    }
)
ENCODED = "encoded"
"""Column that an encoder adds: features and mask of the prompt, or the error that it ended with."""
PICTURE = pa.struct(
    {
        "number": pa.int64(),
        "seconds": pa.float64(),
        "sha256": pa.string(),
        "error": pa.string(),
        "png": pa.binary(),
    }
)
DRAWN = pa.schema({"batch": pa.list_(PICTURE), "failed": pa.string(), "bad_input": pa.bool_()})
"""A row for every batch, whose pictures Ray would take apart in its blocks of bounded size; or why an actor
cannot go on, since of an exception Ray hands on its traceback alone."""
Failure = InputError | RunError


def _opened(means: Means, pieces: Pieces | None) -> tuple[Bundle, Callable[[Bundle], Backend]]:
    """The bundle on this node."""
    if pieces is not None:
        means = replace(means, bundle=on_this_node(means.identity, pieces))
    return opened(means)


class DrawingActor:
    """Draws."""

    def __init__(
        self,
        means: Means,
        settings: Sequence[SamplingSettings],
        pieces: Pieces | None,
        encoded: bool,
        reader: Any,
    ) -> None:
        """Opens the bundle.

        Args:
            encoded: whether prompts come encoded, and the text encoder is not opened.
            reader: Ray's handle of a :class:`ReadingActor`; None where no pictures are given.
        """
        self.artist: Artist | Failure
        try:
            bundle, open_part = _opened(means, pieces)
            rest = bundle.parts()[1] if encoded else bundle
            known = EncodedPrompts({}) if encoded else None
            pipeline = Pipeline(rest, open_part(rest), means.threads, known)
            self.artist = Artist(pipeline, settings, read_by(reader), means.batch)
        except (InputError, RunError) as error:  # told of with the first picture: Ray would only try again
            self.artist = error

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        """A block of pictures to draw, as blocks of those that are drawn."""
        try:
            if isinstance(self.artist, Failure):
                raise self.artist
            if ENCODED in block.column_names:
                self.artist.pipeline.text = _prompts(block)
            for finished in self.artist(Picture(**row) for row in block.select(ASKED.names).to_pylist()):
                yield _row(batch=[asdict(one) for one in finished])
        except (InputError, RunError) as error:
            yield _row(batch=[], failed=str(error), bad_input=isinstance(error, InputError))


class EncodingActor:
    """Encodes prompts."""

    def __init__(self, means: Means, batch: int, pieces: Pieces | None) -> None:
        """``batch``: prompts that are encoded at once."""
        self.batch = batch
        self.encoder: TextEncoder | Failure
        try:
            bundle, open_part = _opened(means, pieces)
            text, _ = bundle.parts()
            self.encoder = TextEncoder(text, open_part(text))
        except (InputError, RunError) as error:
            self.encoder = error

    def __call__(self, block: pa.Table) -> pa.Table:
        """The same block with what drawing needs of its prompts."""
        prompts = block["prompt"].to_pylist()
        try:
            if isinstance(self.encoder, Failure):
                raise self.encoder
            rows: Any = self.encoder.known(list(dict.fromkeys(prompts)), self.batch).rows
        except (InputError, RunError) as error:
            rows = dict.fromkeys(prompts, error)
        encoded = pa.array([pickle.dumps(rows[prompt]) for prompt in prompts], pa.large_binary())
        return block.append_column(ENCODED, encoded)


class ReadingActor:
    """Reads given pictures where they lie, which is the machine that the run was started on."""

    def __init__(self, given: Sequence[Given], model: ModelSpec) -> None:
        self._read = read_here(given, model)

    def read(self, number: int) -> Source | str:
        """A given picture, or what is wrong with it."""
        try:
            return self._read(number)
        except InputError as error:
            return str(error)


def read_by(reader: Any) -> Read:
    """What asks a :class:`ReadingActor`, wherever it is."""

    def read(number: int) -> Source:
        import ray

        found: Source | str = ray.get(reader.read.remote(number))
        if isinstance(found, str):
            raise InputError(found)
        return found

    return read


def _prompts(block: pa.Table) -> EncodedPrompts:
    """What encoders made of a block's prompts; raises what one of them could not go on for."""
    rows = {}
    for prompt, data in zip(block["prompt"].to_pylist(), block[ENCODED].to_pylist(), strict=True):
        rows[prompt] = pickle.loads(data)
        if isinstance(rows[prompt], Failure):
            raise rows[prompt]
    return EncodedPrompts(rows)


def _row(**values: Any) -> pa.Table:
    return pa.Table.from_pylist([values], DRAWN)


def batch_of(row: dict[str, Any]) -> list[Finished]:
    """Of a row that was drawn; raises what an actor could not go on for."""
    if row["failed"] is not None:
        raise (InputError if row["bad_input"] else RunError)(row["failed"])
    return [Finished(**one) for one in row["batch"]]
