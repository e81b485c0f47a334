"""The application of hart-serve on a real Ray Serve: what clients of hart-serve get, they get there."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hart_runtime.common.errors import InputError
from tests.serving import KEY, LONG, PROMPT, Running, events_of, hart_run
from tests.test_bundle import poisoned
from tests.test_serve import (
    models,
    test_a_seed_is_chosen_and_told,
    test_a_stream,
    test_models,
    test_requests_share_batches,
    test_the_pictures_are_those_of_hart_run,
)
from tests.test_serve_clients import (
    Servers,
    test_a_client_that_was_refused_comes_again,
    test_before_one,
    test_from_one_on,
)
from tests.test_serve_faults import (
    test_fault_D08_requests_given_up_and_sent_again_are_drawn_once,
    test_fault_D09_who_stays_in_a_batch_gets_the_same_bytes,
)

__all__ = [  # what holds of hart-serve: run here with other servers
    "models",
    "test_a_client_that_was_refused_comes_again",
    "test_a_seed_is_chosen_and_told",
    "test_a_stream",
    "test_before_one",
    "test_fault_D08_requests_given_up_and_sent_again_are_drawn_once",
    "test_fault_D09_who_stays_in_a_batch_gets_the_same_bytes",
    "test_from_one_on",
    "test_models",
    "test_requests_share_batches",
    "test_the_pictures_are_those_of_hart_run",
]
pytest.importorskip("ray")
pytestmark = pytest.mark.ray

PATIENCE = 240
"""Seconds until three applications are there: each has a process of Ray's and one that draws."""
ANY = "any"
"""The key of clients that give one to a server that wants none; on Ray Serve there is always one."""


@dataclass
class Keyed(Running):
    """One that is asked with its key."""

    def get(self, path: str, **options: Any) -> httpx.Response:
        return super().get(path, **{"headers": self.headers, **options})

    def post(self, body: object, **options: Any) -> httpx.Response:
        return super().post(body, **{"headers": self.headers, **options})

    @contextlib.contextmanager
    def stream(self, **fields: Any) -> Iterator[httpx.Response]:
        body = {"prompt": PROMPT, "stream": True, **fields}
        url = f"{self.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE, headers=self.headers) as response:
            yield response


@pytest.fixture(scope="module")
def servers(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """As hart-serve's: one that draws, one with a broken model, and one whose queue is short."""
    folder = tmp_path_factory.mktemp("serve")
    (both := folder / "both").mkdir()
    (both / "a").symlink_to(demo_bundle)
    broken = poisoned(demo_bundle, both, float("nan"))
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps({**manifest, "name": "broken"}))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    applications = []
    for name, key, more in (
        ("plain", ANY, {}),
        ("guarded", KEY, {"engine": str(both)}),
        ("full", ANY, {"queue": 10}),
    ):
        (folder / name).write_text(key)
        common = {"engine": str(demo_bundle), "device": "cpu", "threads": 1, "cpus": 0.1}
        arguments = {**common, "api_key_file": str(folder / name), **more}
        path = "hart_runtime.serve.ray:build"
        applications.append(
            {"name": name, "route_prefix": f"/{name}", "import_path": path, "args": arguments}
        )
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
    (folder / "serve.yaml").write_text(json.dumps(config))  # YAML is JSON, too
    log = folder / "log"
    with log.open("w") as lines:
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")]
        process = subprocess.Popen(command, stdout=lines, stderr=lines, text=True)
    try:
        found = Servers(
            *(
                Keyed(process, f"http://127.0.0.1:{port}/{name}", log, {"Authorization": f"Bearer {key}"})
                for name, key in (("plain", ANY), ("guarded", KEY), ("full", ANY))
            )
        )
        for server in found:
            wait_for(server)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def server(servers: Servers) -> Running:
    return servers.plain


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=ANY, max_retries=0)


def wait_for(server: Running) -> None:
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        with contextlib.suppress(httpx.HTTPError):
            if server.get("/ready").status_code == 200:
                return
        assert server.process.poll() is None, server.log.read_text()[-4000:]
        time.sleep(0.5)
    raise AssertionError(server.log.read_text()[-4000:])


def test_the_bytes_of_hart_run(servers: Servers, demo_bundle: Path, tmp_path: Path) -> None:
    assert servers.plain.drawn(seed=7, n=2) == hart_run(demo_bundle, tmp_path, "--seed", 7, "--num-images", 2)


def test_nobody_draws_without_the_key(servers: Servers) -> None:
    for headers in ({}, {"Authorization": "Bearer another"}):
        assert servers.plain.post({"prompt": PROMPT}, headers=headers).status_code == 401
        assert servers.plain.get("/v1/models", headers=headers).status_code == 401
    assert servers.plain.get("/health", headers={}).status_code == 200


def test_clients_that_leave_are_not_drawn_for(servers: Servers) -> None:
    """Streamed and not; whoever comes next need not wait for their thousand steps."""
    plain = servers.plain
    before = plain.metrics()["hart_batches_stopped_total"]
    with plain.stream(steps=LONG, partial_images=1) as response:
        next(events_of(response))
    url = f"{plain.url}/v1/images/generations"
    with pytest.raises(httpx.TimeoutException):
        httpx.post(url, json={"prompt": PROMPT, "n": 8, "steps": LONG}, headers=plain.headers, timeout=2)
    began = time.monotonic()
    assert len(plain.drawn(seed=1)) == 1
    while plain.metrics()["hart_batches_stopped_total"] < before + 2:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "engine is missing, expected engine=BUNDLE"),
        ({"engine": "x", "engines": "y"}, "unknown engines; there are engine, replicas"),
        ({"engine": "x", "threads": "many"}, "threads: expected a whole number, found 'many'"),
        ({"engine": "x", "replicas": "4..1"}, "replicas: expected a number such as 4, or two such as 1..8"),
        ({"engine": "x", "backend": "cuda"}, "backend='cuda': expected one of auto, "),
        ({"engine": "x", "queue": "5"}, "queue: expected 10 to "),
        ({"engine": "x", "timeout": "nan"}, "timeout: expected 1 to "),
        ({"engine": "x", "log_prompts": "yes"}, "log_prompts='yes': expected true or false"),
        ({"engine": "x", "device": "gpu"}, "expected one of auto, cpu, cuda"),
        ({"engine": "x"}, "no bundle here"),
    ],
)
def test_bad_arguments(given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hart_runtime.serve.ray import build

    monkeypatch.setenv("HART_API_KEY", "key")
    with pytest.raises(InputError) as caught:
        build(given)
    assert words in str(caught.value)


def test_a_safety_model_reads_texts(var_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hart_runtime.serve.ray import build

    monkeypatch.setenv("HART_API_KEY", "key")
    with pytest.raises(InputError, match="safety_model: reads texts, and these bundles draw classes"):
        build({"engine": str(var_bundle), "safety_model": "x"})


def test_serve_run_ends_with_the_sentence(tmp_path: Path) -> None:
    """And not with a traceback of Ray's; no Ray is started before."""
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "hart_runtime.serve.ray:build"]
    done = subprocess.run(
        [*command, "engine=nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: {tmp_path}/nowhere: no bundle here, ")
    assert "Traceback" not in done.stderr


def test_a_key_is_required(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hart_runtime.serve.ray import build

    monkeypatch.delenv("HART_API_KEY", raising=False)
    with pytest.raises(InputError, match="api_key_file: who reaches Ray's address could draw"):
        build({"engine": str(demo_bundle)})
    monkeypatch.setenv("HART_API_KEY", "key")
    deployment = build({"engine": str(demo_bundle), "replicas": "1..4", "cpus": "2"})._bound_deployment
    scale = deployment._deployment_config.autoscaling_config
    assert (scale.min_replicas, scale.max_replicas, scale.target_ongoing_requests) == (1, 4, 8)
    assert deployment.ray_actor_options["num_cpus"] == 2
