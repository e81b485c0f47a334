"""Options that several commands have: which bundle, and what runs it."""

from __future__ import annotations

import click

from hart_runtime.common.console import PATH, WORD
from hart_runtime.common.errors import InputError
from hart_runtime.common.settings import MOST_THREADS, SPEEDS
from hart_runtime.runtime.backends.names import AUTO, DEVICES, parse_device
from hart_runtime.runtime.backends.registry import BACKENDS

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
speed_option = click.option(
    "--speed",
    type=click.Choice([*SPEEDS]),
    help="How much is left out: nothing; the last scale's guidance; more, and a part of the tokens of the "
    "largest scales. [default: the bundle's]",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads. [default: all cores]"
)
