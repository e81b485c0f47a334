"""The application of hart-serve on Ray Serve, which starts and stops replicas of it.

``serve run hart_runtime.serve.ray:build engine=engines/demo replicas=1..4``

A replica is one server: its own queue, which batches and refuses as :mod:`hart_runtime.serve.scheduler` does,
and a process that draws. Ray spreads requests over replicas and counts those that are there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import click
from ray import serve
from ray.serve import Application

from hart_runtime.common.bounds import bounds
from hart_runtime.common.ending import BAD_INPUT
from hart_runtime.common.errors import InputError, RunError, in_range, known_names, one_of, shown, told_of
from hart_runtime.common.settings import MOST_THREADS
from hart_runtime.runtime.backends.names import AUTO, CPU, parse_device
from hart_runtime.runtime.backends.registry import BACKENDS
from hart_runtime.serve.app import create_app
from hart_runtime.serve.cli import GRACE_TO_READ, KEY_VARIABLE, api_key
from hart_runtime.serve.logs import log_lines
from hart_runtime.serve.metrics import Metrics
from hart_runtime.serve.models import check_screened, find_models
from hart_runtime.serve.scheduler import Scheduler
from hart_runtime.serve.security import Guard, Rules
from hart_runtime.serve.worker import Plan

MOST_REPLICAS = 10_000
LIMITS = (
    ("gpus", 0, 1024),
    ("cpus", 0, 1024),
    ("threads", 0, MOST_THREADS),
    ("queue", 10, 1_000_000),
    ("timeout", 1, 1e9),
    ("grace", 0, 1e9),
)
"""Of arguments, as those of hart-serve."""
BESIDE = 64
"""Requests that a replica takes beyond those that may wait, so that it is the one who refuses them: Ray's own
refusal is no answer that clients of this API know."""


@dataclass(frozen=True)
class Arguments:
    """Of :func:`build`; words, as a command line gives them, or numbers, as a file does."""

    engine: str
    """A bundle, or a folder of them, on every node."""
    replicas: str = "1"
    """A number, or two with dots between them: as many as are asked."""
    device: str = AUTO
    """cpu, or cuda, which takes a GPU for each replica; auto is what the node of a replica has."""
    gpus: float = 0
    """Of each replica, if not one on cuda."""
    cpus: float = 1
    backend: str = AUTO
    threads: int = 0
    """Of the CPU; 0 for all."""
    queue: int = 64
    timeout: float = 600
    grace: float = 30
    safety_model: str = ""
    """That prompts are shown to first, on every node."""
    api_key_file: str = ""
    """Else the key is in the environment of who builds."""
    log_prompts: str = "false"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """Raises InputError: an argument that there is not, or of another kind."""
        known_names("arguments", given, [field.name for field in fields(cls)])
        if "engine" not in given:
            raise InputError("arguments: engine is missing, expected engine=BUNDLE")
        kinds: dict[str, type] = get_type_hints(cls)
        found = {}
        for name, value in given.items():
            try:
                found[name] = kinds[name](value)
            except (TypeError, ValueError):
                words = {int: "a whole number", float: "a number"}
                raise InputError(f"{name}: expected {words[kinds[name]]}, found {shown(value)}") from None
        arguments = cls(**found)
        arguments.check()
        return arguments

    def check(self) -> None:
        """Raises InputError: a value is none of those that there are."""
        parse_device(self.device)
        one_of("backend", self.backend, BACKENDS)
        one_of("log_prompts", self.log_prompts.lower(), ("true", "false"))
        for name, least, most in LIMITS:
            in_range(name, getattr(self, name), least, most)

    @property
    def bounds(self) -> tuple[int, int]:
        """How many replicas there are, at the least and at the most; raises InputError."""
        with told_of("replicas"):
            return bounds(self.replicas, MOST_REPLICAS)


class BadArgumentsError(click.ClickException, InputError):
    """An :class:`InputError` that Ray's commands end with in a sentence, as those of ours do."""

    exit_code = BAD_INPUT


class Replica:
    """One server."""

    async def __init__(self, arguments: Arguments, rules: Rules) -> None:  # type: ignore[misc] # Ray waits
        log_lines("hart_runtime.serve")
        self.rules, self.tell_prompts = rules, arguments.log_prompts.lower() == "true"
        self.models = find_models([Path(arguments.engine)])
        folders = {name: model.folder for name, model in self.models.items()}
        plan = Plan(folders, arguments.device, arguments.backend, arguments.threads or None)
        self.scheduler = Scheduler(
            [plan], Metrics(), arguments.queue, arguments.timeout, arguments.safety_model or None
        )
        self.scheduler.start()
        while not self.scheduler.ready:  # Ray sends nobody here before this ends
            self._check()
            await asyncio.sleep(0.05)

    def __serve_build_asgi_app__(self) -> Guard:
        """What Ray calls for every request."""
        return Guard(create_app(self.scheduler, self.models, self.tell_prompts), self.rules)

    async def check_health(self) -> None:
        """Ray starts a replica again that raises here; a worker that died is started by the replica."""
        self._check()

    async def __del__(self) -> None:
        """Ray waits until nobody is served here, and no longer than the grace, before it ends a replica."""
        with contextlib.suppress(AttributeError):  # it never began
            self.scheduler.end()

    def _check(self) -> None:
        if self.scheduler.broken.done():
            raise RunError(self.scheduler.broken.result().message)


def build(given: dict[str, Any]) -> Application:
    """The application, from the words behind ``serve run`` or the ``args`` of a file.

    Raises:
        BadArgumentsError: an argument cannot be used, there is no bundle, or no key.
    """
    try:
        arguments = Arguments.of(given)
        return _built(replace(arguments, engine=str(Path(arguments.engine).absolute())))
    except InputError as error:
        raise BadArgumentsError(str(error).replace("`", "")) from None


def _built(arguments: Arguments) -> Application:
    least, most = arguments.bounds
    models = find_models([Path(arguments.engine)])
    if arguments.safety_model:
        check_screened(models)
    key = api_key(Path(arguments.api_key_file) if arguments.api_key_file else None)
    if key is None:
        raise InputError(
            f"api_key_file: who reaches Ray's address could draw; give a file with a key, or ${KEY_VARIABLE}"
        )
    first = next(iter(models.values()))
    on_gpu = arguments.device not in (AUTO, CPU)
    replicas: dict[str, Any] = {"num_replicas": least}
    if most > least:
        asked = first.manifest.max_batch  # a batch that is drawn and as many that wait would be two of them
        scale = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": asked}
        replicas = {"autoscaling_config": scale}
    deployment = serve.deployment(serve.ingress()(Replica))
    return deployment.options(
        max_ongoing_requests=arguments.queue + first.manifest.max_batch + BESIDE,
        ray_actor_options={
            "num_cpus": arguments.cpus,
            "num_gpus": arguments.gpus or (1 if on_gpu else 0),
        },
        graceful_shutdown_timeout_s=arguments.grace,
        **replicas,
    ).bind(arguments, Rules(key, None, (), arguments.timeout + GRACE_TO_READ))
