"""What Ray costs: two actors beside two processes without it, in turns on the same machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hart_runtime.common.checkpoint import find_checkpoint
from hart_runtime.export.bundle import export_bundle
from hart_runtime.export.request import Request
from hart_runtime.hart.random_checkpoint import read_shape, write_random_checkpoint
from tests.batches import started

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EACH, TOGETHER = 24, 4
"""Pictures of an actor, and of a batch."""
LEAST = 0.9


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 96 M parameters in int8, of random weights."""
    root = tmp_path_factory.mktemp("middle")
    write_random_checkpoint(read_shape("mid-256px"), root / "checkpoint")
    export_bundle(Request(find_checkpoint(root / "checkpoint"), "int8"), root / "bundle")
    return root / "bundle"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one node, whose idle processes are there in both halves."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        head = {"num_cpus": 2, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
    yield str(cluster.address)
    cluster.shutdown()


def rate(bundle: Path, folder: Path, runs: list[tuple[int, tuple[object, ...]]]) -> float:
    """Pictures a second of some runs together, while all of them draw."""
    folder.mkdir()
    processes = []
    for number, (count, options) in enumerate(runs):
        file = folder / f"{number}.txt"
        file.write_text("\n".join(f"picture {number} {i}" for i in range(count)))
        words = (file, "--engine", bundle, "--output", folder / f"{number}", "--batch", TOGETHER)
        processes.append(started(*words, "--threads", 1, *options))
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    moments = [
        sorted(file.stat().st_mtime for file in (folder / f"{number}").rglob("*.png"))
        for number in range(len(runs))
    ]
    assert [len(times) for times in moments] == [count for count, _ in runs]
    first = max(times[TOGETHER - 1] for times in moments)
    last = min(times[-1] for times in moments)
    return sum(first < moment <= last for times in moments for moment in times) / (last - first)


def test_what_ray_costs(middle: Path, address: str, tmp_path: Path) -> None:
    on_ray = ("--ray", address, "--actors", 2)
    plain, ray = [], []
    for turn in range(2):
        plain.append(rate(middle, tmp_path / f"plain{turn}", [(EACH, ()), (EACH, ())]))
        ray.append(rate(middle, tmp_path / f"ray{turn}", [(2 * EACH, on_ray)]))
    print(f"{plain} pictures a second without Ray, {ray} with it")
    assert sum(ray) >= LEAST * sum(plain)
