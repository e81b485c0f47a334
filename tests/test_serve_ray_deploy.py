"""``deploy/serve.yaml`` on a cluster that runs: replicas that come and go, and a safety model."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.imports import ROOT
from tests.serving import KEY, LONG, events_of, hart_run, later

pytest.importorskip("ray")
from tests.test_serve_ray import PATIENCE, Keyed, wait_for

pytestmark = pytest.mark.ray
SOON = """
    deployments:
      - name: Replica
        autoscaling_config:
          min_replicas: 1
          max_replicas: 4
          target_ongoing_requests: 8
          metrics_interval_s: 1
          look_back_period_s: 2
          upscale_delay_s: 0
          downscale_delay_s: 3
"""
"""What Ray does by itself after half a minute, and after ten."""
PATIENT = {
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "20",
}
"""A replica that does not say within a tenth of a second how many wait is passed over, and on two cores a
new one does not always."""
SCREENED = """
  - name: screened
    route_prefix: /screened
    import_path: hart_runtime.serve.ray:build
    args: {engine: ENGINE, device: cpu, cpus: 0.1, threads: 1, api_key_file: KEY, safety_model: SHIELD}
"""


@dataclass
class Cluster:
    """One that runs, and what was deployed there."""

    process: subprocess.Popen[str]
    dashboard: str
    port: int
    log: Path

    def deploy(self, file: Path) -> None:
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file), "-a", self.dashboard]
        subprocess.run(command, check=True, capture_output=True)

    def told(self, application: str) -> dict[str, object]:
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=60)
        found: dict[str, object] = answer.json()["applications"].get(application, {})
        return found

    def replicas(self, application: str) -> Counter[str]:
        """By their state."""
        deployments = self.told(application).get("deployments") or {}
        assert isinstance(deployments, dict)
        return Counter(replica["state"] for replica in deployments["Replica"]["replicas"])

    def server(self, path: str) -> Keyed:
        headers = {"Authorization": f"Bearer {KEY}"}
        return Keyed(self.process, f"http://127.0.0.1:{self.port}{path}", self.log, headers)

    def until(self, true: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < PATIENCE, self.log.read_text()[-4000:]
            time.sleep(0.2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Of more CPUs than there are, for four replicas of the two that the file gives each."""
    log, port, dashboard = tmp_path_factory.mktemp("cluster") / "log", free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray") as folder, log.open("w") as lines:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=16"]
        places = (f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}")
        # Where Ray was started in this process before, it left word in the environment that it wants a token.
        own = {**os.environ, **PATIENT, "RAY_memory_monitor_refresh_ms": "0", "RAY_AUTH_MODE": "disabled"}
        process = subprocess.Popen([*command, *places], env=own, stdout=lines, stderr=lines, text=True)
        try:
            found = Cluster(process, f"http://127.0.0.1:{dashboard}", free_port(), log)
            found.until(lambda: there(found))
            yield found
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def there(cluster: Cluster) -> bool:
    assert cluster.process.poll() is None, cluster.log.read_text()
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{cluster.dashboard}/api/version", timeout=10).status_code == 200
    return False


@pytest.fixture(scope="module")
def deployed(
    cluster: Cluster, demo_bundle: Path, shield: Path, tmp_path_factory: pytest.TempPathFactory
) -> Cluster:
    """The file with places of this machine, less patience, and a second application."""
    folder = tmp_path_factory.mktemp("deployed")
    (key := folder / "key").write_text(KEY)
    text = (ROOT / "deploy" / "serve.yaml").read_text().rstrip() + SOON + SCREENED.lstrip("\n")
    for found, here in {
        "/engines/key": key,
        "engine: /engines": f"engine: {demo_bundle}",
        "port: 8000": f"port: {cluster.port}",
        "replicas: 1..4": "replicas: 1..4\n      grace: 300",
        "ENGINE": demo_bundle,
        "KEY": key,
        "SHIELD": shield,
    }.items():
        assert found in text
        text = text.replace(found, str(here))
    (file := folder / "serve.yaml").write_text(text)
    cluster.deploy(file)
    for path in ("", "/screened"):
        wait_for(cluster.server(path))
    return cluster


def whole(server: Keyed) -> list[str]:
    """Many pictures that take their time."""
    with server.stream(n=10, steps=LONG, seed=3) as response:
        return [event["b64_json"] for event in events_of(response)]


def asked(server: Keyed) -> float:
    """Requests for pictures that a replica had."""
    return server.metrics()["hart_requests_received_total"]


def test_replicas_come_and_go_and_nobody_is_cut_off(deployed: Cluster) -> None:
    """More of them while many wait; one that is to end draws what it has."""
    hart = deployed.server("")
    assert deployed.replicas("hart") == {"RUNNING": 1}
    with contextlib.ExitStack() as crowd:
        for _ in range(9):
            crowd.enter_context(hart.stream(n=5, steps=LONG))
        staying = [later(whole, hart)]
        deployed.until(lambda: deployed.replicas("hart")["RUNNING"] == 2)
        deployed.until(lambda: asked(hart) == 0)  # who spreads requests knows the new one, too
        staying.append(later(whole, hart))
        deployed.until(lambda: asked(hart) == 1)  # the new one, which has fewer, and answers this, too
    deployed.until(lambda: deployed.replicas("hart")["STOPPING"] == 1)
    deployed.until(lambda: deployed.replicas("hart")["STOPPING"] == 0)
    assert any(one.done() for one in staying), "it went with nobody to wait for"
    first, second = (one.result() for one in staying)
    assert len(first) == 10
    assert first == second
    deployed.until(lambda: deployed.replicas("hart") == {"RUNNING": 1})


def test_a_refused_prompt(deployed: Cluster, demo_bundle: Path, tmp_path: Path) -> None:
    screened = deployed.server("/screened")
    refused = screened.post({"prompt": "a red weapon"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "moderation_blocked")
    assert screened.post({"prompt": "a broken"}).status_code == 500
    answer = screened.post({"prompt": "a blue flower", "seed": 3})
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    options = ("--seed", 3, "--threads", 1)
    assert [data] == hart_run(demo_bundle, tmp_path, *options, prompt="a blue flower")


def test_what_cannot_be_built_is_told_of(cluster: Cluster, tmp_path: Path) -> None:
    """By Ray, with a traceback before it. The last test: a file replaces all that was there."""
    file = tmp_path / "serve.yaml"
    file.write_text(
        "applications: [{name: bad, import_path: 'hart_runtime.serve.ray:build', args: {engine: /nowhere}}]"
    )
    cluster.deploy(file)
    cluster.until(lambda: cluster.told("bad").get("status") == "DEPLOY_FAILED")
    assert "/nowhere: no bundle here" in str(cluster.told("bad")["message"])
