"""A server as users start it, and clients that speak to it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner

from hart_runtime.runtime.cli import main as run_main
from hart_runtime.runtime.find import MANIFEST
from tests.test_bundle import poisoned

PROMPT = "a red circle on a white background"
KEY = "a-key-of-this-test"
LONG = "1000"
"""Denoising steps that keep a worker busy for many seconds; it looks for messages after each."""
START = "import sys; from hart_runtime.serve.cli import main; main(sys.argv[1:])"
PATIENCE = 60
"""Seconds until something that should have happened is taken for never happening."""


@dataclass
class Running:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE, **options)

    def post(self, body: object, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/images/generations", json=body, timeout=PATIENCE, **options)

    def drawn(self, **fields: Any) -> list[bytes]:
        """Pictures, in order."""
        response = self.post({"prompt": PROMPT, **fields})
        assert response.status_code == 200, response.text
        return [base64.b64decode(image["b64_json"]) for image in response.json()["data"]]

    def edit(self, files: Any, **fields: Any) -> httpx.Response:
        """A form: ``files`` as httpx takes them."""
        url, data = f"{self.url}/v1/images/edits", {"prompt": PROMPT, **fields}
        return httpx.post(url, files=files, data=data, timeout=PATIENCE, headers=self.headers)

    @contextlib.contextmanager
    def stream(self, **fields: Any) -> Iterator[httpx.Response]:
        """Events of a request, whose connection is closed at the end."""
        body = {"prompt": PROMPT, "stream": True, **fields}
        url = f"{self.url}/v1/images/generations"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as response:
            yield response

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A worker that draws for somebody else all the while."""
        with self.stream(n=8, steps=LONG, partial_images=1) as response:
            events = events_of(response)  # closes the connection when it is gone
            next(events)
            yield

    def metrics(self) -> dict[str, float]:
        """Everything that is counted, by name and labels."""
        lines = self.get("/metrics", headers=self.headers).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    def outcomes(self) -> dict[str, float]:
        """Requests by how they ended."""
        found = {k: v for k, v in self.metrics().items() if k.startswith("hart_requests_total")}
        return {re.findall('"(.*)"', name)[0]: value for name, value in found.items()}

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = [int(pid) for task in tasks for pid in task.read_text().split()]
        return [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def idle(self) -> bool:
        """Whether every request has ended and nobody waits."""
        found = self.metrics()
        return sum(self.outcomes().values()) == found["hart_requests_received_total"]

    def ended(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE)


def until(true: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    for _ in range(PATIENCE * 10):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never happened")


@contextlib.contextmanager
def serving(*arguments: object, ready: bool = True, log: str | None = None) -> Iterator[Running]:
    """A server on a free port, until the end of the block; ``log``: where its log goes."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(log or f"{folder}/log")
        with lines.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", START, "--port", "0", "--device", "cpu", *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            server = Running(process, url, lines)
            if ready:
                assert url, lines.read_text()
                until(lambda: server.get("/ready").status_code == 200)
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
            process.stdout.close()


@contextlib.contextmanager
def guarded_serving(bundle: Path, folder: Path) -> Iterator[Running]:
    """One that needs a key, listens everywhere, and has a second model, of which every drawing fails."""
    broken = poisoned(bundle, folder, float("nan"))
    manifest = json.loads((broken / MANIFEST).read_text())
    (broken / MANIFEST).write_text(json.dumps({**manifest, "name": "broken"}))
    (key := folder / "key").write_text(f"{KEY}\n")
    engines = ("--engine", bundle, "--engine", broken)
    with serving(*engines, "--threads", 1, "--host", "0.0.0.0", "--api-key-file", key) as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        running.headers = {"Authorization": f"Bearer {KEY}"}
        yield running


def later(function: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
    """Call something in a thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments, **named)
    pool.shutdown(wait=False)
    return future


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


def hart_run(bundle: Path, folder: Path, *options: object, prompt: str = PROMPT) -> list[bytes]:
    """The files that hart-run writes for the same prompt."""
    place = folder / "run"
    place.mkdir()
    arguments = [prompt, "--engine", bundle, "--device", "cpu", "--output", place / "x.png", *options]
    done = CliRunner().invoke(run_main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return [file.read_bytes() for file in sorted(place.iterdir())]
