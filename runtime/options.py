"""Options that several commands have: which bundle, and what runs it."""

from __future__ import annotations

import click

from hart_runtime.common.console import PATH
from hart_runtime.common.settings import MOST_THREADS
from hart_runtime.runtime.backends.names import AUTO, DEVICES
from hart_runtime.runtime.backends.registry import BACKENDS

BUNDLE_HELP = "Bundle made by hart-export, or a folder that holds one."
bundle_option = click.option(
    "--engine",
    "bundle",
    required=True,
    type=PATH,
    metavar="BUNDLE",
    help=BUNDLE_HELP,
)
device_option = click.option("--device", type=click.Choice(DEVICES), default=AUTO, show_default=True)
backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default=AUTO,
    show_default=True,
    help="auto: the bundle's engines where they run, else ONNX Runtime.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="CPU threads. [default: all cores]"
)
