"""Options that several commands have: which bundle, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from hart_runtime.common.console import PATH, WORD
from hart_runtime.common.errors import InputError
from hart_runtime.common.settings import MOST_THREADS, SPEEDS
from hart_runtime.runtime.backends.names import AUTO, DEVICES, parse_device
from hart_runtime.runtime.backends.registry import BACKENDS

Declared = TypeVar("Declared", bound=Callable[..., Any])
BUNDLE_HELP = "Bundle made by hart-export, or a folder that holds one."
bundle_option = click.option(
    "--engine",
    "bundle",
    required=True,
    type=PATH,
    metavar="BUNDLE",
    help=BUNDLE_HELP,
    is_eager=True,  # what stands behind it, help among it, may depend on it
)
size_option = click.option(
    "--size",
    type=int,
    help="Pixels along a side, of those that the bundle was exported with. [default: its first]",
)


def _device(context: click.Context, option: click.Parameter, value: str) -> str:
    try:
        parse_device(value)
    except InputError as error:
        raise click.BadParameter(str(error).replace("`", "")) from None
    return value


device_option = click.option(
    "--device", default=AUTO, show_default=True, metavar="|".join(DEVICES), callback=_device
)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=AUTO,
    show_default=True,
    help="auto: the bundle's engines where they run, else ONNX Runtime.",
)
safety_option = click.option(
    "--safety-model",
    type=WORD,
    metavar="PATH|ID",
    help="Ask this ShieldGemma about every prompt first, such as google/shieldgemma-2b. [default: none]",
)
PICTURE_OPTIONS = (
    click.option("--image", type=PATH, help="Picture to start from: PNG, JPEG, WebP, GIF, BMP or TIFF."),
    click.option(
        "--mask",
        type=PATH,
        help="Picture of its size: where it is white, or transparent, is drawn. [default: where --image is "
        "transparent]",
    ),
    click.option(
        "--outpaint",
        type=WORD,
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        help="Draw around --image, so many of its pixels to each side.",
    ),
    click.option(
        "--vary", type=int, metavar="SCALES", help="Keep the first scales of --image, and draw the others."
    ),
    click.option(
        "--anew", type=int, default=0, show_default=True, help="Coarsest scales drawn whole, whatever --mask."
    ),
    click.option(
        "--fit",
        type=click.Choice(["cover", "contain", "stretch"]),
        help="How --image becomes a square: cut off, with bars, or bent. [default: cover; with --outpaint "
        "contain]",
    ),
    click.option(
        "--paste/--no-paste",
        default=True,
        show_default=True,
        help="Put the pixels of --image back outside of the mask.",
    ),
    click.option(
        "--reconstruct", is_flag=True, help="Only show what the tokenizer keeps of --image, with PSNR."
    ),
)
"""Of commands that take a picture, in the order of their help."""
PICTURE = ("image", "mask", "outpaint", "vary", "anew", "fit", "paste", "reconstruct")
"""Names of their parameters."""


def picture_options(function: Declared) -> Declared:
    """Declare them."""
    for option in reversed(PICTURE_OPTIONS):
        function = option(function)
    return function


speed_option = click.option(
    "--speed",
    type=click.Choice([*SPEEDS]),
    help="How much is left out: nothing; the last scale's guidance; more, and a part of the tokens of the "
    "largest scales. [default: the bundle's]",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads. [default: all cores]"
)
