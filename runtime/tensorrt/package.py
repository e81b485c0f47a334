"""TensorRT and TensorRT-RTX: one Python API under two module names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hart_runtime.common.errors import InputError, parameter
from hart_runtime.common.install import install
from hart_runtime.runtime.tensorrt import MODULES


@dataclass(frozen=True)
class Package:
    """One of the two, imported."""

    name: str
    """A key of :data:`hart_runtime.runtime.tensorrt.MODULES`."""
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


def import_package(name: str) -> Package:
    """Import "tensorrt" or "tensorrt-rtx".

    Raises:
        InputError: it is not installed, or its libraries cannot be loaded; with the command.
    """
    try:
        api = importlib.import_module(MODULES[name])
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == MODULES[name]
        reason = "is not installed" if missing else f"cannot be loaded ({error})"
        given = parameter("backend", name)
        raise InputError(f"{given}: {name} {reason}; install it with: {install(name)}") from None
    version = getattr(api, "__version__", None)
    if version is None or not hasattr(api, "Builder"):  # an installer that left nothing behind
        given = parameter("backend", name)
        raise InputError(f"{given}: {MODULES[name]} holds no TensorRT; install it with: {install(name)}")
    return Package(name, str(version), api)


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
