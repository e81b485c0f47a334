"""``hart-serve``: bundles behind OpenAI's images API, and a page to draw on."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import click

from hart_runtime.common.console import PATH, WORD, FiniteRange, command
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.options import BUNDLE_HELP, backend_option, safety_option, threads_option

KEY_VARIABLE = "HART_API_KEY"
GRACE_TO_READ = 60
"""Seconds that a client has to send its request and to read its pictures, beside the time they take."""


@command(words={"key": "--api-key-file", "source": "--safety-model"})
@click.option(
    "--engine",
    "bundles",
    required=True,
    multiple=True,
    type=PATH,
    metavar="BUNDLE",
    help=f"{BUNDLE_HELP[:-1]} or more; several times for several.",
)
@click.option("--host", default="127.0.0.1", show_default=True, type=WORD, help="Address to listen at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("auto",),
    show_default=True,
    type=WORD,
    help="cpu, cuda or cuda:N; several times for a worker on each. auto: on every GPU, or one on the CPU.",
)
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes for each device."
)
@backend_option
@threads_option
@click.option(
    "--max-loaded",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Bundles that a worker holds open.",
)
@click.option(
    "--queue", default=64, show_default=True, type=click.IntRange(10), help="Pictures that may wait."
)
@click.option(
    "--timeout", default=600.0, show_default=True, type=FiniteRange(1), help="Seconds a request may take."
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=FiniteRange(0),
    help="Seconds that requests have to finish when the server ends.",
)
@safety_option
@click.option(
    "--api-key-file", type=PATH, help=f"File with the key that clients need. [default: ${KEY_VARIABLE}]"
)
@click.option("--insecure", is_flag=True, help="Listen beyond this machine without a key.")
@click.option("--allow-origin", multiple=True, type=WORD, help="Web page elsewhere that may ask.")
@click.option("--root-path", default="", help="Prefix that a reverse proxy strips.")
@click.option("--log-prompts", is_flag=True, help="Write prompts into the log.")
def main(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    devices: tuple[str, ...],
    workers: int,
    backend: str,
    threads: int | None,
    max_loaded: int,
    queue: int,
    timeout: float,
    grace: float,
    safety_model: str | None,
    api_key_file: Path | None,
    insecure: bool,
    allow_origin: tuple[str, ...],
    root_path: str,
    log_prompts: bool,
) -> None:
    """Serve the bundles in BUNDLE to OpenAI's clients, and a page to draw on."""
    from hart_runtime.common.install import require

    require("hart-serve", "serve", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    from hart_runtime.runtime.backends.names import parse_device
    from hart_runtime.serve.logs import log_lines
    from hart_runtime.serve.security import LOOPBACK, Rules
    from hart_runtime.serve.server import Service, serve

    for device in devices:
        parse_device(device)
    key, alone = api_key(api_key_file), _is_loopback(host)
    if not (alone or key or insecure):
        raise InputError(f"`host={host!r}`: everybody there could draw; give a key (`key`), or `insecure`")
    log_lines("hart_runtime.serve")
    rules = Rules(key, LOOPBACK if alone else None, allow_origin, timeout + GRACE_TO_READ)
    service = Service(
        bundles,
        host,
        port,
        devices,
        workers,
        backend,
        threads,
        max_loaded,
        queue,
        timeout,
        grace,
        safety_model,
        rules,
        root_path,
        log_prompts,
    )
    serve(service, click.echo)


def api_key(file: Path | None) -> str | None:
    """The key in a file, else in the environment, else none; raises InputError for a file without one."""
    from hart_runtime.common.text_files import read_text

    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = read_text(file, str(file)).strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"{file}: expected an API key in one line of ASCII, found {len(key)} characters")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
