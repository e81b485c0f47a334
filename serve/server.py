"""Runs the application: the socket, the signals, and the end that nobody's picture is lost at."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from hart_runtime.common.errors import InputError, RunError
from hart_runtime.runtime.backends.names import AUTO, CUDA
from hart_runtime.runtime.memory.gpu import count_gpus
from hart_runtime.serve.app import create_app
from hart_runtime.serve.metrics import Metrics
from hart_runtime.serve.models import Model, check_screened, find_models
from hart_runtime.serve.protocol import MOST_HEADERS, Protocol
from hart_runtime.serve.scheduler import Scheduler
from hart_runtime.serve.security import Guard, Rules
from hart_runtime.serve.worker import Plan

log = logging.getLogger(__name__)

LAST_WORDS = 2
"""Seconds for answers that are on their way when the server ends."""
MOST_CONNECTIONS = 2048


@dataclass(frozen=True)
class Service:
    """How a server is to be run."""

    bundles: Sequence[Path]
    host: str = "127.0.0.1"
    port: int = 8000
    devices: Sequence[str] = (AUTO,)
    workers: int = 1
    """For each device."""
    backend: str = "auto"
    threads: int | None = None
    most_loaded: int = 1
    room: int = 64
    """Pictures that may wait."""
    patience: float = 600.0
    """Seconds until a request is given up."""
    grace: float = 30.0
    """Seconds that requests have to finish when the server ends."""
    safety_model: str | None = None
    """That prompts are shown to first, see :class:`hart_runtime.hart.safety.SafetyModel`."""
    rules: Rules = field(default_factory=Rules)
    root_path: str = ""
    tell_prompts: bool = False


class _Server(uvicorn.Server):
    """Leaves the signals to us: uvicorn raises them again at its end, and would cut streams off."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, listening: Callable[[str], None] = lambda _: None) -> None:
    """Serve until a signal comes.

    Args:
        listening: called with the address.

    Raises:
        InputError, RunError: a bundle or the address cannot be used.
    """
    asyncio.run(_serve(service, listening))


async def _serve(service: Service, listening: Callable[[str], None]) -> None:
    models = find_models(service.bundles)
    if service.safety_model is not None:
        check_screened(models)
    folders = {name: model.folder for name, model in models.items()}
    plans = [
        Plan(folders, device, service.backend, service.threads, service.most_loaded)
        for device in spread_over_gpus(service.devices, models.values())
        for _ in range(service.workers)
    ]
    bound = _bound(service.host, service.port)
    scheduler = Scheduler(plans, Metrics(), service.room, service.patience, service.safety_model)
    app = create_app(scheduler, models, service.tell_prompts)
    server = _Server(
        uvicorn.Config(
            Guard(app, service.rules),  # type: ignore[arg-type]
            http=Protocol,
            ws="none",
            h11_max_incomplete_event_size=MOST_HEADERS,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            root_path=service.root_path,
            timeout_graceful_shutdown=LAST_WORDS,
            limit_concurrency=MOST_CONNECTIONS,
        )
    )
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, ending)
    scheduler.start()
    running = asyncio.ensure_future(server.serve([bound]))
    waiting = asyncio.ensure_future(ending.wait())
    try:
        listening(_address(bound))
        first: set[asyncio.Future[Any]] = {running, waiting, scheduler.broken}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if scheduler.broken.done():
            failure = scheduler.broken.result()
            raise (InputError if failure.bad_input else RunError)(failure.message)
        scheduler.stopping = True
        log.info("stopping", extra={"requests": len(scheduler.orders)})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(scheduler.drained(), service.grace)
    finally:
        scheduler.end()
        server.should_exit = True
        await running
        waiting.cancel()


def spread_over_gpus(devices: Sequence[str], models: Iterable[Model]) -> list[str]:
    """One device for each worker: where there are several GPUs, "auto" stands for all of them.

    With a bundle that runs on the CPU alone it stays what it is for everybody else.
    """
    gpus = count_gpus() if AUTO in devices and all(model.manifest.kind.engines for model in models) else 0
    every = [f"{CUDA}:{number}" for number in range(gpus)] if gpus > 1 else [AUTO]
    return [one for device in devices for one in (every if device == AUTO else [device])]


def _end(ending: asyncio.Event) -> None:
    """The second signal is meant."""
    if ending.is_set():
        os._exit(1)
    ending.set()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = "something else listens there" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise InputError(f"`port={port}`: {host}:{port} cannot be listened to ({why})") from None


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
