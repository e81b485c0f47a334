"""TensorRT and TensorRT-RTX: one Python API under two module names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hart_runtime.common.errors import InputError, one_of, parameter
from hart_runtime.common.install import install
from hart_runtime.runtime.backends.names import MODULES


@dataclass(frozen=True)
class Package:
    """One of the two, imported."""

    name: str
    """A key of :data:`hart_runtime.runtime.backends.names.MODULES`."""
    version: str
    api: Any
    """The Python module."""

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
        raise InputError(f"{given}: {backend} {reason}; install it with: {install(backend)}") from None
    version = getattr(api, "__version__", None)
    if version is None or not hasattr(api, "Builder"):  # an installer that left nothing behind
        raise InputError(f"{given}: {module} holds no TensorRT; install it with: {install(backend)}")
    return Package(backend, str(version), api)


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
