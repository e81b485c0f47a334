"""Draws pictures with an exported HART bundle, without torch.

>>> from hart_runtime import Pipeline
>>> Pipeline.load("engines/demo")("a red circle", seed=0)[0].save("out.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hart_runtime.common.telemetry import switch_off
from hart_runtime.common.version import __version__

switch_off()
if TYPE_CHECKING:
    from hart_runtime.common.errors import InputError, RunError
    from hart_runtime.common.settings import SamplingSettings
    from hart_runtime.runtime.call import Scale
    from hart_runtime.runtime.loop import Snapshot
    from hart_runtime.runtime.pipeline import Pipeline, Result
    from hart_runtime.runtime.reconstruction import Reconstruction

__all__ = [
    "InputError",
    "Pipeline",
    "Reconstruction",
    "Result",
    "RunError",
    "SamplingSettings",
    "Scale",
    "Snapshot",
    "__version__",
]

_PLACES = {
    "InputError": "common.errors",
    "Pipeline": "runtime.pipeline",
    "Reconstruction": "runtime.reconstruction",
    "Result": "runtime.pipeline",
    "RunError": "common.errors",
    "SamplingSettings": "common.settings",
    "Scale": "runtime.call",
    "Snapshot": "runtime.loop",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for on first use: the help of a command should not wait for it."""
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
