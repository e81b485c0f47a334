"""The picture that ``hart-run`` is given, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hart_runtime.common.errors import InputError
from hart_runtime.runtime.editing import require_encoder
from hart_runtime.runtime.picture_record import source_again
from hart_runtime.runtime.pictures import NO_MARGINS, Source, margins_of, plain_source, source_of
from hart_runtime.runtime.reconstruction import CONTINUOUS, DISCRETE

if TYPE_CHECKING:
    from hart_runtime.runtime.backends.backend import Backend
    from hart_runtime.runtime.bundle import Bundle
    from hart_runtime.runtime.png import Origin


@dataclass(frozen=True)
class PictureOptions:
    """Those of the command, see :data:`hart_runtime.runtime.options.PICTURE_OPTIONS`."""

    image: Path | None
    mask: Path | None
    outpaint: str | None
    vary: int | None
    anew: int
    fit: str | None
    paste: bool
    reconstruct: bool

    def check(self) -> None:
        """Refuse what says something of a picture that is not there; raises InputError."""
        if self.image is not None:
            return
        for name in ("mask", "outpaint", "vary", "reconstruct"):
            if getattr(self, name) not in (None, False):
                raise InputError(f"`{name}`: there is no picture; give one with `image`")

    def source(self, bundle: Bundle, origin: Origin | None) -> Source | None:
        """What a drawing takes of them; of a picture that is drawn again, what that tells.

        Raises:
            InputError: a bad picture, or a bundle that takes none.
        """
        again = origin.picture if origin is not None else None
        if self.image is None:
            if again is not None:
                raise InputError("`from_image`: was drawn from another picture: give that one, too (`image`)")
            return None
        require_encoder(bundle)
        model = bundle.manifest.model
        if origin is not None:
            if again is None:
                raise InputError("`from_image`: was drawn from no other picture, found `image` beside it")
            return source_again(again, model, self.image)
        return source_of(
            model,
            self.image,
            self.mask,
            outpaint=NO_MARGINS if self.outpaint is None else margins_of(self.outpaint),
            vary=self.vary,
            anew=self.anew,
            fit=self.fit,
            paste=self.paste,
        )


def show_reconstruction(
    bundle: Bundle, open_part: Callable[[Bundle], Backend], given: PictureOptions, output: Path
) -> None:
    """Write what the tokenizer keeps of a picture beside ``output``, and print how much that is."""
    from hart_runtime.common.files import whole_file
    from hart_runtime.runtime.outputs import refuse_inputs, tell_replaced
    from hart_runtime.runtime.pipeline import Pipeline
    from hart_runtime.runtime.png import check_writable, encoded

    assert given.image is not None
    require_encoder(bundle)
    model = bundle.manifest.model
    names = (DISCRETE, CONTINUOUS) if model.diff_width else (DISCRETE,)
    paths = {name: output.with_stem(f"{output.stem}-{name}") for name in names}
    for path in paths.values():
        check_writable(path)
    refuse_inputs([*paths.values()], bundle.folder, given.image)
    tell_replaced([*paths.values()])
    plain_source(model, given.image, given.fit)  # refused before anything is opened
    _, rest = bundle.parts()
    found = Pipeline(rest, open_part(rest)).reconstruct(given.image, given.fit)
    for name, path in paths.items():
        with whole_file(path) as file:
            file.write(encoded(found.images[name], {"Description": f"{given.image.name}, {name}"}))
        click.echo(f"{path}: {name}, PSNR {found.psnr[name]:.2f} dB")
