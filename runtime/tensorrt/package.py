"""TensorRT and TensorRT-RTX: one Python API under two module names."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hart_runtime.common.errors import InputError, one_of, parameter
from hart_runtime.common.install import install
from hart_runtime.runtime.backends.names import MODULES
from hart_runtime.runtime.contract import STANDARD, WRITTEN_OUT
from hart_runtime.runtime.spec import GraphSpec

FORM_VERSIONS = {
    form: tuple(int(part) for part in form.rpartition("-")[2].split(".")) for form in (WRITTEN_OUT, STANDARD)
}
JETSON = Path("/etc/nv_tegra_release")
"""A file that only the Linux of Jetson boards has."""
OLDEST = FORM_VERSIONS[WRITTEN_OUT]
"""The first version of TensorRT that there is a form for."""


@dataclass(frozen=True)
class Package:
    """One of the two, imported."""

    name: str
    """A key of :data:`hart_runtime.runtime.backends.names.MODULES`."""
    version: str
    api: Any
    """The Python module."""

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = [*re.findall(r"\d+", self.version), "0", "0"][:2]
        return int(major), int(minor)

    @property
    def ahead_of_time(self) -> bool:
        """Whether it builds without a GPU, for several compute capabilities at once."""
        return hasattr(self.api, "ComputeCapability")


def how_to_install() -> str:
    """The commands that install either."""
    return " or ".join(install(name) for name in MODULES)


def import_package(backend: str) -> Package:
    """Import "tensorrt" or "tensorrt-rtx".

    Raises:
        InputError: neither of them, or it is not installed, or its libraries cannot be loaded; with
            the command that mends it.
    """
    one_of("backend", backend, MODULES)
    module, given = MODULES[backend], parameter("backend", backend)
    try:
        api = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module
        reason = "is not installed" if missing else f"cannot be loaded ({error})"
        raise InputError(f"{given}: {backend} {reason}; {_mend(backend)}") from None
    version = getattr(api, "__version__", None)
    if version is None or not hasattr(api, "Builder"):  # an installer that left nothing behind
        raise InputError(f"{given}: {module} holds no TensorRT; {_mend(backend)}")
    package = Package(backend, str(version), api)
    if not package.ahead_of_time and package.release < OLDEST:
        raise InputError(
            f"{given}: expected TensorRT {OLDEST[0]}.{OLDEST[1]} or newer, found {version}; {_mend(backend)}"
        )
    return package


def _mend(backend: str) -> str:
    """How to get a package here."""
    if MODULES[backend] == "tensorrt" and JETSON.exists():
        return (
            "on a Jetson it comes with JetPack (6 or newer) and not from pip: use an environment that sees "
            "the system's packages"
        )
    return f"install it with: {install(backend)}"


def graph_read(package: Package, graph: GraphSpec) -> str:
    """The file of a bundle that holds a graph in the form that a package reads.

    TensorRT-RTX reads what ONNX Runtime does; TensorRT has forms by version, and shares the graphs
    that need none.
    """
    if package.ahead_of_time:
        return graph.file
    if package.release < FORM_VERSIONS[STANDARD]:
        return graph.forms.get(WRITTEN_OUT, graph.file)
    return graph.forms.get(STANDARD, graph.file)


def absent_package(backend: str) -> Package:
    """One that cannot be imported here, for who only asks what it would do; "auto" stands for TensorRT."""
    return Package(backend if backend in MODULES else next(iter(MODULES)), "(not installed)", None)


def available_packages() -> list[Package]:
    """Those that can be imported here, TensorRT first."""
    found = []
    for name in MODULES:
        try:
            found.append(import_package(name))
        except InputError:
            continue
    return found


def operating_system() -> str:
    """Such as ``linux-x86_64``: engines do not move between systems."""
    import platform

    return f"{platform.system()}-{platform.machine()}".lower()
