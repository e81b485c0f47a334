"""A cluster of Ray: how it is reached, and what is on its nodes."""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hart_runtime.common.errors import InputError, first_line, parameter
from hart_runtime.common.room import cores
from hart_runtime.common.version import __version__
from hart_runtime.runtime.backends.names import AUTO

LOCAL = "local"
SECONDS_TO_CONNECT, SECONDS_TO_ANSWER, SECONDS_TO_LOOK = 3, 30, 120
"""Until an address is taken for one where nothing listens, or no Ray; until a node is taken for lost."""


@dataclass(frozen=True, eq=False)
class Node:
    """A node, and what is installed there."""

    name: str
    versions: Mapping[str, str]
    bundle: str | None
    """Identity of the bundle at its path; None where there is none."""


def check_nodes(
    nodes: Iterable[Node], versions: Mapping[str, str], bundle: Path, identity: str | None
) -> None:
    """Refuse nodes that would draw otherwise than this machine, or not at all.

    Args:
        versions: of this machine, by name.
        identity: of the bundle that has to be at its path; None where it is brought there.

    Raises:
        InputError: with the node, what it has and what is here.
    """
    for node in nodes:
        for name, version in versions.items():
            if (found := node.versions.get(name)) != version:
                raise InputError(
                    f"node {node.name}: has {name} {found or 'not at all'}, here it is {version}; "
                    f"install the same on every node"
                )
        if identity is not None and node.bundle != identity:
            found = f"another bundle there ({node.bundle[:12]}...)" if node.bundle else "no bundle there"
            raise InputError(f"node {node.name}: {bundle}: {found}; copy it to every node, or `push` it")


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, until the block ends: of this machine alone, started for the block, or one that runs.

    Args:
        address: "local", "auto" for the one that runs on this machine (or at $RAY_ADDRESS), or HOST:PORT.

    Raises:
        InputError: no Ray of this version answers there.
    """
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or processes of Ray's write into our own words
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray.init(address=LOCAL, num_cpus=cores(), include_dashboard=False, **quiet)
    else:
        address = os.environ.get("RAY_ADDRESS", AUTO) if address == AUTO else address
        if address != AUTO:
            check_address(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:  # none runs here; of another version
            said = first_line(" ".join(str(error).split()))  # versions stand in lines of their own
            raise InputError(f"{parameter('ray', address)}: cannot be used ({said})") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address where no Ray answers, in seconds: Ray itself tries for minutes, and ends the process.

    Raises:
        InputError: with what is there.
    """
    said = parameter("ray", address)
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/]+):(\d{1,5})", address)
    if found is None or int(found[2]) > 65535:
        raise InputError(
            f"{said}: expected local, auto or HOST:PORT of a cluster's head, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise InputError(f"{said}: no Ray answers there ({error.strerror or error})") from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    there = {**os.environ, "RAY_ADDRESS": address}
    try:
        done = subprocess.run(
            command, env=there, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
        )
    except subprocess.TimeoutExpired:
        why = "it does not answer"
    else:
        if not done.returncode:
            return
        why = first_line(done.stderr.strip().rpartition("\n")[2] or "it does not answer")
    raise InputError(
        f"{said}: something listens there, and it is no Ray {versions_here()['ray']} that answers ({why})"
    )


def versions_here() -> dict[str, str]:
    """What has to be the same on every node."""
    import ray

    return {
        "hart-runtime": __version__,
        "ray": ray.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }


def nodes_of(bundle: Path) -> list[Node]:
    """Every node of the cluster that is connected, looked at from itself.

    Raises:
        InputError: one does not answer.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(place: str) -> tuple[dict[str, str], str | None]:
        """Runs where this package may not be, so it travels with its code."""
        import contextlib
        import hashlib
        import importlib.metadata
        import platform
        from pathlib import Path

        versions = {"Python": ".".join(platform.python_version_tuple()[:2])}
        for name in ("hart-runtime", "ray"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        try:
            return versions, hashlib.sha256(Path(place, "manifest.json").read_bytes()).hexdigest()
        except OSError:
            return versions, None

    found = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        name, there = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})", node["NodeID"]
        here = NodeAffinitySchedulingStrategy(there, soft=False)
        task = ray.remote(num_cpus=0, scheduling_strategy=here)(look).remote(str(bundle.absolute()))
        found.append((name, task))
    nodes = []
    for name, task in found:
        try:
            nodes.append(Node(name, *ray.get(task, timeout=SECONDS_TO_LOOK)))
        except RayError as error:
            raise InputError(f"node {name}: does not answer ({first_line(error)})") from None
    return nodes
