"""hart-batch on a real Ray: the bytes of one process, whatever is killed; no wait without an end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from hart_runtime.batch.cluster import connected
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.find import MANIFEST, WEIGHTS
from tests.batches import FEW, check_whole, drawn, hart_run, journal, pictures, started, table
from tests.test_bundle import poisoned

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

PATIENCE = 150
"""Seconds after which what should have ended is taken for hanging."""
COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "ring", "star", "square", "triangle")
TWO = ("--actors", "2", "--threads", 1)
OLDER = "2.58.0"
"""Another Ray, which the package index has."""


@pytest.fixture(scope="module", autouse=True)
def _rays_own_limits() -> Iterator[None]:
    """Ray kills workers of machines whose memory others use up, which these tests do not test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[int], Path]:
    def write(count: int) -> Path:
        lines = [
            f"a {COLOURS[n % 6]} {SHAPES[n // 6 % 5]} on a {COLOURS[(n + 1 + n // 30) % 6]} background"
            for n in range(count)
        ]
        (file := tmp_path / f"{count}.txt").write_text("\n".join(lines))
        return file

    return write


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said, which ends in time and with this code."""
    try:
        out, said = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hangs: {process.communicate()}") from None
    assert process.returncode == code, said + out
    assert "Traceback" not in said
    return said


def workers(parent: int | None = None) -> list[psutil.Process]:
    """Processes that draw."""
    among = psutil.Process(parent).children(recursive=True) if parent else psutil.process_iter()
    found = []
    for process in among:
        with contextlib.suppress(psutil.Error):
            if any("MapWorker" in word for word in process.cmdline()[:1]):
                found.append(process)
    return found


def until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    for _ in range(PATIENCE * 20):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never happened")


def lines(folder: Path) -> int:
    file = folder / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_one_machine(demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path) -> None:
    """500 pictures, an actor killed on the way, the driver too: as in one process, to the byte."""
    file, few = prompts(500), ("--steps", 2)
    words = (file, "--engine", demo_bundle, *few)
    on_ray = (*words, "--output", tmp_path / "ray", "--ray", "local", *TWO)
    process = started(*on_ray)
    until(lambda: lines(tmp_path / "ray") > 20, process)
    (first, *others) = workers(process.pid)
    assert len(others) == 1
    first.kill()
    now = lines(tmp_path / "ray")
    until(lambda: lines(tmp_path / "ray") > now + 60, process)
    process.kill()
    process.communicate()
    before = [line["number"] for line in journal(tmp_path / "ray")]
    assert 80 < len(before) < 500
    ended(started(*on_ray))
    numbers = [line["number"] for line in journal(tmp_path / "ray")]
    assert numbers[: len(before)] == before
    assert sorted(numbers) == list(range(500))
    drawn(*words, "--output", tmp_path / "one")
    assert check_whole(tmp_path / "ray", 500) == check_whole(tmp_path / "one", 500)
    row = table(tmp_path / "ray")[321]
    assert check_whole(tmp_path / "one", 500)[321] == hart_run(
        demo_bundle, tmp_path, row["prompt"], "--seed", row["seed"], *few
    )


@pytest.mark.parametrize("cpus", [[], ["--cpus", "1"]])
def test_two_actors_of_a_cpu_each_on_a_node_of_two(
    demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path, cpus: list[str]
) -> None:
    """Which hangs where Ray's own tasks are to read on the same node."""
    words = (prompts(12), "--engine", demo_bundle, "--ray", "local", "--steps", 2, *TWO, *cpus)
    ended(started(*words, "--output", tmp_path / "out"))
    check_whole(tmp_path / "out", 12)


def test_where_no_ray_answers(demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path) -> None:
    words = (prompts(1), "--engine", demo_bundle, "--output", tmp_path / "out")
    free = socket.create_server(("127.0.0.1", 0))
    silent = socket.create_server(("127.0.0.1", 0))
    closed = free.getsockname()[1]
    free.close()
    quiet = f"127.0.0.1:{silent.getsockname()[1]}"
    addresses = {
        f"127.0.0.1:{closed}": f"--ray 127.0.0.1:{closed}: no Ray answers there",
        "no.such.host.invalid:6379": "--ray no.such.host.invalid:6379: no Ray answers there",
        quiet: f"--ray {quiet}: something listens there, and it is no Ray 2.",
        "here": "--ray here: expected local, auto or HOST:PORT",
        "ray://127.0.0.1:10001": "expected local, auto or HOST:PORT",
        "127.0.0.1:99999": "expected local, auto or HOST:PORT",
    }
    for address, told in addresses.items():
        began = time.monotonic()
        assert told in ended(started(*words, "--ray", address), 2)
        assert time.monotonic() - began < 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed}")
        assert "no Ray answers there" in ended(started(*words, "--ray", "auto"), 2)
    assert "--ray auto: cannot be used" in ended(started(*words, "--ray", "auto"), 2)
    silent.close()
    assert not (tmp_path / "out").exists()


class Cluster:
    """Two nodes of one CPU each on this machine, with a cache of their own."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster as OfRay

        self.cache = folder
        self._cluster = OfRay(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self._second = self._cluster.add_node(num_cpus=1)
        self._cluster.wait_for_nodes()
        self.address = str(self._cluster.address)

    @contextlib.contextmanager
    def another_node(self, **variables: str) -> Iterator[None]:
        """While the block runs; its processes have these variables."""
        node = self._cluster.add_node(num_cpus=1, env_vars=variables)
        self._cluster.wait_for_nodes()
        try:
            yield
        finally:
            self._cluster.remove_node(node)

    def lose_a_node(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def end(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))  # of the nodes' processes
        found = Cluster(folder)
    yield found
    found.end()


def test_bundles_are_brought_once_and_verified(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    file = prompts(8)
    words = (file, "--engine", demo_bundle, "--ray", cluster.address, *TWO, "--push", "--steps", 2)
    ended(started(*words, "--output", tmp_path / "out"))
    check_whole(tmp_path / "out", 8)
    (kept,) = (path for path in cluster.cache.glob("*/bundles/*") if path.is_dir())
    assert (kept / MANIFEST).read_bytes() == (demo_bundle / MANIFEST).read_bytes()
    moment = (kept / WEIGHTS).stat().st_mtime_ns, kept.stat().st_ino
    ended(started(*words, "--output", tmp_path / "again", "--shards"))
    assert moment == ((kept / WEIGHTS).stat().st_mtime_ns, kept.stat().st_ino)
    assert [*check_whole(tmp_path / "again", 8)] == list(range(8))
    weights = (kept / WEIGHTS).read_bytes()
    (kept / WEIGHTS).write_bytes(bytes(100) + weights[100:])
    said = ended(started(*words, "--output", tmp_path / "damaged"), 2)
    assert f"{kept / WEIGHTS}: expected sha256" in said
    shutil.rmtree(kept)


def test_nodes_that_draw_otherwise_are_refused(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    """One with another version of this package, and some where the bundle's path leads elsewhere."""
    (made := tmp_path / "site" / "hart_runtime-0.0.1.dist-info").mkdir(parents=True)
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: hart-runtime\nVersion: 0.0.1\n")
    words = (prompts(3), "--ray", cluster.address, "--output", tmp_path / "out", "--engine")
    before = os.environ.get("PYTHONPATH", "")
    with cluster.another_node(PYTHONPATH=f"{made.parent}:{before}"):
        said = ended(started(*words, demo_bundle), 2)
    assert "has hart-runtime 0.0.1, here it is" in said
    (tmp_path / "demo").symlink_to(demo_bundle)
    said = ended(started(*words, "/proc/self/cwd/demo", cwd=tmp_path), 2)
    assert ": /proc/self/cwd/demo: no bundle there; copy it to every node, or --push it" in said
    assert not (tmp_path / "out").exists()


def test_another_ray(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Its cluster is refused with both versions; to a cluster of ours Ray lets no node of it."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "older"]
    subprocess.run([*map(str, pip), f"ray=={OLDER}"], check=True)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start"]
    older = {**os.environ, "PYTHONPATH": str(tmp_path / "older")}
    joins = subprocess.run(
        [*command, f"--address={cluster.address}"], env=older, capture_output=True, text=True, check=False
    )
    assert joins.returncode != 0
    assert "Version mismatch" in joins.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # sockets have short paths
        head = ("--head", "--block", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false")
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([*command, *head], env=older, stdout=quiet, stderr=quiet, text=True)
        try:
            until(lambda: answers(port), process)
            words = (prompts(3), "--engine", demo_bundle, "--output", tmp_path / "out")
            said = ended(started(*words, "--ray", f"127.0.0.1:{port}"), 2)
        finally:
            process.terminate()
            process.wait()
    assert f"cluster has Ray version {OLDER} but local Ray version is 2." in said
    assert not (tmp_path / "out").exists()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def test_what_ray_says_of_versions_is_repeated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in several lines."""
    from ray._private.utils import check_version_info

    def refuse(**_: object) -> None:
        check_version_info({"ray_version": OLDER, "python_version": "3.10.1"}, "node 10.0.0.2")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(InputError, match=f"Ray: {OLDER} Python: 3.10.1 This process on node 10.0.0.2 was"),
        connected("auto"),
    ):
        pass


def test_what_the_safety_model_refuses_is_not_drawn(
    cluster: Cluster, demo_bundle: Path, shield: Path, tmp_path: Path
) -> None:
    (file := tmp_path / "prompts.txt").write_text("a red weapon\n" + "a flower\na blue flower\n" * 4)
    words = (file, "--engine", demo_bundle, "--ray", cluster.address, *TWO, *FEW, "--safety-model", shield)
    ended(started(*words, "--output", tmp_path / "out"))
    first, *others = table(tmp_path / "out")
    assert first["error"].startswith("refused by the safety model")
    assert {row["error"] for row in others} == {None}
    assert len(pictures(tmp_path / "out")) == 8


def test_encoders_of_their_own(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    """One process holds the text encoder, another draws without it: the same bytes."""
    words = (prompts(20), "--engine", demo_bundle, "--steps", 2)
    on_ray = ("--ray", cluster.address, "--encoders", 1, "--actors", 1, "--threads", 1)
    ended(started(*words, *on_ray, "--output", tmp_path / "ray"))
    drawn(*words, "--output", tmp_path / "one")
    assert check_whole(tmp_path / "ray", 20) == check_whole(tmp_path / "one", 20)


def test_given_pictures_are_brought_to_who_draws(cluster: Cluster, demo_bundle: Path, tmp_path: Path) -> None:
    """Rows with and without them are drawn as in one process, to the byte."""
    for number in range(3):
        Image.effect_noise((64, 64), 50 + number).convert("RGB").save(tmp_path / f"{number}.png")
    rows: list[dict[str, Any]] = [{"prompt": f"a {colour} ring", "count": 2} for colour in COLOURS]
    for number, row in enumerate(rows[:4]):
        row |= {"image": f"{number % 3}.png", "vary": 1 + number % 2}
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (file, "--engine", demo_bundle, *FEW, "--batch", 2)
    ended(started(*words, "--ray", cluster.address, *TWO, "--output", tmp_path / "ray"))
    drawn(*words, "--output", tmp_path / "one")
    assert check_whole(tmp_path / "ray", 12) == check_whole(tmp_path / "one", 12)


def test_what_does_not_fit_is_refused(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    words = (prompts(3), "--engine", demo_bundle, "--ray", cluster.address, "--output", tmp_path / "out")
    for options, told in {
        ("--actors", "3"): "--actors: 3 need 0.8 CPU and 0.3",
        ("--actors", "3..4"): "there is room for 2",
        ("--cpus", "1.5"): "--actors: 1 need 1.5 CPU",
        ("--device", "cuda"): "need 1 GPU, 1 CPU",
    }.items():
        assert told in ended(started(*words, *options), 2)
    assert not (tmp_path / "out").exists()


def test_a_pool_whose_actors_always_die_ends(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    """And what was drawn is kept, and gone on with."""
    words = (prompts(40), "--engine", demo_bundle, "--ray", cluster.address, "--output", tmp_path / "out")
    process = started(*words, "--actors", "1", "--batch", 1)
    until(lambda: lines(tmp_path / "out") > 2, process)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < PATIENCE:
        for worker in workers():
            with contextlib.suppress(psutil.Error):
                worker.kill()
        time.sleep(0.2)
    said = ended(process, 1)
    assert "Ray gave up" in said
    assert "the same command goes on" in said
    assert 2 < lines(tmp_path / "out") < 40
    ended(started(*words, "--actors", "1"))
    check_whole(tmp_path / "out", 40)


def test_a_bundle_that_draws_nothing_ends_with_its_sentence(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    bundle = poisoned(demo_bundle, tmp_path, float("nan"))
    words = (prompts(30), "--engine", bundle, "--ray", cluster.address, "--output", tmp_path / "out")
    said = ended(started(*words, "--steps", 2), 1)
    assert "3 pictures in a row failed, the last of them: " in said


def test_a_node_is_lost(
    cluster: Cluster, demo_bundle: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    """Rows that it was drawing are drawn on the other. The last test of this cluster."""
    words = (prompts(120), "--engine", demo_bundle, "--steps", 2)
    process = started(*words, "--output", tmp_path / "ray", "--ray", cluster.address, *TWO, "--batch", 2)
    until(lambda: lines(tmp_path / "ray") > 20, process)
    cluster.lose_a_node()
    assert process.poll() is None
    ended(process)
    drawn(*words, "--output", tmp_path / "one")
    assert check_whole(tmp_path / "ray", 120) == check_whole(tmp_path / "one", 120)
    numbers = [line["number"] for line in journal(tmp_path / "ray")]
    assert sorted(numbers) == list(range(120))
