"""Libraries that tell their makers who uses them are kept from it: nobody was asked.

Here for all of them. The package switches off what the environment can switch off when it is first imported,
before any of these libraries is; what the user has set stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Read once by ONNX Runtime (from 1.29 on), huggingface_hub and Ray, when they are loaded."""
OPENVINO_SENDER = "openvino_telemetry"
"""What OpenVINO sends with while it is imported; it has no switch, and goes on without the package."""


def switch_off() -> None:
    """For this process and those that it starts."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def kept_out(package: str) -> Iterator[None]:
    """Have imports find no such package, unless it was imported before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(package, None)
